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
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeAlias

import equinox as eqx
import jax
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
    ScalarLike,
    Shaped,
    UInt8,
    UInt16,
)

from .layout import Layout


class Dither(eqx.Module):
    """The rounding thresholds of one leaf in one step.

    `code` in [0, 1) is added before rounding down; `scale`, an integer of 16 bits, is
    added to the bits of a scale before they are cut. Both are Weyl sequences in the
    number of the step: they visit every subinterval of [0, 1) equally often.
    """

    code: Scalar
    scale: Scalar

    @staticmethod
    def at(count: Scalar, leaf: ScalarLike) -> "Dither":
        """The thresholds of step `count` for the leaf with this index. A deterministic
        function of both, so that a resumed run continues bit for bit.
        """
        turn, leaf = count.astype(jnp.uint32), jnp.asarray(leaf, jnp.uint32)
        # Multiples of the golden ratio; of the plastic number's reciprocals for the
        # second sequence and for the leaves' offsets.
        code = turn * np.uint32(0x9E3779B9) + leaf * np.uint32(0x91E10DA5)
        scale = turn * np.uint32(0xC13FA9A9) + leaf * np.uint32(0x9E3779B9)
        return Dither((code >> 8).astype(jnp.float32) * np.float32(2**-24), scale >> 16)


Reduction: TypeAlias = Callable[..., Array]
# What is the same for all elements of a group, or (scalars) of all groups.
GroupConstants: TypeAlias = tuple[Shaped[Array, "..."], ...]


class AbstractMomentCodec(eqx.Module):
    """Moments to bytes and back.

    `encode` and `decode` work on one tile. They are made of steps, so that a kernel can
    do what concerns a whole group on arrays that are not broadcast yet: `prepare`,
    `quantize` and `dequantize` are elementwise, `statistics` reduces each group, `fit`
    and `dequantizer` are elementwise over groups.

    `factor` is what the stored moment is multiplied by when it is decoded, and what a
    moment is multiplied by before it is stored. `None` is 1.
    """

    @property
    @abc.abstractmethod
    def flattened(self) -> bool:
        """Whether groups run through the flattened leaf instead of along one axis."""

    @property
    def initial(self) -> float | None:
        """Where the parameter of a codec that learns begins. `None` for others."""
        return None

    def with_parameter(self, parameter: Scalar | None) -> "AbstractMomentCodec":
        """The codec with this parameter, which may be traced: for one step, or part of
        it. `None` if nothing is learned."""
        del parameter
        return self

    @abc.abstractmethod
    def init(self, layout: Layout, dtype: DTypeLike) -> "StoredMoment":
        """A stored moment of zeros, for a leaf that computes in `dtype`."""

    def prepare(
        self, moment: Float[Array, "*tile"]
    ) -> tuple[Float[Array, "*tile"], ...]:
        """The arrays that `statistics` and `quantize` share: computed once."""
        return (moment,)

    @abc.abstractmethod
    def statistics(
        self, prepared: tuple[Float[Array, "*tile"], ...]
    ) -> tuple[tuple[Reduction, Float[Array, "*tile"]], ...]:
        """What the scale of a group depends on: each a reduction along the axis of the
        group, `jnp.max` or `jnp.min`, and what it is taken of."""

    @abc.abstractmethod
    def fit(
        self,
        statistics: tuple[Float[Array, "*groups"], ...],
        factor: Scalar | None,
        dither: Dither,
    ) -> tuple[Shaped[Array, "*groups"] | None, GroupConstants]:
        """The scales to store, and what `quantize` needs to know of a group."""

    @abc.abstractmethod
    def quantize(
        self,
        prepared: tuple[Float[Array, "*tile"], ...],
        quantizer: GroupConstants,
    ) -> Shaped[Array, "*tile"]:
        """The codes of the elements. Every element must lie within the statistics of
        its group."""

    @abc.abstractmethod
    def dequantizer(
        self,
        scales: Shaped[Array, "*groups"] | None,
        factor: Scalar | None,
        dtype: DTypeLike,
    ) -> GroupConstants:
        """What `dequantize` needs to know of a group."""

    @abc.abstractmethod
    def dequantize(
        self,
        codes: Shaped[Array, "*tile"],
        dequantizer: GroupConstants,
        dtype: DTypeLike,
    ) -> Float[Array, "*tile"]:
        """The elements that the codes stand for, in the floating-point `dtype`."""

    def encode(
        self,
        moment: Float[Array, "*tile"],
        axis: int,
        dither: Dither,
        factor: Scalar | None = None,
    ) -> tuple[Shaped[Array, "*tile"], Shaped[Array, "*groups"] | None]:
        """The codes and the scales of a tile whose groups run along `axis`."""
        prepared = self.prepare(moment)
        statistics = tuple(
            reduction(x, axis=axis) for reduction, x in self.statistics(prepared)
        )
        scales, quantizer = self.fit(statistics, factor, dither)
        return self.quantize(prepared, _broadcastable(quantizer, axis)), scales

    def decode(
        self,
        codes: Shaped[Array, "*tile"],
        scales: Shaped[Array, "*groups"] | None,
        axis: int,
        dtype: DTypeLike,
        factor: Scalar | None = None,
    ) -> Float[Array, "*tile"]:
        """The moments of a tile, in the floating-point `dtype`."""
        dequantizer = self.dequantizer(scales, factor, dtype)
        return self.dequantize(codes, _broadcastable(dequantizer, axis), dtype)


