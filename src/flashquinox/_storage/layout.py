"""Where the groups of a leaf lie: which runs of elements share one scale."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from functools import cached_property
from typing import TypeVar

import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from . import tpu_memory


T = TypeVar("T")


def are_consecutive(matrices: int, run: int, columns: int, group_size: int) -> bool:
    """Whether all groups of a leaf lie one after the other, and are whole but for the
    last one of the leaf."""
    is_whole = run % group_size == 0
    return columns == 1 and (is_whole or matrices == 1)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A leaf seen as groups of up to `group_size` consecutive elements along a *run*:
    consecutive axes, read as one, in the order of the memory. The last group of a run
    may be partial; it has a scale of its own.

    A *tile* is the leaf with its run divided in two, `(groups, elements of a group)`.

    `axes` are those of the run. They count from the end, so that they stay true under
    `vmap`. A scalar has none: its one group comes last.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    group_size: int

    def __post_init__(self):
        first = self.axes[0] if self.axes else 0
        consecutive = tuple(range(first, first + len(self.axes)))
        if self.axes != consecutive or not -len(self.shape) <= first <= -len(self.axes):
            raise ValueError(
                f"`Layout(axes={self.axes})`: the axes of the groups must be "
                "consecutive, count from the end, and exist in the shape "
                f"{self.shape}."
            )

    @cached_property
    def tile_axis(self) -> int:
        """The axis of a tile along which a group runs."""
        return self.axes[-1] if self.axes else -1

    @cached_property
    def scale_shape(self) -> tuple[int, ...]:
        """The shape of the scales at rest: the leaf's, with the groups in place of the
        run."""
        return self._with_run(self.groups)

    @cached_property
    def matrices(self) -> int:
        """The product of the axes before the run."""
        return math.prod(self._before)

    @cached_property
    def run(self) -> int:
        """The number of elements of a run."""
        return math.prod(self.shape[len(self._before) :][: len(self.axes)])

    @cached_property
    def columns(self) -> int:
        """The product of the axes after the run."""
        return math.prod(self._after)

    @cached_property
    def groups(self) -> int:
        """The number of groups of a run."""
        return -(-self.run // self._group_length)

    @property
    def is_consecutive(self) -> bool:
        return are_consecutive(self.matrices, self.run, self.columns, self.group_size)

    def tile(self, x: Shaped[Array, "*shape"]) -> Shaped[Array, "*tile"]:
        """The leaf as a tile. A partial group is filled up with copies of its last
        element, which change neither its largest nor its smallest element."""
        x = x.reshape(self._with_run(self.run))
        if self._padding > 0:
            # `jnp.pad` slices the other axes too, which meshes may divide.
            axis = self.tile_axis % x.ndim
            last = lax.slice_in_dim(x, self.run - 1, self.run, axis=axis)
            copies = jnp.broadcast_to(last, self._with_run(self._padding))
            x = lax.concatenate([x, copies], axis)
        return x.reshape(self._with_run(self.groups, self._group_length))

    def untile(self, x: Shaped[Array, "*tile"]) -> Shaped[Array, "*shape"]:
        """The leaf of a tile: the inverse of `tile`."""
        x = x.reshape(self._with_run(self.run + self._padding))
        if self._padding > 0:
            x = lax.slice_in_dim(x, 0, self.run, axis=self.tile_axis)
        return x.reshape(self.shape)

    def divides(self, parts: tuple[int, ...]) -> bool:
        """Whether no group lies in two parts, with every axis cut into so many equal
        ones. Of a run, only the first axis may be cut: the parts of others are not
        consecutive."""
        first, *others = [parts[axis] for axis in self.axes] or [1]
        whole = first == 1 or self.run % (first * self.group_size) == 0
        return whole and all(n == 1 for n in others)

    def of_scales(self, of_axes: Sequence[T]) -> tuple[T, ...]:
        """What belongs to each axis of the scales, from what belongs to each axis of
        the leaf: to groups, that of the first axis of their run. The axis of the scale
        of a scalar has nothing."""
        before = len(self._before)
        return (*of_axes[: before + 1], *of_axes[before + len(self.axes) :])

    def of_shape(self, shape: tuple[int, ...]) -> "Layout":
        """The same groups in a part of the leaf. Without the first axes of a run, the
        groups of what is left of it."""
        axes = tuple(axis for axis in self.axes if axis >= -len(shape))
        return layout_of(shape, axes, self.group_size)

    @cached_property
    def _before(self) -> tuple[int, ...]:
        first = self.axes[0] if self.axes else 0
        return self.shape[: len(self.shape) + first]

    @cached_property
    def _after(self) -> tuple[int, ...]:
        return self.shape[len(self._before) + len(self.axes) :]

    def _with_run(self, *lengths: int) -> tuple[int, ...]:
        """The shape of the leaf with these axes in place of the run."""
        return (*self._before, *lengths, *self._after)

    @cached_property
    def _group_length(self) -> int:
        # At least 1, for leaves of size 0.
        return max(1, min(self.group_size, self.run))

    @cached_property
    def _padding(self) -> int:
        return self.groups * self._group_length - self.run


@functools.lru_cache(maxsize=4096)
def layout_of(shape: tuple[int, ...], axes: tuple[int, ...], group_size: int) -> Layout:
    """The layout of these fields, one object for all leaves that have it: its shapes
    are computed once."""
    return Layout(shape, axes, group_size)


def flattened(shape: tuple[int, ...], group_size: int) -> Layout:
    """Groups of all elements, one after the other."""
    return layout_of(shape, tuple(range(-len(shape), 0)), group_size)


def choose_layout(
    shape: tuple[int, ...],
    group_size: int,
    prefer_rows: bool = False,
    parts: tuple[int, ...] | None = None,
) -> Layout:
    """Groups that are consecutive in memory: along the fewest trailing axes that hold
    whole groups. If none do, along all axes, with one partial group at the end. A group
    may then lie in several of the leading axis's parts, as in several layers of a
    stack.

    With `prefer_rows`, as kernels for TPUs need them: see `tpu_memory.choose_axis`.

    Of a leaf that is cut into `parts` along each axis, groups lie within one of them if
    there is a way: along one axis if not along trailing ones, and partial ones if whole
    ones do not fit.
    """
    ndim = len(shape)
    cut = parts or (1,) * ndim
    trailing = [tuple(range(first, 0)) for first in range(-1, -ndim - 1, -1)]
    single = [(axis,) for axis in range(-1, -ndim - 1, -1)]
    layouts = [layout_of(shape, axes, group_size) for axes in trailing + single]
    within = [layout for layout in layouts if layout.divides(cut)]
    if prefer_rows:
        part = tuple(length // n for length, n in zip(shape, cut, strict=True))
        axes = [layout.axes[0] for layout in within if len(layout.axes) == 1]
        axis = tpu_memory.choose_axis(part, group_size, axes)
        if axis is not None:
            return layout_of(shape, (axis,), group_size)
    whole = [layout for layout in within if layout.run % group_size == 0]
    if whole:
        return whole[0]
    # The longest run has the fewest scales.
    return max(within, key=lambda x: x.run) if within else flattened(shape, group_size)
