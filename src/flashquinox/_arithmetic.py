"""Arithmetic that backends may replace by what their device has instructions for."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, Shaped


def _byte_times(
    byte: Shaped[Array, "*#shape"], factor: Int32[Array, "*#shape"]
) -> Int32[Array, "*shape"]:
    """`byte * factor`, of 8-bit integers and factors with at most 16 significant bits.
    Their product is exact in float32 too, for devices that cannot multiply integers."""
    return byte.astype(jnp.int32) * factor


byte_times = jax.jit(_byte_times)
# By which it is known in what was traced.
BYTE_TIMES = _byte_times.__name__
