"""Small arrays outside of programs, by NumPy. There, JAX compiles a program for each
operation, shape and dtype, which takes tens of milliseconds."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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
# Of arrays that come back: of the larger ones, models have dozens of one shape, for
# which one program will do.
_MOST_BYTES_BOTH_WAYS = 2**21
# Fewer take as long.
_LEAST_ELEMENTS = 2**12


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
    return _put(x, like.sharding if like.committed else None, like.ndim)


def _put(x: np.ndarray, where: Sharding | None, axes: int) -> jax.Array:
    """An array that is whole where others are, which have so many axes. One of as many
    has their sharding: the axes of a mesh may all be of size 1, and have names."""
    if isinstance(where, NamedSharding) and x.ndim != axes:
        where = where.update(spec=PartitionSpec())
    return jax.device_put(x, where)


class Function(NamedTuple):
    """A function of arrays, and the same one for small arrays outside of programs, as
    NumPy has them. That takes the same few programs for arrays of all shapes."""

    of_arrays: Callable[..., PyTree]
    of_small: Callable[[list[np.ndarray]], PyTree]

    def __call__(self, *arrays: Any) -> PyTree:
        return self.of_arrays(*arrays)


def computed(
    function: Function, arrays: Sequence[Any], where: Sharding | None
) -> PyTree | None:
    """`function` of small arrays, with its results in this sharding. `None` for arrays
    that are not small, or not whole on each device, and within programs."""
    is_whole = where is None or (
        where.is_fully_addressable and where.is_fully_replicated
    )
    if not is_whole or _bytes(arrays) > _MOST_BYTES_BOTH_WAYS:
        return None
    found = fetched([x for x in arrays if not isinstance(x, np.ndarray)])
    if found is None:
        return None
    left = iter(found)
    values = [x if isinstance(x, np.ndarray) else next(left) for x in arrays]
    put = lambda x: _put(np.asarray(x), where, arrays[0].ndim)
    return jtu.tree_map(put, function.of_small(values))


def elementwise(function: Callable[..., PyTree]) -> Function:
    """A function of arrays of one shape, where each element of the results depends on
    those at the same place alone. Of small ones, it sees vectors."""

    def of_vectors(values: list[np.ndarray]) -> PyTree:
        values = list(np.broadcast_arrays(*values))
        shape, size = values[0].shape, values[0].size
        new = function(*[lengthened(x.reshape(-1)) for x in values])
        return jtu.tree_map(lambda x: shortened(x, size).reshape(shape), new)

    return Function(function, of_vectors)


def lengthened(x: np.ndarray, of_row: int = 1) -> jax.Array:
    """With zeros past the end of its first axis, so that many arrays have its length, a
    power of two. `of_row`: how many elements are computed of one of its rows."""
    least = max(1, _LEAST_ELEMENTS // of_row)
    length = max(least, 1 << max(0, len(x) - 1).bit_length())
    zeros = [(0, 0)] * (x.ndim - 1)
    return jax.device_put(np.pad(x, [(0, length - len(x)), *zeros]))


def shortened(x: jax.Array, length: int) -> np.ndarray:
    """What `lengthened` was given, of the result for that. A copy: a CPU's array could
    be a part of the memory of the longer one, and would keep all of it."""
    return np.asarray(x)[:length].copy()


def largest(x: Any) -> Any:
    """The largest magnitude of an array's elements, on the host if that has them."""
    here = on_host(x)
    if here is None:
        return _largest(x)
    return np.max(np.abs(here), initial=0)


def on_host(x: Any) -> np.ndarray | None:
    """A small array as NumPy has it. `None` for others."""
    if isinstance(x, np.ndarray):
        return x
    if _bytes([x]) > _MOST_BYTES_BOTH_WAYS:
        return None
    found = fetched([x])
    return None if found is None else found[0]


def place(*arrays: Any) -> Sharding | None:
    """Where the first array is that is committed to devices, if they are there
    already."""
    for x in arrays:
        is_there = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
        if is_there and x.committed:
            return x.sharding
    return None


@jax.jit
def _largest(x: Shaped[Array, "..."]) -> Shaped[Array, ""]:
    # XLA leaves NaN out of the maximum of an array on CPUs.
    is_nan = jnp.any(jnp.isnan(x))
    return jnp.where(is_nan, jnp.nan, jnp.max(jnp.abs(x), initial=0))


def _are_small(arrays: Sequence[Any]) -> bool:
    return _bytes(arrays) <= _MOST_BYTES


def _bytes(arrays: Sequence[Any]) -> int:
    return sum([x.size * jnp.dtype(x.dtype).itemsize for x in arrays])
