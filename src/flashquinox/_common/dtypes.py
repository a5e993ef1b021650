"""The dtypes of weights, and the dtypes that they are updated in."""

import jax.numpy as jnp
from jax.typing import DTypeLike


# Weights that a correction can extend.
NARROW_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))


def compute_dtype(dtype: DTypeLike) -> DTypeLike:
    """The dtype in which a weight of this dtype is updated: float32, or float64."""
    return jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32
