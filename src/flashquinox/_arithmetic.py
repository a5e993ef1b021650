"""Arithmetic that backends may replace by what their device has instructions for."""

import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, Shaped, UInt32


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


def _rounded_quotient(
    x: Float[Array, "*#shape"], y: Float[Array, "*#shape"]
) -> Float[Array, "*shape"]:
    """`x / y` rounded to nearest, as everywhere. Other quotients may be approximations:
    of simple fractions too, which codes are often halfway between."""
    return x / y


def _rounded_root(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`sqrt(x)` rounded to nearest."""
    return jnp.sqrt(x)


byte_times = jax.jit(_byte_times)
canonical_pattern = jax.jit(_canonical_pattern)
rounded_quotient = jax.jit(_rounded_quotient)
rounded_root = jax.jit(_rounded_root)
# By which they are known in what was traced.
BYTE_TIMES = _byte_times.__name__
CANONICAL_PATTERN = _canonical_pattern.__name__
ROUNDED_QUOTIENT = _rounded_quotient.__name__
ROUNDED_ROOT = _rounded_root.__name__
