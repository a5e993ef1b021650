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

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float16, Int8, Scalar, Shaped, UInt8, UInt16

from ._layout import Layout


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


StoredMoment = QuantMoment | Float[Array, "..."]


def zeros(
    codec: AbstractMomentCodec,
    layout: Layout,
    code_dtype: DTypeLike,
    scale_dtype: DTypeLike,
) -> QuantMoment:
    """The stored form of zeros: all codes and all scales are zero."""
    return QuantMoment(
        codes=jnp.zeros(layout.shape, code_dtype),
        scales=jnp.zeros(layout.scale_shape, scale_dtype),
        axis=layout.axis,
        group_size=layout.group_size,
        codec=codec,
    )
