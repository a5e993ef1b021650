"""Defaults of how weights and moments are stored."""

import enum
from typing import Any, Literal, TypeAlias

import jax
import jax.core
import numpy as np
from jaxtyping import Array

from .._common.text import shown


Integer: TypeAlias = int | np.integer


# As the argument `master_weight_bits`.
Bits: TypeAlias = Integer | Array | Literal["auto"] | None


# `optax.inject_hyperparams` turns every int, float and array argument into a traced
# array, defaults included. These two decide shapes and dtypes, so they are a string and
# a NumPy scalar, which it leaves alone.
MASTER_WEIGHT_BITS: Literal["auto"] = "auto"


GROUP_SIZE: Integer = np.uint8(32)


# What `master_weight_bits="auto"` is for weights that a correction can extend.
AUTO_BITS = 24


class Unknown(enum.Enum):
    """Stands for such an argument that is a traced array all the same, as when it is
    passed through `inject_hyperparams`. What it was, the state can tell.
    """

    TRACED = "traced"


# `master_weight_bits` as the engine has it.
StaticBits: TypeAlias = int | Literal["auto"] | Unknown | None


def check_group_size(call: str, value: Any) -> int | Unknown:
    """The argument of this name as a Python number, if it is known."""
    size = _known_integer(value)
    if size is Unknown.TRACED or (isinstance(size, int) and size in range(16, 129, 16)):
        return size
    raise ValueError(
        f"`{call}(group_size=...)` must be a multiple of 16 from 16 to 128, as an "
        f"integer; got {shown(value)}."
    )


def _known_integer(value: Any) -> Any:
    """An integer as a Python number. A float is none, but for a JAX array, in which
    `optax.inject_hyperparams` keeps every number."""
    if isinstance(value, jax.core.Tracer):
        return Unknown.TRACED
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, jax.Array | np.ndarray) and value.ndim == 0:
        number = value.item()
        return int(number) if number in range(256) else number
    return value
