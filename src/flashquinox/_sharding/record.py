"""What a state remembers of how its weights were divided."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.core
from jax.sharding import (
    AbstractMesh,
    NamedSharding,
)

from .._model.trees import Leaf


# Of the state: for each leaf that is on several devices, its unwrapped path and how it
# was divided by `init`. The mesh is one without devices.
Shardings: TypeAlias = tuple[tuple[tuple[Any, ...], NamedSharding], ...]


def record(
    leaves: Sequence[Leaf], shardings: Sequence[NamedSharding | None], old: Shardings
) -> Shardings:
    """What the state keeps: nothing of the devices, which may be others later. In a
    program that is traced, what it kept: states of a loop have one structure."""
    if are_traced(leaves) and old:
        return old
    if not leaves:
        return _OfNothing()
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


class _OfNothing(tuple[Any, ...]):
    """What the state of no weights keeps. `optax.tree.map_params` makes such a state,
    and compares it with those of a model, however that is divided."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, tuple)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(())


def are_traced(leaves: Sequence[Leaf]) -> bool:
    return any(isinstance(leaf.value, jax.core.Tracer) for leaf in leaves)
