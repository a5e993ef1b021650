"""How leaves lie in a TPU's memory, and along which of their axes groups run there."""

import dataclasses
import functools
import math
from collections.abc import Collection, Sequence
from typing import Literal, TypeAlias


# Axes from the outermost to the innermost.
Axes: TypeAlias = tuple[int, ...]

# Of a tile in memory, or a register: columns, and rows of float32.
LANES, SUBLANES = 128, 8
# The rows of a tile of 8-bit integers.
TILE_ROWS = 32
# In bytes.
_CODE, SCALE_BYTES, _WEIGHT = 1, 2, 2
# Layers of a model, at most.
_MOST_LAYERS = 128
# Groups are long that have so many scales for an element, or fewer.
_LONG = 1 / 16


@functools.lru_cache(maxsize=4096)
def memory_order(shape: tuple[int, ...], itemsize: int) -> Axes:
    """The order in which XLA lays out the axes of an array.

    The two innermost axes, the *rows* and *columns*, are cut into tiles and filled up
    to whole ones. XLA chooses the two for which least is filled up, among equals the
    last axes, and leaves the others in their order. It does so with all arguments and
    results of a program. (Found by `libtpu`'s default layouts: they are these for 6,000
    random shapes of 2 to 5 axes, of 8, 16 and 32 bits, on all generations from v4 on.)
    """
    axes = range(len(shape))
    if len(shape) < 2:
        return tuple(axes)

    # As `filled_size`, for all pairs of axes.
    tiles = [rows_of_tile(length, itemsize) for length in shape]
    as_rows = [_filled(x, tile) for x, tile in zip(shape, tiles, strict=True)]
    as_columns = [_filled(length, LANES) for length in shape]

    def size(rows: int, columns: int) -> int:
        outer = [shape[i] for i in axes if i not in (rows, columns)]
        return as_rows[rows] * as_columns[columns] * math.prod(outer)

    pairs = [(i, j) for j in axes for i in axes if i != j]
    rows, columns = min(pairs, key=lambda x: (size(*x), -x[1], -x[0]))
    return (*[i for i in axes if i not in (rows, columns)], rows, columns)


def slice_unit(shape: tuple[int, ...], itemsize: int) -> int | None:
    """Slices of an array in host memory along its first axis have a length of so many,
    or a multiple of it. `None` where the array has no whole number of these."""
    order = memory_order(shape, itemsize)
    if order[-1] == 0:
        # Vectors lie in rows of 128, as many as a tile of 32-bit numbers has.
        unit = LANES * (SUBLANES if len(shape) == 1 else 1)
    elif order[-2] == 0:
        # Rows that share words are copied together.
        unit = _rows_of_word(itemsize)
    else:
        unit = 1
    return None if shape[0] % unit else unit


def rows_of_tile(rows: int, itemsize: int) -> int:
    """Of the tiles of an array with so many rows."""
    if itemsize == 1 and rows % TILE_ROWS == 0:
        return TILE_ROWS
    return max(
        _rows_of_word(itemsize), min(SUBLANES, 2 ** (max(1, rows) - 1).bit_length())
    )


def _rows_of_word(itemsize: int) -> int:
    """Rows of narrow numbers share words of 32 bits."""
    return 4 // itemsize


def filled_size(lengths: Sequence[int], itemsize: int) -> int:
    """How many elements an array takes in memory that has axes of these lengths, in its
    order, with tiles filled up."""
    *outer, rows, columns = lengths
    tile = rows_of_tile(rows, itemsize)
    return math.prod(outer) * _filled(rows, tile) * _filled(columns, LANES)


