"""Zeros in the place of arrays in host memory, if a flag says so.

A branch of a program that leaves such arrays as they are, beside one that makes new
ones, has XLA for GPUs copy them in either. So a kernel writes zeros after the branches,
or ends without having read or written anything.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from .. import _compat
from .._common import memory


def clear_if(
    flag: Bool[Array, ""], arrays: Sequence[Array], after: Array
) -> list[Array]:
    """Zeros in the place of these arrays, or the arrays; once `after` is computed, and
    with it what reads them. Kernels for GPUs write where they are."""
    if not arrays:
        return []
    _by_platform.serve("cuda")
    return list(_by_platform(None, flag.astype(jnp.int32), after, tuple(arrays)))


def _clear_on(
    key: None, platform: str, is_exported: bool
) -> Callable[..., tuple[Array, ...]]:
    del key, is_exported
    return _by_kernel if platform == "cuda" else _through_device


def _through_device(
    flag: Int32[Array, ""], after: Array, arrays: Any
) -> tuple[Array, ...]:
    flag, _ = lax.optimization_barrier((flag, after))
    here = memory.to_device(arrays)
    new = tuple([jnp.where(flag != 0, jnp.zeros_like(x), x) for x in here])
    return memory.where(new, arrays)


@jax.custom_batching.custom_vmap
def _by_kernel(flag: Int32[Array, ""], after: Array, arrays: Any) -> tuple[Array, ...]:
    from .gpu import host_arrays

    return tuple(host_arrays.clear_if(flag, arrays, after))


@_by_kernel.def_vmap
def _(size: int, is_mapped: Any, flag: Any, after: Any, arrays: Any) -> Any:
    del size
    of_flag, of_after, of_arrays = is_mapped
    axis = lambda x: 0 if x else None
    axes = axis(of_flag), axis(of_after), tuple(map(axis, of_arrays))
    new = jax.vmap(_through_device, axes)(flag, after, arrays)
    return new, tuple([True for _ in new])


_by_platform = _compat.ByPlatform("flashquinox_clear", _clear_on)
