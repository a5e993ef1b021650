"""Computing with arrays in any sharding, and putting the results where other arrays
are."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from . import eager, memory, meshes
from .target import Target


def put_like(call: str, name: str, x: Any, like: Any) -> Any:
    """An array on the devices, in the sharding and in the memory of another one. Inside
    `jit`, this applies to `Explicit` axes of a mesh, and the compiler decides the
    rest."""
    if _is_traced(x, like):
        x = meshes.as_typed(jnp.asarray(x), jax.typeof(like).sharding)
        return memory.where(x, like)
    target = Target.of(call, name, like)
    return target.put(_free(x) if target.sharding is None else x)


def compute_like(
    call: str,
    name: str,
    function: Callable[..., PyTree],
    arrays: Sequence[Any],
    likes: Sequence[Any],
) -> PyTree:
    """`function(*arrays)`, with each array put where its `like` is. `Explicit` axes of
    meshes are made automatic, for functions that do not say how their results are
    sharded. Arrays in host memory are copied to the device."""
    if _is_traced(*arrays, *likes):
        return function(*memory.to_device(list(arrays)))
    targets = [Target.of(call, name, like) for like in likes]
    places = [target.sharding_of_read(automatic=True) for target in targets]
    with no_mesh():
        if isinstance(function, eager.Function):
            new = eager.computed(function, arrays, places[0])
            if new is not None:
                return new
        return function(
            *[
                _free(x) if place is None else jax.device_put(x, place)
                for x, place in zip(arrays, places, strict=True)
            ]
        )


def no_mesh() -> Any:
    """A context without the mesh that the caller may have set: arrays may be on other
    meshes."""
    try:
        return jax.set_mesh(Mesh(np.empty((), dtype=object), ()))
    except ValueError:
        # In a function that JAX transforms, arrays need not be traced: under `vmap`,
        # what is the same for all members is not. A mesh cannot be set there.
        return contextlib.nullcontext()


def _free(x: Any) -> Any:
    """An array that is not committed to devices."""
    return np.asarray(x) if isinstance(x, jax.Array) and x.committed else x


def _is_traced(*arrays: Any) -> bool:
    return any(isinstance(x, jax.core.Tracer) for x in arrays)
