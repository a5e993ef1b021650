"""Arrays in host memory: JAX's memory kind `pinned_host`, which devices read directly.

Inside of `jit`, the type of an array tells where it lives, and operations on arrays of
both memories are errors. Outside, its sharding tells: the type is wrong for arrays on
one device that `jit(out_shardings=...)` or `jax.make_array_from_callback` made.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree


_HOST = jax.memory.Space.Host
_DEVICE = jax.memory.Space.Device

# What JAX calls this memory.
HOST_KIND = "pinned_host"


def are_on_host(arrays: Iterable[Any]) -> list[bool]:
    """Whether each of these is an array in host memory."""
    return [
        isinstance(x, jax.Array)
        and (
            jax.typeof(x).memory_space == _HOST
            if isinstance(x, jax.core.Tracer)
            else x.sharding.memory_kind == HOST_KIND
        )
        for x in arrays
    ]


def is_on_host(x: Any) -> bool:
    """Whether this is an array in host memory."""
    return are_on_host([x])[0]


def any_on_host(tree: PyTree) -> bool:
    return any(are_on_host(jtu.tree_leaves(tree)))


def to_device(tree: PyTree) -> PyTree:
    """The arrays of a tree in the memory of their devices."""
    leaves, structure = jtu.tree_flatten(tree)
    away = are_on_host(leaves)
    if not any(away):
        return tree
    return structure.unflatten(
        [_put(x, _DEVICE) if y else x for x, y in zip(leaves, away, strict=True)]
    )


def to_host(tree: PyTree) -> PyTree:
    """The arrays of a tree in host memory."""
    return jtu.tree_map(lambda x: x if is_on_host(x) else _put(x, _HOST), tree)


def _put(x: Any, space: Any) -> jax.Array:
    if isinstance(x, jax.core.Tracer):
        return jax.device_put(x, space)
    kind = HOST_KIND if space == _HOST else "device"
    return jax.device_put(x, jnp.asarray(x).sharding.with_memory_kind(kind))


def where(tree: PyTree, like: PyTree) -> PyTree:
    """The arrays of a tree in the memories of those of another one of its structure."""
    return jtu.tree_map(
        lambda x, y: to_host(x) if is_on_host(y) else to_device(x), tree, like
    )


def has_host_memory(device: Any) -> bool:
    """Whether programs for a device can have arrays in host memory. Of an abstract
    device, that is not known."""
    memories = getattr(device, "addressable_memories", None)
    return memories is None or HOST_KIND in [x.kind for x in memories()]
