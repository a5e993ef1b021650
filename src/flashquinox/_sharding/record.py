"""The shardings of weights that a state records."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.core
from jax.sharding import AbstractMesh, NamedSharding

from .._model.trees import Leaf


# For each leaf on several devices, its unwrapped path and its sharding when `init` was
# called, on a mesh without devices.
Shardings: TypeAlias = tuple[tuple[tuple[Any, ...], NamedSharding], ...]


def record(
    leaves: Sequence[Leaf], shardings: Sequence[NamedSharding | None], old: Shardings
) -> Shardings:
    """The shardings to record, without devices, because these may change. Inside `jit`,
    the old record stays: all states of a loop must have the same structure."""
    if are_traced(leaves) and old:
        return old
    if not leaves:
        return OfNothing()
    return tuple(
        (
            leaf.unwrapped,
            NamedSharding(
                AbstractMesh(sharding.mesh.axis_sizes, sharding.mesh.axis_names),
                sharding.spec,
            ),
        )
        for leaf, sharding in zip(leaves, shardings, strict=True)
        if sharding is not None
    )


class OfNothing(tuple[Any, ...]):
    """A record of a state without weights. It is equal to every record, because
    `optax.tree.map_params` makes such a state, and compares its structure with that of
    any other."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, tuple)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(())


def are_traced(leaves: Sequence[Leaf]) -> bool:
    return any(isinstance(leaf.value, jax.core.Tracer) for leaf in leaves)
