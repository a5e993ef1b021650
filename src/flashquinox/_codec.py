"""How a moment of an optimizer is stored in 8 bits.

A codec turns float32 into codes and scales and back, for one tile. The elements of a
group share a scale; *companding* spends the 256 codes where they matter. Two facts of
training loops, where a moment is decoded, moved by a fraction of a percent and encoded
again thousands of times, decide the rest:

- Rounding to nearest stalls: with b2 = 0.999 a second moment moves by less than one
    code a step. So second moments (and scales) are rounded by a threshold that rotates
    through [0, 1) from step to step: unbiased over time, without random numbers.
- A second moment that is rounded to zero beside a first moment that is not makes the
    next update explode. So no code of a nonzero group stands for zero.
"""

import abc
import math

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import (
    Array,
    Float,
    Float16,
    Float32,
    Int8,
    Scalar,
    Shaped,
    UInt8,
    UInt16,
    UInt32,
)

from ._layout import choose_layout, Layout
from ._rule import MomentKind


class Dither(eqx.Module):
    """The rounding thresholds of one leaf in one step.

    `code` in [0, 1) is added before rounding down; `scale`, an integer of 16 bits, is
    added to the bits of a scale before they are cut. Both are Weyl sequences in the
    number of the step: they visit every subinterval of [0, 1) equally often.
    """

    code: Scalar
    scale: Scalar

    @staticmethod
    def at(count: Scalar, leaf: int) -> "Dither":
        """The thresholds of step `count` for the leaf with this index. A deterministic
        function of both, so that a resumed run continues bit for bit.
        """
        turn = count.astype(jnp.uint32)
        # Multiples of the golden ratio; of the plastic number's reciprocals for the
        # second sequence and for the leaves' offsets.
        code = turn * np.uint32(0x9E3779B9) + np.uint32(leaf * 0x91E10DA5 % 2**32)
        scale = turn * np.uint32(0xC13FA9A9) + np.uint32(leaf * 0x9E3779B9 % 2**32)
        return Dither((code >> 8).astype(jnp.float32) * np.float32(2**-24), scale >> 16)


class AbstractMomentCodec(eqx.Module):
    """Moments to bytes and back, one tile at a time."""

    @property
    @abc.abstractmethod
    def flattened(self) -> bool:
        """Whether groups run through the flattened leaf instead of along one axis."""

    @abc.abstractmethod
    def init(self, layout: Layout, dtype: DTypeLike) -> "StoredMoment":
        """A stored moment of zeros, for a leaf that computes in `dtype`."""

    @abc.abstractmethod
    def encode(
        self, moment: Float[Array, "*tile"], axis: int, dither: Dither
    ) -> tuple[Shaped[Array, "*tile"], Shaped[Array, "*#tile"] | None]:
        """The codes and the scales of a tile whose groups run along `axis`."""

    @abc.abstractmethod
    def decode(
        self,
        codes: Shaped[Array, "*tile"],
        scales: Shaped[Array, "*#tile"] | None,
        dtype: DTypeLike,
    ) -> Float[Array, "*tile"]:
        """The moments of a tile, in the floating-point `dtype`."""


