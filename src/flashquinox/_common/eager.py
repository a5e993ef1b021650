"""Small arrays outside of programs, by NumPy. There, JAX compiles a program for each
operation, shape and dtype, which takes tens of milliseconds."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, DTypeLike, PyTree, Shaped

from .memory import HOST_KIND


# Copies of larger arrays between host and device would take as long as a compiler.
_MOST_BYTES = 2**24
# Of vectors that are computed with. Shorter ones take as long.
_LEAST_LENGTH = 2**12


def is_traced() -> bool:
    """Whether operations become parts of a program."""
    return isinstance(jnp.zeros((), jnp.int32), jax.core.Tracer)


def zeros(
    shape: tuple[int, ...], dtype: DTypeLike, sharding: Sharding | None = None
) -> Shaped[Array, "..."]:
    """`jnp.zeros`. Those that are large are made by the devices, but for those in host
    memory."""
    if is_traced():
        x = jnp.zeros(shape, dtype)
        return x if sharding is None else jax.device_put(x, sharding)
    like = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    if sharding is None:
        is_set = not jax.sharding.get_abstract_mesh().empty
        if is_set or not _are_small([like]):
            return jnp.zeros(shape, dtype)
        return jax.device_put(np.zeros(shape, like.dtype))
    if not _are_small([like]) and sharding.memory_kind != HOST_KIND:
        return jnp.zeros(shape, dtype, device=sharding)
    # The system gives such pages when they are written to.
    part = np.zeros(sharding.shard_shape(shape), like.dtype)
    if len(sharding.device_set) == 1:
        # The other function would not give it the type of one in host memory.
        return jax.device_put(part, sharding)
    return jax.make_array_from_callback(shape, sharding, lambda _: part)


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
    if not here or not _are_small(arrays) or is_traced():
        return None
    return jax.device_get(list(arrays))


def put(x: np.ndarray, like: jax.Array) -> jax.Array:
    """An array where another one is that was fetched."""
    there = like.sharding
    if isinstance(there, NamedSharding):
        # It may have another number of axes.
        there = there.update(spec=PartitionSpec())
    return jax.device_put(x, there if like.committed else None)


def by_elements(
    function: Callable[..., PyTree], arrays: Sequence[Any], where: Sharding | None
) -> PyTree | None:
    """`function(*arrays)`, of arrays of one shape, whose elements depend on those at
    the same place alone, with its results in this sharding. It sees vectors whose
    lengths are powers of two, so that arrays of all shapes share its few programs.
    `None` for arrays that are not small, or not whole on each device, and within
    programs."""
    is_whole = where is None or (
        where.is_fully_addressable and where.is_fully_replicated
    )
    jax_arrays = [x for x in arrays if not isinstance(x, np.ndarray)]
    if not is_whole or not _are_small(arrays):
        return None
    found = fetched(jax_arrays)
    if found is None:
        return None
    left = iter(found)
    values = [x if isinstance(x, np.ndarray) else next(left) for x in arrays]
    shape, size = values[0].shape, values[0].size
    padding = _length(size) - size
    # What is past the end is computed with the others.
    rows = [jax.device_put(np.pad(x.reshape(-1), (0, padding))) for x in values]
    restored = lambda x: np.asarray(x)[:size].reshape(shape)
    return jtu.tree_map(lambda x: jax.device_put(restored(x), where), function(*rows))


def place(x: Any) -> Sharding | None:
    """Where an array is committed to, if it is there already."""
    is_there = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
    return x.sharding if is_there and x.committed else None


def _length(size: int) -> int:
    return max(_LEAST_LENGTH, 1 << max(0, size - 1).bit_length())


def _are_small(arrays: Sequence[Any]) -> bool:
    return sum([x.size * jnp.dtype(x.dtype).itemsize for x in arrays]) <= _MOST_BYTES
