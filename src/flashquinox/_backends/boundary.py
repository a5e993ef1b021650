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
from jaxtyping import Array, Shaped

from .. import _compat
from .groups import flat, joined


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
        [x if i in numbers else _stored(x)[0] for i, x in enumerate(arrays)]
    )


def _flat_and_stored(x: Array) -> list[Array]:
    # In arrays of one axis, loops over which are compiled to faster code, and sooner.
    return [lax.optimization_barrier(flat(x)).reshape(x.shape)]


def _joined_and_stored(*numbers: Array) -> list[Array]:
    """Those of groups in one array, and those that are the same for all."""
    stored = list(numbers)
    for shape in dict.fromkeys([x.shape for x in numbers]):
        alike = [i for i, x in enumerate(numbers) if x.shape == shape]
        arrays = [numbers[i].reshape(-1) for i in alike]
        for i, x in zip(alike, _joined_and_split(arrays, shape), strict=True):
            stored[i] = x
    return stored


_stored = _compat.unchanged("flashquinox_stored", _flat_and_stored)
_stored_together = _compat.unchanged("flashquinox_stored_together", _joined_and_stored)


def _joined_and_split(
    arrays: Sequence[Shaped[Array, " n"]], shape: tuple[int, ...]
) -> list[Shaped[Array, "..."]]:
    if len(arrays) == 1:
        # One scalar takes no time to compute again where it is needed.
        (x,) = arrays if shape == () else lax.optimization_barrier(arrays)
        return [x.reshape(shape)]
    bits = joined([lax.bitcast_convert_type(x, jnp.int32) for x in arrays])
    bits = lax.optimization_barrier(bits)
    size = arrays[0].size
    parts = [bits[i * size : (i + 1) * size] for i in range(len(arrays))]
    return [
        lax.bitcast_convert_type(part, x.dtype).reshape(shape)
        for part, x in zip(parts, arrays, strict=True)
    ]
