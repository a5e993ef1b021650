"""A float32 master weight as a narrow weight plus an integer correction.

Floats of one sign are ordered like their bit patterns, so a fraction of a unit in the
last place is a difference of integers: no exponent arithmetic, exact through subnormals
and across binades.
"""

from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import (
    Array,
    Float,
    Float32,
    Int8,
    Int16,
    Shaped,
    UInt32,
)

from .._common.arithmetic import canonical_pattern
from .._common.dtypes import compute_dtype, NARROW_DTYPES


# For each width of the master weight, the dtype that holds what the weight does not.
CORRECTION_DTYPES = {24: jnp.dtype(jnp.int8), 32: jnp.dtype(jnp.int16)}


Correction = Int8[Array, "*shape"] | Int16[Array, "*shape"]

# Patterns are uint32: the float32 bits, sign included.
_SIGN = np.uint32(0x8000_0000)
_MAGNITUDE = np.uint32(0x7FFF_FFFF)

# float16 magnitudes lie on float32's once the exponent is rebiased and the constant
# spacing below 2^-14 is stretched to that of the binade above.
_F16_SMALLEST_NORMAL = np.float32(2.0**-14)
_F16_REBIAS = np.uint32((127 - 15) << 10)
_F16_INFINITY = np.uint32(0x7C00)
_F16_QUIET_NAN = np.uint32(0x7E00)
_F32_BINADE = np.uint32(1 << 23)


class ECCWeight(eqx.Module):
    r"""A master weight stored as a narrow floating-point weight and an integer
    correction.

    The correction counts steps of $2^{-8}$ (`int8`, 24 bits in all) or $2^{-16}$
    (`int16`, 32 bits) of a unit in the last place of the weight:

    $$\text{master} = \text{weight} + \text{correction} \cdot 2^{-8}
    \operatorname{ulp}(\text{weight})$$

    On the float32 bit pattern $b$, with bfloat16 weights and 24 bits:
    $b_{24} = \lfloor (b + 128) / 2^8 \rfloor$, then the weight's bits are
    $h = \lfloor (b_{24} + 128) / 2^8 \rfloor$ and the correction is
    $b_{24} - 2^8 h \in [-128, 127]$. Decoding and then encoding is the identity.

    With bfloat16 weights and 32 bits, every finite float32 is kept bit for bit. With
    float16 weights, an `int16` correction keeps every float32 in
    $[2^{-14}, 65520)$ bit for bit, and is within $2^{-38}$ below; an `int8` correction
    is within half of $2^{-8}$ of a float16 unit in the last place, and within
    $2^{-33} + 2^{-38}$ below $2^{-14}$. Magnitudes that round to 65520 or more are
    infinite in float16 and stay infinite; likewise, with bfloat16 weights and 24 bits,
    the 128 largest float32 magnitudes.

    NaN, $\pm\infty$ and $\pm 0$ are kept.

    ??? cite "Reference"

        The idea of a correction in units of the weight's rounding interval: Gonzalez
        Ortiz, Gupta, Rinard and Blalock, *FlashOptim: Optimizers for Memory Efficient
        Training*, [arXiv:2602.23349](https://arxiv.org/abs/2602.23349), Section 3.1.
        The integer form is this library's.
    """

    weight: Float[Array, "*shape"]
    correction: Correction | None

    @staticmethod
    def encode(
        master: Float32[Array, "*shape"], dtype: DTypeLike, bits: int | None
    ) -> "ECCWeight":
        """Splits a float32 array.

        **Arguments:**

        - `master`: the float32 weights, of any shape.
        - `dtype`: of the narrow weight: `bfloat16` or `float16`.
        - `bits`: 24, 32, or `None` for no correction (a plain rounding).

        **Returns:**

        The weight in `dtype`, and an `int8`, an `int16` or no correction of the same
        shape.

        **Raises:**

        `ValueError` for other dtypes or widths.
        """
        if master.dtype != jnp.float32 or jnp.dtype(dtype) not in NARROW_DTYPES:
            raise ValueError(
                "`ECCWeight.encode(master, dtype, bits)` splits float32 into bfloat16 "
                f"or float16; got {master.dtype} and {jnp.dtype(dtype)}."
            )
        if bits is not None and bits not in CORRECTION_DTYPES:
            raise ValueError(
                f"`ECCWeight.encode(..., bits)` must be 24, 32 or None; got {bits!r}."
            )
        correction_dtype = None if bits is None else CORRECTION_DTYPES[bits]
        weight, correction = encode_weight(master, jnp.dtype(dtype), correction_dtype)
        return ECCWeight(weight, correction)

    def decode(self) -> Float32[Array, "*shape"]:
        """The float32 master weight."""
        return decode_stored(self.weight, self.correction)


