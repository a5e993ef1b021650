"""Where arrays are: computing with those that are divided among devices in any way, and
putting what comes of it where it belongs."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from . import meshes
from .target import Target


def put_like(call: str, name: str, x: Any, like: Any) -> Any:
    """An array where another one is: on its devices, and divided as it is. In a program
    that is traced, the compiler decides, but for axes of a mesh that are `Explicit`."""
    if _is_traced(x, like):
        return meshes.as_typed(jnp.asarray(x), jax.typeof(like).sharding)
    target = Target.of(call, name, like)
    return target.put(_free(x) if target.sharding is None else x)


def compute_like(
    call: str,
    name: str,
    function: Callable[..., PyTree],
    arrays: Sequence[Any],
    likes: Sequence[Any],
) -> PyTree:
    """What a function makes of arrays, each put where its `like` is: for functions that
    say nothing of how their results are divided, as is asked of them on mesh axes that
    are `Explicit`."""
    if _is_traced(*arrays, *likes):
        return function(*arrays)
    placed = []
    for x, like in zip(arrays, likes, strict=True):
        sharding = Target.of(call, name, like).sharding_of_read(automatic=True)
        placed.append(_free(x) if sharding is None else jax.device_put(x, sharding))
    with no_mesh():
        return function(*placed)


def no_mesh() -> Any:
    """Without the mesh that the caller may have set: the arrays may lie on others."""
    return jax.set_mesh(Mesh(np.empty((), dtype=object), ()))


def _free(x: Any) -> Any:
    """An array that is bound to no device."""
    return np.asarray(x) if isinstance(x, jax.Array) and x.committed else x


def _is_traced(*arrays: Any) -> bool:
    return any(isinstance(x, jax.core.Tracer) for x in arrays)
