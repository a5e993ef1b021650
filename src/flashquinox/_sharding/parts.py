"""What of a leaf is on each device: its own part, as if that were all there is."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from .._backends.dispatch import LeafStep
from .._common import meshes
from . import state_specs


def by_mesh(shardings: list[NamedSharding | None]) -> dict[Any, list[int]]:
    """The numbers of the leaves on each mesh, and on none."""
    found: dict[Any, list[int]] = {}
    for i, sharding in enumerate(shardings):
        found.setdefault(sharding and sharding.mesh, []).append(i)
    return found


def on_parts(
    function: Callable, mesh: Mesh | AbstractMesh, in_specs: Any, out_specs: Any
) -> Any:
    """A function that every device of a mesh calls with its parts of the arguments."""
    # What is computed on every device alike cannot be told from what is not.
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(meshes.free_axes(mesh)),
        check_vma=False,
    )


def specs_of(step: LeafStep, sharding: NamedSharding) -> Any:
    """How the arrays of a step are divided: as the weight is, also the scales; but
    nothing of what is the same for all elements."""
    return eqx.tree_at(
        lambda x: (x.scalars, x.old),
        state_specs.alike(sharding.spec, step),
        (
            state_specs.alike(PartitionSpec(), step.scalars),
            state_specs.of_leaf(step.old, step.layout, sharding),
        ),
    )


def with_own_shape(step: LeafStep) -> LeafStep:
    layout = step.layout.of_shape(step.grad.shape)
    return LeafStep(step.structure, layout, step.scalars, step.grad, step.old)
