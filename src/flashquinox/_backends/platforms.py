"""For which platform a program is traced, and whether its kernels are there.

Kernels are imported when the first optimizer is built that may take them, and not with
this library: they need parts of JAX that are experimental, which other versions of it
may not have. Nor are they imported later, in the middle of a program that is traced:
Pallas adds settings to those by which JAX finds what it has compiled, and everything
would be compiled twice.
"""

import functools
import importlib
import warnings
from types import ModuleType
from typing import Literal

import jax

from .. import _compat as compat


Kernels = Literal["gpu", "tpu"]
# The part of JAX that kernels are made with.
_NEEDED = {
    "gpu": "jax.experimental.pallas.triton",
    "tpu": "jax.experimental.pallas.tpu",
}


def kernels(name: Kernels, warn: bool = True) -> ModuleType | None:
    """The backend of this name; `None` if JAX has no more what it is made with. With
    `warn`, that is said, once."""
    backend, reason = _imported(name)
    if backend is None and warn:
        _warn_of_plain_xla(name, reason)
    return backend


def load() -> None:
    """Imports what there is. Asks for no device: an optimizer may be built before
    `jax.distributed.initialize`."""
    for name in _NEEDED:
        _imported(name)


def require(call: str, name: Kernels) -> None:
    """Raises `ImportError` if these kernels, which were asked for, are not there."""
    backend, reason = _imported(name)
    if backend is None:
        raise ImportError(
            f'`{call}(backend="{name}")` needs `{_NEEDED[name]}`, which cannot be '
            f"imported from this JAX ({jax.__version__}): {reason}. Install a version "
            'that has it, or pass `backend="auto"` for plain XLA.'
        )


@functools.cache
def _imported(name: Kernels) -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module(f"{__package__}.{name}.kernel"), ""
    except ImportError as error:
        return None, str(error)


@functools.cache
def _warn_of_plain_xla(name: Kernels, reason: str) -> None:
    warnings.warn(
        f"flashquinox: no kernels for {name.upper()}s, as `{_NEEDED[name]}` cannot be "
        f"imported from this JAX ({jax.__version__}): {reason}. Steps take plain XLA "
        "instead: the same results, in more time and memory. Install a version of JAX "
        "that has it for the kernels.",
        stacklevel=2,
    )


def is_gpu() -> bool:
    """Whether this program is traced for a GPU that there are kernels for. It must be
    known: by the default device, or by that of an abstract mesh.
    """
    device = compat.traced_device()
    if isinstance(device, jax.sharding.AbstractDevice):
        return device.platform in ("gpu", "cuda")
    capability = getattr(device, "compute_capability", "")
    # Of other makers, it is a name.
    known = device.platform == "gpu" and capability.replace(".", "").isdigit()
    return known and float(capability) >= 8


def is_tpu() -> bool:
    """Whether this program is traced for a TPU, as far as that is known."""
    return compat.traced_device().platform == "tpu"
