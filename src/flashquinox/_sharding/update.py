"""A step of leaves that are divided among devices: each device takes its own part."""

from functools import partial

import jax
import jax.lax as lax
from jax.sharding import NamedSharding
from jaxtyping import Array

from .._backends import dispatch
from .._backends.dispatch import LeafStep, Way
from .._common import meshes
from .._tile.step import TileState
from . import state_specs
from .learned import with_new_codes
from .parts import by_mesh, on_parts, specs_of, with_own_shape


def update_leaves(
    way: Way, steps: list[LeafStep], shardings: list[NamedSharding | None]
) -> list[TileState]:
    """One step of all leaves.

    If groups lie within its part of a leaf, no device needs anything of another one.
    Otherwise all parts are gathered, and each device updates all and keeps its own.
    """
    new: dict[int, TileState] = {}
    for mesh, indices in by_mesh(shardings).items():
        here = [steps[i] for i in indices]
        if mesh is None:
            updated = with_new_codes(here, dispatch.update_leaves(way, here))
        else:
            divided = tuple(shardings[i] for i in indices)
            updated = _update_parts(way, divided, here)  # pyright: ignore
        new.update(zip(indices, updated, strict=True))
    return [new[i] for i in range(len(steps))]


# Compiled once, also where the caller does not.
@partial(jax.jit, static_argnums=(0, 1))
def _update_parts(
    way: Way, shardings: tuple[NamedSharding, ...], steps: list[LeafStep]
) -> list[TileState]:
    gathered = [
        step.old.is_grouped
        and not state_specs.holds_whole_groups(step.layout, sharding)
        for step, sharding in zip(steps, shardings, strict=True)
    ]

    def update(steps: list[LeafStep]) -> list[TileState]:
        whole = [
            _gather(step, sharding) if needed else step
            for step, sharding, needed in zip(steps, shardings, gathered, strict=True)
        ]
        whole = [with_own_shape(x) for x in whole]
        new = with_new_codes(whole, dispatch.update_leaves(way, whole))
        return [
            state.map(lambda x, sharding=sharding: _cut(x, sharding))
            if needed
            else state
            for state, sharding, needed in zip(new, shardings, gathered, strict=True)
        ]

    in_specs = [
        specs_of(step, sharding)
        for step, sharding in zip(steps, shardings, strict=True)
    ]
    out_specs = [specs.old for specs in in_specs]
    return on_parts(update, shardings[0].mesh, (in_specs,), out_specs)(steps)


def _gather(step: LeafStep, sharding: NamedSharding) -> LeafStep:
    def gather(x: Array) -> Array:
        for axis, names in enumerate(meshes.mesh_axes(sharding)):
            if names:
                x = lax.all_gather(x, names, axis=axis, tiled=True)
        return x

    return LeafStep(
        step.structure,
        step.layout,
        step.scalars,
        gather(step.grad),
        step.old.map(gather),
    )


def _cut(x: Array, sharding: NamedSharding) -> Array:
    """This device's part of an array."""
    parts = meshes.divisions(sharding)
    for axis, names in enumerate(meshes.mesh_axes(sharding)):
        if names:
            length = x.shape[axis] // parts[axis]
            start = lax.axis_index(names) * length
            x = lax.dynamic_slice_in_dim(x, start, length, axis)
    return x
