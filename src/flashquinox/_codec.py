"""How a moment of an optimizer is stored in 8 bits.

A codec turns float32 into codes and scales and back, for one tile. The elements of a group
share a scale; *companding* spends the 256 codes where they matter. Two facts of training
loops, where a moment is decoded, moved by a fraction of a percent and encoded again
thousands of times, decide the rest:

- Rounding to nearest stalls: with b2 = 0.999 a second moment moves by less than one code a
  step. So second moments (and scales) are rounded by a threshold that rotates through
  [0, 1) from step to step: unbiased over time, without random numbers.
- A second moment that is rounded to zero beside a first moment that is not makes the next
  update explode. So no code of a nonzero group stands for zero.
"""

import abc
from typing import TypeVar

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float16, Int8, Scalar, Shaped, UInt8, UInt16, UInt32

from ._layout import choose_layout, Layout
from ._rule import MomentKind


class Dither(eqx.Module):
    """The rounding thresholds of one leaf in one step.

    `code` in [0, 1) is added before rounding down; `scale`, an integer of 15 bits, is added
    to the bits of a scale before they are cut. Both are Weyl sequences in the number of the
    step: they visit every subinterval of [0, 1) equally often.
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
        return Dither((code >> 8).astype(jnp.float32) * np.float32(2**-24), scale >> 17)


class AbstractCompanding(eqx.Module):
    """The curve between a moment and its codes.

    The scale of a group is the largest *amplitude* in it. `compress` and `expand` are
    inverse to each other up to rounding; they see the scale as it will be stored, which
    may be up to 2^-8 smaller than the largest amplitude.
    """

    @property
    @abc.abstractmethod
    def code_dtype(self) -> DTypeLike:
        """The integer dtype of the codes."""

    @abc.abstractmethod
    def amplitude(self, moment: Float[Array, "*tile"]) -> Float[Array, "*tile"]:
        """What the scale of a group measures."""

    @abc.abstractmethod
    def compress(
        self, amplitude: Float[Array, "*tile"], scale: Float[Array, "*#tile"]
    ) -> Float[Array, "*tile"]:
        """Codes before rounding; rounding them must stay within the code dtype."""

    @abc.abstractmethod
    def expand(
        self, codes: Float[Array, "*tile"], scale: Float[Array, "*#tile"]
    ) -> Float[Array, "*tile"]:
        """The moment of rounded codes."""


class Softsign(AbstractCompanding):
    r"""Softsign companding for signed moments, in `int8`.

    $$q = 127 \cdot \frac{2 n}{1 + |n|}, \qquad n = \frac{q}{254 - |q|}, \qquad
    n = \frac{m}{\max |m|}$$

    ??? cite "Reference"

        FlashOptim, [arXiv:2602.23349](https://arxiv.org/abs/2602.23349), Section 3.2.
    """

    @property
    def code_dtype(self) -> DTypeLike:
        return jnp.int8

    def amplitude(self, moment: Float[Array, "*tile"]) -> Float[Array, "*tile"]:
        return moment

    def compress(
        self, amplitude: Float[Array, "*tile"], scale: Float[Array, "*#tile"]
    ) -> Float[Array, "*tile"]:
        return 254 * amplitude / (_positive(scale) + jnp.abs(amplitude))

    def expand(
        self, codes: Float[Array, "*tile"], scale: Float[Array, "*#tile"]
    ) -> Float[Array, "*tile"]:
        return codes * scale / (254 - jnp.abs(codes))


class FourthRoot(AbstractCompanding):
    r"""Fourth-root companding with an offset for averages of squares, in `uint8`.

    $$\sqrt{v} = s \cdot \frac{q^2 + k}{254^2 + k}, \qquad s = \max \sqrt{v}$$

    The relative step between neighboring codes is $2q / (q^2 + k)$, at most
    $1 / \sqrt{k}$, and the code 0 stands for $v > 0$: an update divides by $\sqrt{v}$, so
    neither may be unbounded.
    """

    offset: float = eqx.field(static=True, default=16.0)

    @property
    def code_dtype(self) -> DTypeLike:
        return jnp.uint8

    def amplitude(self, moment: Float[Array, "*tile"]) -> Float[Array, "*tile"]:
        return jnp.sqrt(moment)

    def compress(
        self, amplitude: Float[Array, "*tile"], scale: Float[Array, "*#tile"]
    ) -> Float[Array, "*tile"]:
        squares = amplitude * (self._largest / _positive(scale))
        return jnp.sqrt(jnp.maximum(squares - self.offset, 0))

    def expand(
        self, codes: Float[Array, "*tile"], scale: Float[Array, "*#tile"]
    ) -> Float[Array, "*tile"]:
        root = (codes * codes + self.offset) * (scale / self._largest)
        return root * root

    @property
    def _largest(self) -> float:
        return 254.0**2 + self.offset


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


class CompandedCodec(AbstractMomentCodec):
    """8-bit codes through a companding curve, and 16-bit scales with float32's range.

    A scale is kept as a float32's eight exponent bits and its eight leading mantissa bits
    in a `uint16` (it has no sign): the range of a bfloat16 with one more bit of precision.
    Scales are rounded by the rotating threshold; codes too if `dithered`, else to nearest.
    """

    companding: AbstractCompanding
    dithered: bool = eqx.field(static=True)

    @property
    def flattened(self) -> bool:
        return False

    def init(self, layout: Layout, dtype: DTypeLike) -> "StoredMoment":
        del dtype
        return QuantMoment(
            codes=jnp.zeros(layout.shape, self.companding.code_dtype),
            scales=jnp.zeros(layout.scale_shape, jnp.uint16),
            axis=layout.axis,
            group_size=layout.group_size,
            codec=self,
        )

    def encode(
        self, moment: Float[Array, "*tile"], axis: int, dither: Dither
    ) -> tuple[Shaped[Array, "*tile"], Shaped[Array, "*#tile"] | None]:
        amplitude = self.companding.amplitude(moment)
        largest = jnp.max(jnp.abs(amplitude), axis=axis, keepdims=True)
        scales = encode_scale(largest.astype(jnp.float32), dither.scale)
        codes = self.companding.compress(
            amplitude, decode_scale(scales).astype(moment.dtype)
        )
        if self.dithered:
            codes = jnp.floor(codes + dither.code.astype(moment.dtype))
        else:
            codes = jnp.round(codes)
        return codes.astype(self.companding.code_dtype), scales

    def decode(
        self,
        codes: Shaped[Array, "*tile"],
        scales: Shaped[Array, "*#tile"] | None,
        dtype: DTypeLike,
    ) -> Float[Array, "*tile"]:
        assert scales is not None
        return self.companding.expand(
            codes.astype(dtype), decode_scale(scales).astype(dtype)
        )


class FlashOptimCodec(AbstractMomentCodec):
    r"""The codec of the paper, bit-compatible with its reference implementation: flattened
    groups of 32 with float16 scales, everything rounded to nearest.

    $$q = \lfloor 127 \cdot 2n / (1 + |n|) + \tfrac12 \rfloor \text{ with }
    n = m / \max |m| \text{ for signed moments}$$

    $$q = \lfloor 255 \cdot \sqrt{v} / \max \sqrt{v} + \tfrac12 \rfloor
    \text{ for averages of squares}$$

    For checkpoints from elsewhere and for comparison. Its scales overflow above 65504 and
    vanish below $3 \cdot 10^{-8}$, and its second moments stall and collapse.

    ??? cite "Reference"

        FlashOptim, [arXiv:2602.23349](https://arxiv.org/abs/2602.23349), Section 3.2.
    """

    kind: MomentKind = eqx.field(static=True)

    @property
    def flattened(self) -> bool:
        return True

    def init(self, layout: Layout, dtype: DTypeLike) -> "StoredMoment":
        del dtype
        return QuantMoment(
            codes=jnp.zeros(layout.shape, self._code_dtype),
            scales=jnp.zeros(layout.scale_shape, jnp.float16),
            axis=layout.axis,
            group_size=layout.group_size,
            codec=self,
        )

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

    `codes` has the shape of the weight. `scales` has the same shape with `axis` divided by
    `group_size` (rounded up), so that a sharding of the weight is one of the state. `axis`
    counts from the end; if it is `None`, the leaf is flattened and `scales` has one axis.
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


class MomentCodecs(eqx.Module):
    """Which codec stores which kind of moment.

    `MomentCodecs.named` gives the three that `moments=` accepts by name:

    - `"flashquinox"`: softsign, rounded to nearest, for signed moments; fourth root with
        rotating dither for averages of squares; 16-bit scales with float32's range.
    - `"flashoptim"`: the codec of the paper.
    - `"float32"`: no compression.
    """

    signed: AbstractMomentCodec
    nonnegative: AbstractMomentCodec

    @staticmethod
    def named(name: str) -> "MomentCodecs":
        return _named[name]

    @staticmethod
    def names() -> tuple[str, ...]:
        return tuple(_named)

    def of(self, kind: MomentKind) -> AbstractMomentCodec:
        return self.signed if kind == "signed" else self.nonnegative

    def layout(self, shape: tuple[int, ...], group_size: int) -> Layout:
        """The groups of a leaf of this shape."""
        if self.signed.flattened or self.nonnegative.flattened:
            return Layout(shape, None, group_size)
        return choose_layout(shape, group_size)


_named = {
    "flashquinox": MomentCodecs(
        CompandedCodec(Softsign(), dithered=False),
        CompandedCodec(FourthRoot(), dithered=True),
    ),
    "flashoptim": MomentCodecs(
        FlashOptimCodec("signed"), FlashOptimCodec("nonnegative")
    ),
    "float32": MomentCodecs(FullPrecision(), FullPrecision()),
}


_SCALE_DROPPED_BITS = 15
_INFINITY = np.uint32(0x7F80_0000)
_QUIET_NAN = np.uint32(0x7FC0_0000)
_LARGEST_SCALE = np.uint32((0x7F80_0000 >> _SCALE_DROPPED_BITS) - 1)


def encode_scale(
    scale: Float[Array, "*tile"], threshold: UInt32[Array, ""]
) -> UInt16[Array, "*tile"]:
    """Eight exponent and eight mantissa bits of a nonnegative float32, rounded up where the
    cut bits and the 15-bit threshold overflow. NaN and infinity are kept; finite scales
    stay finite.
    """
    bits = jnp.minimum(lax.bitcast_convert_type(scale, jnp.uint32), _QUIET_NAN)
    rounded = (bits + threshold) >> _SCALE_DROPPED_BITS
    rounded = jnp.where(bits < _INFINITY, jnp.minimum(rounded, _LARGEST_SCALE), rounded)
    return rounded.astype(jnp.uint16)


def decode_scale(scale: UInt16[Array, "*tile"]) -> Float[Array, "*tile"]:
    """The float32 value of a stored scale."""
    bits = scale.astype(jnp.uint32) << _SCALE_DROPPED_BITS
    return lax.bitcast_convert_type(bits, jnp.float32)


def _positive(scale: Float[Array, "*tile"]) -> Float[Array, "*tile"]:
    """Keeps the quotients of a group of zeros at zero."""
    return jnp.maximum(scale, np.float32(2.0**-126).astype(scale.dtype))
