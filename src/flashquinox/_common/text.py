"""Plain text: values in messages, and tables."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import numpy as np


_LONGEST = 80


def shown(value: Any) -> str:
    """How a message shows a value: as one short line."""
    if isinstance(value, jax.core.Tracer):
        return f"a traced {jax.typeof(value).str_short()}"
    if isinstance(value, jax.Array | np.ndarray) and value.ndim > 0:
        shape = ",".join(map(str, value.shape))
        return f"an array {value.dtype}[{shape}]"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return f"an object of the class {type(value).__name__}"
    if callable(value) and not isinstance(value, type):
        return function_name(value)
    text = " ".join(repr(value).split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 4] + " ..."


def function_name(function: Any) -> str:
    """The name of a function, after the names of enclosing functions. For other
    callable objects, the name of their class."""
    if isinstance(function, functools.partial):
        return f"partial({function_name(function.func)}, ...)"
    name = getattr(function, "__qualname__", None)
    if isinstance(name, str):
        return name.replace(".<locals>", "")
    return f"{type(function).__name__}(...)"


def aligned(rows: Sequence[Sequence[str]], left: int) -> str:
    """Rows of cells as lines: the first `left` columns flush left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
