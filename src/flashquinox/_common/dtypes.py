"""The dtypes of weights, and the dtypes that they are updated in."""

import functools

import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int16, Shaped


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


# Integers that stand for the bfloat16 numbers of their bits: in the place of gradients
# that were summed in integers, in the memory of the sums. XLA would copy what it takes
# as numbers of another dtype.
BITS_DTYPE = jnp.dtype(jnp.int16)


def bits_of_bfloat16(x: Float[Array, "*shape"]) -> Int16[Array, "*shape"]:
    """The bits of the nearest bfloat16 numbers, of those that are in between of the
    even ones."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    rounded = (bits + (np.int32(0x7FFF) + ((bits >> 16) & 1))) >> 16
    return jnp.where(x == x, rounded, np.int32(0x7FC0)).astype(BITS_DTYPE)


def numbers_of(grad: Shaped[Array, "*shape"]) -> Float[Array, "*shape"]:
    """A gradient as numbers, in float32 where it was bits."""
    if grad.dtype != BITS_DTYPE:
        return grad
    return lax.bitcast_convert_type(grad.astype(jnp.int32) << 16, jnp.float32)
