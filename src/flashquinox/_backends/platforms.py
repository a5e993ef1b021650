"""Which backends there are, and whether what they need is there.

Kernels are imported when the first optimizer is built that may take them, and not with
this library: they need a compiler, or parts of JAX that are experimental, which other
versions of it may not have. Nor are they imported later, in the middle of a program
that is traced: Pallas adds settings to those by which JAX finds what it has compiled,
and everything would be compiled twice.
"""

import functools
import importlib
import warnings
from typing import Any, get_args, Literal, TypeAlias

import jax

from .base import AbstractBackend, Update


# The list of backends. Each is a module or folder of this name beside this file, whose
# `BACKEND` is an `AbstractBackend`; "auto" chooses among them by the device.
Backend: TypeAlias = Literal["auto", "xla", "cpu", "tpu", "gpu"]
# What a step takes. "divisible" is plain XLA for leaves that lie on several devices as
# only XLA knows: a program that it divides without having to gather anything.
Way: TypeAlias = Backend | Literal["divisible"]


def names() -> tuple[Backend, ...]:
    """What an optimizer takes as `backend`."""
    return get_args(Backend)


@functools.cache
def named(name: str) -> AbstractBackend:
    """The backend of this name, which is not "auto"."""
    return importlib.import_module(f"{__package__}.{name}").BACKEND


def backends() -> list[AbstractBackend]:
    return [named(name) for name in names() if name != "auto"]


def chosen(name: Backend, device: Any) -> list[AbstractBackend]:
    """The backends, but for plain XLA, that a program which is traced for a device may
    contain: first the one that its leaves are batched for, if that is not plain XLA.
    """
    if name != "auto":
        candidates = [named(name)]
    else:
        # Those that serve the device first.
        candidates = sorted(backends(), key=lambda x: not x.serves(device))
    return [
        backend
        for backend in candidates
        if backend.platform != "default"
        and (name != "auto" or backend.in_every_program or backend.serves(device))
        and update_of(backend, warn=backend.is_missed and backend.serves(device))
        is not None
    ]


def update_of(backend: AbstractBackend, warn: bool = True) -> Update | None:
    """What updates batches of a backend; `None` if what it needs is not there. With
    `warn`, that is said, once."""
    update, reason = _loaded(backend)
    if update is None and warn:
        _warn_of_plain_xla(backend, reason)
    return update


def load() -> None:
    """Imports all backends that there are. Asks for no device: an optimizer may be
    built before `jax.distributed.initialize`."""
    for backend in backends():
        _loaded(backend)


def check_loads(call: str, name: str) -> None:
    """Raises `ImportError` if this backend, which was asked for, is not there."""
    backend = named(name)
    update, reason = _loaded(backend)
    if update is None:
        raise ImportError(
            f'`{call}(backend="{name}")` needs `{backend.needs}`, which is not there '
            f"(JAX {jax.__version__}): {reason}. {backend.remedy}, or pass "
            '`backend="auto"` for plain XLA.'
        )


@functools.cache
def _loaded(backend: AbstractBackend) -> tuple[Update | None, str]:
    try:
        return backend.load(), ""
    except ImportError as error:
        return None, str(error)


@functools.cache
def _warn_of_plain_xla(backend: AbstractBackend, reason: str) -> None:
    warnings.warn(
        f"flashquinox: no kernels for {backend.name.upper()}s, as `{backend.needs}` "
        f"is not there (JAX {jax.__version__}): {reason}. Steps take plain XLA: the "
        f"same results, in more time and memory. {backend.remedy} for the kernels.",
        stacklevel=2,
    )
