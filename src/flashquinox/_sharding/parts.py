"""A step of leaves that are divided among devices: each device takes its own part, as
if it were all there is."""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float32, PyTree, Scalar

from .._backends import dispatch, learning
from .._backends.dispatch import LeafStep, Way
from .._common import memory, meshes
from .._storage.learned_codec import AbstractLearner
from .._storage.quant_moment import QuantMoment
from .._storage.regroup import encode_nearest
from .._tile.tile import TileState
from . import state_specs


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
            updated = _with_new_codes(here, dispatch.update_leaves(way, here))
        else:
            divided = tuple(shardings[i] for i in indices)
            updated = _update_parts(way, divided, here)  # pyright: ignore
        new.update(zip(indices, updated, strict=True))
    return [new[i] for i in range(len(steps))]


def make(
    makers: list[Callable[[], PyTree]],
    shardings: list[NamedSharding | None],
    is_traced: bool,
) -> list[PyTree]:
    """What each of these makes for a leaf: moments, and other arrays of its shape. Each
    array is divided like the leaf from the start. `is_traced`: whether leaves are."""
    made: dict[int, PyTree] = {}
    for mesh, indices in by_mesh(shardings).items():
        make_here = lambda indices=indices: [makers[i]() for i in indices]
        if mesh is None:
            here = make_here()
        else:
            shapes = eqx.filter_eval_shape(make_here)
            divided = [
                state_specs.of_arrays(x, shardings[i])  # pyright: ignore
                for i, x in zip(indices, shapes, strict=True)
            ]
            # On `Explicit` axes of a mesh that is set, types tell how arrays lie,
            # and not `jit`.
            is_set = not jax.sharding.get_abstract_mesh().empty
            by_type = is_traced and is_set and meshes.is_explicit(mesh)
            if isinstance(mesh, Mesh) and not by_type:
                here = jax.jit(make_here, out_shardings=divided)()
            else:
                here = jtu.tree_map(meshes.constrain, make_here(), divided)
        made.update(zip(indices, here, strict=True))
    return [made[i] for i in range(len(makers))]


def learn(
    steps: list[LeafStep], shardings: list[NamedSharding | None]
) -> list[LeafStep]:
    """The same steps with the parameters of codecs that learn. Every few steps they are
    fitted: of leaves that are divided, to all parts, with one collective for a mesh, of
    twelve numbers per moment."""
    new = list(steps)
    for mesh, indices in by_mesh(shardings).items():
        chosen = [i for i in indices if _learns(steps[i], shardings[i])]
        kinds = dict.fromkeys(
            type(learner)
            for i in chosen
            for learner in learning.learners(steps[i].structure).values()
        )
        for kind in kinds:
            # What is fitted does not depend on anything that could be differentiated.
            here = lax.stop_gradient([steps[i] for i in chosen])
            divided = tuple(shardings[i] for i in chosen)
            learned = _learn(kind, mesh, divided, here)
            for i, parameters in zip(chosen, learned, strict=True):
                new[i] = eqx.tree_at(
                    lambda step: step.scalars.leaf.parameters,
                    new[i],
                    new[i].scalars.leaf.parameters | parameters,
                )
    return new


def _learns(step: LeafStep, sharding: NamedSharding | None) -> bool:
    # Of groups that lie in several parts, a part does not know its scales.
    whole = sharding is None or state_specs.holds_whole_groups(step.layout, sharding)
    return bool(learning.learners(step.structure)) and whole


@partial(jax.jit, static_argnums=(0, 1, 2))
def _learn(
    kind: type[AbstractLearner],
    mesh: Mesh | AbstractMesh | None,
    shardings: tuple[NamedSharding | None, ...],
    steps: list[LeafStep],
) -> list[dict[str, tuple[Scalar, Scalar]]]:
    """For each leaf, the parameters before this step and after, of the moments whose
    learners are of this kind."""
    axes = () if mesh is None else tuple(meshes.free_axes(mesh))
    learners = [
        {
            name: learner
            for name, learner in learning.learners(step.structure).items()
            if isinstance(learner, kind)
        }
        for step in steps
    ]
    keys = [(i, name) for i, of_leaf in enumerate(learners) for name in of_leaf]

    # As one array: of scalars, GPUs would copy each in every step, as the kernels read
    # the old ones when the new ones may have taken their place.
    old = jnp.stack([steps[i].scalars.leaf.parameters[name][0] for i, name in keys])
    old = lax.optimization_barrier(old)

    def fit(
        steps: list[LeafStep], old: Float32[Array, " moments"]
    ) -> Float32[Array, " moments"]:
        def fitted() -> Float32[Array, " moments"]:
            observations = [
                observation
                for names, step in zip(
                    learners, map(_with_own_shape, steps), strict=True
                )
                for observation in learning.observe(
                    [*names], step.structure, step.layout, step.scalars, step.old
                )
            ]
            of_keys = [learners[i][name] for i, name in keys]
            errors = kind.errors(of_keys, observations, old)
            return kind.follow(old, lax.psum(errors, axes))

        return lax.cond(learning.is_due(steps[0].scalars.count), fitted, lambda: old)

    if mesh is not None:
        in_specs = [
            _specs(step, sharding)
            for step, sharding in zip(steps, shardings, strict=True)
            if sharding is not None
        ]
        fit = on_parts(fit, mesh, (in_specs, PartitionSpec()), PartitionSpec())
    fitted = fit(steps, old)
    learned: list[dict[str, tuple[Scalar, Scalar]]] = [{} for _ in steps]
    # `fitted` is `old` where no fit is due. Chosen all the same, for GPUs: they make
    # many such scalars in one kernel, but parts of an array each in its own.
    due = learning.is_due(steps[0].scalars.count)
    for (i, name), before, after in zip(keys, old, fitted, strict=True):
        take = steps[i].scalars.take
        take = due if take is None else due & take
        learned[i][name] = before, jnp.where(take, after, before)
    return learned


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


