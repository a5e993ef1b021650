"""Codecs that learn, of leaves that are divided among devices: each device looks at its
own part of the sample, and all get the same parameters."""

from functools import partial

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float32, Scalar

from .._backends import learning
from .._backends.dispatch import LeafStep
from .._common import meshes
from .._storage.learned_codec import AbstractLearner
from .._storage.quant_moment import QuantMoment
from .._storage.regroup import encode_nearest
from .._tile.step import TileState
from . import state_specs
from .parts import by_mesh, on_parts, specs_of, with_own_shape


def learn(
    steps: list[LeafStep], shardings: list[NamedSharding | None]
) -> list[LeafStep]:
    """The same steps with the parameters of codecs that learn. Every few steps they are
    fitted: of leaves that are divided, to all parts, with one collective for a mesh, of
    twelve numbers per moment."""
    new = list(steps)
    if not any([step.scalars.leaf.parameters for step in steps]):
        return new
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
        [
            name
            for name, learner in learning.learners(step.structure).items()
            if isinstance(learner, kind)
        ]
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
            here = [*map(with_own_shape, steps)]
            errors = learning.errors(kind, learners, here)
            return kind.follow(old, lax.psum(errors, axes))

        return lax.cond(learning.is_due(steps[0].scalars.count), fitted, lambda: old)

    if mesh is not None:
        in_specs = [
            specs_of(step, sharding)
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


def with_new_codes(steps: list[LeafStep], new: list[TileState]) -> list[TileState]:
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
