"""Measurements in a new process: what an allocator counts is of a whole one."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, ParamSpec, TypeVar


_P = ParamSpec("_P")
_T = TypeVar("_T")


def in_process(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """What a function returns in a new process, which imports its module anew."""
    context: Any = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *args, **kwargs).result()


_folders: list[tempfile.TemporaryDirectory[str]] = []


def without_kept_programs() -> None:
    """From now on, this process finds no program that another one has compiled."""
    _folders.append(tempfile.TemporaryDirectory())
    keep_programs_in(_folders[-1].name)


def keep_programs_in(folder: str) -> None:
    """Programs of this library, and what NVIDIA's driver makes of PTX."""
    os.environ["XDG_CACHE_HOME"] = os.environ["CUDA_CACHE_PATH"] = folder
