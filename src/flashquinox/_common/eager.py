"""Small arrays outside of programs, by NumPy. There, JAX compiles a program for each
operation, shape and dtype, which takes tens of milliseconds."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, DTypeLike, Shaped


# Copies of larger arrays between host and device would take as long as a compiler.
_MOST_BYTES = 2**24


def is_here() -> bool:
    """Whether operations are carried out here and now, on no mesh that is set."""
    is_traced = isinstance(jnp.zeros((), jnp.int32), jax.core.Tracer)
    return not is_traced and jax.sharding.get_abstract_mesh().empty


def zeros(shape: tuple[int, ...], dtype: DTypeLike) -> Shaped[Array, "..."]:
    like = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    if _are_small([like]) and is_here():
        return jax.device_put(np.zeros(shape, like.dtype))
    return jnp.zeros(shape, dtype)


def fetched(arrays: Sequence[Any]) -> list[np.ndarray] | None:
    """Arrays that are whole on each of some devices, as NumPy has them. `None` for
    others."""
    here = all(
        [
            isinstance(x, jax.Array)
            and not isinstance(x, jax.core.Tracer)
            and x.is_fully_addressable
            and x.is_fully_replicated
            for x in arrays
        ]
    )
    if not here or not _are_small(arrays) or not is_here():
        return None
    return jax.device_get(list(arrays))


def put(x: np.ndarray, like: jax.Array) -> jax.Array:
    """An array where another one is that was fetched."""
    there = like.sharding
    if isinstance(there, NamedSharding):
        # It may have another number of axes.
        there = there.update(spec=PartitionSpec())
    return jax.device_put(x, there if like.committed else None)


def _are_small(arrays: Sequence[Any]) -> bool:
    return sum([x.size * jnp.dtype(x.dtype).itemsize for x in arrays]) <= _MOST_BYTES
