"""How kernels for GPUs see a leaf: as a number of equal tiles."""

import abc
import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.experimental import pallas as pl
from jaxtyping import Array

from ..._storage.layout import Layout
from ..._tile.tile import TileState
from .slices import below, Places, tile_start


def view_of(layout: Layout, grad: Array, old: TileState) -> "AbstractView | None":
    """How the kernel sees a leaf. `None` if it cannot take it: then plain XLA does."""
    dtypes = {jnp.dtype(x.dtype) for x in jtu.tree_leaves((old, grad))}
    size = old.weight.size
    # Triton computes addresses with 32 bits.
    if jnp.dtype(jnp.float64) in dtypes or not 0 < size < 2**31:
        return None
    if not jtu.tree_leaves(old.scales):
        return Elements(1, size, Elements.row)
    kind = Lanes if layout.columns == 1 else Rows
    leaf = layout.matrices, layout.run, layout.group_size
    return kind(*leaf) if kind is Lanes else Rows(*leaf, layout.columns)


class Tile(NamedTuple):
    """A tile of a part of a leaf."""

    index: Any
    # The number 0, which Triton does not know to be 0.
    zero: Any


class AbstractPart(abc.ABC):
    """Tiles of a leaf whose places are computed alike."""

    @property
    @abc.abstractmethod
    def tiles(self) -> int:
        """The number of tiles."""

    @abc.abstractmethod
    def places(self, tile: Tile) -> tuple[Places, Places]:
        """Where the elements of a tile are, and its scales: of a leaf without scales,
        anything."""

    # Below, the arrays of a tile are in a list, of which the last ones are `scales`
    # arrays of scales.

    def load(self, refs: Sequence[Any], scales: int, tile: Tile) -> list[Array]:
        """The arrays of a tile."""
        (elements, groups), first = self.places(tile), len(refs) - scales
        return elements.load(refs[:first]) + groups.load(refs[first:])

    def store(
        self, refs: Sequence[Any], scales: int, tile: Tile, values: Sequence[Array]
    ) -> None:
        """Writes the arrays of a tile."""
        (elements, groups), first = self.places(tile), len(refs) - scales
        elements.store(refs[:first], values[:first])
        groups.store(refs[first:], values[first:])


@dataclasses.dataclass(frozen=True)
class AbstractView(abc.ABC):
    """A leaf as parts, whose tiles are alike. Hashable, for `jit`. Its arrays are
    flattened, which moves nothing.

    It is seen as matrices that lie one after the other, whose groups run along the
    columns: `run` elements in each column, one row below the other.
    """

    matrices: int
    run: int
    group_size: int

    # The axis of a tile that its groups run along.
    axis: ClassVar[int]
    # The largest number of leaves that share a kernel. Triton's time to compile grows
    # with its square.
    most_leaves: ClassVar[int] = 8
    # Elements per tile.
    tile_size: ClassVar[int]

    @property
    @abc.abstractmethod
    def warps(self) -> int:
        """Warps per tile."""

    @property
    def kind(self) -> tuple[Any, ...]:
        """What views must have in common for their tiles to be alike."""
        return type(self), self.group_size

    @property
    @abc.abstractmethod
    def parts(self) -> tuple[AbstractPart, ...]: ...

    @cached_property
    def groups(self) -> int:
        """The groups of a run, of which the last may be partial."""
        return pl.cdiv(self.run, self.group_size)

    @cached_property
    def slots(self) -> int:
        """The elements that a tile has room for in each group: Triton's arrays have
        powers of two."""
        return pl.next_power_of_2(self.group_size)

    @property
    def slot_numbers(self) -> Any:
        """For each slot of a group, the number of its element. What is left over has a
        copy of the last one."""
        numbers = jnp.arange(self.slots)
        # Of a minimum, Triton does not know that it is consecutive.
        is_full = self.slots == self.group_size
        return numbers if is_full else jnp.minimum(numbers, self.group_size - 1)


