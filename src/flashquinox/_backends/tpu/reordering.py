"""Which arrays of a leaf are reordered in VMEM, and how large blocks of it are."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from ..._storage.tpu_memory import Axes, filled_size, LANES, rows_of_tile, SUBLANES
from ..._tile.step import TileState
from .block import evenly
from .chip import Chip
from .planes import PlanesBlock
from .reorder import NarrowRef, Reorder, widened
from .reordered import ReorderedBlock
from .rows import RowsBlock
from .view import Orders, View


# Groups of a chunk, at most.
_MOST_GROUPS = 16
# Blocks are buffered twice.
_BUFFERS = 2


@dataclasses.dataclass(frozen=True)
class _Operand:
    """An array of a leaf, and its copies in VMEM."""

    dtype: Any
    # The order of its axes, and that of 8-bit arrays.
    own: Axes
    order: Axes
    of_scales: bool
    is_result: bool

    @property
    def is_moved(self) -> bool:
        # Scales are read and written by single rows.
        return self.of_scales or self.own != self.order

    def sizes(self, block: ReorderedBlock) -> tuple[int, ...]:
        """Of a block, by the number of an axis."""
        return block.scale_sizes if self.of_scales else block.sizes

    def bytes(self, block: ReorderedBlock) -> int:
        """What it takes in VMEM."""
        sizes, itemsize = self.sizes(block), self.dtype.itemsize
        times = _BUFFERS * (2 if self.is_result else 1)
        buffers = times * itemsize * filled_size([sizes[i] for i in self.own], itemsize)
        return buffers + sum([4 * filled_size(x, 4) for x in self.scratch(block)])

    def scratch(self, block: ReorderedBlock) -> list[tuple[int, ...]]:
        """Shapes of arrays of 32 bits: one in the order of 8-bit arrays, and one in its
        own order if that is needed."""
        if not self.is_moved:
            return []
        shapes = [block.scratch_of_scales if self.of_scales else block.elements]
        if self._reorder(block).needs_words:
            sizes = self.sizes(block)
            shapes.append(tuple([sizes[i] for i in self.own]))
        return shapes

    def _reorder(self, block: ReorderedBlock) -> Reorder:
        return Reorder(self.own, self.order, self.sizes(block), self.dtype.itemsize)

    def _steps(self, block: ReorderedBlock) -> list[Reorder]:
        """From a block to each of its scratch."""
        whole = self._reorder(block)
        if not whole.needs_words:
            return [whole]
        return [
            dataclasses.replace(whole, other=self.own),
            dataclasses.replace(whole, itemsize=4),
        ]

    def is_possible(self, block: ReorderedBlock) -> bool:
        return not self.is_moved or all([x.is_possible for x in self._steps(block)])

    def copy(
        self, block: ReorderedBlock, own: Any, scratch: Sequence[Any], back: bool
    ) -> None:
        """From a reference to a block to the first of those to its scratch, or back."""
        refs = [own, *reversed(scratch)]
        steps = list(zip(self._steps(block), refs[:-1], refs[1:], strict=True))
        for step, source, target in reversed(steps) if back else steps:
            step.copy(source, target, back)


def _operands(orders: Orders, grad: Array, old: TileState) -> list[_Operand]:
    """Of a gradient and of all arrays of a state, in their order."""

    def one(x: Array, of_scales: bool = False, is_result: bool = True) -> _Operand:
        own, bytes_ = orders.of_array(x, of_scales), orders.of_bytes
        return _Operand(jnp.dtype(x.dtype), own, bytes_, of_scales, is_result)

    arrays = zip(jtu.tree_leaves(old), old.are_of_groups, strict=True)
    return [one(grad, is_result=False), *[one(x, of_scales=y) for x, y in arrays]]


@dataclasses.dataclass(frozen=True)
class Reordering:
    """A leaf whose arrays are reordered in VMEM: the gradient, and all of a state."""

    orders: Orders
    block: ReorderedBlock
    operands: list[_Operand]

    @property
    def specs(self) -> list[pl.BlockSpec]:
        return [self.block.spec(x.own, x.of_scales) for x in self.operands]

    @property
    def scratch_shapes(self) -> list[Any]:
        return [
            pltpu.VMEM(shape, widened(operand.dtype))
            for operand in self.operands
            for shape in operand.scratch(self.block)
        ]

    def inside(
        self, old: Sequence[Any], new: Sequence[Any], scratch: Sequence[Any]
    ) -> tuple[list[Any], list[Any], Callable[[], None], Callable[[], None]]:
        """From references to blocks of all arrays, the new ones without a gradient:
        those to what a chunk reads and writes, and functions to call before all chunks
        and after them."""
        rest, places = list(scratch), []
        for operand in self.operands:
            count = len(operand.scratch(self.block))
            places.append(rest[:count])
            rest = rest[count:]
        sharing = self.block.sharing
        turn = pl.program_id(len(self.block.grid) - 1)
        is_last = turn == self.block.grid[-1] - 1

        def seen(refs: Sequence[Any], first: int) -> list[Any]:
            of_each = zip(refs, self.operands[first:], places[first:], strict=True)
            return [
                NarrowRef(place[0], operand.dtype) if operand.is_moved else ref
                for ref, operand, place in of_each
            ]

        def copy(refs: Sequence[Any], first: int, back: bool) -> None:
            of_each = zip(refs, self.operands[first:], places[first:], strict=True)
            for ref, operand, place in of_each:
                here = partial(operand.copy, self.block, ref, place, back)
                if not operand.is_moved:
                    continue
                if not operand.of_scales or sharing == 1:
                    here()
                elif back:
                    pl.when(is_last | (turn % sharing == sharing - 1))(here)
                else:
                    pl.when(turn % sharing == 0)(here)

        before, after = partial(copy, old, 0, False), partial(copy, new, 1, True)
        return seen(old, 0), seen(new, 1), before, after


def reordered(view: View, chip: Chip, grad: Array, old: TileState) -> Reordering | None:
    """With blocks as large as there is room for. `None` if there is none: then XLA
    copies; or if nothing is to be reordered."""
    if view.orders is None:
        return None
    operands = _operands(view.orders, grad, old)
    choices = [
        _Choice(view.orders, operands, groups, chip)
        for groups in _groups_of_chunk(view.orders)
    ]
    blocks = [block for x in choices if (block := x.block) is not None]
    if not blocks:
        return None
    return Reordering(view.orders, min(blocks, key=_cost), operands)


def _cost(block: ReorderedBlock) -> float:
    """How long a leaf takes, in units of an element, roughly."""
    whole = [n * size for n, size in zip(block.grid, block.grid_sizes, strict=True)]
    # What belongs to groups takes as long for one as for a register of them.
    return math.prod(whole) * (1 + 0.5 / min(block.chunk_scales[0], _MOST_GROUPS))


def _groups_of_chunk(orders: Orders) -> list[int]:
    """How many a chunk may have: all of a run, or powers of two. The fewer, the
    smaller a block may be."""
    layout = orders.layout
    if layout.axes[0] % len(layout.shape) != orders.of_bytes[-2]:
        return [1]
    most = min(_MOST_GROUPS, 2 ** (layout.groups - 1).bit_length())
    powers = [2**i for i in reversed(range(most.bit_length()))]
    return [layout.groups, *powers] if layout.groups < most else powers


@dataclasses.dataclass(frozen=True)
class _Choice:
    orders: Orders
    operands: list[_Operand]
    # Of a chunk, along their axis.
    groups: int
    chip: Chip

    @property
    def block(self) -> ReorderedBlock | None:
        sizes, sharing = self._smallest
        if not self._fits(sizes, sharing):
            return None
        *outer, rows, columns = self.orders.of_bytes
        for axis in (columns, rows, *reversed(outer)):
            is_group_axis = axis == self._group_axis
            # All rows of a block are in each chunk, unless groups run along them.
            if (axis == rows and not is_group_axis) or (is_group_axis and sharing > 1):
                continue
            count = pl.cdiv(self._shape[axis], sizes[axis])
            most = 1
            for n in [*[2**i for i in range(1, count.bit_length())], count]:
                if self._fits(_times(sizes, axis, n), sharing):
                    most = max(most, n)
            times = math.prod(self._of(sizes, sharing).grid) // count
            sizes = _times(sizes, axis, evenly(times, count, most))
        return self._of(sizes, sharing)

    @property
    def _shape(self) -> tuple[int, ...]:
        return self.orders.layout.shape

    @property
    def _group_axis(self) -> int:
        return self.orders.layout.axes[0] % len(self._shape)

    @property
    def _along_rows(self) -> bool:
        return self._group_axis == self.orders.of_bytes[-2]

    @property
    def _group_size(self) -> int:
        """There may be fewer planes than a group has elements."""
        size = self.orders.layout.group_size
        return size if self._along_rows else min(size, self._shape[self._group_axis])

    @property
    def _all_groups(self) -> int:
        """Along their axis."""
        return pl.cdiv(self._shape[self._group_axis], self._group_size)

    @property
    def _smallest(self) -> tuple[tuple[int, ...], int]:
        """The smallest blocks of elements that hold whole tiles of all arrays, and how
        many of these share a block of scales."""
        shape, group_axis, groups = self._shape, self._group_axis, self.groups
        units = [1 for _ in shape]
        units[group_axis] = groups * self._group_size
        for operand in self.operands:
            lengths = self.orders.layout.scale_shape if operand.of_scales else shape
            *_, rows, columns = operand.own
            tile = rows_of_tile(lengths[rows], operand.dtype.itemsize)
            for axis, unit in ((rows, tile), (columns, LANES)):
                if operand.of_scales and axis == group_axis:
                    groups = math.lcm(groups, unit)
                else:
                    units[axis] = math.lcm(units[axis], unit)
        sizes = [min(pair) for pair in zip(units, shape, strict=True)]
        sizes[group_axis] = units[group_axis]
        here = sizes[group_axis] // self._group_size
        sharing = math.lcm(groups, here) // here
        return tuple(sizes), min(sharing, pl.cdiv(self._all_groups, here))

    def _fits(self, sizes: tuple[int, ...], sharing: int) -> bool:
        block = self._of(sizes, sharing)
        taken = sum([operand.bytes(block) for operand in self.operands])
        possible = all([operand.is_possible(block) for operand in self.operands])
        # Loads with a stride, as of words, are from arrays of no more lanes. So are
        # those of a part of a tile, as of scales of a few groups.
        *_, groups, columns = block.scratch_of_scales
        whole_tiles = groups == self.groups or self.groups % SUBLANES == 0
        tiles = whole_tiles or not self._along_rows
        wide = tiles and not self.chip.arithmetic.only_words
        possible = possible and (wide or columns <= LANES)
        return taken <= self.chip.block_bytes and possible

    def _of(self, sizes: tuple[int, ...], sharing: int) -> ReorderedBlock:
        shape, axis = self._shape, self._group_axis
        *_, rows, columns = self.orders.of_bytes
        lanes = min(LANES, sizes[columns])
        if self._along_rows:
            inside = RowsBlock(
                shape=(1, shape[rows], shape[columns]),
                matrices=1,
                rows=sizes[rows],
                columns=sizes[columns],
                groups=self.groups,
                group_size=self._group_size,
                lanes=lanes,
            )
        else:
            inside = PlanesBlock(
                shape=(1, shape[axis], 1, shape[rows], shape[columns]),
                planes=sizes[axis],
                columns=sizes[columns],
                group_size=self._group_size,
                rows=sizes[rows],
                lanes=lanes,
            )
        return ReorderedBlock(
            inside=inside,
            order=self.orders.of_bytes,
            shape=shape,
            sizes=sizes,
            group_axis=axis,
            group_size=self._group_size,
            sharing=sharing,
        )


def _times(sizes: tuple[int, ...], axis: int, count: int) -> tuple[int, ...]:
    """More along one axis."""
    return (*sizes[:axis], count * sizes[axis], *sizes[axis + 1 :])
