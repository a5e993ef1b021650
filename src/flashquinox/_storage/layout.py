"""Where the groups of a leaf lie: which runs of elements share one scale."""

import dataclasses
import functools
import math
from functools import cached_property

import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Shaped


@dataclasses.dataclass(frozen=True)
class Layout:
    """A leaf seen as groups of up to `group_size` consecutive elements along one axis.

    A *tile* is the leaf with that axis split in two, `(groups, elements of a group)`.
    The last group of an axis may be partial; it has a scale of its own.

    `axis` counts from the end, so that it stays true under `vmap`. It is `None` when
    the leaf is flattened first, as for scalars and for the codec of the paper.
    """

    shape: tuple[int, ...]
    axis: int | None
    group_size: int

    def __post_init__(self):
        if self.axis is not None and not -len(self.shape) <= self.axis < 0:
            raise ValueError(
                f"`Layout(axis={self.axis})`: the axis of the groups counts from the "
                f"end and must exist in the shape {self.shape}."
            )

    @cached_property
    def tile_axis(self) -> int:
        """The axis of a tile along which a group runs."""
        return -1 if self.axis is None else self.axis

    @cached_property
    def scale_shape(self) -> tuple[int, ...]:
        """The shape of the scales at rest: the leaf's, with the group axis divided."""
        shape = list(self._grouped_shape)
        shape[self.tile_axis] = self._groups
        return tuple(shape)

    def tile(self, x: Shaped[Array, "*shape"]) -> Shaped[Array, "*tile"]:
        """The leaf as a tile. A partial group is filled up with copies of its last
        element, which change neither its largest nor its smallest element."""
        x = x.reshape(self._grouped_shape)
        if self._padding > 0:
            padding = [(0, 0)] * x.ndim
            padding[self.tile_axis] = (0, self._padding)
            x = jnp.pad(x, padding, mode="edge")
        return x.reshape(self._tile_shape)

    def untile(self, x: Shaped[Array, "*tile"]) -> Shaped[Array, "*shape"]:
        """The leaf of a tile: the inverse of `tile`."""
        x = x.reshape(self._padded_shape)
        if self._padding > 0:
            length = self._grouped_shape[self.tile_axis]
            x = lax.slice_in_dim(x, 0, length, axis=self.tile_axis)
        return x.reshape(self.shape)

    def divides(self, parts: tuple[int, ...]) -> bool:
        """Whether no group lies in two parts, with every axis cut into so many equal
        ones."""
        if self.axis is None:
            return math.prod(parts) == 1
        return _divides(self.shape[self.axis], self.group_size, parts[self.axis])

    @cached_property
    def _grouped_shape(self) -> tuple[int, ...]:
        return (math.prod(self.shape),) if self.axis is None else self.shape

    @cached_property
    def _group_length(self) -> int:
        # At least 1, for leaves of size 0.
        return max(1, min(self.group_size, self._grouped_shape[self.tile_axis]))

    @cached_property
    def _groups(self) -> int:
        return -(-self._grouped_shape[self.tile_axis] // self._group_length)

    @cached_property
    def _padding(self) -> int:
        return self._groups * self._group_length - self._grouped_shape[self.tile_axis]

    @cached_property
    def _padded_shape(self) -> tuple[int, ...]:
        shape = list(self._grouped_shape)
        shape[self.tile_axis] += self._padding
        return tuple(shape)

    @cached_property
    def _tile_shape(self) -> tuple[int, ...]:
        shape = self._grouped_shape
        position = len(shape) + self.tile_axis
        split = self._groups, self._group_length
        return (*shape[:position], *split, *shape[position + 1 :])


@functools.lru_cache(maxsize=4096)
def layout_of(shape: tuple[int, ...], axis: int | None, group_size: int) -> Layout:
    """The layout of these fields, one object for all leaves that have it: its shapes
    are computed once."""
    return Layout(shape, axis, group_size)


def choose_layout(
    shape: tuple[int, ...],
    group_size: int,
    prefer_rows: bool = False,
    parts: tuple[int, ...] | None = None,
) -> Layout:
    """Groups along the axis that needs the fewest scales; the last one among equals,
    which is the model dimension of Equinox's `Linear` and `Embedding` weights. With
    `prefer_rows`, along what are the rows in a TPU's memory, if full groups fit into
    them. Of a leaf that is cut into `parts` along each axis, an axis where no group
    lies in two of them, if there is one.
    """
    if len(shape) == 0:
        return Layout(shape, None, group_size)
    cut = parts or (1,) * len(shape)
    axes = range(-1, -len(shape) - 1, -1)
    axes = [a for a in axes if _divides(shape[a], group_size, cut[a])] or axes
    if prefer_rows:
        part = tuple(length // n for length, n in zip(shape, cut, strict=True))
        for axis in (-1, -2) if lies_transposed(part) else (-2,):
            if axis in axes and shape[axis] % group_size == 0:
                return Layout(shape, axis, group_size)

    def scales_per_element(axis: int) -> float:
        return -(-shape[axis] // group_size) / max(1, shape[axis])

    return Layout(shape, min(axes, key=scales_per_element), group_size)


def lies_transposed(shape: tuple[int, ...]) -> bool:
    """Whether the last axis of an array of this shape is what the rows are in a TPU's
    memory. There the two last axes are filled up to tiles of 8 rows and 128 columns,
    and XLA lays them out such that less is filled up (as it does with all arrays that a
    program takes; found by compiling for v5e and v6e).
    """
    if len(shape) < 2:
        return False

    def filled_up(rows: int, columns: int) -> int:
        return -(-rows // 8) * 8 * -(-columns // 128) * 128

    return filled_up(shape[-1], shape[-2]) < filled_up(shape[-2], shape[-1])


def _divides(length: int, group_size: int, parts: int) -> bool:
    return parts == 1 or length % (parts * group_size) == 0
