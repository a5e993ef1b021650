"""Blocks of leaves whose arrays XLA lays out in different orders. In VMEM, they are
brought into the order of 8-bit arrays, and results back into their own."""

import dataclasses
import math
from typing import Any

from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Shaped

from ..._storage.codec import Reduction
from ..._storage.tpu_memory import Axes
from .block import AbstractChunk, AbstractGridBlock, unravel
from .planes import PlanesBlock
from .rows import RowsBlock


@dataclasses.dataclass(frozen=True)
class ReorderedBlock(AbstractGridBlock):
    """A block of a leaf, with all axes in the order of 8-bit arrays. A chunk is one of
    rows or planes, at one place of all other axes.

    A block of scales may belong to several blocks of elements that follow one another
    along the axis of the groups: where that is the columns of the scales, 128 groups
    are together. The grid has this axis last, so that scales stay in VMEM meanwhile.
    """

    inside: RowsBlock | PlanesBlock
    # Of the leaf, in the order of 8-bit arrays.
    order: Axes
    # By the number of an axis, not in that order, of the leaf and of a block.
    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    group_axis: int
    group_size: int
    # How many blocks of elements share one of scales.
    sharing: int

    @property
    def _grid_axes(self) -> Axes:
        return (*[x for x in self.order if x != self.group_axis], self.group_axis)

    @property
    def grid(self) -> tuple[int, ...]:
        return tuple([pl.cdiv(self.shape[i], self.sizes[i]) for i in self._grid_axes])

    @property
    def grid_sizes(self) -> tuple[int, ...]:
        """Of a block, along each axis of the grid."""
        return tuple([self.sizes[i] for i in self._grid_axes])

    @property
    def elements(self) -> tuple[int, ...]:
        return tuple([self.sizes[i] for i in self.order])

    @property
    def scales(self) -> tuple[int, ...]:
        return tuple([self.scale_sizes[i] for i in self.order])

    def scales_at(self, *index: Any) -> tuple[Any, ...]:
        return (*index[:-1], index[-1] // self.sharing)

    @property
    def _groups(self) -> int:
        """Of a block of elements, along their axis."""
        return self.sizes[self.group_axis] // self.group_size

    @property
    def scale_sizes(self) -> tuple[int, ...]:
        """Of a block of scales, by the number of an axis."""
        groups = pl.cdiv(self.shape[self.group_axis], self.group_size)
        return self._with_groups(min(groups, self.sharing * self._groups))

    @property
    def scratch_of_scales(self) -> tuple[int, ...]:
        """With room for all groups of whole chunks."""
        sizes = self._with_groups(self.sharing * self._groups)
        return tuple([sizes[i] for i in self.order])

    def _with_groups(self, groups: int) -> tuple[int, ...]:
        sizes = list(self.sizes)
        sizes[self.group_axis] = groups
        return tuple(sizes)

    def spec(self, own: Axes, of_scales: bool) -> pl.BlockSpec:
        """Of an array with its axes in its own order."""
        sizes = self.scale_sizes if of_scales else self.sizes
        places = [self._grid_axes.index(axis) for axis in own]

        def index_map(*index: Any) -> tuple[Any, ...]:
            index = self.scales_at(*index) if of_scales else index
            return tuple([index[place] for place in places])

        return pl.BlockSpec(tuple([sizes[axis] for axis in own]), index_map)

    @property
    def _outer(self) -> tuple[int, ...]:
        """The lengths of axes of which a chunk has one index."""
        outer = self.order[:-2]
        return tuple([self.sizes[axis] for axis in outer if axis != self.group_axis])

    @property
    def chunks(self) -> int:
        return math.prod(self._outer) * self.inside.chunks

    @property
    def pieces(self) -> int:
        return self.inside.pieces

    @property
    def piece(self) -> tuple[int, ...]:
        return self.inside.piece

    @property
    def chunk_scales(self) -> tuple[int, int]:
        return self.inside.chunk_scales

    def reduced_piece(
        self, reduction: Reduction, x: Shaped[Array, "..."]
    ) -> Shaped[Array, "..."]:
        return self.inside.reduced_piece(reduction, x)

    def at(self, index: Any, block_index: tuple[Any, ...]) -> "_ReorderedChunk":
        outer = unravel(index // self.inside.chunks, self._outer)
        turn = block_index[-1]
        # Of the other indices, only plain ones would matter: that of matrices.
        inside = (0, turn, *[0 for _ in self.inside.shape[2:]])
        chunk = self.inside.at(index % self.inside.chunks, inside)
        first = 0 if self.sharing == 1 else turn % self.sharing * self._groups
        return _ReorderedChunk(self, chunk, outer, first)

    def constants_of(self, piece: int) -> Any:
        return self.inside.constants_of(piece)

    def extremes_of(self, piece: int) -> Any:
        return self.inside.extremes_of(piece)

    @property
    def extremes(self) -> tuple[int, ...]:
        return self.inside.extremes

    def reduced(
        self, reduction: Reduction, extremes: Shaped[Array, "..."]
    ) -> Shaped[Array, "groups lanes"]:
        return self.inside.reduced(reduction, extremes)

    def spread(self, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        return self.inside.spread(x)


@dataclasses.dataclass(frozen=True)
class _ReorderedChunk(AbstractChunk):
    block: ReorderedBlock
    inside: AbstractChunk
    outer: tuple[Any, ...]
    # Of the block of elements, in the block of scales.
    first_group: Any

    @property
    def scales(self) -> tuple[Any, ...]:
        _, groups, *rest = self.inside.scales
        if isinstance(self.block.inside, RowsBlock):
            count = self.block.inside.groups
            start = pl.multiple_of(self.first_group + groups.start, count)
            return self._index(pl.ds(start, count), *rest)
        return self._index(self.first_group + groups, *rest)

    def elements(self, piece: int) -> tuple[Any, ...]:
        _, *rest = self.inside.elements(piece)
        return self._index(*rest)

    def _index(self, groups: Any, *rest: Any) -> tuple[Any, ...]:
        if isinstance(self.block.inside, RowsBlock):
            return (*self.outer, groups, *rest)
        place = self.block.order.index(self.block.group_axis)
        # Without the axes between planes and rows.
        rows, lanes = rest[1:]
        return (*self.outer[:place], groups, *self.outer[place:], rows, lanes)

    def present(self, piece: int) -> Bool[Array, "..."] | None:
        return self.inside.present(piece)
