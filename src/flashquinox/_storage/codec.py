"""How a moment of an optimizer is stored: in codes of 8 bits and a scale per group.

A codec turns the float32 numbers of one tile into codes and scales, and back.
*Companding* spaces the 256 codes of a group unevenly: closely where precision matters.

In training, a moment is decoded, moved by a fraction of a percent and encoded again,
thousands of times. Two consequences shape the codecs of this library:

- Rounding to nearest stalls. With b2 = 0.999, a second moment moves by less than one
    code a step; with b1 = 0.9, a first moment that decays stays at the codes 1 to 4. So
    codes and scales are rounded by a threshold that rotates through [0, 1) from step to
    step: unbiased over time, without random numbers.
- An update explodes if its second moment is rounded to zero and its first moment is
    not. So no code stands for zero among averages of squares in a group with other
    numbers.
"""

import abc
from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Scalar, ScalarLike, Shaped

from .._rules.rule import MomentKind
from .thresholds import even_thresholds, STRIDES_OF_MOMENTS


class Dither(eqx.Module):
    """The rounding thresholds of one moment of a leaf in one step.

    `code` in (0, 1) is added before rounding down; `scale`, an integer of 16 bits, is
    added to the bits of a scale before they are cut. Both are equidistributed sequences
    in the number of the step: they visit every subinterval of [0, 1) equally often.

    `code` is an odd multiple of 2^-16, so that float32 has the sum of it and any code
    of 8 bits: one that is rounded to 24 bits could make 128 of 127, which no `int8` is.
    """

    code: Scalar
    scale: Scalar

    @staticmethod
    def at(
        count: Scalar,
        leaf: ScalarLike,
        kind: MomentKind = "nonnegative",
        relative: bool = False,
    ) -> "Dither":
        """The thresholds of step `count` for moments of this kind of the leaf with this
        index; `relative` for signed ones that are stored relative to another. A
        deterministic function of these, so that a resumed run continues bit for bit.

        Averages of squares move by less than a code for many steps: of these, the
        thresholds of 2048 turns are spread as evenly as can be. A signed moment loses a
        tenth of itself in each step, and rounding feeds back: by evenly spaced
        thresholds, small codes would die at a fixed time. So these have the multiples
        of the golden ratio at the cubes of turns, which are as independent of one
        another as random ones.

        Of a relative moment, most elements move by several codes in a step. Half of the
        variance of their errors is that of the threshold, which is the same for all of
        them. So these thresholds come in pairs, u and 1 - u: what one adds, the next
        one takes away, before it is forgotten. Every 256 turns, one of a pair is left
        out, so that even turns have the first ones of pairs as often as odd turns:
        otherwise a direction that alternates, by less than a code, would be rounded
        to one side.
        """
        turn, leaf = count.astype(jnp.uint32), jnp.asarray(leaf, jnp.uint32)
        # One number in 257 is left out, so that turns that are multiples of a power of
        # two, whose cubes end in zeros, are not all multiples of that here.
        half = turn + (turn >> 8)
        # Of the golden ratio; of the plastic number's reciprocals for the second
        # sequence and for the leaves' offsets.
        golden, offset = np.uint32(0x9E3779B9), leaf * np.uint32(0x91E10DA5)
        place = half >> 1 if relative else half
        code = place * place * place * golden + offset
        if kind == "nonnegative":
            place = place if relative else turn
            code = even_thresholds(place, STRIDES_OF_MOMENTS, golden, offset)
        if relative:
            code = code ^ (np.uint32(0) - (half & np.uint32(1)))
        scale = turn * np.uint32(0xC13FA9A9) + leaf * np.uint32(0x9E3779B9)
        odd = (code >> 16) | np.uint32(1)
        return Dither(odd.astype(jnp.float32) * np.float32(2**-16), scale >> 16)


# Called with what one pass over a tile computes for the next ones, it returns the same
# values: where compilers would compute them again in each of the next ones.
Boundary: TypeAlias = Callable[[Any], Any]


def no_boundary(values: Any) -> Any:
    return values


Reduction: TypeAlias = Callable[..., Array]
# What is the same for all elements of a group, one number for each group; or (scalars)
# for all groups.
GroupConstants: TypeAlias = tuple[Shaped[Array, "..."], ...]


