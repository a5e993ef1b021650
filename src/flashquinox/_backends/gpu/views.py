"""How kernels for GPUs see a leaf: as a number of equal tiles."""

import abc
import dataclasses
from collections.abc import Hashable, Sequence
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
    tile_size = 512 if size > _SMALL else 128
    if not jtu.tree_leaves(old.scales):
        return Elements(1, size, _ELEMENTS_OF_ROW, tile_size)
    leaf = layout.matrices, layout.run, layout.group_size
    if layout.columns == 1:
        return Lanes(*leaf, max(tile_size, pl.next_power_of_2(layout.group_size)))
    return Rows(*leaf, _TILE_OF_ROWS, layout.columns)


# 512 elements are 32 threads x 16, one 16-byte load of each thread and moment. What all
# threads of a group compute is then computed by few, and the programs of one warp do
# not wait for others. Of leaves of at most so many elements, tiles are smaller: what
# takes long there is to load the program, and that is shorter.
_SMALL = 2**17
# 128 columns of groups of 32 rows: whole sectors of memory in each row.
_TILE_OF_ROWS = 4096
# Larger leaves share a kernel with few others.
_LARGE = 2**19
# Of so many, a leaf takes no longer if it is loaded element by element.
_TINY = 2**13
# The rows of leaves without groups.
_ELEMENTS_OF_ROW = 32


class Tile(NamedTuple):
    """A tile of a part of a leaf."""

    index: Any
    # What the part says of itself: see `AbstractPart.numbers`.
    numbers: Sequence[Any]
    # The number 0, which Triton does not know to be 0.
    zero: Any


class AbstractPart(abc.ABC):
    """Tiles of a leaf whose places are computed alike. Parts of several leaves share a
    kernel."""

    @property
    @abc.abstractmethod
    def tiles(self) -> int:
        """The number of tiles."""

    @property
    @abc.abstractmethod
    def numbers(self) -> tuple[int, ...]:
        """What places depend on, and kernels choose for a part: so that one computation
        of places serves all parts of a kernel."""

    @property
    @abc.abstractmethod
    def code(self) -> Hashable:
        """What places depend on beside that. Of parts of a class, these are all equal
        after `together`, or else each part computes its own places."""

    @abc.abstractmethod
    def places(self, tile: Tile) -> tuple[Places, Places]:
        """Where the elements of a tile are, and its scales: of a leaf without scales,
        anything."""

    def together(self, parts: "Sequence[AbstractPart]") -> "AbstractPart":
        """This part in a kernel with these others."""
        del parts
        return self


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
    # The elements of a tile.
    tile_size: int

    # The axis of a tile that its groups run along.
    axis: ClassVar[int]
    # Warps per tile.
    warps: ClassVar[int]

    @property
    @abc.abstractmethod
    def parts(self) -> tuple[AbstractPart, ...]: ...

    @property
    def one_part(self) -> AbstractPart:
        """The whole leaf as one part, however it is best divided."""
        (part,) = self.parts
        return part

    @property
    def kind(self) -> tuple[Any, ...]:
        """What views must have in common for their tiles to be alike."""
        return type(self), self.group_size, self.tile_size

    @property
    def most_leaves(self) -> int:
        """How many leaves share a kernel, at most. Many, as each launch takes time; but
        Triton's time to compile grows with the square of the number; and with eight
        leaves of 2^21 elements, a kernel took 10 % longer on an H100 than two with four
        leaves."""
        return 4 if self.matrices * self.run > _LARGE else 8

    @property
    def tiles(self) -> int:
        """The number of tiles, of all parts."""
        return sum([part.tiles for part in self.parts])

    @property
    def groups(self) -> int:
        """The groups of a run, of which the last may be partial."""
        return pl.cdiv(self.run, self.group_size)

    @property
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
    warps: ClassVar[int] = 1

    @property
    def parts(self) -> tuple[AbstractPart, ...]:
        whole, groups = 0, self.matrices * self.groups
        if self.run % self.group_size == 0:
            whole = groups
        elif self.matrices == 1:
            # All but the last one.
            whole = groups - 1
        parts = []
        if whole > 0:
            parts.append(_WholeGroups(self, whole))
        if groups > whole:
            parts.append(_PartialGroups(self, whole, groups - whole))
        return tuple(parts)

    @property
    def one_part(self) -> AbstractPart:
        return _PartialGroups(self, 0, self.matrices * self.groups)

    @property
    def groups_of_tile(self) -> int:
        return self.tile_size // self.slots


@dataclasses.dataclass(frozen=True)
class Elements(Lanes):
    """A leaf without scales, in groups that nothing depends on."""

    @property
    def most_leaves(self) -> int:
        # They have fewer arrays.
        return 2 * super().most_leaves


