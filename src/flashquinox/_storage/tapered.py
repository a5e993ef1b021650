import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32, Scalar, Shaped

from .._rules.rule import MomentKind
from .codec import AbstractMomentCodec, Dither, GroupConstants, Reduction
from .scales import bits_of, float_of


class TaperedCodec(AbstractMomentCodec):
    r"""Codes of 16 bits whose precision tapers off from the largest element of a group
    to the smallest. It stores the sums of [`flashquinox.accumulate`][] with `bits=16`,
    in 2.0625 bytes per parameter, and any first moment for which 8 bits are too few:
    that of [`flashquinox.muon`][], say.

    With $2^e$ the power of two above the largest magnitude of the group, a number is
    kept in

    | magnitude | significant bits |
    | --- | ---: |
    | $2^{e-2}$ to $2^e$ | 13 |
    | $2^{e-6}$ to $2^{e-2}$ | 12 |
    | $2^{e-14}$ to $2^{e-6}$ | 11 |
    | $2^{e-29}$ to $2^{e-14}$ | 10 |
    | below | multiples of $2^{e-38}$ |

    where bfloat16 has 8. That are the floating-point numbers of 13 bits in
    $2 + e - \log_2 |x|$, with the logarithm between powers of two drawn as a straight
    line: so codes are made by operations on the bits of float32 alone, and those
    between two powers of two are evenly spaced.

    Rounding is by the rotating threshold, so it is unbiased over time; a number that
    has a code stays what it is. A scale is $e$, in an `int16`. When the largest element
    grows by a power of two, others lose at most one bit.

    What is not finite is decoded as NaN, and changes no other element.

    ??? cite "Reference"

        Morris, *Tapered Floating Point: A New Floating-Point Representation*,
        IEEE Transactions on Computers C-20, 1971, has the idea. The form is this
        library's.
    """

    @property
    def kinds(self) -> tuple[MomentKind, ...]:
        return ("signed",)

    @property
    def dtypes(self) -> tuple[DTypeLike, DTypeLike]:
        return jnp.int16, jnp.int16

    def statistics(
        self, prepared: tuple[Float[Array, "*tile"], ...]
    ) -> tuple[tuple[Reduction, Float[Array, "*tile"]], ...]:
        magnitude = jnp.abs(prepared[0])
        # An element of a group must not spoil the others.
        return ((jnp.max, jnp.where(magnitude <= _LARGEST, magnitude, 0)),)

    def fit(
        self,
        statistics: tuple[Float[Array, "*groups"], ...],
        factor: Scalar | None,
        dither: Dither,
    ) -> tuple[Shaped[Array, "*groups"] | None, GroupConstants]:
        (largest,) = statistics
        if factor is not None:
            largest = largest * factor
        # Whatever would be rounded to 2^e, which has no code, belongs above it. Of the
        # largest numbers, it would be infinity.
        bits = bits_of(largest.astype(jnp.float32)) + (_FIRST_STEP - 1)
        exponent = jnp.minimum(bits >> 23, _LARGEST_EXPONENT)
        power = _OF_LAST_STEP - exponent
        threshold = dither.scale.astype(jnp.int32)
        constants = (
            (exponent + 1) << 23,
            *_halves(power),
            threshold >> (16 - _DROPPED),
            # So that float32 has its sum with a number of steps.
            (threshold >> 2).astype(jnp.float32) * np.float32(2**-14),
        )
        constants = constants if factor is None else (*constants, factor)
        return exponent.astype(jnp.int16), constants

    def quantize(
        self,
        prepared: tuple[Float[Array, "*tile"], ...],
        encode_constants: GroupConstants,
    ) -> Shaped[Array, "*tile"]:
        (moment,) = prepared
        top, first, second, threshold, fraction, *factor = encode_constants
        moment = moment * factor[0] if factor else moment
        moment = moment.astype(jnp.float32)
        # In units of the last place: 2^23 is a factor of two.
        below = top - bits_of(moment)
        distance = jnp.minimum(below, _FARTHEST) + _ORIGIN
        bits = lax.bitcast_convert_type(distance.astype(jnp.float32), jnp.int32)
        # Of the largest numbers alone, it would be that of 2^e.
        place = jnp.maximum((bits - _ORIGIN_BITS + threshold) >> _DROPPED, 1)
        steps = jnp.abs(moment) * first * second + fraction
        # Floors of what is not in the linear part may be of any size.
        steps = jnp.minimum(steps, float(_LINEAR)).astype(jnp.int32)
        codes = jnp.where(below > _FARTHEST, steps, _ABOVE - place)
        # Comparisons may take subnormal numbers for 0.
        is_negative = lax.bitcast_convert_type(moment, jnp.int32) < 0
        codes = jnp.where(is_negative, -codes, codes)
        is_finite = jnp.abs(moment) <= _LARGEST
        return jnp.where(is_finite, codes, -_ABOVE).astype(jnp.int16)

    def decode_constants(
        self,
        scales: Shaped[Array, "*groups"] | None,
        factor: Scalar | None,
        dtype: DTypeLike,
    ) -> GroupConstants:
        assert scales is not None
        del dtype
        exponent = scales.astype(jnp.int32)
        constants = (exponent + 1) << 23, *_halves(exponent - _OF_LAST_STEP)
        return constants if factor is None else (*constants, factor)

    def dequantize(
        self,
        codes: Shaped[Array, "*tile"],
        decode_constants: GroupConstants,
        dtype: DTypeLike,
    ) -> Float[Array, "*tile"]:
        top, first, second, *factor = decode_constants
        codes = codes.astype(jnp.int32)
        size = jnp.abs(codes)
        bits = ((_ABOVE - size) << _DROPPED) + _ORIGIN_BITS
        distance = float_of(bits).astype(jnp.int32) - _ORIGIN
        magnitude = float_of(jnp.maximum(top - distance, 0))
        steps = size.astype(jnp.float32) * first * second
        magnitude = jnp.where(size > _LINEAR, magnitude, steps)
        magnitude = jnp.where(size == _ABOVE, np.float32(np.nan), magnitude)
        moment = jnp.where(codes < 0, -magnitude, magnitude).astype(dtype)
        return moment * factor[0] if factor else moment


_LARGEST = float(jnp.finfo(jnp.float32).max)
_LARGEST_EXPONENT = np.int32(254)
# The code of 2^e, if there was one; its negative stands for what is not finite.
_ABOVE = np.int32(1 << 15)
# Distances from 2^e count from 2, as integers; of their bits as float32, so many are
# dropped.
_ORIGIN = np.int32(2 << 23)
_ORIGIN_BITS = np.int32(np.float32(2 << 23).view(np.int32))
_DROPPED = 10
# From 2^e to the next code, in units of the last place.
_FIRST_STEP = np.int32(1 << 11)
# From this distance on, codes are evenly spaced: as closely as just above it.
_FARTHEST = np.int32(29 << 23)
_LINEAR = np.int32(512)
# With `exponent` the biased one of numbers just below 2^e: the last step is
# 2^(exponent - 164).
_OF_LAST_STEP = np.int32(126 + 38)


def _halves(
    power: Int32[Array, "*groups"],
) -> tuple[Float32[Array, "*groups"], Float32[Array, "*groups"]]:
    """Two powers of two whose product is 2^power. One alone would not be finite."""
    half = power >> 1
    return float_of((half + 127) << 23), float_of((power - half + 127) << 23)
