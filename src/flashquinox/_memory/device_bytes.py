"""The bytes of arrays on one device, given their shapes and shardings."""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.sharding import NamedSharding
from jaxtyping import PyTree

from .._common import meshes
from .._model.trees import flatten
from .._sharding import state_specs


def as_struct(x: Any, sharding: NamedSharding | None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def arrays_of_state(
    trees: list[PyTree],
    there: dict[Any, NamedSharding],
    paths: set[tuple[Any, ...]] | None = None,
) -> list[Any]:
    """The arrays in trees of a state, with shardings like those of their weights. Each
    moment is one entry. With `paths`, those of these leaves."""
    found = []
    for leaf in (leaf for tree in trees for leaf in flatten(tree)[0]):
        value = leaf.value
        if paths is not None and leaf.unwrapped not in paths:
            continue
        if value is not None and leaf.unwrapped in there:
            shardings = state_specs.of_arrays(value, there[leaf.unwrapped])
            value = jtu.tree_map(as_struct, value, shardings)
        found += [] if value is None else [value]
    return found


def elements_on_device(x: Any) -> int:
    """The number of elements of an array on one device."""
    if not isinstance(x.sharding, NamedSharding):
        return math.prod(x.shape)
    return math.prod(x.shape) // math.prod(meshes.divisions(x.sharding))


def bytes_on_device(arrays: Iterable[Any]) -> int:
    return sum(math.ceil(elements_on_device(x) * _bits(x.dtype) / 8) for x in arrays)


def _bits(dtype: Any) -> int:
    """The bits of an element. On devices, those of fewer than 8 share bytes, which
    `itemsize` does not say."""
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.finfo(dtype).bits
    return 8 * dtype.itemsize
