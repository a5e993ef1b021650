"""Blocks of arrays with one axis: in memory, elements that follow one another lie along
the lanes, and so do groups. Some hundred more instructions for each piece exchange
lanes: of vectors, there are few."""

import dataclasses
from typing import Any

import jax.lax as lax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Int32, Shaped

from ..._storage.codec import Reduction
from ..._storage.tpu_memory import LANES, SUBLANES
from .block import AbstractChunk, AbstractGridBlock, evenly


@dataclasses.dataclass(frozen=True)
class VectorBlock(AbstractGridBlock):
    """A block of `(elements,)`. A piece is as many elements as have a row of scales, in
    rows of 128 lanes: so it has as many rows as a group has elements."""

    shape: tuple[int, ...]
    length: int
    # The pieces of a chunk.
    height: int
    group_size: int

    @property
    def grid(self) -> tuple[int, ...]:
        return (pl.cdiv(self.shape[0], self.length),)

    @property
    def elements(self) -> tuple[int, ...]:
        return (self.length,)

    @property
    def scales(self) -> tuple[int, ...]:
        return (self.length // self.group_size,)

    def scales_at(self, *index: Any) -> tuple[Any, ...]:
        return index

    @property
    def chunks(self) -> int:
        return self.length // (self.height * self.group_size * LANES)

    @property
    def pieces(self) -> int:
        return self.height

    @property
    def piece(self) -> tuple[int, int]:
        return self.group_size, LANES

    @property
    def chunk_scales(self) -> tuple[int, int]:
        return self.pieces, LANES

    def at(self, index: Any, block_index: tuple[Any, ...]) -> "_VectorChunk":
        return _VectorChunk(self, index, block_index)

    def constants_of(self, piece: int) -> Any:
        return pl.ds(piece, 1)

    @property
    def extremes(self) -> tuple[int, int]:
        return self.pieces, LANES

    def extremes_of(self, piece: int) -> Any:
        return pl.ds(piece, 1)

    def reduced_piece(
        self, reduction: Reduction, x: Shaped[Array, "rows lanes"]
    ) -> Shaped[Array, "1 lanes"]:
        return reduced_along_lanes(reduction, x, self.group_size)

    def reduced(
        self, reduction: Reduction, extremes: Shaped[Array, "pieces lanes"]
    ) -> Shaped[Array, "pieces lanes"]:
        del reduction
        return extremes

    def spread(self, x: Shaped[Array, "rows lanes"]) -> Shaped[Array, "rows lanes"]:
        return spread_along_lanes(x, self.group_size)


@dataclasses.dataclass(frozen=True)
class _VectorChunk(AbstractChunk):
    block: VectorBlock
    index: Any
    block_index: tuple[Any, ...]

    @property
    def scales(self) -> tuple[Any, ...]:
        size = self.block.pieces * LANES
        return (pl.ds(pl.multiple_of(self.index * size, size), size),)

    def elements(self, piece: int) -> tuple[Any, ...]:
        return (pl.ds(self._start(piece), self.block.group_size * LANES),)

    def present(self, piece: int) -> Bool[Array, "rows lanes"] | None:
        block, (length,) = self.block, self.block.shape
        if length % block.group_size == 0:
            return None
        (first,) = self.block_index
        first = first * block.elements[0] + self._start(piece)
        return first + place_in_piece(block.group_size) < length

    def _start(self, piece: int) -> Any:
        size = self.block.group_size * LANES
        return pl.multiple_of((self.index * self.block.pieces + piece) * size, size)


def place_in_piece(group_size: int) -> Int32[Array, "rows lanes"]:
    """The number of each element of a piece."""
    return LANES * _number(group_size, 0) + _number(group_size, 1)


def reduced_along_lanes(
    reduction: Reduction, x: Shaped[Array, "rows lanes"], group_size: int
) -> Shaped[Array, "1 lanes"]:
    """The maxima (or minima) of the groups of a piece, in their order."""
    pick = jnp.maximum if reduction is jnp.max else jnp.minimum
    lane, distance = _number(group_size, 1), 1
    while distance < group_size:
        x = pick(x, _lanes(x, lane ^ distance))
        distance *= 2
    # All lanes of a group have its maximum.
    groups = LANES // group_size
    x = _lanes(x, lane % groups * group_size)
    here = _number(group_size, 0) == lane // groups
    nothing = -jnp.inf if reduction is jnp.max else jnp.inf
    return reduction(jnp.where(here, x, nothing), axis=0, keepdims=True)


def spread_along_lanes(
    x: Shaped[Array, "rows lanes"], group_size: int
) -> Shaped[Array, "rows lanes"]:
    """From numbers of groups, in their order and alike in each row, those of the
    elements of a piece."""
    groups = LANES // group_size
    row, lane = _number(group_size, 0), _number(group_size, 1)
    return _lanes(x, groups * row + lane // group_size)


def _number(rows: int, axis: int) -> Int32[Array, "rows lanes"]:
    """Of each row or lane of a piece."""
    return lax.broadcasted_iota(jnp.int32, (rows, LANES), axis)


def _lanes(
    x: Shaped[Array, "rows lanes"], lanes: Int32[Array, "rows lanes"]
) -> Shaped[Array, "rows lanes"]:
    """In each row, what is in these lanes."""
    return jnp.take_along_axis(x, lanes, axis=1)


def vector_block(shape: tuple[int, ...], group_size: int, room: int) -> VectorBlock:
    """As many whole chunks as there is room for, evenly divided."""
    pieces = SUBLANES
    chunk = pieces * group_size * LANES
    chunks = evenly(1, pl.cdiv(shape[0], chunk), room // chunk)
    return VectorBlock(shape, chunks * chunk, pieces, group_size)