class AbstractMomentCodec(eqx.Module):
    r"""Moments to codes and scales, and back.

    A step of a leaf decodes each moment, applies the rule, and encodes the new moment.
    A backend calls the methods below for one *tile* of the leaf at a time, or for the
    *groups* of a tile, possibly inside a kernel:

    | in a step, in this order | is called for | shapes: in, out |
    | --- | --- | --- |
    | `decode_constants` | the groups of a tile | groups, groups |
    | `dequantize` | the elements of a tile | tile, tile |
    | `prepare`, `statistics` | the elements of a tile | tile, tile |
    | (the backend reduces each of the statistics along the groups) | | tile, groups |
    | `fit` | the groups of a tile | groups, groups |
    | `quantize` | the elements of a tile | tile, tile |

    A backend chooses the shapes. So each method must be elementwise: over the elements
    of a tile, or over groups. What `fit` and `decode_constants` return for each group
    is broadcast to all of its elements before `quantize` and `dequantize` get it.
    [`flashquinox.Storage`][] checks all this when it is made.

    `factor`, a scalar or `None` for 1, is what the stored moment is multiplied by when
    it is decoded, and what a new moment is multiplied by before it is stored (see
    [`flashquinox.Moment`][]).

    A codec is compiled into programs. So all of its fields are static, with a hash.
    """

    @property
    @abc.abstractmethod
    def kinds(self) -> tuple[MomentKind, ...]:
        """Which kinds of moments it can store: `("signed",)`, `("nonnegative",)` or
        both. Asked when an optimizer is built, and when numbers are stored by hand."""

    @property
    def flattened(self) -> bool:
        """Whether groups run through the flattened leaf instead of along one axis.
        Asked when a state is made. `False`, unless a codec says otherwise."""
        return False

    @property
    @abc.abstractmethod
    def dtypes(self) -> tuple[DTypeLike, DTypeLike] | None:
        """The dtypes of codes and of scales: an integer dtype, and any. Asked when a
        state is made or checked. In a new state all of both are zero; `dequantize` must
        make zeros of them.

        `None` stores a moment as it is. That is [`flashquinox.FullPrecision`][]'s.
        """

    def prepare(
        self, moment: Float[Array, "*tile"]
    ) -> tuple[Float[Array, "*tile"], ...]:
        """Is called once for the elements of each new moment, before `statistics`.
        Unless a codec has its own, it returns the moment alone.

        **Arguments:**

        - `moment`: the new moment, in float32 (float64 for leaves in float64).

        **Returns:**

        The arrays that `statistics` and `quantize` share: at least one, each of the
        shape and the dtype of `moment`.
        """
        return (moment,)

    @abc.abstractmethod
    def statistics(
        self, prepared: tuple[Float[Array, "*tile"], ...]
    ) -> tuple[tuple[Reduction, Float[Array, "*tile"]], ...]:
        """Is called after `prepare`, with what that returned.

        **Returns:**

        What the scale of a group depends on: for each statistic a pair of `jnp.max` or
        `jnp.min`, and an array of the shape of the tile that the backend reduces by it
        along each group.
        """

    @abc.abstractmethod
    def fit(
        self,
        statistics: tuple[Float[Array, "*groups"], ...],
        factor: Scalar | None,
        dither: Dither,
    ) -> tuple[Shaped[Array, "*groups"] | None, GroupConstants]:
        """Is called for the groups of a tile, when their statistics are known.

        **Arguments:**

        - `statistics`: those of `statistics`, in this order, reduced.
        - `factor`: what the moment is multiplied by before it is stored. The statistics
            are of the moment before that.
        - `dither`: the thresholds of this step for this leaf.

        **Returns:**

        A 2-tuple of the scales to store, in their dtype, and of `encode_constants`:
        what `quantize` needs to know of each group, in float32 or int32; scalars for
        what is the same for all groups.
        """

    @abc.abstractmethod
    def quantize(
        self,
        prepared: tuple[Float[Array, "*tile"], ...],
        encode_constants: GroupConstants,
    ) -> Shaped[Array, "*tile"]:
        """Is called last, for the elements of a tile.

        **Arguments:**

        - `prepared`: what `prepare` returned. Every element lies within the statistics
            of its group.
        - `encode_constants`: the second result of `fit`, broadcast to the elements.

        **Returns:**

        The codes of the elements, in their dtype. Numbers that are converted to it must
        be ones that it holds: plain XLA clips others, kernels keep their lowest bits.
        """

    @abc.abstractmethod
    def decode_constants(
        self,
        scales: Shaped[Array, "*groups"] | None,
        factor: Scalar | None,
        dtype: DTypeLike,
    ) -> GroupConstants:
        """Is called first in a step, for the groups of a tile.

        **Arguments:**

        - `scales`: as they are stored.
        - `factor`: what the decoded moment is multiplied by.
        - `dtype`: that of the moment: float32, or float64 for leaves in float64.

        **Returns:**

        What `dequantize` needs to know of each group, in `dtype` or int32; scalars for
        what is the same for all groups.
        """

    @abc.abstractmethod
    def dequantize(
        self,
        codes: Shaped[Array, "*tile"],
        decode_constants: GroupConstants,
        dtype: DTypeLike,
    ) -> Float[Array, "*tile"]:
        """Is called after `decode_constants`, for the elements of a tile.

        **Arguments:**

        - `codes`: as they are stored.
        - `decode_constants`: what the method of this name returned, broadcast to the
            elements.
        - `dtype`: as there.

        **Returns:**

        The elements that the codes stand for, in `dtype`.
        """

    def encode(
        self,
        moment: Float[Array, "*tile"],
        axis: int,
        dither: Dither,
        factor: Scalar | None = None,
        boundary: Boundary = no_boundary,
    ) -> tuple[Shaped[Array, "*tile"], Shaped[Array, "*groups"] | None]:
        """The codes and the scales of a tile whose groups run along `axis`: all the
        steps at once."""
        if self.dtypes is None:
            boundary = no_boundary
        prepared = boundary(self.prepare(moment))
        statistics = tuple(
            [
                boundary(reduction(x, axis=axis))
                for reduction, x in self.statistics(prepared)
            ]
        )
        scales, constants = boundary(self.fit(statistics, factor, dither))
        return self.quantize(prepared, _broadcastable(constants, axis)), scales

    def decode(
        self,
        codes: Shaped[Array, "*tile"],
        scales: Shaped[Array, "*groups"] | None,
        axis: int,
        dtype: DTypeLike,
        factor: Scalar | None = None,
        boundary: Boundary = no_boundary,
    ) -> Float[Array, "*tile"]:
        """The moments of a tile whose groups run along `axis`, in the floating-point
        `dtype`: both steps at once."""
        if self.dtypes is None:
            boundary = no_boundary
        constants = boundary(self.decode_constants(scales, factor, dtype))
        return boundary(self.dequantize(codes, _broadcastable(constants, axis), dtype))


def _broadcastable(constants: GroupConstants, axis: int) -> GroupConstants:
    return tuple([x if x.ndim == 0 else jnp.expand_dims(x, axis) for x in constants])