class SoftsignCodec(AbstractMomentCodec):
    r"""For signed moments: softsign companding in `int8`, rounded to nearest.

    $$q = 127 \cdot \frac{2 n}{1 + |n|}, \qquad n = \frac{m}{s} = \frac{q}{254 - |q|},
    \qquad s = \max |m|$$

    A scale $s$ is kept as a float32's eight exponent bits and its `scale_mantissa_bits`
    leading mantissa bits in a `uint16` (it has no sign). 8, the default, is the range
    of a bfloat16 with one more bit of precision; 7 is bfloat16 itself. Scales are
    rounded by the rotating threshold, or they would stall where a moment decays slowly;
    codes are not, or a small moment would be left beside a second moment that is
    smaller still.

    ??? cite "Reference"

        FlashOptim, [arXiv:2602.23349](https://arxiv.org/abs/2602.23349), Section 3.2.
    """

    dithered: bool = eqx.field(static=True, default=False)
    scale_mantissa_bits: int = eqx.field(static=True, default=8)

    @property
    def flattened(self) -> bool:
        return False

    def init(self, layout: Layout, dtype: DTypeLike) -> "StoredMoment":
        del dtype
        return _zeros(self, layout, jnp.int8, jnp.uint16)

    def encode(
        self, moment: Float[Array, "*tile"], axis: int, dither: Dither
    ) -> tuple[Shaped[Array, "*tile"], Shaped[Array, "*#tile"] | None]:
        magnitude = jnp.abs(moment)
        largest = jnp.max(magnitude, axis=axis, keepdims=True).astype(jnp.float32)
        scales = encode_scale(largest, dither.scale, self.scale_mantissa_bits)
        rounded = decode_scale(scales, self.scale_mantissa_bits)
        # Keeps the quotients of a group of zeros at zero.
        positive = jnp.maximum(rounded, _SMALLEST_NORMAL).astype(moment.dtype)
        # A scale that was rounded down lets this reach 127.25 at most.
        codes = 254 * moment / (positive + magnitude)
        if self.dithered:
            codes = jnp.floor(codes + dither.code.astype(moment.dtype))
        else:
            codes = jnp.round(codes)
        return codes.astype(jnp.int8), scales

    def decode(
        self,
        codes: Shaped[Array, "*tile"],
        scales: Shaped[Array, "*#tile"] | None,
        dtype: DTypeLike,
    ) -> Float[Array, "*tile"]:
        assert scales is not None
        codes = codes.astype(dtype)
        scales = decode_scale(scales, self.scale_mantissa_bits).astype(dtype)
        return codes * scales / (254 - jnp.abs(codes))


class FourthRootCodec(AbstractMomentCodec):
    r"""For averages of squares: fourth-root companding in `uint8`, fitted to the range
    of each group, rounded by the rotating threshold.

    $$\sqrt{v} = s \left( \frac{q + t}{N + t} \right)^2, \qquad
    s = \max \sqrt{v}, \qquad N = 254.5$$

    The shift $t$ fits the curve to the range of the group: code 0 stands for
    $s \, (t / (N + t))^2$, at most the smallest $\sqrt{v}$ of the group. The relative
    step between neighboring codes is $2 / (q + t)$. A group of similar moments has a
    large $t$ and steps of down to 0.05 %. A group that spans many orders of magnitude
    has $t = 16$, the least there is, and code 0 stands for $0.0035 s$: where $\sqrt{v}$
    is smaller than that, the first moment is below its own first code, and an update
    divides the one by the other.

    One `uint16` holds both: $s$ with eight exponent bits, rounded *up* to three mantissa
    bits (codes make up for what it exceeds the maximum by), and $t$ rounded *down* to one
    of 32 values, about $16 \cdot 2^{i/4}$. That is the size and the exponent range of a
    bfloat16.

    With `dithered=False`, codes are rounded to nearest; with `fitted=False`, $t = 16$
    everywhere: for measuring what each is worth.
    """

    dithered: bool = eqx.field(static=True, default=True)
    fitted: bool = eqx.field(static=True, default=True)

    @property
    def flattened(self) -> bool:
        return False

    def init(self, layout: Layout, dtype: DTypeLike) -> "StoredMoment":
        del dtype
        return _zeros(self, layout, jnp.uint8, jnp.uint16)

    def encode(
        self, moment: Float[Array, "*tile"], axis: int, dither: Dither
    ) -> tuple[Shaped[Array, "*tile"], Shaped[Array, "*#tile"] | None]:
        root = jnp.sqrt(moment)
        largest = jnp.max(root, axis=axis, keepdims=True).astype(jnp.float32)
        smallest = jnp.min(root, axis=axis, keepdims=True).astype(jnp.float32)
        if not self.fitted:
            smallest = jnp.zeros_like(smallest)
        scales = encode_range(smallest, largest)
        scale, shift = decode_range(scales)
        factor = (_LARGEST_CODE + shift) ** 2 / jnp.maximum(scale, _NEGLIGIBLE_ROOT)
        factor, shift = factor.astype(moment.dtype), shift.astype(moment.dtype)
        # Rounding q by a threshold raises the mean of (q + t)^4 by 6 (q + t)^2 times the
        # variance, which averages to somewhat less than 1/12.
        square = jnp.maximum(root * factor - 0.25, shift * shift)
        codes = jnp.sqrt(square) - shift
        threshold = dither.code if self.dithered else jnp.asarray(0.5, jnp.float32)
        codes = jnp.floor(codes + threshold.astype(moment.dtype))
        return codes.astype(jnp.uint8), scales

    def decode(
        self,
        codes: Shaped[Array, "*tile"],
        scales: Shaped[Array, "*#tile"] | None,
        dtype: DTypeLike,
    ) -> Float[Array, "*tile"]:
        assert scales is not None
        scale, shift = decode_range(scales)
        factor = (scale / (_LARGEST_CODE + shift) ** 2).astype(dtype)
        shifted = codes.astype(dtype) + shift.astype(dtype)
        root = shifted * shifted * factor
        return root * root


