"""Defaults that more than one file needs."""

import enum
from typing import TypeAlias

import numpy as np


Integer: TypeAlias = int | np.integer

# `optax.inject_hyperparams` turns every int, float and array argument into a traced
# array, defaults included. These two decide shapes and dtypes, so they are NumPy
# scalars, which it leaves alone.
MASTER_WEIGHT_BITS: Integer = np.uint8(24)
GROUP_SIZE: Integer = np.uint8(32)


class Unknown(enum.Enum):
    """Stands for such an argument that is a traced array all the same, as when it is
    passed through `inject_hyperparams`. What it was, the state can tell.
    """

    TRACED = "traced"
