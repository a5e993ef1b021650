"""Functions of the arrays in a state that belong to weights."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from .._model.selection import children
from .._sharding import state_specs
from .._storage.codec import QuantMoment
from .state import OptimizerState
from .states import find


def map_params(
    optim: Any,
    function: Callable[..., Any],
    state: PyTree,
    *rest: PyTree,
    transform_non_params: Callable[[Any], Any] | None = None,
) -> PyTree:
    """`optax.tree.map_params` for states in which a weight has several arrays, or none.

    Optax's function maps over trees of the structure of the weights, and a moment of 8
    bits is none: it has codes and scales. Nor is a correction that is `None`. This one
    calls `function` with each array of a weight, and with what `rest` has for that
    weight.

    ??? Example

        A state goes where its weights are:

        ```python
        everywhere = NamedSharding(mesh, PartitionSpec())
        where = fq.map_params(
            optim,
            lambda array, sharding: sharding,
            state,
            shardings,  # a tree like the weights
            transform_non_params=lambda _: everywhere,
        )
        state = jax.device_put(state, where)
        ```

    **Arguments:**

    - `optim`: what made the state: an optimizer of this library, or any of Optax that
        it is wrapped in.
    - `function`: a function `(array, *rest) -> new`, of an array of the state: codes,
        scales, corrections, moments that are not compressed, and checksums.
    - `state`: from `optim.init` or from a step.
    - `rest`: trees of the structure of the weights. Where one has a `NamedSharding`,
        what `function` gets with an array of another shape than the weight, such as the
        scales of groups, is a sharding that fits it: divided like the weight if groups
        are whole in each part, or else not at all.
    - `transform_non_params`: a function of all other leaves, such as the count. By
        default they stay as they are.

    **Returns:**

    A pytree of the structure of `state`, with `None` where that has `None`.

    **Raises:**

    `ValueError` if `rest` has not the structure of the weights.
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

    # What is written down of shardings is no array, but part of the structure, which
    # Optax compares with that of a state of nothing.
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
    return new.replace([_like(*x) for x in zip(found.values, new.values, strict=True)])


def _like(old: OptimizerState, new: OptimizerState) -> OptimizerState:
    """With all that is static in the old one. Its fields need not be arrays."""
    (_, put_together), (parts, _) = children(old), children(new)  # pyright: ignore
    return put_together([child for _, child in parts])


def _of_scales(moment: QuantMoment, other: Any) -> Any:
    if not isinstance(other, NamedSharding):
        return other
    # With an entry for each axis of the weight.
    ndim = moment.codes.ndim
    spec = PartitionSpec(*other.spec, *[None] * (ndim - len(other.spec)))
    full = NamedSharding(other.mesh, spec)
    return NamedSharding(other.mesh, state_specs.of_scales(moment.layout, full))


def _of_array(array: Any, other: Any) -> Any:
    """A scalar, as a checksum is, cannot be divided."""
    if isinstance(other, NamedSharding) and array.ndim < len(other.spec):
        return NamedSharding(other.mesh, PartitionSpec())
    return other