def decode_weight(
    weight: Float[Array, "*shape"], correction: Correction | None = None
) -> Float[Array, "*shape"]:
    """The master weight, in float32 (float64 for a float64 weight).

    A correction that does not belong to the weight, such as a negative one beside a
    weight that was set to zero, gives a neighbour of the weight, never NaN.
    """
    wide = weight.astype(compute_dtype(weight.dtype))
    if correction is None:
        return wide
    shift = _unstored_bits(weight.dtype, correction.dtype)
    steps = (correction.astype(jnp.int32) << shift).astype(jnp.uint32)
    if weight.dtype == jnp.bfloat16:
        master = _from_pattern(_pattern(wide) + steps)
    else:
        magnitude = _from_float16_pattern(_float16_pattern(wide) + steps)
        master = jnp.where(jnp.isinf(wide), wide, jnp.copysign(magnitude, wide))
    # The sum is a NaN pattern in just those cases where it left the weight's sign or
    # passed its infinity (and for NaN weights).
    return jnp.where(jnp.isnan(master), wide, master)


# Outside of `jit`: one program for a shape and a dtype, in place of ten.
decode_stored = jax.jit(decode_weight)


def encode_weight(
    master: Float[Array, "*shape"],
    dtype: DTypeLike,
    correction_dtype: DTypeLike | None,
    threshold: Shaped[Array, ""] | None = None,
) -> tuple[Float[Array, "*shape"], Correction | None]:
    """The weight and the correction that together are nearest to `master`. With a
    threshold of 16 bits, a narrow weight, or a weight and its correction together, is
    rounded by that: away from zero where its sum with the bits that are cut
    overflows."""
    if correction_dtype is None:
        if threshold is None or jnp.dtype(dtype) not in NARROW_DTYPES:
            return master.astype(dtype), None
        dropped = _dropped_bits(dtype)
        pattern = _aligned_pattern(master, dtype)
        high = (pattern + _rounding(dropped, threshold)) >> dropped
        return _from_high_bits(high, master, dtype), None
    pattern = _aligned_pattern(master, dtype)
    stored_bits = correction_bits(dtype, correction_dtype)
    unstored_bits = _unstored_bits(dtype, correction_dtype)
    # Both roundings at once: floor((floor(x / a) + b) / c) is floor((x + a b) / (a c)).
    # With c = 2 b, what is left of it is the last digit in base c, less b.
    half = 1 << (stored_bits - 1)
    shifted = pattern + (
        np.uint32(half << unstored_bits) + _rounding(unstored_bits, threshold)
    )
    high = shifted >> (stored_bits + unstored_bits)
    digit = (shifted >> unstored_bits) & np.uint32(2 * half - 1)
    low = digit.astype(jnp.int32) - half
    if dtype == jnp.float16:
        low = jnp.where(high - _F16_REBIAS < _F16_INFINITY, low, 0)
    return _from_high_bits(high, master, dtype), low.astype(correction_dtype)


def _from_high_bits(
    high: UInt32[Array, "*shape"], master: Float32[Array, "*shape"], dtype: DTypeLike
) -> Float[Array, "*shape"]:
    """The narrow weight with these top bits of an aligned pattern."""
    weight = high
    if dtype == jnp.float16:
        # The sign travels separately and large magnitudes saturate.
        weight = jnp.where(
            jnp.isnan(master),
            _F16_QUIET_NAN,
            jnp.minimum(high - _F16_REBIAS, _F16_INFINITY),
        )
        weight = weight | ((_pattern(master) & _SIGN) >> 16)
    return lax.bitcast_convert_type(weight.astype(jnp.uint16), dtype)