class FlashOptimCodec(AbstractMomentCodec):
    r"""The codec of the paper, bit-compatible with its reference implementation:
    flattened groups of 32 with float16 scales, everything rounded to nearest.

    $$q = \lfloor 127 \cdot 2n / (1 + |n|) + \tfrac12 \rfloor \text{ with }
    n = m / \max |m| \text{ for signed moments}$$

    $$q = \lfloor 255 \cdot \sqrt{v} / \max \sqrt{v} + \tfrac12 \rfloor
    \text{ for averages of squares}$$

    For checkpoints from elsewhere and for comparison. Its scales overflow above 65504
    and vanish below $3 \cdot 10^{-8}$, and its second moments stall and collapse.

    ??? cite "Reference"

        FlashOptim, [arXiv:2602.23349](https://arxiv.org/abs/2602.23349), Section 3.2.
    """

    kind: MomentKind = eqx.field(static=True)

    @property
    def flattened(self) -> bool:
        return True

    def init(self, layout: Layout, dtype: DTypeLike) -> "StoredMoment":
        del dtype
        return _zeros(self, layout, self._code_dtype, jnp.float16)

    def encode(
        self, moment: Float[Array, "*tile"], axis: int, dither: Dither
    ) -> tuple[Shaped[Array, "*tile"], Shaped[Array, "*#tile"] | None]:
        del dither
        signed = self.kind == "signed"
        amplitude = moment if signed else jnp.sqrt(moment)
        largest = jnp.max(jnp.abs(amplitude), axis=axis, keepdims=True)
        largest = jnp.maximum(largest, 1e-12)
        codes = amplitude / largest
        if signed:
            codes = 2 * codes / (1 + jnp.abs(codes))
        codes = jnp.floor(codes * self._largest_code + 0.5)
        return codes.astype(self._code_dtype), largest.astype(jnp.float16)

    def decode(
        self,
        codes: Shaped[Array, "*tile"],
        scales: Shaped[Array, "*#tile"] | None,
        dtype: DTypeLike,
    ) -> Float[Array, "*tile"]:
        assert scales is not None
        # Behind a barrier, or XLA multiplies by the rounded reciprocal of the constant.
        largest_code = lax.optimization_barrier(jnp.asarray(self._largest_code, dtype))
        amplitude = codes.astype(dtype) / largest_code
        if self.kind == "signed":
            return amplitude / (2 - jnp.abs(amplitude)) * scales.astype(dtype)
        amplitude = amplitude * scales.astype(dtype)
        return amplitude * amplitude

    @property
    def _code_dtype(self) -> DTypeLike:
        return jnp.int8 if self.kind == "signed" else jnp.uint8

    @property
    def _largest_code(self) -> float:
        return 127.0 if self.kind == "signed" else 255.0


class FullPrecision(AbstractMomentCodec):
    """No compression: the moment itself, in the precision the leaf computes in."""

    @property
    def flattened(self) -> bool:
        return False

    def init(self, layout: Layout, dtype: DTypeLike) -> "StoredMoment":
        return jnp.zeros(layout.shape, dtype)

    def encode(
        self, moment: Float[Array, "*tile"], axis: int, dither: Dither
    ) -> tuple[Shaped[Array, "*tile"], Shaped[Array, "*#tile"] | None]:
        del axis, dither
        return moment, None

    def decode(
        self,
        codes: Shaped[Array, "*tile"],
        scales: Shaped[Array, "*#tile"] | None,
        dtype: DTypeLike,
    ) -> Float[Array, "*tile"]:
        del scales
        return codes.astype(dtype)


