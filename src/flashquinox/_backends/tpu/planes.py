"""Blocks of leaves whose groups run along an axis that is neither the rows nor the
columns in memory. Where there are few rows, as there are heads, groups along them would
be short."""

import dataclasses
from typing import Any

import jax.lax as lax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Shaped

from ..._storage.codec import Reduction
from ..._storage.tpu_memory import LANES, SUBLANES, TILE_ROWS
from .block import AbstractChunk, AbstractGridBlock, evenly_both


# Of a piece, in registers of float32.
_PIECE = 4


@dataclasses.dataclass(frozen=True)
class PlanesBlock(AbstractGridBlock):
    """A block of `(before, planes, between, rows, columns)`. A chunk is one group of
    planes in each of some rows and 128 lanes."""

    shape: tuple[int, ...]
    planes: int
    columns: int
    # Of a chunk.
    group_size: int
    rows: int
    lanes: int

    @property
    def grid(self) -> tuple[int, int, int, int, int]:
        before, planes, between, rows, columns = self.shape
        planes, rows = pl.cdiv(planes, self.planes), pl.cdiv(rows, self.rows)
        return before, planes, between, rows, pl.cdiv(columns, self.columns)

    @property
    def elements(self) -> tuple[int, int, int, int, int]:
        return 1, self.planes, 1, self.rows, self.columns

    @property
    def scales(self) -> tuple[int, int, int, int, int]:
        return 1, self.planes // self.group_size, 1, self.rows, self.columns

    def scales_at(self, *index: Any) -> tuple[Any, ...]:
        return index

    @property
    def chunks(self) -> int:
        return self.planes // self.group_size * self.columns // self.lanes

    @property
    def pieces(self) -> int:
        return self.group_size // self.piece[0]

    @property
    def piece(self) -> tuple[int, int, int]:
        most = max(1, _PIECE // pl.cdiv(self.rows, SUBLANES))
        planes = max(n for n in range(1, most + 1) if self.group_size % n == 0)
        return planes, self.rows, self.lanes

    @property
    def chunk_scales(self) -> tuple[int, int]:
        return self.rows, self.lanes

    def reduced_piece(
        self, reduction: Reduction, x: Shaped[Array, "planes rows lanes"]
    ) -> Shaped[Array, "rows lanes"]:
        return reduction(x, axis=0)

    def at(self, index: Any, block_index: tuple[Any, ...]) -> "_PlanesChunk":
        wide = self.columns // self.lanes
        group, k = index // wide, index % wide
        lanes = pl.ds(pl.multiple_of(k * self.lanes, self.lanes), self.lanes)
        return _PlanesChunk(self, group, lanes, block_index)

    def constants_of(self, piece: int) -> Any:
        del piece
        return slice(None)

    def extremes_of(self, piece: int) -> Any:
        return piece

    @property
    def extremes(self) -> tuple[int, int, int]:
        return self.pieces, self.rows, self.lanes

    def reduced(
        self, reduction: Reduction, extremes: Shaped[Array, "..."]
    ) -> Shaped[Array, "rows lanes"]:
        return reduction(extremes, axis=0)

    def spread(self, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        return x


@dataclasses.dataclass(frozen=True)
class _PlanesChunk(AbstractChunk):
    block: PlanesBlock
    group: Any
    lanes: Any
    block_index: tuple[Any, ...]

    @property
    def scales(self) -> tuple[Any, ...]:
        return 0, self.group, 0, slice(None), self.lanes

    def elements(self, piece: int) -> tuple[Any, ...]:
        count, *_ = self.block.piece
        planes = pl.ds(self.group * self.block.group_size + piece * count, count)
        return 0, planes, 0, slice(None), self.lanes

    def present(self, piece: int) -> Bool[Array, "planes rows lanes"] | None:
        block = self.block
        if block.shape[1] % block.group_size == 0:
            return None
        first = self.block_index[1] * block.planes + self.group * block.group_size
        planes = lax.broadcasted_iota(jnp.int32, block.piece, 0)
        return first + piece * block.piece[0] + planes < block.shape[1]


def planes_block(shape: tuple[int, ...], group_size: int, room: int) -> PlanesBlock:
    """As many whole chunks as there is room for, evenly divided.

    **Arguments:**

    - `shape`: of the view.
    - `group_size`: how many planes a group has, at most.
    - `room`: the elements that fit into VMEM.
    """
    before, planes, between, rows, columns = shape
    group_size = min(group_size, planes)
    height, lanes = min(rows, TILE_ROWS), min(LANES, columns)
    chunks = pl.cdiv(planes, group_size), pl.cdiv(columns, lanes)
    # Tiles of 8-bit integers are filled up.
    room = room // (group_size * -(-height // SUBLANES) * SUBLANES * lanes)
    times = before * between * pl.cdiv(rows, height)
    high, wide = evenly_both(times, chunks, room)
    return PlanesBlock(
        shape, high * group_size, wide * lanes, group_size, height, lanes
    )
