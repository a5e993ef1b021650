"""How the kernel for TPUs sees a leaf: with its axes in the order of memory."""

import dataclasses
import math
from typing import Any, Literal, TypeAlias

import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Shaped

from ..._storage.layout import flattened, Layout
from ..._storage.tpu_memory import (
    Axes,
    groups_in_memory,
    LANES,
    lies_like,
    memory_order,
    TILE_ROWS,
)
from ..._tile.step import map_arrays, TileState


# See `GroupsInMemory`; vectors have groups along their only axis.
Kind: TypeAlias = Literal["rows", "matrices", "planes", "vector"]
# Elements of a leaf that has a kernel of its own.
LARGE = 2**14


@dataclasses.dataclass(frozen=True)
class ArrayView:
    """An array with its axes in another order, some of them merged. To make it and to
    go back moves nothing if the array lies in memory in this order."""

    shape: tuple[int, ...]
    # Which axes of the array each axis of the view stands for.
    axes: tuple[Axes, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple([math.prod([self.shape[i] for i in axes]) for axes in self.axes])

    def of(self, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        return x.transpose(self._order).reshape(self.lengths)

    def restore(self, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """The inverse of `of`."""
        order = self._order
        x = x.reshape([self.shape[i] for i in order])
        return x.transpose(sorted(range(len(order)), key=order.__getitem__))

    @property
    def _order(self) -> list[int]:
        return [i for axes in self.axes for i in axes]


@dataclasses.dataclass(frozen=True)
class View:
    """A leaf, its state and its groups. See `GroupsInMemory`."""

    layout: Layout
    kind: Kind
    elements: ArrayView
    scales: ArrayView
    # Of elements of 16 bits and more, where these lie in another order: in that of the
    # scales.
    wide: ArrayView | None = None
    # Where XLA lays out some arrays in other orders than these: so it would copy them.
    orders: "Orders | None" = None

    @property
    def group_size(self) -> int:
        return self.layout.group_size

    def of(self, x: TileState) -> TileState:
        return map_arrays(self.of_elements, self.scales.of, x)

    def of_elements(self, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        return self.view_of(x.dtype).of(x)

    def restore(self, x: TileState) -> TileState:
        restore = lambda array: self.view_of(array.dtype).restore(array)
        return map_arrays(restore, self.scales.restore, x)

    def view_of(self, dtype: Any) -> ArrayView:
        """Of elements of a dtype."""
        if self.wide is not None and jnp.dtype(dtype).itemsize > 1:
            return self.wide
        return self.elements


@dataclasses.dataclass(frozen=True)
class Orders:
    """A leaf and its state, with the axes of each array in its own order. For arrays
    of a view, `of` and `restore` are those of `View`."""

    layout: Layout

    @property
    def of_bytes(self) -> Axes:
        """The order of the axes of 8-bit arrays."""
        return memory_order(self.layout.shape, itemsize=1)

    def of_array(self, x: Any, of_scales: bool = False) -> Axes:
        """That of another array, by its dtype."""
        return memory_order(
            self.layout.scale_shape if of_scales else self.layout.shape,
            jnp.dtype(x.dtype).itemsize,
        )

    def of_elements(self, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        return self._view(x, False).of(x)

    def of(self, x: TileState) -> TileState:
        return map_arrays(
            self.of_elements, lambda array: self._view(array, True).of(array), x
        )

    def restore(self, x: TileState) -> TileState:
        return map_arrays(
            lambda array: self._view(array, False).restore(array),
            lambda array: self._view(array, True).restore(array),
            x,
        )

    def _view(self, x: Any, of_scales: bool) -> ArrayView:
        shape = self.layout.scale_shape if of_scales else self.layout.shape
        order = self.of_array(x, of_scales)
        return ArrayView(shape, tuple([(axis,) for axis in order]))


def view_of(
    layout: Layout, old: TileState, grad: Array, only_words: bool = False
) -> View | None:
    """`None` if the kernel cannot take this leaf. With `only_words`, all rows must be
    in whole groups."""
    dtypes = {jnp.dtype(x.dtype) for x in jtu.tree_leaves((old, grad))}
    if dtypes & {jnp.dtype(jnp.float16), jnp.dtype(jnp.float64)}:
        return None
    shape = layout.shape
    if math.prod(shape) < 2:
        return None
    if sum([length > 1 for length in shape]) < 2:
        return None if only_words else _of_vector(layout, old)
    *_, rows, columns = memory_order(shape, itemsize=1)
    if old.is_grouped:
        layouts = [layout]
    else:
        # Of the kernel's choice.
        axes = rows - len(shape), -2
        layouts = [Layout(shape, (axis,), TILE_ROWS) for axis in axes]
    for layout in layouts:
        if len(layout.axes) != 1 or layout.group_size % TILE_ROWS != 0:
            continue
        (axis,) = layout.axes
        whole = shape[axis] % TILE_ROWS == 0
        if axis + len(shape) == columns and not (axis == -2 and whole):
            # Plain XLA copies less than a transposition does.
            continue
        found = groups_in_memory(shape, axis, layout.group_size)
        is_large = math.prod(shape) >= LARGE
        if only_words and not (whole and axis + len(shape) == rows):
            continue
        if only_words and found.kind != "rows" and not is_large:
            continue
        view = View(
            layout,
            found.kind,
            ArrayView(shape, found.elements),
            ArrayView(layout.scale_shape, found.scales),
        )
        # Small leaves move little.
        if not is_large:
            return view
        if found.pairs and not only_words:
            view = dataclasses.replace(view, wide=ArrayView(shape, found.scales))
        needs_orders = only_words and found.kind != "rows"
        if not needs_orders and (
            axis + len(shape) == columns or _sees_as_they_lie(view, old, grad)
        ):
            return view
        return dataclasses.replace(view, orders=Orders(layout))
    return None


def _sees_as_they_lie(view: View, old: TileState, grad: Array) -> bool:
    """Whether XLA lays out all arrays as the view has them."""
    arrays = [(grad, False), *zip(jtu.tree_leaves(old), old.are_of_groups, strict=True)]
    seen = [
        (view.scales if of_groups else view.view_of(x.dtype), x)
        for x, of_groups in arrays
    ]
    return all([lies_like(x.shape, x.axes, a.dtype.itemsize) for x, a in seen])


def _of_vector(layout: Layout, old: TileState) -> View | None:
    """Of a leaf with at most one axis that is longer than 1."""
    shape = layout.shape
    if not old.is_grouped:
        layout = flattened(shape, TILE_ROWS)
    # A row of lanes has whole groups.
    if layout.group_size % TILE_ROWS != 0 or LANES % layout.group_size != 0:
        return None
    if layout.run != math.prod(shape):
        return None
    elements = _as_row(shape)
    scales = _as_row(layout.scale_shape)
    return View(layout, "vector", elements, scales)


def _as_row(shape: tuple[int, ...]) -> ArrayView:
    """A vector, or a matrix with one row: they are not the same in memory."""
    if len(shape) < 2:
        return ArrayView(shape, (tuple(range(len(shape))),))
    columns = max(range(len(shape)), key=lambda axis: (shape[axis], axis))
    others = tuple([axis for axis in range(len(shape)) if axis != columns])
    return ArrayView(shape, (others, (columns,)))
