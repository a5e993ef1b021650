"""Blocks of vectors, and of matrices with one row: in memory, elements that follow one
another lie along the lanes, and so do groups. Some hundred more instructions for each
piece exchange lanes: of vectors, there are few."""

import dataclasses
from typing import Any

import jax.lax as lax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Int32, Shaped

from ..._storage.codec import Reduction
from ..._storage.tpu_memory import LANES, SUBLANES
from .block import AbstractChunk, AbstractGridBlock, evenly
from .view import View


@dataclasses.dataclass(frozen=True)
class VectorBlock(AbstractGridBlock):
    """A block of `(elements,)` or `(1, elements)`. A piece is as many elements as have
    a row of scales, in rows of 128 lanes: so it has as many rows as a group has
    elements."""

    shape: tuple[int, ...]
    # Of all scales: (groups,) or (1, groups), whichever the elements have.
    scale_shape: tuple[int, ...]
    length: int
    # The pieces of a chunk.
    height: int
    group_size: int

    @property
    def grid(self) -> tuple[int, ...]:
        return (*self.shape[:-1], pl.cdiv(self.shape[-1], self.length))

    @property
    def elements(self) -> tuple[int, ...]:
        return (*self.shape[:-1], self.length)

    @property
    def scales(self) -> tuple[int, ...]:
        return (*self.scale_shape[:-1], self.length // self.group_size)

    def scales_at(self, *index: Any) -> tuple[Any, ...]:
        return _last_of(self.scale_shape, index[-1])

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
        return _VectorChunk(self, index, block_index[-1])

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
    block_index: Any

    @property
    def scales(self) -> tuple[Any, ...]:
        size = self.block.pieces * LANES
        scales = pl.ds(pl.multiple_of(self.index * size, size), size)
        return _last_of(self.block.scale_shape, scales)

    def elements(self, piece: int) -> tuple[Any, ...]:
        elements = pl.ds(self._start(piece), self.block.group_size * LANES)
        return _last_of(self.block.shape, elements)

    def present(self, piece: int) -> Bool[Array, "rows lanes"] | None:
        block, length = self.block, self.block.shape[-1]
        if length % block.group_size == 0:
            return None
        first = self.block_index * block.length + self._start(piece)
        return first + place_in_piece(block.group_size) < length

    def _start(self, piece: int) -> Any:
        size = self.block.group_size * LANES
        return pl.multiple_of((self.index * self.block.pieces + piece) * size, size)


def _last_of(shape: tuple[int, ...], index: Any) -> tuple[Any, ...]:
    """An index of the last axis, with those of axes of length 1 before it."""
    return (*[0 for _ in shape[:-1]], index)


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


def vector_block(view: View, room: int) -> VectorBlock:
    """As many whole chunks as there is room for, evenly divided."""
    shape, scale_shape = view.elements.lengths, view.scales.lengths
    pieces, group_size = SUBLANES, view.group_size
    chunk = pieces * group_size * LANES
    chunks = evenly(1, pl.cdiv(shape[-1], chunk), room // chunk)
    return VectorBlock(shape, scale_shape, chunks * chunk, pieces, group_size)