@dataclasses.dataclass(frozen=True)
class Lanes(AbstractView):
    """Groups of elements that are consecutive in memory."""

    axis: ClassVar[int] = -1
    # 512 elements are 32 threads x 16, one 16-byte load of each thread and moment. What
    # all threads of a group compute is then computed by few, and the programs of one
    # warp do not wait for others.
    tile_size: ClassVar[int] = 512

    @property
    def warps(self) -> int:
        return 1

    @property
    def parts(self) -> tuple[AbstractPart, ...]:
        rest = self.run % self.group_size
        whole = 0
        if rest == 0:
            whole = self.matrices * self.groups
        elif self.matrices == 1:
            # All groups but the last one.
            whole = self.groups - 1
        last = self.matrices * self.groups - whole
        parts = []
        if whole > 0:
            parts.append(_WholeGroups(self, whole))
        if last > 0:
            parts.append(_PartialGroups(self, whole, last))
        return tuple(parts)

    @cached_property
    def groups_of_tile(self) -> int:
        return max(1, self.tile_size // self.slots)

    def tile_groups(self, tile: Tile, first: int, count: int) -> tuple[Any, Any]:
        """The numbers of the groups of a tile, of `count` that begin with `first`; and
        which of them exist."""
        start = tile_start(tile.index, self.groups_of_tile, count)
        groups = start + jnp.arange(self.groups_of_tile)
        exist = None if count % self.groups_of_tile == 0 else groups < count
        return groups + first, exist


@dataclasses.dataclass(frozen=True)
class Elements(Lanes):
    """A leaf without scales, in groups that nothing depends on."""

    row: ClassVar[int] = 32
    # More than of leaves with scales: they have fewer arrays, and most are small.
    most_leaves: ClassVar[int] = 16


@dataclasses.dataclass(frozen=True)
class _WholeGroups(AbstractPart):
    """The first groups of a leaf, which are whole and lie one after the other."""

    view: Lanes
    groups: int

    @property
    def tiles(self) -> int:
        return pl.cdiv(self.groups, self.view.groups_of_tile)

    def places(self, tile: Tile) -> tuple[Places, Places]:
        groups, exist = self.view.tile_groups(tile, 0, self.groups)
        slots = self.view.slot_numbers
        index = groups[:, None] * self.view.group_size + slots[None, :]
        return Places(index, _broadcast(exist, index.shape, 0)), Places(groups, exist)


@dataclasses.dataclass(frozen=True)
class _PartialGroups(AbstractPart):
    """Groups of which some are partial. They are filled up with the last element of
    their run, again and again."""

    view: Lanes
    first: int
    groups: int

    @property
    def tiles(self) -> int:
        return pl.cdiv(self.groups, self.view.groups_of_tile)

    def places(self, tile: Tile) -> tuple[Places, Places]:
        view = self.view
        groups, exist = view.tile_groups(tile, self.first, self.groups)
        matrix, group = _divided(groups, view.groups)
        place = group[:, None] * view.group_size + view.slot_numbers[None, :]
        index = matrix[:, None] * view.run + jnp.minimum(place, view.run - 1)
        return Places(index, _broadcast(exist, index.shape, 0)), Places(groups, exist)


@dataclasses.dataclass(frozen=True)
class Rows(AbstractView):
    """Groups of consecutive rows, in all columns of several matrices."""

    columns: int

    axis: ClassVar[int] = -2
    # 128 columns of groups of 32 rows: whole sectors of memory in each row.
    tile_size: ClassVar[int] = 4096
    # The neighbouring columns of one thread, which one instruction loads. With 4, it
    # needs more registers than it gains (measured on an H100).
    neighbours: ClassVar[int] = 2

    @property
    def warps(self) -> int:
        return 4

    @property
    def parts(self) -> tuple[AbstractPart, ...]:
        return (_RowGroups(self),)

    @cached_property
    def columns_of_tile(self) -> int:
        return max(self.neighbours, self.tile_size // self.slots)

    @cached_property
    def tiles_across(self) -> int:
        return pl.cdiv(self.columns, self.columns_of_tile)


@dataclasses.dataclass(frozen=True)
class _RowGroups(AbstractPart):
    """All groups of a leaf."""

    view: Rows

    @property
    def tiles(self) -> int:
        return self.view.matrices * self.view.groups * self.view.tiles_across

    def places(self, tile: Tile) -> tuple[Places, Places]:
        view, across = self.view, self.view.tiles_across
        # Triton gives a thread as many neighbours as it knows to be aligned.
        offset = view.neighbours * below(tile.zero, 2)
        start = tile_start(tile.index % across, view.columns_of_tile, view.columns)
        columns = start + offset + jnp.arange(view.columns_of_tile)
        exist = (
            None if view.columns % view.columns_of_tile == 0 else columns < view.columns
        )
        group = below(tile.index // across, view.matrices * view.groups)
        rows = group * view.group_size + view.slot_numbers
        if view.run % view.group_size != 0:
            matrix, place = _divided(group, view.groups)
            place = place * view.group_size + view.slot_numbers
            rows = matrix * view.run + jnp.minimum(place, view.run - 1)
        index = rows[:, None] * view.columns + columns[None, :]
        of_groups = group * view.columns + columns
        return Places(index, _broadcast(exist, index.shape, 1)), Places(
            of_groups, exist
        )


def _divided(x: Any, by: int) -> tuple[Any, Any]:
    """Quotient and remainder of numbers that are not negative."""
    divisor = jnp.full_like(x, by)
    return lax.div(x, divisor), lax.rem(x, divisor)


def _broadcast(mask: Any, shape: tuple[int, int], axis: int) -> Any:
    """A mask for one axis of a tile, for all elements."""
    if mask is None:
        return None
    return jnp.broadcast_to(mask[:, None] if axis == 0 else mask[None, :], shape)