def _with_new_codes(steps: list[LeafStep], new: list[TileState]) -> list[TileState]:
    """Where a step was not taken, but codecs have learned: moments as they were, in new
    codes."""
    return [
        _in_new_codes(step, x)
        if step.scalars.take is not None and step.scalars.leaf.parameters
        else x
        for step, x in zip(steps, new, strict=True)
    ]


def _in_new_codes(step: LeafStep, new: TileState) -> TileState:
    learned, take = step.scalars.leaf.parameters, step.scalars.take
    assert take is not None
    groups = (step.layout.axes, step.layout.group_size)

    def encode_again(name: str) -> tuple[Array, Array]:
        codes, scales = new.codes[name], new.scales[name]
        assert scales is not None
        codec = step.structure.codec_of[name]
        before, after = learned[name]
        old = QuantMoment(codes, scales, *groups, codec, before)
        return encode_nearest(old.decode_stored(), codec, groups, after)

    as_they_are = {name: (new.codes[name], new.scales[name]) for name in learned}
    moved = jnp.any(jnp.stack([before != after for before, after in learned.values()]))
    found = lax.cond(
        moved & ~take,
        lambda: {name: encode_again(name) for name in learned},
        lambda: as_they_are,
    )
    codes = {name: codes for name, (codes, _) in found.items()}
    scales = {name: scales for name, (_, scales) in found.items()}
    return TileState(new.weight, new.correction, new.codes | codes, new.scales | scales)


# Compiled once, also where the caller does not.
@partial(jax.jit, static_argnums=(0, 1))
def _update_parts(
    way: Way, shardings: tuple[NamedSharding, ...], steps: list[LeafStep]
) -> list[TileState]:
    gathered = [
        bool(jtu.tree_leaves(step.old.scales))
        and not state_specs.holds_whole_groups(step.layout, sharding)
        for step, sharding in zip(steps, shardings, strict=True)
    ]

    def update(steps: list[LeafStep]) -> list[TileState]:
        whole = [
            _gather(step, sharding) if needed else step
            for step, sharding, needed in zip(steps, shardings, gathered, strict=True)
        ]
        whole = [_with_own_shape(x) for x in whole]
        new = _with_new_codes(whole, dispatch.update_leaves(way, whole))
        return [
            state.map(lambda x, sharding=sharding: _cut(x, sharding))
            if needed
            else state
            for state, sharding, needed in zip(new, shardings, gathered, strict=True)
        ]

    in_specs = [
        _specs(step, sharding) for step, sharding in zip(steps, shardings, strict=True)
    ]
    out_specs = [specs.old for specs in in_specs]
    return on_parts(update, shardings[0].mesh, (in_specs,), out_specs)(steps)


def _specs(step: LeafStep, sharding: NamedSharding) -> Any:
    """How the arrays of a step are divided: as the weight is, also the scales; but
    nothing of what is the same for all elements."""
    return eqx.tree_at(
        lambda x: (x.scalars, x.old),
        state_specs.alike(sharding.spec, step),
        (
            state_specs.alike(PartitionSpec(), step.scalars),
            _of_stacks(step, state_specs.of_leaf(step.old, step.layout, sharding)),
        ),
    )


def _of_stacks(step: LeafStep, specs: TileState) -> TileState:
    """The specs of a state, of which arrays in host memory may have all layers."""
    if step.scalars.leaf.layer is None:
        return specs
    return jtu.tree_map(
        lambda x, spec: PartitionSpec(None, *spec) if memory.is_on_host(x) else spec,
        step.old,
        specs,
    )


def _with_own_shape(step: LeafStep) -> LeafStep:
    layout = step.layout.of_shape(step.grad.shape)
    return LeafStep(step.structure, layout, step.scalars, step.grad, step.old)


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
