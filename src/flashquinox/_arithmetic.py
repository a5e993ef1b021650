"""Arithmetic that backends may replace by what their device has instructions for."""

import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, Shaped, UInt32


_QUIET_NAN = np.uint32(0x7FC0_0000)


def _byte_times(
    byte: Shaped[Array, "*#shape"], factor: Int32[Array, "*#shape"]
) -> Int32[Array, "*shape"]:
    """`byte * factor`, of 8-bit integers and factors with at most 16 significant bits.
    Their product is exact in float32 too, for devices that cannot multiply integers."""
    return byte.astype(jnp.int32) * factor


def _canonical_pattern(x: Float32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """The bits of a float32, with one pattern for NaN."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(jnp.isnan(x), _QUIET_NAN, bits)


byte_times = jax.jit(_byte_times)
canonical_pattern = jax.jit(_canonical_pattern)
# By which they are known in what was traced.
BYTE_TIMES = _byte_times.__name__
CANONICAL_PATTERN = _canonical_pattern.__name__
