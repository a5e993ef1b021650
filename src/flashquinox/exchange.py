"""Exchange with other libraries: safetensors files, the states of Optax's optimizers,
and checkpoints of PyTorch's FlashOptim."""

from ._common.short_types import show_short_types as _show_short_types
from ._exchange.files import (
    load_safetensors as load_safetensors,
    save_safetensors as save_safetensors,
)
from ._exchange.of_flashoptim import from_flashoptim as from_flashoptim
from ._exchange.of_optax import from_optax as from_optax, to_optax as to_optax


_show_short_types(vars().values())
