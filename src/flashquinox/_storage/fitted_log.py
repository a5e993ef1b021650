import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int32, Scalar, Shaped, UInt16

from .._common.arithmetic import byte_times, nearest_uint8
from .._common.number_checks import check_flag
from .._rules.rule import MomentKind
from .codec import AbstractMomentCodec, Dither, GroupConstants, Reduction
from .scales import bits_of, float_of, INFINITY


class FittedLogCodec(AbstractMomentCodec):
    r"""For averages of squares: logarithmic companding in `uint8`, fitted to the range
    of each group, rounded by the rotating threshold.

    The bits of a float32, read as an integer $b$, are a logarithm that is linear
    between powers of two: $b(v) = 2^{23} (127 + e + f)$ for $v = 2^e (1 + f)$. Codes
    are evenly spaced on it:

    $$q = \operatorname{round}\left(\frac{b(v) - b_0}{d} + u - \tfrac12\right), \qquad
    b(v) = b_0 + q \, d$$

    $b_0 \le b(\min v)$ and the step $d$ are fitted to the group such that
    $b(\max v) \le b_0 + 254.5 \, d$. The relative step between codes is then nearly the
    same for all elements: 0.05 % in a group of similar moments, at most 19 %. A group
    that spans more than 47 powers of two (more than 31 if some are zero, and at most
    13 % then) has $v$ below that stored as $b_0$. As $b$ is linear between powers of
    two, the threshold $u$ is unbiased for $v$ itself.

    One huge gradient leaves an element above $2^{32}$, beside which that could be all
    others. A group of such an element that spans more than 47 powers of two has steps
    of a factor of $2^{3/4}$, from $2^{-62}$ to infinity. Infinity itself is stored as a
    number just below it.

    One `uint16` holds both. The step is $a 2^k$ with $a$ one of 2 and 3 and $11 \le k
    \le 18$, in four bits; $b_0$ is a multiple of $2^{18} a$, in twelve. For $a = 3$,
    these count further than float32 does: the rest is for $k = 19$, with $b_0$ a
    multiple of $2^{19} a$, and for $k = 21$. $b_0$ is always a multiple of the step: as
    long as a group keeps its step, its codes keep their places, and only what moves is
    rounded again.

    With `dithered=False`, codes are rounded to nearest; with `fitted=False`, all groups
    have the largest step, and $\max v$ has one of the last codes: for measuring what
    each is worth.
    """

    dithered: bool = eqx.field(static=True, default=True)
    fitted: bool = eqx.field(static=True, default=True)

    def __check_init__(self):
        check_flag("FittedLogCodec", "dithered", self.dithered)
        check_flag("FittedLogCodec", "fitted", self.fitted)

    @property
    def kinds(self) -> tuple[MomentKind, ...]:
        return ("nonnegative",)

    @property
    def dtypes(self) -> tuple[DTypeLike, DTypeLike]:
        return jnp.uint8, jnp.uint16

    def statistics(
        self, prepared: tuple[Float[Array, "*tile"], ...]
    ) -> tuple[tuple[Reduction, Float[Array, "*tile"]], ...]:
        (moment,) = prepared
        return (jnp.max, moment), (jnp.min, moment)

    def fit(
        self,
        statistics: tuple[Float[Array, "*groups"], ...],
        factor: Scalar | None,
        dither: Dither,
    ) -> tuple[Shaped[Array, "*groups"] | None, GroupConstants]:
        if factor is not None:
            statistics = tuple(x * factor for x in statistics)
        largest, smallest = (x.astype(jnp.float32) for x in statistics)
        if not self.fitted:
            smallest = float_of(jnp.maximum(bits_of(largest) - _OF_ZEROS, 0))
        fitted = _Range.fit(smallest, largest)
        # In units of 2^-16. More than -1/2, or a rounding error before code 0 would be
        # one after it.
        threshold = (dither.code * 2**16).astype(jnp.int32)
        if not self.dithered:
            threshold = jnp.full_like(threshold, 2**15)
        offset = fitted.times_step(jnp.maximum(threshold, 1) - 2**15) - fitted.origin
        # Near infinity, codes are smaller by one at least, for none to be decoded as
        # infinity. What overflowed soon leaves this range.
        near_infinity = bits_of(largest) > INFINITY - _FACTOR_OF_TWO
        inverse_step = fitted.inverse_step * jnp.where(near_infinity, _SHRUNK, 1)
        encode_constants = (float_of(fitted.origin), offset, inverse_step)
        if factor is not None:
            encode_constants = (*encode_constants, factor)
        return fitted.word, encode_constants

    def quantize(
        self,
        prepared: tuple[Float[Array, "*tile"], ...],
        encode_constants: GroupConstants,
    ) -> Shaped[Array, "*tile"]:
        (moment,) = prepared
        floor, offset, inverse_step, *factor = encode_constants
        if factor:
            moment = moment * factor[0]
        moment = jnp.maximum(moment.astype(jnp.float32), floor)
        bits = lax.bitcast_convert_type(moment, jnp.int32)
        codes = (bits + offset).astype(jnp.float32) * inverse_step
        return nearest_uint8(codes)

    def decode_constants(
        self,
        scales: Shaped[Array, "*groups"] | None,
        factor: Scalar | None,
        dtype: DTypeLike,
    ) -> GroupConstants:
        del dtype
        assert scales is not None
        stored = _Range.of(scales)
        step = stored.step
        # As the codes are read with an offset of 128: signed bytes are cheaper to
        # widen on TPUs.
        middle = stored.origin + (step << 7)
        return (middle, step) if factor is None else (middle, step, factor)

    def dequantize(
        self,
        codes: Shaped[Array, "*tile"],
        decode_constants: GroupConstants,
        dtype: DTypeLike,
    ) -> Float[Array, "*tile"]:
        middle, step, *factor = decode_constants
        codes = lax.bitcast_convert_type(codes ^ np.uint8(128), jnp.int8)
        moment = float_of(byte_times(codes, step) + middle).astype(dtype)
        return moment * factor[0] if factor else moment


