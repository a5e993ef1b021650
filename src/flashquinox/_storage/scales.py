"""Scales of groups in 16 bits with the range of float32: the leading bits of a float32.

Bit patterns are `int32` here, as all backends can compare these. Scales are never
negative, so the order of the patterns is that of the numbers.
"""

import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32, Integer, Scalar, Shaped, UInt16


INFINITY = np.int32(0x7F80_0000)
# What larger moments are stored as: signed ones, and averages of squares. The second is
# the square of the first, so that a quotient of both stays of ordinary size. Times a
# decay rate's factor, they are finite.
LARGEST_SIGNED, LARGEST_SQUARE = np.float32(2.0**62), np.float32(2.0**124)
_SMALLEST_NORMAL = np.float32(2.0**-126)
_QUIET_NAN = np.int32(0x7FC0_0000)
_MAGNITUDE = np.int32(0x7FFF_FFFF)


def bits_of(x: Float32[Array, "*groups"]) -> Int32[Array, "*groups"]:
    """The bits of nonnegative numbers, with one pattern for NaN."""
    bits = lax.bitcast_convert_type(x, jnp.int32) & _MAGNITUDE
    return jnp.minimum(bits, _QUIET_NAN)


def float_of(bits: Int32[Array, "*groups"]) -> Float32[Array, "*groups"]:
    return lax.bitcast_convert_type(bits, jnp.float32)


def largest_finite(
    largest: Float[Array, "*groups"], otherwise: float
) -> Float[Array, "*groups"]:
    """The largest magnitude of a group of signed moments; `otherwise` where one of them
    is not finite. That one is stored as zero, and the others are lost for one step, but
    not for good. The weight of a gradient that is not finite shows it."""
    return jnp.where(largest < np.inf, largest, np.asarray(otherwise, largest.dtype))


def encode_scale(
    scale: Float32[Array, "*groups"],
    threshold: Shaped[Array, ""],
    mantissa_bits: int = 8,
) -> UInt16[Array, "*groups"]:
    """The eight exponent bits and the leading mantissa bits of a nonnegative float32.
    The rest is rounded by `threshold`, a 16-bit integer: up where the dropped bits plus
    the threshold overflow. NaN and infinity are kept; finite scales stay finite.
    """
    dropped = 23 - mantissa_bits
    bits = bits_of(scale)
    rounded = (bits + (threshold.astype(jnp.int32) >> (16 - dropped))) >> dropped
    largest = np.int32((int(INFINITY) >> dropped) - 1)
    rounded = jnp.where(bits < INFINITY, jnp.minimum(rounded, largest), bits >> dropped)
    return rounded.astype(jnp.uint16)


def divisor(
    scale: Float32[Array, "*groups"], factor: Scalar | None, dtype: DTypeLike
) -> Float[Array, "*groups"]:
    """What a moment is divided by to be in units of a stored scale, before it is
    multiplied by its `factor`. At least the smallest normal number, so that the
    quotients of a group of zeros are zero and its reciprocal is finite."""
    scale = jnp.maximum(scale, _SMALLEST_NORMAL).astype(dtype)
    if factor is None:
        return scale
    return jnp.maximum(scale / factor, _SMALLEST_NORMAL.astype(dtype))


def decode_scale(
    scale: Integer[Array, "*groups"], mantissa_bits: int = 8
) -> Float32[Array, "*groups"]:
    """The float32 value of a stored scale."""
    return float_of(scale.astype(jnp.int32) << (23 - mantissa_bits))
