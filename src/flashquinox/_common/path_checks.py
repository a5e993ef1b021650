"""Checks of arguments of functions that read and write files."""

import operator
import os
from typing import Any

import numpy as np

from .text import shown


def check_path(call: str, name: str, value: Any) -> None:
    if not isinstance(value, str | os.PathLike):
        raise TypeError(
            f"`{call}({name}, ...)` takes a path, as a string or a `pathlib.Path`, "
            f"first; got {shown(value)}."
        )


def check_step(call: str, value: Any) -> int:
    """The number of a step, as a Python integer."""
    try:
        if not isinstance(value, bool | np.bool_):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(
        f"`{call}(step=...)` takes the number of a step, an integer; got "
        f"{shown(value)}."
    )


def check_is_file(call: str, path: str | os.PathLike[str]) -> None:
    """There must be a file at this path."""
    if os.path.isdir(path):
        raise IsADirectoryError(
            f"`{call}`: {os.fspath(path)} is a folder. Pass the path of a file."
        )
    if not os.path.exists(path):
        raise FileNotFoundError(f"`{call}`: there is no file {os.fspath(path)}.")
