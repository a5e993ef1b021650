"""Blocks of leaves whose groups run along the rows, where each matrix has few of them:
a chunk has a group of each of several matrices."""

import dataclasses
import math
from typing import Any

import jax.lax as lax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Shaped

from ..._storage.codec import Reduction
from ..._storage.tpu_memory import LANES, SUBLANES
from .block import AbstractChunk, AbstractGridBlock, evenly_both
from .view import View


@dataclasses.dataclass(frozen=True)
class MatricesBlock(AbstractGridBlock):
    """A block of `(..., matrices, ..., rows, columns)`, in elements. A piece is a group
    of each of 128 lanes."""

    shape: tuple[int, ...]
    # Which of these axes are the matrices.
    axis: int
    # In the same order, the axes of the scales.
    scale_axes: tuple[int, ...]
    matrices: int
    rows: int
    columns: int
    # Of a chunk.
    group_size: int
    lanes: int

    @property
    def grid(self) -> tuple[int, ...]:
        pairs = zip(self.shape, self.elements, strict=True)
        return tuple([pl.cdiv(length, part) for length, part in pairs])

    @property
    def elements(self) -> tuple[int, ...]:
        return self._index(1, self.matrices, self.rows, self.columns)

    @property
    def scales(self) -> tuple[int, ...]:
        groups = self.rows // self.group_size
        return self.scales_at(*self._index(1, self.matrices, groups, self.columns))

    def scales_at(self, *index: Any) -> tuple[Any, ...]:
        return tuple([index[axis] for axis in self.scale_axes])

    def _index(self, other: Any, matrices: Any, rows: Any, columns: Any) -> Any:
        """What belongs to each axis of the view."""
        outer: list[Any] = [other for _ in self.shape[:-2]]
        outer[self.axis] = matrices
        return (*outer, rows, columns)

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
        block = self.block
        index = block._index(0, slice(None), self.group, self.lanes)
        return block.scales_at(*index)

    def elements(self, piece: int) -> tuple[Any, ...]:
        size = self.block.group_size
        rows = slice(None)
        if self.block.rows > size:
            rows = pl.ds(pl.multiple_of(self.group * size, size), size)
        return self.block._index(0, piece, rows, self.lanes)

    def present(self, piece: int) -> Bool[Array, "rows lanes"] | None:
        del piece
        block = self.block
        last, left = divmod(block.shape[-2], block.group_size)
        if left == 0:
            return None
        group = self.block_index[-2] * (block.rows // block.group_size) + self.group
        rows = lax.broadcasted_iota(jnp.int32, block.piece, 0)
        return rows < jnp.where(group == last, left, block.group_size)


def matrices_block(view: View, most: int, room: int) -> MatricesBlock:
    """As many whole chunks as there is room for, evenly divided.

    **Arguments:**

    - `view`: of the leaf.
    - `most`: how many matrices a chunk has, at most.
    - `room`: the elements that fit into VMEM.
    """
    elements, scales = view.elements.axes, view.scales.axes
    shape = view.elements.lengths
    axis = elements.index(scales[-2])
    *_, rows, columns = shape
    matrices, group_size = min(most, shape[axis]), min(view.group_size, rows)
    lanes = min(LANES, columns)
    chunks = pl.cdiv(rows, group_size), pl.cdiv(columns, lanes)
    # Tiles are filled up.
    height = pl.cdiv(group_size, SUBLANES) * SUBLANES
    room = room // (matrices * height * lanes)
    times = math.prod(shape[:-2]) // shape[axis] * pl.cdiv(shape[axis], matrices)
    high, wide = evenly_both(times, chunks, room)
    return MatricesBlock(
        shape=shape,
        axis=axis,
        scale_axes=tuple([elements.index(axes) for axes in scales]),
        matrices=matrices,
        rows=high * group_size,
        columns=wide * lanes,
        group_size=group_size,
        lanes=lanes,
    )