def _filled(length: int, tile: int) -> int:
    return -(-length // tile) * tile


@dataclasses.dataclass(frozen=True)
class GroupsInMemory:
    """A leaf with groups along one axis, as its arrays lie in memory.

    Each axis of a view stands for some of the leaf's:

    | kind | elements | groups run along | scales |
    | --- | --- | --- | --- |
    | "rows" | `(matrices, rows, columns)` | the rows | `(matrices, groups, columns)` |
    | "matrices" | `(..., matrices, ..., rows, columns)` | the rows |
        `(..., groups, ..., matrices, columns)` |
    | "planes" | `(before, planes, between, rows, columns)` | the planes |
        `(before, groups, between, rows, columns)` |

    It is "matrices" where there are few groups in each matrix, so that XLA does not lay
    out the scales like the leaf, or where the rows fill no tile.

    Two matrices may be *pairs*: numbers of 16 bits and more then lie like the scales,
    `(..., rows, ..., matrices, columns)`, as an axis of length 2 fills the tiles of
    these, but not of bytes.
    """

    kind: Literal["rows", "matrices", "planes"]
    elements: tuple[Axes, ...]
    scales: tuple[Axes, ...]
    pairs: bool
    # Whether XLA lays out all arrays like this, of bfloat16 weights.
    in_place: bool


@functools.lru_cache(maxsize=4096)
def groups_in_memory(
    shape: tuple[int, ...], axis: int, group_size: int
) -> GroupsInMemory:
    """How groups of `group_size` along an axis lie. Not along the columns: where those
    are asked for, the rows are the columns, and XLA copies the arrays."""
    order = memory_order(shape, _CODE)
    axis %= len(shape)
    if order[-1] == axis:
        order = (*order[:-2], axis, order[-2])
    *outer, rows, columns = order
    scale_shape = list(shape)
    scale_shape[axis] = -(-shape[axis] // group_size)
    scale_rows = memory_order(tuple(scale_shape), SCALE_BYTES)[-2]
    if axis != rows:
        kind = "planes"
        place = outer.index(axis)
        before, between = tuple(outer[:place]), tuple(outer[place + 1 :])
        elements = scales = before, (axis,), between, (rows,), (columns,)
    elif shape[rows] >= TILE_ROWS and (
        scale_rows == rows or scale_shape[rows] == scale_shape[scale_rows] == 1
    ):
        kind = "rows"
        elements = scales = tuple(outer), (rows,), (columns,)
    else:
        kind = "matrices"
        # An axis of length 1 if there is no other.
        matrices = (scale_rows,) if scale_rows in outer else ()
        others = [axis for axis in outer if axis not in matrices]
        elements = [(axis,) for axis in outer]
        elements = (*elements, *[()][len(matrices) :], (rows,), (columns,))
        scales = [(axis,) for axis in sorted([*others, rows])]
        scales = (*scales, matrices, (columns,))
    pairs = (
        kind == "matrices"
        and math.prod([shape[i] for i in scales[-2]]) == 2
        and not lies_like(shape, elements, _WEIGHT)
        and lies_like(shape, scales, _WEIGHT)
    )
    in_place = (
        lies_like(shape, elements, _CODE)
        and (pairs or lies_like(shape, elements, _WEIGHT))
        and lies_like(tuple(scale_shape), scales, SCALE_BYTES)
    )
    return GroupsInMemory(kind, elements, scales, pairs, in_place)


def lies_like(shape: tuple[int, ...], view: tuple[Axes, ...], itemsize: int) -> bool:
    """Whether an array lies in memory in the order of a view."""
    *outer, rows, columns = memory_order(shape, itemsize)
    *view_outer, view_rows, view_columns = view
    length = math.prod([shape[i] for i in view_rows])
    long = lambda axes: [i for i in axes if shape[i] > 1]
    return (
        view_columns == (columns,)
        and length == shape[rows]
        and (view_rows == (rows,) or length == 1)
        and long(outer) == long([i for axes in view_outer for i in axes])
    )


def choose_axis(
    shape: tuple[int, ...], group_size: int, axes: Collection[int]
) -> int | None:
    """The axis along which the groups of a leaf should run, of those that are allowed,
    counted from the end. `None` if the leaf has none for the kernels.

    These are the rows in memory, if groups along them are long. Otherwise it is the
    axis that needs the fewest scales; best one with which XLA lays out
    all arrays in one order.
    """
    ndim = len(shape)
    # A leaf with one long axis is a vector.
    if sum([length > 1 for length in shape]) < 2 or math.prod(shape) == 0:
        return None
    *outer, rows, _ = memory_order(shape, _CODE)

    def scales(axis: int) -> float:
        """How many, for an element."""
        return -(-shape[axis] // group_size) / shape[axis]

    def is_fit(axis: int) -> bool:
        # The first axis may be that of stacked layers, which must have groups of their
        # own to be updated one by one. But no model has this many layers, and few have
        # layers that lie along the rows; unless they are of convolutions.
        separate = axis > 0 or shape[0] >= _MOST_LAYERS or (axis == rows and ndim < 5)
        return axis - ndim in axes and separate

    fit = [axis for axis in (*reversed(outer), rows) if is_fit(axis)]
    in_place = lambda axis: groups_in_memory(shape, axis, group_size).in_place
    fit = [axis for axis in fit if in_place(axis)] or fit
    if not fit:
        return None
    if rows in fit and scales(rows) <= _LONG:
        return rows - ndim
    return min(fit, key=scales) - ndim
