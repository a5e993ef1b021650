"""How weights and states are divided among devices: what is wrong, and what is slow."""

import warnings

import jax
import jax.tree_util as jtu
from jax.sharding import NamedSharding

from .._common import meshes
from .._compat import varying_axes
from .._model.trees import Leaf
from .._sharding import state_specs
from .._sharding.record import Shardings
from .._storage.quant_moment import QuantMoment, StoredMoment
from .._storage.split import Correction


def warn_of_unknown_division(call: str, unknown: list[Leaf]) -> None:
    """Warns of weights whose division among devices only XLA knows."""
    if not unknown:
        return
    others = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
    mesh = jax.typeof(unknown[0].value).sharding.mesh
    warnings.warn(
        f"`{call}`: the weight at `{unknown[0].name}`{others} is on the mesh "
        f"{meshes.mesh_text(mesh)}, and it is not known how it is divided there: "
        "inside `jit` and `vmap`, JAX does not tell. XLA divides the program, without "
        "this library's kernels, and may communicate. For kernels, call `init` outside "
        "of `jit`, on the weights where they shall be, and the state knows; or use a "
        "mesh with axes of type `Explicit`; or pass `shardings=...` to the optimizer: "
        "a `NamedSharding` for each weight, which under `vmap` is that of one member.",
        stacklevel=2,
    )


def warn_of_parts(
    call: str, leaves: list[Leaf], what: str, recorded: Shardings
) -> None:
    """Warns of what is computed of whole weights, where a `shard_map` of the caller's
    leaves a part of them to each device. The types of arrays say so, but with
    `check_vma=False`; then, what the state recorded."""
    manual = frozenset(jax.sharding.get_abstract_mesh().manual_axes)
    if not manual:
        return
    there = {
        path: manual & meshes.spec_axes(sharding.spec) for path, sharding in recorded
    }
    found = [
        (leaf, varying_axes(leaf.value) | there.get(leaf.unwrapped, frozenset()))
        for leaf in leaves
    ]
    divided = [leaf for leaf, axes in found if axes]
    if not divided:
        return
    axes = ", ".join(sorted(frozenset().union(*[axes for _, axes in found])))
    others = f" and {len(divided) - 1} more" if len(divided) > 1 else ""
    warnings.warn(
        f"`{call}`: in a `shard_map`, the weight at `{divided[0].name}`{others} "
        f"differs along the mesh axes {axes}. {what} of what one device holds: right "
        "for whole weights, as of the stages of a pipeline, and wrong for parts. For "
        "parts, take the step outside of the `shard_map`.",
        stacklevel=2,
    )


def warn_of_divided_groups(
    call: str,
    leaf: Leaf,
    stored: dict[str, StoredMoment],
    sharding: NamedSharding,
) -> None:
    """Warns of a division that cuts through groups: it is correct, but slow."""
    for moment in stored.values():
        if not isinstance(moment, QuantMoment):
            continue
        if not state_specs.holds_whole_groups(moment.layout, sharding):
            warnings.warn(
                f"`{call}`: the weight at `{leaf.name}`, of shape {leaf.value.shape}, "
                f"is sharded by {sharding.spec} into {meshes.divisions(sharding)} "
                f"parts, which hold no whole groups of {moment.group_size} elements "
                f"along {_axis_text(moment)}. Every step gathers it on every device. "
                "Shard it along another axis, or make its axes multiples of the parts "
                "times the group size; a state from elsewhere may need a new `init`.",
                stacklevel=2,
            )
            return


def _axis_text(moment: QuantMoment) -> str:
    axes = moment.axes
    return f"axis {axes[0]}" if len(axes) == 1 else f"the merged axes {axes}"


def check_state_is_with_weight(
    call: str,
    leaf: Leaf,
    stored: dict[str, StoredMoment],
    correction: Correction | None,
    sharding: NamedSharding,
) -> None:
    """The state of a leaf must be divided as its weight is."""
    state = stored, correction
    found = jtu.tree_leaves(state)
    expected = jtu.tree_leaves(state_specs.of_arrays(state, sharding))
    for x, there in zip(found, expected, strict=True):
        if not meshes.is_there(x, there):
            raise ValueError(
                f"`{call}`: the state at `{leaf.name}` is sharded by "
                f"{jax.typeof(x).sharding}, and should be by {there.spec} on the mesh "
                "of its weight. Put it there with `jax.device_put`, or restore it with "
                "`flashquinox.checkpoint` into a state that `init` made."
            )
