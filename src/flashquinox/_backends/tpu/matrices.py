"""Blocks of leaves whose groups run along the rows, where each matrix has few of them:
a chunk has a group of each of several matrices."""

import dataclasses
from typing import Any

import jax.lax as lax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Shaped

from ..._storage.codec import Reduction
from .block import AbstractChunk, AbstractGridBlock, evenly, LANES, SUBLANES


@dataclasses.dataclass(frozen=True)
class MatricesBlock(AbstractGridBlock):
    """A block of `(before, matrices, between, rows, columns)`, in elements. A piece is
    a group of each of 128 lanes."""

    shape: tuple[int, ...]
    matrices: int
    rows: int
    columns: int
    # Of a chunk.
    group_size: int
    lanes: int

    @property
    def grid(self) -> tuple[int, ...]:
        before, matrices, between, rows, columns = self.shape
        matrices, rows = pl.cdiv(matrices, self.matrices), pl.cdiv(rows, self.rows)
        return before, matrices, between, rows, pl.cdiv(columns, self.columns)

    @property
    def elements(self) -> tuple[int, ...]:
        return 1, self.matrices, 1, self.rows, self.columns

    @property
    def scales(self) -> tuple[int, ...]:
        return 1, 1, self.rows // self.group_size, self.matrices, self.columns

    def scales_at(self, *index: Any) -> tuple[Any, ...]:
        before, matrices, between, rows, columns = index
        return before, between, rows, matrices, columns

    @property
    def chunks(self) -> int:
        return self.rows // self.group_size * (self.columns // self.lanes)

    @property
    def pieces(self) -> int:
        return self.matrices

    @property
    def piece(self) -> tuple[int, int]:
        return self.group_size, self.lanes

    @property
    def chunk_scales(self) -> tuple[int, int]:
        return self.matrices, self.lanes

    @property
    def _sublanes(self) -> int:
        """How many rows are left of a piece: all of a register, if pieces are whole
        ones."""
        return SUBLANES if self.group_size % SUBLANES == 0 else 1

    def reduced_piece(
        self, reduction: Reduction, x: Shaped[Array, "rows lanes"]
    ) -> Shaped[Array, "sublanes lanes"]:
        if self._sublanes == 1:
            return reduction(x, axis=0, keepdims=True)
        return reduction(x.reshape(-1, SUBLANES, self.lanes), axis=0)

    def at(self, index: Any, block_index: tuple[Any, ...]) -> "_MatricesChunk":
        wide = self.columns // self.lanes
        group, k = index // wide, index % wide
        lanes = pl.ds(pl.multiple_of(k * self.lanes, self.lanes), self.lanes)
        return _MatricesChunk(self, group, lanes, block_index)

    def constants_of(self, piece: int) -> Any:
        return pl.ds(piece, 1)

    @property
    def extremes(self) -> tuple[int, int]:
        return self.matrices * self._sublanes, self.lanes

    def extremes_of(self, piece: int) -> Any:
        if self._sublanes == 1:
            return pl.ds(piece, 1)
        return pl.ds(piece, SUBLANES, stride=self.matrices)

    def reduced(
        self, reduction: Reduction, extremes: Shaped[Array, "..."]
    ) -> Shaped[Array, "matrices lanes"]:
        x = extremes.reshape(-1, self.matrices, self.lanes)
        return reduction(x, axis=0)

    def spread(self, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        return x


@dataclasses.dataclass(frozen=True)
class _MatricesChunk(AbstractChunk):
    block: MatricesBlock
    group: Any
    lanes: Any
    block_index: tuple[Any, ...]

    @property
    def scales(self) -> tuple[Any, ...]:
        return 0, 0, self.group, slice(None), self.lanes

    def elements(self, piece: int) -> tuple[Any, ...]:
        size = self.block.group_size
        rows = slice(None)
        if self.block.rows > size:
            rows = pl.ds(pl.multiple_of(self.group * size, size), size)
        return 0, piece, 0, rows, self.lanes

    def present(self, piece: int) -> Bool[Array, "rows lanes"] | None:
        del piece
        block = self.block
        last, left = divmod(block.shape[3], block.group_size)
        if left == 0:
            return None
        group = self.block_index[3] * (block.rows // block.group_size) + self.group
        rows = lax.broadcasted_iota(jnp.int32, block.piece, 0)
        return rows < jnp.where(group == last, left, block.group_size)


def matrices_block(
    shape: tuple[int, ...], group_size: int, matrices: int, room: int
) -> MatricesBlock:
    """As many whole chunks as there is room for, evenly divided.

    **Arguments:**

    - `shape`: of the view.
    - `group_size`: how many rows a group has, at most.
    - `matrices`: how many matrices a chunk has, at most.
    - `room`: the elements that fit into VMEM.
    """
    before, all_matrices, between, rows, columns = shape
    matrices, group_size = min(matrices, all_matrices), min(group_size, rows)
    lanes = min(LANES, columns)
    chunks = pl.cdiv(rows, group_size), pl.cdiv(columns, lanes)
    # Tiles are filled up.
    height = pl.cdiv(group_size, SUBLANES) * SUBLANES
    room = room // (matrices * height * lanes)
    times = before * between * pl.cdiv(all_matrices, matrices)
    wide, high = evenly(times * chunks[0], chunks[1], room), 1
    if wide == chunks[1]:
        high = evenly(times, chunks[0], room // wide, wide)
    return MatricesBlock(
        shape, matrices, high * group_size, wide * lanes, group_size, lanes
    )