# All in units of float32's last place: 2^23 is a factor of two.
_LAST_CODE = 254.5
_FINEST, _COARSEST = 11, 19
_GRID = 18
# What the coarsest steps of two cover, and those of three; the latter less the rounding
# of the origin.
_WIDE = np.int32(_LAST_CODE * (2 << _COARSEST))
_WIDEST = np.int32(254 * (3 << _COARSEST) - (1 << 21))
# What codes cover in a group with zeros, by steps of 2^20.
_OF_ZEROS = np.int32(_WIDE - (1 << 20))
# With steps of three, indices of origins are less than this; what is above stands for
# the coarsest steps.
_INDICES = np.int32((int(INFINITY) >> _GRID) // 3 + 1)
_MORE_INDICES = np.int32((1 << 12) - _INDICES)
_FACTOR_OF_TWO = np.int32(1 << 23)
# What is huge: 2^32. The step of groups that need it for a huge element, 3 too, and
# their origin, which is 254 of them below infinity.
_HUGE, _FARTHEST = np.int32((127 + 32) << 23), 21
_LOWEST_ORIGIN = np.int32(int(INFINITY) - 254 * (3 << _FARTHEST))
# Arithmetic may flush smaller numbers to zero.
_SMALLEST_NORMAL = np.int32(1 << 23)
# What codes near infinity are multiplied by, to be smaller by one. Of an origin that is
# this far below, the code of infinity is at least the 127th, as the step is the finest.
_SHRUNK, _HIGHEST_ORIGIN = np.float32(119 / 120), np.int32(INFINITY - (1 << 21))


class _Range(eqx.Module):
    """The codes of a group: `a` is 3 or 2, as `three` tells."""

    three: Bool[Array, "*groups"]
    k: Int32[Array, "*groups"]
    # The origin in units of 2^18 a, or of 2^19 a for the coarsest steps.
    units: Int32[Array, "*groups"]

    @staticmethod
    def fit(
        smallest: Float32[Array, "*groups"], largest: Float32[Array, "*groups"]
    ) -> "_Range":
        """The finest step for which codes cover a group. NaN is kept: it is an origin
        too."""
        low, high = bits_of(smallest), bits_of(largest)
        # Zeros do not ask for the coarsest steps: no update depends on them.
        far = (high > _HUGE) & (high - low > _WIDEST)
        low = jnp.maximum(low, high - jnp.where(low > 0, _WIDEST, _OF_ZEROS))
        low = jnp.where(far, _LOWEST_ORIGIN, low)
        # The grid is less than 2^21, so that the origin is zero or a normal number.
        low = jnp.maximum(low, _SMALLEST_NORMAL + (1 << 21))
        low = jnp.where(high < 2 * _SMALLEST_NORMAL, 0, low)
        low = jnp.where(high > INFINITY, high, jnp.minimum(low, _HIGHEST_ORIGIN))
        half = low >> (_GRID + 1)
        # Exact for numbers of less than 2^15.
        third = ((low >> _GRID) * 21846) >> 16
        k2 = _finest(2, high - (half << (_GRID + 1)))
        k3 = _finest(3, high - ((3 * third) << _GRID))
        # With the same k, a step of two is the finer one.
        three, k = k3 < k2, jnp.minimum(k2, k3)
        coarsest = k >= _COARSEST
        too_wide = high - ((half >> 1) << (_GRID + 2)) > _WIDE
        # Kernels for TPUs cannot select booleans.
        three = (coarsest & too_wide) | (~coarsest & three)
        units = jnp.where(three, third, half) >> coarsest.astype(jnp.int32)
        k = jnp.where(far, _FARTHEST, jnp.minimum(k, _COARSEST))
        return _Range(three, k, units)

    @property
    def origin(self) -> Int32[Array, "*groups"]:
        multiple = 2 * self.units + jnp.where(self.three, self.units, 0)
        return multiple << jnp.where(self.k < _COARSEST, _GRID, _GRID + 1)

    @property
    def word(self) -> UInt16[Array, "*groups"]:
        """The index of the origin in twelve bits, k in three, and whether a is 3. The
        coarsest steps have 3 in the last bit, an index from `_INDICES` on, and in place
        of k whether a is 2, whether k is the farthest one, and whether `_MORE_INDICES`
        are to be added."""
        three = self.three.astype(jnp.int32)
        word = (self.units << 4) | ((self.k - _FINEST) << 1) | three
        more = (self.units >= _MORE_INDICES).astype(jnp.int32)
        index = self.units + (_INDICES - more * _MORE_INDICES)
        bits = (self.k - _COARSEST) | more
        coarsest = (index << 4) | ((1 - three) << 3) | (bits << 1) | 1
        return jnp.where(self.k < _COARSEST, word, coarsest).astype(jnp.uint16)

    @staticmethod
    def of(word: UInt16[Array, "*groups"]) -> "_Range":
        bits = word.astype(jnp.int32)
        index, k, three = bits >> 4, (bits >> 1) & 7, (bits & 1) == 1
        coarsest = three & (index >= _INDICES)
        units = index - _INDICES + (k & 1) * _MORE_INDICES
        return _Range(
            three & ~(coarsest & (k >= 4)),
            jnp.where(coarsest, _COARSEST + (k & 2), k + _FINEST),
            jnp.where(coarsest, units, index),
        )

    @property
    def step(self) -> Int32[Array, "*groups"]:
        return jnp.where(self.three, 3, 2) << self.k

    def times_step(self, x: Int32[Array, ""]) -> Int32[Array, "*groups"]:
        """`step * x / 2^16`, rounded towards zero."""
        product = jnp.where(self.three, 3 * x, 2 * x)
        more, less = jnp.maximum(self.k - 16, 0), jnp.maximum(16 - self.k, 0)
        return ((product << more) + jnp.where(x < 0, (1 << less) - 1, 0)) >> less

    @property
    def inverse_step(self) -> Float32[Array, "*groups"]:
        power = float_of((127 - self.k) << 23)
        return power * jnp.where(self.three, _THIRD, np.float32(0.5))


_THIRD = np.float32(1 / 3)


def _finest(a: int, span: Int32[Array, "*groups"]) -> Int32[Array, "*groups"]:
    """The least k for which 254.5 steps of a 2^k cover a span."""
    steps = span.astype(jnp.float32) * np.float32(1 / (_LAST_CODE * a))
    # The logarithm of a float, rounded up.
    logarithm = (lax.bitcast_convert_type(steps, jnp.int32) + ((1 << 23) - 1)) >> 23
    return jnp.maximum(logarithm - 127, _FINEST)
