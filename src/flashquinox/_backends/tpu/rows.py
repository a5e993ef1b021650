"""Blocks of leaves whose groups run along the rows: 32 rows of 128 lanes are a tile of
8-bit integers, and four registers of float32."""

import dataclasses
import math
from typing import Any

import jax.lax as lax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Shaped

from ..._storage.codec import Reduction
from ..._storage.tpu_memory import LANES, SUBLANES
from .block import AbstractChunk, AbstractGridBlock, evenly, evenly_both


@dataclasses.dataclass(frozen=True)
class RowsBlock(AbstractGridBlock):
    """A block of `(matrices, rows, columns)`, in elements. A piece is a group of each
    of 128 lanes."""

    shape: tuple[int, ...]
    # More than one if each of them is one chunk high, or lower.
    matrices: int
    rows: int
    columns: int
    # Of a matrix of a chunk: its groups, which lie one below the other, and its lanes.
    groups: int
    group_size: int
    lanes: int

    @property
    def grid(self) -> tuple[int, int, int]:
        matrices, rows, columns = self.shape
        matrices, rows = pl.cdiv(matrices, self.matrices), pl.cdiv(rows, self.rows)
        return matrices, rows, pl.cdiv(columns, self.columns)

    @property
    def elements(self) -> tuple[int, int, int]:
        return self.matrices, self.rows, self.columns

    @property
    def scales(self) -> tuple[int, int, int]:
        return self.matrices, self.rows // self.group_size, self.columns

    def scales_at(self, *index: Any) -> tuple[Any, ...]:
        return index

    @property
    def chunks(self) -> int:
        return math.prod(self.chunk_grid)

    @property
    def chunk_grid(self) -> tuple[int, int]:
        """How many chunks lie one below the other, and side by side."""
        high = self.rows // (self.groups * self.group_size)
        return high, self.columns // self.lanes

    @property
    def pieces(self) -> int:
        return self.matrices * self.groups

    @property
    def piece(self) -> tuple[int, int]:
        return self.group_size, self.lanes

    @property
    def chunk_scales(self) -> tuple[int, int]:
        return self.pieces, self.lanes

    def reduced_piece(
        self, reduction: Reduction, x: Shaped[Array, "rows lanes"]
    ) -> Shaped[Array, "sublanes lanes"]:
        return reduction(x.reshape(-1, SUBLANES, self.lanes), axis=0)

    def at(self, index: Any, block_index: tuple[Any, ...]) -> "_RowsChunk":
        high, wide = self.chunk_grid
        j, k = (0, index) if high == 1 else (index // wide, index % wide)
        lanes = pl.ds(pl.multiple_of(k * self.lanes, self.lanes), self.lanes)
        return _RowsChunk(self, j * self.groups, lanes, block_index)

    def constants_of(self, piece: int) -> Any:
        # Loads broadcast a row for nothing.
        return pl.ds(piece, 1)

    def extremes_of(self, piece: int) -> Any:
        # The same sublane of all groups together: stores do this for nothing.
        return pl.ds(piece, SUBLANES, stride=self.pieces)

    @property
    def extremes(self) -> tuple[int, int]:
        return self.pieces * SUBLANES, self.lanes

    def reduced(
        self, reduction: Reduction, extremes: Shaped[Array, "..."]
    ) -> Shaped[Array, "groups lanes"]:
        x = extremes.reshape(SUBLANES, self.pieces, self.lanes)
        return reduction(x, axis=0)

    def spread(self, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        return x


@dataclasses.dataclass(frozen=True)
class _RowsChunk(AbstractChunk):
    block: RowsBlock
    first_group: Any
    lanes: Any
    block_index: tuple[Any, ...]

    @property
    def scales(self) -> tuple[Any, Any, Any]:
        if self.block.matrices > 1:
            return slice(None), slice(None), self.lanes
        start = pl.multiple_of(self.first_group, self.block.groups)
        return 0, pl.ds(start, self.block.groups), self.lanes

    def elements(self, piece: int) -> tuple[Any, Any, Any]:
        size = self.block.group_size
        matrix, group = divmod(piece, self.block.groups)
        start = pl.multiple_of((self.first_group + group) * size, size)
        return matrix, pl.ds(start, size), self.lanes

    def present(self, piece: int) -> Bool[Array, "rows lanes"] | None:
        block = self.block
        last, left = divmod(block.shape[1], block.group_size)
        # A block has only whole chunks: all chunks with the last group have it at the
        # same place.
        piece %= block.groups
        if left == 0 or piece != last % block.groups:
            return None
        groups = block.rows // block.group_size
        group = self.block_index[1] * groups + self.first_group + piece
        rows = lax.broadcasted_iota(jnp.int32, block.piece, 0)
        return rows < jnp.where(group == last, left, block.group_size)


def rows_block(
    shape: tuple[int, ...],
    group_size: int,
    groups: int,
    room: int,
    one_column: bool,
) -> RowsBlock:
    """As many whole chunks as there is room for, evenly divided.

    **Arguments:**

    - `shape`: of the view.
    - `group_size`: how many rows a group has, at most.
    - `groups`: how many groups a chunk has, at most.
    - `room`: the elements that fit into VMEM.
    - `one_column`: whether chunks may not lie side by side.
    """
    matrices, rows, columns = shape
    most, groups = groups, min(groups, pl.cdiv(rows, group_size))
    chunk = groups * group_size
    lanes = min(LANES, columns)
    chunks = pl.cdiv(rows, chunk), pl.cdiv(columns, lanes)
    room = room // (chunk * lanes)
    # As many matrices as make a chunk.
    times = pl.cdiv(matrices, most // groups)
    together = pl.cdiv(matrices, times)
    if together > 1 and not one_column:
        wide = evenly(times, chunks[1], room // together)
        columns = wide * lanes
        return RowsBlock(shape, together, chunk, columns, groups, group_size, lanes)
    if one_column:
        high, wide = evenly(matrices * chunks[1], chunks[0], room), 1
    else:
        high, wide = evenly_both(matrices, chunks, room)
    return RowsBlock(shape, 1, high * chunk, wide * lanes, groups, group_size, lanes)
