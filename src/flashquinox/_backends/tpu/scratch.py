"""What a chunk keeps in VMEM between its phases."""

import dataclasses
import functools
from typing import Any

import jax
import jax.lax as lax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Scalar, Shaped

from ..._storage.codec import AbstractMomentCodec, Dither, GroupConstants, Reduction
from ..._tile.step import StepStructure
from .block import AbstractBlock


@dataclasses.dataclass(frozen=True)
class Counts:
    """How many arrays a codec has of each sort."""

    prepared: int
    # One for each statistic.
    reductions: tuple[Reduction, ...]
    # At most: scalars among them are not kept.
    constants: int

    @staticmethod
    @functools.cache
    def of(codec: AbstractMomentCodec) -> "Counts":
        """Those of a codec without a traced parameter."""
        found = []

        def count(moment: Array, one: Scalar, bits: Scalar) -> None:
            prepared = codec.prepare(moment)
            pairs = codec.statistics(prepared)
            statistics = tuple([reduction(x, axis=0) for reduction, x in pairs])
            scales, encoding = codec.fit(statistics, one, Dither(one, bits))
            constants = (*encoding, *codec.decode_constants(scales, one, jnp.float32))
            reductions = tuple([reduction for reduction, _ in pairs])
            found.append(Counts(len(prepared), reductions, len(constants)))

        shapes = ((1, 1), jnp.float32), ((), jnp.float32), ((), jnp.uint32)
        jax.eval_shape(count, *[jax.ShapeDtypeStruct(*x) for x in shapes])
        return found[0]


def scratch_shapes(structure: StepStructure, block: AbstractBlock) -> list[Any]:
    """The arrays that a chunk needs: for constants of groups, for statistics, and for
    prepared moments."""
    counts = [Counts.of(codec) for codec in structure.codecs]
    # At least one of each: there are no empty arrays.
    constants = max(1, sum([count.constants for count in counts]))
    statistics = max(1, sum([len(count.reductions) for count in counts]))
    prepared = max(1, sum([count.prepared for count in counts]))
    return [
        pltpu.VMEM((constants, *block.chunk_scales), jnp.int32),
        pltpu.VMEM((statistics, *block.extremes), jnp.float32),
        pltpu.VMEM((prepared, block.pieces, *block.piece), jnp.float32),
    ]


class Scratch:
    """The arrays of `scratch_shapes`, for one chunk."""

    def __init__(
        self,
        constants: Any,
        extremes: Any,
        prepared: Any,
        zero: Any,
        block: AbstractBlock,
    ):
        self._constants = constants
        self._extremes = extremes
        self._prepared = prepared
        # The compiler does not know that this is 0, so that it does not keep in
        # registers, of which there are too few, what was written to VMEM.
        self._zero = zero
        self._block = block
        self._used = 0

    def put_constants(self, constants: GroupConstants) -> tuple[Any, ...]:
        """Keeps what belongs to groups, one row for each group. What is returned is
        what `constants` takes."""
        kept = []
        for x in constants:
            if x.ndim == 0:
                kept.append(x)
                continue
            row, self._used = self._used, self._used + 1
            self._constants[row, :, :] = lax.bitcast_convert_type(x, jnp.int32)
            kept.append((row, x.dtype))
        return tuple(kept)

    def constants(self, kept: tuple[Any, ...], piece: int) -> GroupConstants:
        """What is kept of the groups of a piece, at each of its elements."""
        found = []
        for x in kept:
            if isinstance(x, tuple):
                row, dtype = x
                bits = self._constants[row, self._block.constants_of(piece), :]
                bits = self._block.spread(jnp.broadcast_to(bits, self._block.piece))
                x = lax.bitcast_convert_type(bits, dtype)
            found.append(x)
        return tuple(found)

    def put_prepared(self, arrays: list[Array], piece: int) -> None:
        for i, x in enumerate(arrays):
            self._prepared[i, piece] = x

    def prepared(self, first: int, count: int, piece: int) -> tuple[Array, ...]:
        """`count` arrays of those that were put, of a piece."""
        return tuple(
            [self._prepared[self._zero + first + i, piece] for i in range(count)]
        )

    def put_statistics(
        self, statistics: list[Array], reductions: list[Reduction], piece: int
    ) -> None:
        """Keeps what is left of statistics when the registers of a piece are reduced
        to one."""
        place = self._block.extremes_of(piece)
        for i, (x, reduction) in enumerate(zip(statistics, reductions, strict=True)):
            x = self._block.reduced_piece(reduction, x)
            self._extremes[pl.ds(i, 1), place] = x[None]

    def extremes(
        self, reductions: list[Reduction]
    ) -> list[Shaped[Array, "groups lanes"]]:
        """The maxima (or minima) of all groups, of each of the statistics."""
        return [
            self._block.reduced(reduction, self._extremes[i])
            for i, reduction in enumerate(reductions)
        ]