def _broadcastable(constants: GroupConstants, axis: int) -> GroupConstants:
    return tuple(x if x.ndim == 0 else jnp.expand_dims(x, axis) for x in constants)


class QuantMoment(eqx.Module):
    """A moment in 8 bits per element and one scale per group.

    `codes` has the shape of the weight. `scales` has the same shape with `axis` divided
    by `group_size` (rounded up), so that a sharding of the weight is one of the state.
    `axis` counts from the end; if it is `None`, the leaf is flattened and `scales` has
    one axis. `parameter` is a scalar for a codec that learns (see
    [`flashquinox.RationalCurve`][]): the one that `codes` were made with. It is `None`
    for others.
    """

    codes: Int8[Array, "*shape"] | UInt8[Array, "*shape"]
    scales: UInt16[Array, "*groups"] | Float16[Array, "*groups"]
    axis: int | None = eqx.field(static=True)
    group_size: int = eqx.field(static=True)
    codec: AbstractMomentCodec = eqx.field(static=True)
    parameter: Float32[Array, "*ensemble"] | None = None

    @property
    def layout(self) -> Layout:
        return Layout(self.codes.shape, self.axis, self.group_size)

    def decode(self, dtype: DTypeLike = jnp.float32) -> Float[Array, "*shape"]:
        """The moment as floating-point numbers of this dtype.

        Of an ensemble made by `vmap`, decode the members under `jax.vmap` as well.
        """
        for name, like in zip(
            ("codes", "scales"), stored_dtypes(self.codec), strict=True
        ):
            found = getattr(self, name).dtype
            if found != like:
                raise TypeError(
                    f"`QuantMoment.decode`: the {name} are {found}, and must be {like}."
                    " They were cast after they were stored: take them from the state "
                    "as `init` or the previous step returned it."
                )
        layout = self.layout
        codec = self.codec.with_parameter(self.parameter)
        tile = codec.decode(
            layout.tile(self.codes), self.scales, layout.tile_axis, dtype
        )
        return layout.untile(tile)

    def encode(self, values: Float[Array | np.ndarray, "*shape"]) -> "QuantMoment":
        """A moment of these numbers, stored as this one is: by the same codec, in the
        same groups, on the same devices. Codes and scales are rounded to nearest, so
        that equal numbers give equal bits. Of this moment, nothing but its form counts.

        A first moment of 0 is stored as 0. A second moment has no code for 0 in a group
        with other numbers: 0 becomes the lowest code of the group, at least 15 powers
        of two below the largest. See [`flashquinox.map_moments`][] for moments of a
        whole state.

        **Arguments:**

        - `values`: floating-point numbers of the shape of `codes`: finite, and at least
            0 where `codes` are unsigned, as those of averages of squares are.

        **Returns:**

        The new moment.

        **Raises:**

        `TypeError` for other dtypes; `ValueError` for other shapes, and for numbers
        that cannot be stored (where values are traced, an error when they are
        computed). Of an ensemble made by `vmap`, encode the members under `jax.vmap`.
        """
        # That needs this class.
        from .moment_values import encode

        return encode(self, values)


StoredMoment = QuantMoment | Float[Array, "..."]


@lru_cache
def stored_dtypes(codec: AbstractMomentCodec) -> tuple[Any, Any]:
    """Of codes and scales, also of a codec that is not this library's."""
    layout = Layout((16,), None if codec.flattened else -1, 16)
    stored = jax.eval_shape(lambda: codec.init(layout, jnp.float32))
    assert isinstance(stored, QuantMoment)
    return stored.codes.dtype, stored.scales.dtype


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
        parameter=None if codec.initial is None else jnp.float32(codec.initial),
    )
