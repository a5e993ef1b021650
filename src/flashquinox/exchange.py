"""Models and states from other libraries, and for them: safetensors files, the states
of Optax's optimizers, and checkpoints of FlashOptim."""

from ._exchange.files import (
    load_safetensors as load_safetensors,
    save_safetensors as save_safetensors,
)
from ._exchange.of_flashoptim import from_flashoptim as from_flashoptim
from ._exchange.of_optax import from_optax as from_optax, to_optax as to_optax
