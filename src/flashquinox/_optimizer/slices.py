"""Slices of a leaf along its first axis, each of whole groups."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax.lax as lax
from jax.sharding import NamedSharding
from jaxtyping import Array

from .. import _compat
from .._common import meshes
from .._storage.layout import Layout
from .._storage.tpu_memory import memory_order, SCALE_BYTES, slice_unit, TILE_ROWS
from .._tile.step import map_arrays, TileState


class Span(NamedTuple):
    """From one row of an array to before another."""

    start: int
    end: int


class Slice(NamedTuple):
    """A part of a leaf: rows of the arrays of its shape, and rows of scales."""

    rows: Span
    of_scales: Span

    def rows_of(self, x: Array) -> Array:
        return lax.slice_in_dim(x, *self.rows)

    def read(self, state: TileState) -> TileState:
        return self._map(lambda span, x: lax.slice_in_dim(x, *span), state)

    def write(self, state: TileState, new: TileState) -> TileState:
        """The state with this slice of it replaced."""

        def update(span: Span, x: Array, part: Array) -> Array:
            return lax.dynamic_update_slice_in_dim(x, part, span.start, 0)

        return self._map(update, state, new)

    def _map(self, function: Callable[..., Array], *states: TileState) -> TileState:
        rows = lambda *x: function(self.rows, *x)
        return map_arrays(rows, lambda *x: function(self.of_scales, *x), *states)


def elements_on_device(shape: tuple[int, ...], sharding: NamedSharding | None) -> int:
    """How many elements of a leaf each device has."""
    parts = 1 if sharding is None else math.prod(meshes.divisions(sharding))
    return math.prod(shape) // parts


def slices_of(
    shape: tuple[int, ...],
    layouts: Sequence[Layout | None],
    sharding: NamedSharding | None,
    elements: int,
) -> list[tuple[Slice, ...]] | None:
    """A leaf in slices of about so many elements on each device, each once for every
    layout, in which states of the leaf have their groups. `None` for a leaf that has no
    more elements, and where no slices have whole groups on every device. A layout is
    `None` for a state without groups."""
    if not shape:
        return None
    size = elements_on_device(shape, sharding)
    is_divided = sharding is not None and meshes.divisions(sharding)[:1] > (1,)
    if size <= elements or is_divided:
        return None
    unit = TILE_ROWS if len(shape) == 2 else 1
    for layout in layouts:
        if layout is not None and _is_along_rows(layout, shape):
            unit = math.lcm(unit, _whole_groups(layout))
    on_tpus = _compat.traced_device().platform == "tpu"
    if on_tpus:
        for length in _units_on_tpus(shape, layouts):
            if length is None:
                return None
            unit = math.lcm(unit, length)
    rows = max(1, elements // (size // shape[0]))
    rows = max(unit, rows // unit * unit)
    if rows >= shape[0]:
        return None
    spans = [
        Span(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows)
    ]
    if on_tpus and not all([_lies_alike(shape, x.end - x.start) for x in spans]):
        return None
    return [
        tuple([Slice(span, _of_scales(layout, shape, span)) for layout in layouts])
        for span in spans
    ]


def _units_on_tpus(
    shape: tuple[int, ...], layouts: Sequence[Layout | None]
) -> Iterator[int | None]:
    """How many rows of a leaf a slice has there at least, by each of its arrays."""
    for itemsize in (1, 2, 4):
        yield slice_unit(shape, itemsize)
    for layout in layouts:
        if layout is None:
            continue
        unit = slice_unit(layout.scale_shape, SCALE_BYTES)
        if unit is not None and _is_along_rows(layout, shape):
            unit = _whole_groups(layout, unit)
        yield unit


def _lies_alike(shape: tuple[int, ...], rows: int) -> bool:
    """Whether TPUs lay out so many rows of a leaf like all of them."""
    part = rows, *shape[1:]
    return all([memory_order(part, x) == memory_order(shape, x) for x in (1, 2, 4)])


def _is_along_rows(layout: Layout, shape: tuple[int, ...]) -> bool:
    """Whether groups run along the first axis, and those after it."""
    return layout.axes[0] == -len(shape)


def _whole_groups(layout: Layout, groups: int = 1) -> int:
    """Of groups along the first axis: rows that have a multiple of so many."""
    elements = groups * layout.group_size
    return elements // math.gcd(elements, _inner(layout))


def _inner(layout: Layout) -> int:
    """The elements of a run in each row."""
    return layout.run // layout.shape[0]


def _of_scales(layout: Layout | None, shape: tuple[int, ...], rows: Span) -> Span:
    """The rows of scales that belong to rows of a leaf."""
    if layout is None or not _is_along_rows(layout, shape):
        return rows
    inner, size = _inner(layout), layout.group_size
    return Span(rows.start * inner // size, -(-rows.end * inner // size))
