"""Slices of a leaf along its first axis, each of whole groups."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.lax as lax
from jax.sharding import NamedSharding
from jaxtyping import Array

from .._common import meshes
from .._storage.layout import Layout
from .._tile.step import map_arrays, TileState


# Rows that TPUs keep together, of arrays of one byte.
_ROWS = 32


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
    layout: Layout | None,
    sharding: NamedSharding | None,
    elements: int,
) -> list[Slice] | None:
    """A leaf in slices of about so many elements on each device. `None` for one that
    has no more, and where no slices have whole groups on every device. `layout` is
    `None` for a leaf without groups."""
    if not shape:
        return None
    size = elements_on_device(shape, sharding)
    is_divided = sharding is not None and meshes.divisions(sharding)[:1] > (1,)
    if size <= elements or is_divided:
        return None
    inner, unit, in_run = 1, _ROWS if len(shape) == 2 else 1, False
    if layout is not None and layout.axes[0] == -len(shape):
        # Groups run along the first axis, and those after it.
        inner, in_run = layout.run // shape[0], True
        whole = layout.group_size // math.gcd(layout.group_size, inner)
        unit = math.lcm(unit, whole)
    row = size // shape[0]
    rows = max(1, elements // row)
    rows = max(unit, rows // unit * unit)
    if rows >= shape[0]:
        return None
    found = []
    for start in range(0, shape[0], rows):
        span = Span(start, min(start + rows, shape[0]))
        groups = span
        if in_run:
            assert layout is not None
            size = layout.group_size
            groups = Span(start * inner // size, -(-span.end * inner // size))
        found.append(Slice(span, groups))
    return found
