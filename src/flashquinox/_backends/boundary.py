"""Where plain XLA on CPUs ends one kernel and begins the next.

It fuses what it can, and computes again in each kernel what several need. What crosses
a boundary is stored. As XLA takes 10 ms and more to compile a kernel, whatever that
does, several numbers for each group become one array.
"""

from collections.abc import Sequence
from typing import Any

import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Shaped

from .groups import joined


def boundary(values: Any) -> Any:
    """The same arrays, which XLA stores before they are used: numbers for each group in
    one array, all others one by one."""
    arrays, structure = jtu.tree_flatten(values)
    numbers = [i for i, x in enumerate(arrays) if x.ndim == 0 and x.dtype.itemsize == 4]
    if len(numbers) < 2:
        numbers = []
    else:
        stored = _stored_together(*[arrays[i] for i in numbers])
        for i, x in zip(numbers, stored, strict=True):
            arrays[i] = x
    # One by one: together, all would have the axis of groups.
    return structure.unflatten(
        [x if i in numbers else _stored(x) for i, x in enumerate(arrays)]
    )


@custom_vmap
def _stored(x: Array) -> Array:
    """The same array, which XLA fuses with nothing: it is stored."""
    return lax.optimization_barrier(x)


@_stored.def_vmap
def _stored_of_groups(
    axis_size: int, is_batched: list[bool], x: Array
) -> tuple[Array, bool]:
    # In arrays of one axis, loops over which are compiled to faster code, and sooner.
    del axis_size
    (batched,) = is_batched
    return lax.optimization_barrier(x.reshape(-1)).reshape(x.shape), batched


@custom_vmap
def _stored_together(*numbers: Array) -> tuple[Array, ...]:
    return tuple(_joined_and_split([x.reshape(1) for x in numbers], ()))


@_stored_together.def_vmap
def _stored_together_of_groups(
    axis_size: int, is_batched: Sequence[bool], *numbers: Array
) -> tuple[tuple[Array, ...], tuple[bool, ...]]:
    stored = list(numbers)
    for batched in (False, True):
        of_kind = [i for i, x in enumerate(is_batched) if x is batched]
        if not of_kind:
            continue
        shape = numbers[of_kind[0]].shape
        flat_ones = [numbers[i].reshape(-1) for i in of_kind]
        for i, x in zip(of_kind, _joined_and_split(flat_ones, shape), strict=True):
            stored[i] = x
    return tuple(stored), tuple(is_batched)


def _joined_and_split(
    arrays: Sequence[Shaped[Array, " n"]], shape: tuple[int, ...]
) -> list[Shaped[Array, "..."]]:
    if len(arrays) == 1:
        return [lax.optimization_barrier(arrays[0]).reshape(shape)]
    bits = joined([lax.bitcast_convert_type(x, jnp.int32) for x in arrays])
    bits = lax.optimization_barrier(bits)
    size = arrays[0].size
    parts = [bits[i * size : (i + 1) * size] for i in range(len(arrays))]
    return [
        lax.bitcast_convert_type(part, x.dtype).reshape(shape)
        for part, x in zip(parts, arrays, strict=True)
    ]