@dataclasses.dataclass(frozen=True)
class _WholeGroups(AbstractPart):
    """The first groups of a leaf, which are whole and lie one after the other."""

    view: Lanes
    groups: int
    # In a kernel with others: whether all tiles of all of them are full, and the
    # groups of the largest.
    all_full: bool = False
    most: int = 0

    @property
    def tiles(self) -> int:
        return pl.cdiv(self.groups, self.view.groups_of_tile)

    @property
    def numbers(self) -> tuple[int, ...]:
        return (self.groups,)

    @property
    def code(self) -> Hashable:
        return self.view.group_size, self.all_full, self.most

    def together(self, parts: Sequence[AbstractPart]) -> AbstractPart:
        groups = [x.groups for x in parts if isinstance(x, _WholeGroups)]
        all_full = all(n % self.view.groups_of_tile == 0 for n in groups)
        most = pl.next_power_of_2(max(groups))
        return dataclasses.replace(self, all_full=all_full, most=most)

    def places(self, tile: Tile) -> tuple[Places, Places]:
        view, (count,) = self.view, tile.numbers
        start = tile_start(tile.index, view.groups_of_tile, self.most)
        groups = start + jnp.arange(view.groups_of_tile)
        exist = None if self.all_full else groups < count
        index = groups[:, None] * view.group_size + view.slot_numbers[None, :]
        return Places(index, _broadcast(exist, index.shape, 0)), Places(groups, exist)


@dataclasses.dataclass(frozen=True)
class _PartialGroups(AbstractPart):
    """Groups of which some are partial. They are filled up with the last element of
    their run, again and again."""

    view: Lanes
    first: int
    count: int

    @property
    def groups_of_tile(self) -> int:
        # As few as instructions can take that pack four bytes of a thread: they are
        # loaded element by element.
        return pl.cdiv(128, self.view.slots)

    @property
    def tiles(self) -> int:
        return pl.cdiv(self.count, self.groups_of_tile)

    @property
    def numbers(self) -> tuple[int, ...]:
        return self.first, self.first + self.count, self.view.groups, self.view.run

    @property
    def code(self) -> Hashable:
        return self.view.group_size

    def places(self, tile: Tile) -> tuple[Places, Places]:
        view, (first, end, groups_of_run, run) = self.view, tile.numbers
        start = first + tile.index * self.groups_of_tile
        groups = start + jnp.arange(self.groups_of_tile)
        exist = groups < end
        matrix, group = _divided(groups, groups_of_run)
        place = group[:, None] * view.group_size + view.slot_numbers[None, :]
        index = matrix[:, None] * run + jnp.minimum(place, run - 1)
        return Places(index, _broadcast(exist, index.shape, 0)), Places(groups, exist)


@dataclasses.dataclass(frozen=True)
class Rows(AbstractView):
    """Groups of consecutive rows, in all columns of several matrices."""

    columns: int

    axis: ClassVar[int] = -2
    warps: ClassVar[int] = 4
    # The neighbouring columns of one thread, which one instruction loads. With 4, it
    # needs more registers than it gains (measured on an H100).
    neighbours: ClassVar[int] = 2

    @property
    def parts(self) -> tuple[AbstractPart, ...]:
        return (_RowGroups(self),)

    @property
    def columns_of_tile(self) -> int:
        return max(self.neighbours, self.tile_size // self.slots)

    @property
    def tiles_across(self) -> int:
        return pl.cdiv(self.columns, self.columns_of_tile)


@dataclasses.dataclass(frozen=True)
class _RowGroups(AbstractPart):
    """All groups of a leaf."""

    view: Rows

    @property
    def tiles(self) -> int:
        return self.view.matrices * self.view.groups * self.view.tiles_across

    @property
    def numbers(self) -> tuple[int, ...]:
        return ()

    @property
    def code(self) -> Hashable:
        # Of numbers from memory, Triton would not know how they are aligned.
        return self.view

    def places(self, tile: Tile) -> tuple[Places, Places]:
        view, across = self.view, self.view.tiles_across
        # Triton gives a thread as many neighbours as it knows to be aligned.
        offset = view.neighbours * below(tile.zero, 2)
        start = tile_start(tile.index % across, view.columns_of_tile, view.columns)
        columns = start + offset + jnp.arange(view.columns_of_tile)
        is_full = view.columns % view.columns_of_tile == 0
        exist = None if is_full else columns < view.columns
        group = below(tile.index // across, view.matrices * view.groups)
        rows = group * view.group_size + view.slot_numbers
        if view.run % view.group_size != 0:
            matrix, place = _divided(group, jnp.int32(view.groups))
            place = place * view.group_size + view.slot_numbers
            rows = matrix * view.run + jnp.minimum(place, view.run - 1)
        index = rows[:, None] * view.columns + columns[None, :]
        of_groups = group * view.columns + columns
        return Places(index, _broadcast(exist, index.shape, 1)), Places(
            of_groups, exist
        )


def parts_of(views: Sequence[AbstractView]) -> list[list[tuple[int, AbstractPart]]]:
    """The parts of these leaves, with their numbers: those of each sort, which share a
    kernel. All parts of small leaves are of one sort: another kernel would take
    longer."""
    found: dict[Any, list[tuple[int, AbstractPart]]] = {}
    for number, view in enumerate(views):
        for part in view.parts:
            found.setdefault(type(part), []).append((number, part))
    if len(found) > 1 and all(view.matrices * view.run <= _TINY for view in views):
        return [[(number, view.one_part) for number, view in enumerate(views)]]
    return list(found.values())


def _divided(x: Any, by: Any) -> tuple[Any, Any]:
    """Quotient and remainder of numbers that are not negative."""
    by = jnp.broadcast_to(by, x.shape)
    return lax.div(x, by), lax.rem(x, by)


def _broadcast(mask: Any, shape: tuple[int, int], axis: int) -> Any:
    """A mask for one axis of a tile, for all elements."""
    if mask is None:
        return None
    return jnp.broadcast_to(mask[:, None] if axis == 0 else mask[None, :], shape)