def _rounding(bits: int, threshold: Shaped[Array, ""] | None) -> Any:
    """What is added before so many bits are cut: half of their unit, or a threshold of
    16 bits in place of the half."""
    if threshold is None or bits == 0:
        return np.uint32((1 << bits) >> 1)
    return threshold.astype(jnp.uint32) >> (16 - bits)


def encode_correction(
    master: Float[Array, "*shape"],
    weight: Float[Array, "*shape"],
    correction_dtype: DTypeLike | None,
    threshold: Shaped[Array, ""] | None = None,
) -> Correction | None:
    """The correction that brings a *given* weight nearest to `master`: at most half a
    unit in the last place of the weight either way. With a threshold, rounded by that,
    as by [`encode_weight`][].

    [`flashquinox.ECCWeight.encode`][] chooses the weight too. This is for a weight that
    was decided elsewhere, such as the rounded sum of an old weight and an Optax update.
    """
    if correction_dtype is None:
        return None
    dtype = weight.dtype
    shift = _unstored_bits(dtype, correction_dtype)
    wide = weight.astype(jnp.float32)
    magnitude = _aligned_pattern(master, dtype) & _MAGNITUDE
    target = (magnitude + _rounding(shift, threshold)) >> shift
    origin = (_aligned_pattern(wide, dtype) & _MAGNITUDE) >> shift
    most = (1 << (correction_bits(dtype, correction_dtype) - 1)) - 1
    low = jnp.clip(target.astype(jnp.int32) - origin.astype(jnp.int32), -most - 1, most)
    low = jnp.where(jnp.signbit(master) == jnp.signbit(wide), low, -most - 1)
    low = jnp.where(jnp.isnan(master), 0, low)
    return low.astype(correction_dtype)


def change_width(
    weight: Float[Array, "*shape"], correction: Correction, dtype: DTypeLike
) -> Correction:
    """The correction of the same master weight in another dtype: exactly in a wider
    one, as near as the weight allows in a narrower one."""
    if jnp.dtype(dtype).itemsize < correction.dtype.itemsize:
        master = decode_weight(weight, correction)
        narrow = encode_correction(master, weight, dtype)
        assert narrow is not None
        return narrow
    old, new = (_unstored_bits(weight.dtype, x) for x in (correction.dtype, dtype))
    return correction.astype(dtype) << (old - new)


def master_digits(dtype: DTypeLike, correction_dtype: DTypeLike | None) -> int:
    """How many significant bits a master weight has."""
    digits = int(jnp.finfo(dtype).nmant) + 1
    if correction_dtype is None:
        return digits
    return digits + correction_bits(dtype, correction_dtype)


def _dropped_bits(dtype: DTypeLike) -> int:
    """How many of float32's mantissa bits a weight of this dtype lacks."""
    return 23 - jnp.finfo(dtype).nmant


def correction_bits(dtype: DTypeLike, correction_dtype: DTypeLike) -> int:
    return min(jnp.iinfo(correction_dtype).bits, _dropped_bits(dtype))


def _unstored_bits(dtype: DTypeLike, correction_dtype: DTypeLike) -> int:
    return _dropped_bits(dtype) - correction_bits(dtype, correction_dtype)


def _pattern(x: Float32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    return lax.bitcast_convert_type(x, jnp.uint32)


def _from_pattern(x: UInt32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    return lax.bitcast_convert_type(x, jnp.float32)


def _aligned_pattern(
    master: Float32[Array, "*shape"], dtype: DTypeLike
) -> UInt32[Array, "*shape"]:
    """The pattern whose top bits are the weight's: with the sign for bfloat16, the
    magnitude alone for float16."""
    if dtype == jnp.bfloat16:
        # Rounding up the largest NaN payload would overflow into -0.
        return canonical_pattern(master)
    return _float16_pattern(master)


def _float16_pattern(x: Float32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    magnitude = jnp.abs(x)
    shifted = _pattern(magnitude + _F16_SMALLEST_NORMAL) - _F32_BINADE
    return jnp.where(magnitude < _F16_SMALLEST_NORMAL, shifted, _pattern(magnitude))


def _from_float16_pattern(x: UInt32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    small = _from_pattern(x + _F32_BINADE) - _F16_SMALLEST_NORMAL
    magnitude = _from_pattern(x)
    return jnp.where(magnitude < _F16_SMALLEST_NORMAL, jnp.maximum(small, 0), magnitude)
