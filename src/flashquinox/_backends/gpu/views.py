"""How kernels for GPUs see a leaf: as a number of equal tiles."""

import abc
import dataclasses
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import jax.tree_util as jtu
from jax.experimental import pallas as pl
from jaxtyping import Array

from ..._storage.layout import Layout
from ..._tile.tile import TileState
from .slices import below, MaskedSlice, span


_LARGEST_GROUP = 256


def view_of(layout: Layout, grad: Array, old: TileState) -> "AbstractView | None":
    """How the kernel sees a leaf. `None` if it cannot take it: then plain XLA does."""
    dtypes = {jnp.dtype(x.dtype) for x in jtu.tree_leaves((old, grad))}
    size, group = old.weight.size, layout.group_size
    # Triton computes addresses with 32 bits.
    if jnp.dtype(jnp.float64) in dtypes or size >= 2**31:
        return None
    if not jtu.tree_leaves(old.scales):
        return Elements(size)
    if group & (group - 1) != 0 or group > _LARGEST_GROUP:
        return None
    axis, shape = layout.axis, layout.shape
    if axis is None or axis == -1:
        whole = size if axis is None else shape[-1]
        return None if whole % group != 0 else Lanes(size // group, group)
    if shape[axis] % group != 0:
        return None
    columns = math.prod(shape[axis + 1 :])
    return Rows(size // columns // group, group, columns)


class Tile(NamedTuple):
    """A tile of a leaf."""

    index: Any
    # The number 0, which Triton does not know to be 0.
    zero: Any


@dataclasses.dataclass(frozen=True)
class AbstractView(abc.ABC):
    """A leaf as a number of tiles, and where these are in memory. Hashable, for `jit`.

    Arrays with one entry for each element are reshaped to `shape`, scales to
    `scale_shape`. Both reshapes move nothing.
    """

    # The axis of a tile that its groups run along.
    axis: ClassVar[int]
    # Warps per tile, and elements per tile.
    warps: ClassVar[int]
    tile_size: ClassVar[int]
    # The largest number of leaves that share a kernel. Triton's time to compile grows
    # with its square.
    most_leaves: ClassVar[int]

    @property
    @abc.abstractmethod
    def kind(self) -> tuple[Any, ...]:
        """What views must have in common for their tiles to be alike."""

    @property
    @abc.abstractmethod
    def tiles(self) -> int:
        """The number of tiles."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]: ...

    @property
    @abc.abstractmethod
    def scale_shape(self) -> tuple[int, ...]: ...

    @abc.abstractmethod
    def element_slice(self, tile: Tile) -> MaskedSlice:
        """Where the elements of a tile are."""

    @abc.abstractmethod
    def scale_slice(self, tile: Tile) -> MaskedSlice:
        """Where the scales of a tile are. Of a leaf without scales, anything."""

    # Below, the arrays of a leaf or a tile are in a list, of which the last ones are
    # `scales` arrays of scales.

    def reshape(self, arrays: Sequence[Array], scales: int) -> list[Array]:
        """The arrays of a leaf as the kernel takes them."""
        shapes = [self.shape] * (len(arrays) - scales) + [self.scale_shape] * scales
        return [x.reshape(shape) for x, shape in zip(arrays, shapes, strict=True)]

    def load(self, refs: Sequence[Any], scales: int, tile: Tile) -> list[Array]:
        """The arrays of a tile."""
        slices, first = self._slices(tile), len(refs) - scales
        return slices[0].load(refs[:first]) + slices[1].load(refs[first:])

    def store(
        self, refs: Sequence[Any], scales: int, tile: Tile, values: Sequence[Array]
    ) -> None:
        """Writes the arrays of a tile."""
        slices, first = self._slices(tile), len(refs) - scales
        slices[0].store(refs[:first], values[:first])
        slices[1].store(refs[first:], values[first:])

    def _slices(self, tile: Tile) -> tuple[MaskedSlice, MaskedSlice]:
        return self.element_slice(tile), self.scale_slice(tile)


@dataclasses.dataclass(frozen=True)
class Lanes(AbstractView):
    """Groups of consecutive elements, one after the other."""

    groups: int
    group_size: int

    axis: ClassVar[int] = -1
    # 512 elements are 32 threads x 16, one 16-byte load of each thread and moment. What
    # all threads of a group compute is then computed by few, and the programs of one
    # warp do not wait for others.
    warps: ClassVar[int] = 1
    tile_size: ClassVar[int] = 512
    most_leaves: ClassVar[int] = 8

    @property
    def kind(self) -> tuple[Any, ...]:
        return Lanes, self.group_size

    @cached_property
    def _groups_of_tile(self) -> int:
        return max(1, self.tile_size // self.group_size)

    @property
    def tiles(self) -> int:
        return pl.cdiv(self.groups, self._groups_of_tile)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.groups, self.group_size

    @property
    def scale_shape(self) -> tuple[int, ...]:
        return (self.groups,)

    def element_slice(self, tile: Tile) -> MaskedSlice:
        groups, mask = span(tile.index, self._groups_of_tile, self.groups)
        if mask is not None:
            shape = self._groups_of_tile, self.group_size
            mask = jnp.broadcast_to(mask[:, None], shape)
        return MaskedSlice((groups, slice(None)), mask)

    def scale_slice(self, tile: Tile) -> MaskedSlice:
        groups, mask = span(tile.index, self._groups_of_tile, self.groups)
        return MaskedSlice((groups,), mask)


@dataclasses.dataclass(frozen=True)
class Rows(AbstractView):
    """Groups of consecutive rows, in all columns of several matrices."""

    matrices: int
    group_size: int
    columns: int

    axis: ClassVar[int] = -2
    # 128 columns of groups of 32 rows: whole sectors of memory in each row.
    warps: ClassVar[int] = 4
    tile_size: ClassVar[int] = 4096
    most_leaves: ClassVar[int] = 8
    # The neighbouring columns of one thread, which one instruction loads. With 4, it
    # needs more registers than it gains (measured on an H100).
    neighbours: ClassVar[int] = 2

    @property
    def kind(self) -> tuple[Any, ...]:
        return Rows, self.group_size

    @property
    def tiles(self) -> int:
        return self.matrices * self._tiles_across

    @property
    def shape(self) -> tuple[int, ...]:
        return self.matrices, self.group_size, self.columns

    @property
    def scale_shape(self) -> tuple[int, ...]:
        return self.matrices, self.columns

    @cached_property
    def _columns_of_tile(self) -> int:
        return max(self.neighbours, self.tile_size // self.group_size)

    @cached_property
    def _tiles_across(self) -> int:
        return pl.cdiv(self.columns, self._columns_of_tile)

    def _position(self, tile: Tile) -> tuple[Any, Any, Any]:
        across = self._tiles_across
        # Triton gives a thread as many neighbours as it knows to be aligned.
        offset = self.neighbours * below(tile.zero, 2)
        columns, mask = span(
            tile.index % across, self._columns_of_tile, self.columns, offset
        )
        return below(tile.index // across, self.matrices), columns, mask

    def element_slice(self, tile: Tile) -> MaskedSlice:
        matrix, columns, mask = self._position(tile)
        if mask is not None:
            shape = self.group_size, self._columns_of_tile
            mask = jnp.broadcast_to(mask[None, :], shape)
        return MaskedSlice((matrix, slice(None), columns), mask)

    def scale_slice(self, tile: Tile) -> MaskedSlice:
        matrix, columns, mask = self._position(tile)
        return MaskedSlice((matrix, columns), mask)


@dataclasses.dataclass(frozen=True)
class Elements(AbstractView):
    """A leaf without groups."""

    size: int

    axis: ClassVar[int] = -1
    # As of `Lanes`.
    warps: ClassVar[int] = 1
    tile_size: ClassVar[int] = 512
    # More than of leaves with groups: they have fewer arrays, and most are small.
    most_leaves: ClassVar[int] = 16

    @property
    def kind(self) -> tuple[Any, ...]:
        return (Elements,)

    @property
    def tiles(self) -> int:
        return pl.cdiv(self.size, self.tile_size)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.size,)

    @property
    def scale_shape(self) -> tuple[int, ...]:
        return ()

    def element_slice(self, tile: Tile) -> MaskedSlice:
        part, mask = span(tile.index, self.tile_size, self.size)
        return MaskedSlice((part,), mask)

    def scale_slice(self, tile: Tile) -> MaskedSlice:
        return self.element_slice(tile)
