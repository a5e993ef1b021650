"""Defaults that more than one file needs."""

import enum
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Array


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
