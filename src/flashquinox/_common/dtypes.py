"""The dtypes of weights, and the dtypes that they are updated in."""

import functools

import jax.numpy as jnp
from jax.typing import DTypeLike


# Weights that a correction can extend.
NARROW_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))


# A step asks for it at each leaf.
@functools.cache
def compute_dtype(dtype: DTypeLike) -> DTypeLike:
    """The dtype in which a weight of this dtype is updated: float32, or float64."""
    return jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32


def largest_gradient(dtype: DTypeLike) -> float:
    """What a gradient of a weight of this dtype may be for a rule to take its square:
    2^62, or 2^510 for float64. So sums of three of them have finite squares too."""
    return 2.0 ** (int(jnp.finfo(compute_dtype(dtype)).maxexp) // 2 - 2)
