"""Mapping functions over the arrays that a state has for weights."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from .._sharding import state_specs
from .._storage.quant_moment import QuantMoment
from .packing import FIELDS
from .state import with_fields
from .states import find, unpacked


def map_params(
    optim: Any,
    function: Callable[..., Any],
    state: PyTree,
    *rest: PyTree,
    transform_non_params: Callable[[Any], Any] | None = None,
) -> PyTree:
    """`optax.tree.map_params` for states that have several arrays, or none, for a
    weight.

    Optax's function expects trees of the structure of the weights. Compressed moments
    have codes and scales for each weight, and corrections may be `None`. This function
    calls `function` with each array that belongs to a weight, and with the entries of
    `rest` for that weight.

    ??? Example

        Put a state where its weights are:

        ```python
        everywhere = NamedSharding(mesh, PartitionSpec())
        state = fq.map_params(
            optim,
            jax.device_put,
            state,
            shardings,  # a tree like the weights
            transform_non_params=lambda x: jax.device_put(x, everywhere),
        )
        ```

    **Arguments:**

    - `optim`: the optimizer that made the state: one of this library, or an Optax
        wrapper around one.
    - `function`: a function `(array, *rest) -> new` of codes, scales, corrections,
        uncompressed moments and checksums.
    - `state`: from `optim.init` or from a step.
    - `rest`: trees of the structure of the weights. `NamedSharding`s in them are
        adapted to arrays of other shapes than the weight, such as scales: `function`
        gets the sharding of the weight if its parts hold whole groups, and a replicated
        one otherwise.
    - `transform_non_params`: a function of all other leaves, such as the count. By
        default, these stay as they are.

    **Returns:**

    A pytree of the structure of `state`, with `None` where `state` has `None`.

    **Raises:**

    `ValueError` if `rest` does not have the structure of the weights.
    """
    is_whole = lambda x: x is None or isinstance(x, QuantMoment | optax.MaskedNode)
    leave = lambda x: x if transform_non_params is None else transform_non_params(x)

    def one(stored: Any, *others: Any) -> Any:
        if not isinstance(stored, QuantMoment):
            if is_whole(stored):
                return stored
            return function(stored, *(_of_array(stored, x) for x in others))
        parts = [
            function(stored.codes, *others),
            function(stored.scales, *(_of_scales(stored, x) for x in others)),
        ]
        where = lambda x: (x.codes, x.scales)
        if stored.parameter is not None:
            parts.append(leave(stored.parameter))
            where = lambda x: (x.codes, x.scales, x.parameter)
        return eqx.tree_at(where, stored, tuple(parts))

    # The recorded shardings are static. They are left out here, because Optax compares
    # the structure of this state with that of a state without weights.
    state, packed = unpacked(state)
    found = find(state)
    bare = [dataclasses.replace(x, shardings=()) for x in found.values]
    mapped = optax.tree.map_params(
        optim,
        one,
        found.replace(bare),
        *rest,
        transform_non_params=transform_non_params,
        is_leaf=is_whole,
    )
    new = find(mapped)
    return packed(
        new.replace(
            [
                # Which can be anything that `function` returns.
                with_fields(
                    old, None, steps=x.steps, **{y: getattr(x, y) for y in FIELDS}
                )
                for old, x in zip(found.values, new.values, strict=True)
            ]
        )
    )


def _of_scales(moment: QuantMoment, other: Any) -> Any:
    if not isinstance(other, NamedSharding):
        return other
    # A spec may have fewer entries than the weight has axes.
    ndim = moment.codes.ndim
    spec = PartitionSpec(*other.spec, *[None] * (ndim - len(other.spec)))
    full = NamedSharding(other.mesh, spec)
    return NamedSharding(other.mesh, state_specs.of_scales(moment.layout, full))


def _of_array(array: Any, other: Any) -> Any:
    """A sharding for an array with fewer axes than the weight, such as a checksum, is
    replicated; one for means, along the axes that are left."""
    if not isinstance(other, NamedSharding):
        return other
    if array.ndim < len(other.spec):
        return NamedSharding(other.mesh, PartitionSpec())
    return state_specs.of_array(array.shape, other)
