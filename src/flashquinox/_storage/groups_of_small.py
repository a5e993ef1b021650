"""Encoding and decoding small moments outside of programs, where those of all shapes
share a few programs: of groups in rows, whose number is a power of two."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from .._common.eager import Function, lengthened, shortened
from .layout import Layout
from .regroup import Groups


def encoding(encode: Callable[..., tuple[Any, Any]], layout: Layout) -> Function:
    """A moment, and the parameter of its codec if it has one, to codes and scales in
    groups of this layout: by `encode`, which also takes `groups`."""

    def of_rows(values: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        moment, *parameter = values
        rows = _rows(layout, moment)
        rows_of_many = lengthened(rows, layout.group_size)
        codes, scales = encode(rows_of_many, *parameter, groups=_of_row(layout))
        codes, scales = (shortened(x, len(rows)) for x in (codes, scales))
        return _of_rows(layout, codes), _of_groups(layout, scales)

    return Function(partial(encode, groups=_groups(layout)), of_rows)


def decoding(decode: Callable[..., Any], layout: Layout) -> Function:
    """Codes, scales, and the parameter of their codec if it has one, to the moment: by
    `decode`, which also takes `groups`."""

    def of_rows(values: list[np.ndarray]) -> np.ndarray:
        codes, scales, *parameter = values
        rows = _rows(layout, codes)
        moment = decode(
            lengthened(rows, layout.group_size),
            lengthened(_in_groups(layout, scales), layout.group_size),
            *parameter,
            groups=_of_row(layout),
        )
        return _of_rows(layout, shortened(moment, len(rows)))

    return Function(partial(decode, groups=_groups(layout)), of_rows)


def _groups(layout: Layout) -> Groups:
    return layout.axes, layout.group_size


def _of_row(layout: Layout) -> Groups:
    """A group in each row."""
    return (-1,), layout.group_size


def _rows(layout: Layout, x: np.ndarray) -> np.ndarray:
    """A row for each group. What a partial one lacks are copies of its last element, as
    in `Layout.tile`."""
    x = x.reshape(layout.matrices, layout.run, layout.columns).swapaxes(1, 2)
    missing = layout.groups * layout.group_size - layout.run
    x = np.pad(x, [(0, 0), (0, 0), (0, missing)], mode="edge")
    return x.reshape(-1, layout.group_size)


def _of_rows(layout: Layout, rows: np.ndarray) -> np.ndarray:
    length = layout.groups * layout.group_size
    x = rows.reshape(layout.matrices, layout.columns, length)[..., : layout.run]
    return x.swapaxes(1, 2).reshape(layout.shape)


def _in_groups(layout: Layout, scales: np.ndarray) -> np.ndarray:
    x = scales.reshape(layout.matrices, layout.groups, layout.columns)
    return x.swapaxes(1, 2).reshape(-1, 1)


def _of_groups(layout: Layout, scales: np.ndarray) -> np.ndarray:
    x = scales.reshape(layout.matrices, layout.columns, layout.groups)
    return x.swapaxes(1, 2).reshape(layout.scale_shape)
