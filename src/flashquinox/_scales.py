"""Scales of groups in 16 bits with float32's exponent range: bits of float32s, cut."""

import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, UInt16, UInt32


_INFINITY = np.uint32(0x7F80_0000)
_QUIET_NAN = np.uint32(0x7FC0_0000)


def encode_scale(
    scale: Float32[Array, "*tile"], threshold: UInt32[Array, ""], mantissa_bits: int = 8
) -> UInt16[Array, "*tile"]:
    """The eight exponent and the leading mantissa bits of a nonnegative float32,
    rounded up where the sum of the cut bits and the 16-bit threshold overflows. NaN and
    infinity are kept; finite scales stay finite.
    """
    dropped = 23 - mantissa_bits
    bits = _bits(scale)
    rounded = (bits + (threshold >> (16 - dropped))) >> dropped
    largest = np.uint32((int(_INFINITY) >> dropped) - 1)
    rounded = jnp.where(bits < _INFINITY, jnp.minimum(rounded, largest), rounded)
    return rounded.astype(jnp.uint16)


def decode_scale(
    scale: UInt16[Array, "*tile"], mantissa_bits: int = 8
) -> Float32[Array, "*tile"]:
    """The float32 value of a stored scale."""
    bits = scale.astype(jnp.uint32) << (23 - mantissa_bits)
    return _float(bits)


# Of a group's largest root, three mantissa bits are kept: 11 bits in all. The other 5
# bits index the shifts: floats with two mantissa bits, from 16 to 3584.
LARGEST_CODE = 254.5
_ROOT_DROPPED_BITS = 20
_SHIFT_BITS = 5
_SHIFT_DROPPED_BITS = 21
_SMALLEST_SHIFT = np.uint32(0x4180_0000 >> _SHIFT_DROPPED_BITS)
_LAST_SHIFT = np.uint32((1 << _SHIFT_BITS) - 1)
# The square root of the smallest subnormal float32 is 4e-23.
NEGLIGIBLE_ROOT = np.float32(1e-30)


def encode_range(
    smallest: Float32[Array, "*tile"], largest: Float32[Array, "*tile"]
) -> UInt16[Array, "*tile"]:
    """The scale and the shift for a group whose square roots lie in this range: the
    least scale and the largest shift that cover it. NaN and infinity are kept in the
    scale.
    """
    round_up = np.uint32((1 << _ROOT_DROPPED_BITS) - 1)
    scale_bits = (_bits(largest) + round_up) >> _ROOT_DROPPED_BITS
    scale = _float(scale_bits << _ROOT_DROPPED_BITS)
    # t / (N + t) = sqrt(smallest / scale)
    ratio = jnp.sqrt(smallest / jnp.maximum(scale, NEGLIGIBLE_ROOT))
    shift = LARGEST_CODE * ratio / jnp.maximum(1 - ratio, np.float32(1e-6))
    index = jnp.maximum(_bits(shift) >> _SHIFT_DROPPED_BITS, _SMALLEST_SHIFT)
    index = jnp.minimum(index - _SMALLEST_SHIFT, _LAST_SHIFT)
    return ((scale_bits << _SHIFT_BITS) | index).astype(jnp.uint16)


def decode_range(
    scale: UInt16[Array, "*tile"],
) -> tuple[Float32[Array, "*tile"], Float32[Array, "*tile"]]:
    """The scale and the shift of a group."""
    word = scale.astype(jnp.uint32)
    shift = (word & _LAST_SHIFT) + _SMALLEST_SHIFT
    return (
        _float((word >> _SHIFT_BITS) << _ROOT_DROPPED_BITS),
        _float(shift << _SHIFT_DROPPED_BITS),
    )


def _bits(x: Float32[Array, "*tile"]) -> UInt32[Array, "*tile"]:
    """The bits of nonnegative numbers, with one pattern for NaN."""
    return jnp.minimum(lax.bitcast_convert_type(x, jnp.uint32), _QUIET_NAN)


def _float(bits: UInt32[Array, "*tile"]) -> Float32[Array, "*tile"]:
    return lax.bitcast_convert_type(bits, jnp.float32)
