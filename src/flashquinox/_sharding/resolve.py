"""Finding the sharding of each leaf.

JAX always knows on which mesh a weight is, also inside `jit`. There it does not know
how the weight is divided over axes of type `Auto`. A wrong guess would silently
communicate in every step, so the library never guesses. Instead, `init` records
shardings in the state when it is called outside of `jit`. Where the sharding is
unknown, the step runs in plain XLA, which knows it when it partitions the program;
kernels cannot be partitioned.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.core
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from .._common.meshes import (
    axes_of_type,
    axis_names,
    divisions,
    everywhere,
    free_axes,
    mesh_text,
    restrict,
    visible_spec,
)
from .._model.trees import Leaf
from .record import Shardings


class Resolved(NamedTuple):
    """The shardings of leaves: `None` for leaves on one device, and for those whose
    sharding is not known. The latter are in `unknown`."""

    shardings: list[NamedSharding | None]
    unknown: list[Leaf]


def resolve_all(
    call: str,
    leaves: Sequence[Leaf | None],
    given: Sequence[NamedSharding | None],
    recorded: Shardings,
) -> Resolved:
    """The sharding of each leaf. If some leaves are on a mesh, leaves on one device are
    replicated over it."""
    written = dict(recorded)
    found = [
        None
        if leaf is None
        else _resolve(call, leaf, sharding, written.get(leaf.unwrapped))
        for leaf, sharding in zip(leaves, given, strict=True)
    ]
    if found.count(None) == len(found):
        return Resolved([None for _ in found], [])
    others = everywhere([x for x in found if isinstance(x, NamedSharding)])
    pairs = list(zip(leaves, found, strict=True))
    return Resolved(
        [_settle(leaf, sharding, others) for leaf, sharding in pairs],
        [leaf for leaf, x in pairs if leaf is not None and isinstance(x, _Unknown)],
    )


def _settle(
    leaf: Leaf | None,
    sharding: "NamedSharding | _Unknown | None",
    others: NamedSharding | None,
) -> NamedSharding | None:
    if isinstance(sharding, _Unknown):
        return None
    if leaf is None or sharding is not None or others is None:
        return sharding
    return NamedSharding(others.mesh, restrict(others.spec, (), leaf.value.ndim))


class _Unknown:
    """In place of a sharding that only XLA knows."""


def _resolve(
    call: str, leaf: Leaf, given: NamedSharding | None, written: NamedSharding | None
) -> NamedSharding | _Unknown | None:
    """The sharding of a weight. `None` if it is on one device, and its type is as if
    there was no mesh. This is so inside a `shard_map` over all axes of the mesh, too.

    **Raises:**

    `ValueError` if the sharding is known in part only, as on a mesh with axes of types
    `Auto` and `Explicit`; or if the sources of it contradict each other.
    """
    value = leaf.value
    mesh = jax.typeof(value).sharding.mesh
    if given is not None:
        _check_fits_mesh(call, leaf, given, mesh)
        # The given mesh may have devices; but it does not know of an enclosing
        # `shard_map`.
        mesh = mesh if axes_of_type(mesh, AxisType.Manual) else given.mesh
    elif not isinstance(value, jax.core.Tracer):
        placed = getattr(value, "sharding", None)
        mesh = placed.mesh if isinstance(placed, NamedSharding) else mesh
    free = free_axes(mesh)
    is_alone = math.prod([mesh.shape[name] for name in free]) == 1
    if is_alone and not (free and _is_typed(value)):
        return None
    seen = visible_spec(value)
    spec = given.spec if given is not None else seen
    if spec is None:
        # Under `vmap`, a weight has fewer axes than `init` saw.
        if written is None or len(written.spec) != value.ndim:
            explicit = axes_of_type(mesh, AxisType.Explicit)
            if all(mesh.shape[name] == 1 for name in explicit):
                return _Unknown()
            raise ValueError(
                f"`{call}`: the weight at `{leaf.name}` is on the mesh "
                f"{mesh_text(mesh)}, and it is only known how the axes of type "
                f"`Explicit` divide it, {', '.join(explicit)}: inside `jit` and "
                "`vmap`, JAX does not tell of those of type `Auto`. Call `init` "
                "outside of them, on the weights where they shall be, and the state "
                "knows; or use a mesh with axes of one type; or pass `shardings=...` "
                "to the optimizer: a `NamedSharding` for each weight, which under "
                "`vmap` is that of one member."
            )
        if written.mesh.shape != mesh.shape:
            raise ValueError(
                f"`{call}`: the weight at `{leaf.name}` is on the mesh "
                f"{mesh_text(mesh)}; the state was made for "
                f"{mesh_text(written.mesh)}. Restore it with `flashquinox.checkpoint`, "
                "into a state that `init` made on this mesh."
            )
        spec = written.spec
    spec = restrict(spec, free, value.ndim)
    if given is not None and seen is not None:
        if restrict(seen, free, value.ndim) != spec:
            raise ValueError(
                f"`{call}`: the weight at `{leaf.name}` is sharded by {seen}, but "
                f"`shardings` has {given.spec} for it. Put it there with "
                "`jax.device_put`, or leave `shardings` out."
            )
    sharding = NamedSharding(mesh, spec)
    check_equal_parts(call, leaf, sharding)
    return sharding


def _is_typed(value: Any) -> bool:
    """Whether the type of an array names axes of a mesh. It does on `Explicit` axes of
    one device, too, where arrays of other types cannot be computed with it."""
    return any([axis_names(entry) for entry in jax.typeof(value).sharding.spec])


def check_equal_parts(call: str, leaf: Leaf, sharding: NamedSharding) -> None:
    shape = leaf.value.shape
    for length, shards in zip(shape, divisions(sharding), strict=True):
        if length % shards != 0:
            raise ValueError(
                f"`{call}`: the weight at `{leaf.name}`, of shape {shape}, cannot be "
                f"sharded by {sharding.spec} on {mesh_text(sharding.mesh)}: "
                f"{length} is no multiple of {shards}."
            )


def as_explicit(
    call: str, leaf: Leaf, sharding: NamedSharding, mesh: AbstractMesh
) -> NamedSharding:
    """The same sharding on this mesh, all axes of which are of type `Explicit`."""
    _check_fits_mesh(call, leaf, sharding, mesh)
    spec = restrict(sharding.spec, mesh.axis_names, leaf.value.ndim)
    explicit = NamedSharding(mesh, spec)
    check_equal_parts(call, leaf, explicit)
    return explicit


def _check_fits_mesh(
    call: str, leaf: Leaf, given: NamedSharding, mesh: Mesh | AbstractMesh
) -> None:
    if len(given.spec) > leaf.value.ndim:
        raise ValueError(
            f"`{call}`: `shardings` has {given.spec} for the weight at `{leaf.name}`, "
            f"which has {leaf.value.ndim} axes."
        )
    if not mesh.empty and mesh.shape != given.mesh.shape:
        raise ValueError(
            f"`{call}`: the weight at `{leaf.name}` is on the mesh "
            f"{mesh_text(mesh)}, but `shardings` has {mesh_text(given.mesh)} for it."
        )