class QuantMoment(eqx.Module):
    """A moment in 8 bits per element and one scale per group.

    `codes` has the shape of the weight. `scales` has the same shape with `axis` divided
    by `group_size` (rounded up), so that a sharding of the weight is one of the state.
    `axis` counts from the end; if it is `None`, the leaf is flattened and `scales` has
    one axis.
    """

    codes: Int8[Array, "*shape"] | UInt8[Array, "*shape"]
    scales: UInt16[Array, "*groups"] | Float16[Array, "*groups"]
    axis: int | None = eqx.field(static=True)
    group_size: int = eqx.field(static=True)
    codec: AbstractMomentCodec = eqx.field(static=True)

    @property
    def layout(self) -> Layout:
        return Layout(self.codes.shape, self.axis, self.group_size)

    def decode(self, dtype: DTypeLike = jnp.float32) -> Float[Array, "*shape"]:
        """The moment as floating-point numbers of this dtype.

        Of an ensemble made by `vmap`, decode the members under `jax.vmap` as well.
        """
        tile = self.codec.decode(
            self.layout.tile(self.codes), self.layout.tile_scales(self.scales), dtype
        )
        return self.layout.untile(tile)


StoredMoment = QuantMoment | Float[Array, "*shape"]


def _zeros(
    codec: AbstractMomentCodec,
    layout: Layout,
    code_dtype: DTypeLike,
    scale_dtype: DTypeLike,
) -> QuantMoment:
    return QuantMoment(
        codes=jnp.zeros(layout.shape, code_dtype),
        scales=jnp.zeros(layout.scale_shape, scale_dtype),
        axis=layout.axis,
        group_size=layout.group_size,
        codec=codec,
    )


class MomentCodecs(eqx.Module):
    """Which codec stores which moment.

    `MomentCodecs.named` gives the three that `moments=` accepts by name:

    - `"flashquinox"`: softsign, rounded to nearest, for signed moments; fitted fourth
        root with rotating dither for averages of squares.
    - `"flashoptim"`: the codec of the paper.
    - `"float32"`: no compression.

    Leaves of at most one axis (biases, the scales of norms) with fewer than
    `smallest_vector` elements keep their moments in full precision: they hold a
    negligible share of the bytes, and the loss of precision would be the largest there.
    """

    signed: AbstractMomentCodec
    nonnegative: AbstractMomentCodec
    smallest_vector: int = eqx.field(static=True, default=4096)

    @staticmethod
    def named(name: str) -> "MomentCodecs":
        return _named[name]

    @staticmethod
    def names() -> tuple[str, ...]:
        return tuple(_named)

    def of(self, kind: MomentKind, shape: tuple[int, ...]) -> AbstractMomentCodec:
        """The codec for a moment of this kind, of a leaf of this shape."""
        if len(shape) <= 1 and math.prod(shape) < self.smallest_vector:
            return FullPrecision()
        return self.signed if kind == "signed" else self.nonnegative

    def layout(self, shape: tuple[int, ...], group_size: int) -> Layout:
        """The groups of a leaf of this shape."""
        if self.signed.flattened or self.nonnegative.flattened:
            return Layout(shape, None, group_size)
        return choose_layout(shape, group_size)


_named = {
    "flashquinox": MomentCodecs(SoftsignCodec(), FourthRootCodec()),
    "flashoptim": MomentCodecs(
        FlashOptimCodec("signed"), FlashOptimCodec("nonnegative"), smallest_vector=0
    ),
    "float32": MomentCodecs(FullPrecision(), FullPrecision()),
}


#
# Scales: bits of float32
#


_INFINITY = np.uint32(0x7F80_0000)
_QUIET_NAN = np.uint32(0x7FC0_0000)
_SMALLEST_NORMAL = np.float32(2.0**-126)


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


# Of a group's largest root, three mantissa bits are kept: 11 bits in all. The other 5 bits
# index the shifts: floats with two mantissa bits, from 16 to 3584.
_LARGEST_CODE = 254.5
_ROOT_DROPPED_BITS = 20
_SHIFT_BITS = 5
_SHIFT_DROPPED_BITS = 21
_SMALLEST_SHIFT = np.uint32(0x4180_0000 >> _SHIFT_DROPPED_BITS)
_LAST_SHIFT = np.uint32((1 << _SHIFT_BITS) - 1)
# The square root of the smallest subnormal float32 is 4e-23.
_NEGLIGIBLE_ROOT = np.float32(1e-30)


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
    ratio = jnp.sqrt(smallest / jnp.maximum(scale, _NEGLIGIBLE_ROOT))
    shift = _LARGEST_CODE * ratio / jnp.maximum(1 - ratio, np.float32(1e-6))
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
