"""How a leaf is divided among devices.

Of a weight, JAX always tells on which mesh it is, also while a program is traced. How
it is divided there is not always known: inside `jit`, not for mesh axes of type `Auto`.
A guess would be compiled all the same, and communicate in every step. So `init` writes
it down if it sees the weights outside of `jit`. What nobody knows is left to XLA, which
knows it when it divides the program: without kernels, as these cannot be divided.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.sharding import (
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
)
from jaxtyping import Array, PyTree

from ._codec import QuantMoment
from ._layout import Layout
from ._trees import Leaf


# Of the state: for each leaf that is on several devices, its unwrapped path and how it
# was divided by `init`. The mesh is one without devices.
Shardings: TypeAlias = tuple[tuple[tuple[Any, ...], NamedSharding], ...]


class Found(NamedTuple):
    """How leaves are divided: `None` for those on one device, and for those of which it
    is not known; the latter are `unknown` too."""

    shardings: list[NamedSharding | None]
    unknown: list[Leaf]


def find_all(
    call: str,
    leaves: Sequence[Leaf | None],
    given: Sequence[NamedSharding | None],
    recorded: Shardings,
) -> Found:
    """For each of the leaves, how it is divided. If some are on a mesh, those on one
    device will be on each of its devices."""
    written = dict(recorded)
    found = [
        None
        if leaf is None
        else _find(call, leaf, sharding, written.get(leaf.unwrapped))
        for leaf, sharding in zip(leaves, given, strict=True)
    ]
    others = everywhere([x for x in found if isinstance(x, NamedSharding)])

    def settle(
        leaf: Leaf | None, sharding: NamedSharding | _Unknown | None
    ) -> NamedSharding | None:
        if isinstance(sharding, _Unknown):
            return None
        if leaf is None or sharding is not None or others is None:
            return sharding
        return NamedSharding(others.mesh, _only(others.spec, (), leaf.value.ndim))

    pairs = list(zip(leaves, found, strict=True))
    return Found(
        [settle(leaf, sharding) for leaf, sharding in pairs],
        [leaf for leaf, x in pairs if leaf is not None and isinstance(x, _Unknown)],
    )


class _Unknown:
    """In place of the sharding of a weight of which only XLA knows it."""


def _find(
    call: str, leaf: Leaf, given: NamedSharding | None, written: NamedSharding | None
) -> NamedSharding | _Unknown | None:
    """How a weight is divided. `None` if it is on one device, or all axes of the mesh
    are manual: then what is seen of it is on one device.

    **Raises:**

    `ValueError` if it is known in part only, as on a mesh of axes of both types; or if
    what is known does not go together.
    """
    value = leaf.value
    mesh = jax.typeof(value).sharding.mesh
    if given is not None:
        _goes_with(call, leaf, given, mesh)
        # Which may know its devices; but not what is done by hand at this point.
        mesh = mesh if _axes(mesh, AxisType.Manual) else given.mesh
    elif not isinstance(value, jax.core.Tracer):
        placed = getattr(value, "sharding", None)
        mesh = placed.mesh if isinstance(placed, NamedSharding) else mesh
    free = free_axes(mesh)
    if math.prod(mesh.shape[name] for name in free) == 1:
        return None
    seen = _seen(value)
    spec = given.spec if given is not None else seen
    if spec is None:
        # Under `vmap`, a weight has fewer axes than `init` saw.
        if written is None or len(written.spec) != value.ndim:
            explicit = _axes(mesh, AxisType.Explicit)
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
    spec = _only(spec, free, value.ndim)
    if given is not None and seen is not None:
        if _only(seen, free, value.ndim) != spec:
            raise ValueError(
                f"`{call}`: the weight at `{leaf.name}` is sharded by {seen}, but "
                f"`shardings` has {given.spec} for it. Put it there with "
                "`jax.device_put`, or leave `shardings` out."
            )
    sharding = NamedSharding(mesh, spec)
    parts_are_equal(call, leaf, sharding)
    return sharding


def parts_are_equal(call: str, leaf: Leaf, sharding: NamedSharding) -> None:
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
    """The same as a matter of types: on this mesh, all axes of which are explicit."""
    _goes_with(call, leaf, sharding, mesh)
    spec = _only(sharding.spec, mesh.axis_names, leaf.value.ndim)
    explicit = NamedSharding(mesh, spec)
    parts_are_equal(call, leaf, explicit)
    return explicit


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


def divisions(sharding: NamedSharding) -> tuple[int, ...]:
    """In how many parts each axis is divided."""
    sizes = sharding.mesh.shape
    return tuple(
        math.prod(sizes[name] for name in _names(entry)) for entry in sharding.spec
    )


def mesh_axes(sharding: NamedSharding) -> tuple[tuple[str, ...], ...]:
    """The axes of the mesh that divide each axis."""
    return tuple(_names(entry) for entry in sharding.spec)


def holds_whole_groups(layout: Layout, sharding: NamedSharding) -> bool:
    """Whether no group of a leaf lies in two parts of it."""
    return layout.divides(divisions(sharding))


def of_scales(layout: Layout, sharding: NamedSharding) -> PartitionSpec:
    """How the scales of a leaf are divided: as the leaf is, or not at all."""
    parts = divisions(sharding)
    divided = math.prod(parts) > 1 and layout.divides(parts)
    return sharding.spec if divided else PartitionSpec()


def of_arrays(tree: PyTree, sharding: NamedSharding) -> PyTree[NamedSharding]:
    """How the arrays of a leaf are divided: moments, and others of its shape."""

    def one(x: Any) -> Any:
        if not isinstance(x, QuantMoment):
            return sharding
        scales = NamedSharding(sharding.mesh, of_scales(x.layout, sharding))
        parts = sharding, scales
        if x.parameter is None:
            return eqx.tree_at(lambda x: (x.codes, x.scales), x, parts)
        alone = NamedSharding(sharding.mesh, PartitionSpec())
        where = lambda x: (x.codes, x.scales, x.parameter)
        return eqx.tree_at(where, x, (*parts, alone))

    return jtu.tree_map(one, tree, is_leaf=lambda x: isinstance(x, QuantMoment))


def everywhere(shardings: Sequence[NamedSharding | None]) -> NamedSharding | None:
    """On every device of the mesh that a model is on. `None` if it is on none."""
    mesh = next((sharding.mesh for sharding in shardings if sharding is not None), None)
    return None if mesh is None else NamedSharding(mesh, PartitionSpec())


def is_there(x: Any, sharding: NamedSharding) -> bool:
    """Whether an array is divided like this, as far as can be seen."""
    seen, mesh = _seen(x), jax.typeof(x).sharding.mesh
    if mesh.empty or seen is None:
        return True
    free = free_axes(sharding.mesh)
    same = _only(seen, free, x.ndim) == _only(sharding.spec, free, x.ndim)
    return same and mesh.shape == sharding.mesh.shape


def as_typed(x: Array, sharding: NamedSharding | None) -> Array:
    """An array divided like this, as far as that is a matter of types: on mesh axes
    that are `Explicit`. On others, XLA moves it where it is used."""
    if sharding is None:
        return x
    mesh = sharding.mesh
    explicit = _axes(mesh, AxisType.Explicit)
    if not explicit:
        return x
    spec = _only(sharding.spec, explicit, x.ndim)
    seen = jax.typeof(x).sharding
    if seen.mesh.shape == mesh.shape and _only(seen.spec, explicit, x.ndim) == spec:
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, spec))


def where_the_weight_is(tree: PyTree, sharding: NamedSharding | None) -> PyTree:
    """A part of the state of a leaf. Arrays of it that are on no mesh, such as those of
    NumPy, go where the weight is, as far as that is a matter of types."""
    if sharding is None:
        return tree
    nowhere = lambda x: jax.typeof(x).sharding.mesh.empty
    return jtu.tree_map(
        lambda x, there: as_typed(jnp.asarray(x), there) if nowhere(x) else x,
        tree,
        of_arrays(tree, sharding),
    )


def place(x: Array, sharding: NamedSharding) -> Array:
    """A new array, divided like this, in a program that is traced."""
    x = as_typed(x, sharding)
    if not _axes(sharding.mesh, AxisType.Auto):
        return x
    return jax.lax.with_sharding_constraint(x, sharding)


def _abstract(mesh: Mesh | AbstractMesh) -> AbstractMesh:
    return mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh


def _axes(mesh: Mesh | AbstractMesh, *kinds: AxisType) -> list[str]:
    types = _abstract(mesh).axis_types
    return [
        name for name, kind in zip(mesh.axis_names, types, strict=True) if kind in kinds
    ]


def is_explicit(mesh: Mesh | AbstractMesh) -> bool:
    """Whether types tell something of how arrays are divided."""
    return bool(_axes(mesh, AxisType.Explicit))


def free_axes(mesh: Mesh | AbstractMesh) -> list[str]:
    """Those over which a program is not divided by hand already."""
    return _axes(mesh, AxisType.Auto, AxisType.Explicit)


def _seen(x: Any) -> PartitionSpec | None:
    """How an array is divided. `None` if that cannot be seen."""
    if not isinstance(x, jax.Array):
        return PartitionSpec()
    if not isinstance(x, jax.core.Tracer):
        if isinstance(x.sharding, NamedSharding):
            return x.sharding.spec
        # In a program for many devices, what is on one will be on each of them.
        return PartitionSpec() if len(x.sharding.device_set) == 1 else None
    typed = jax.typeof(x).sharding
    auto = _axes(typed.mesh, AxisType.Auto)
    if all(typed.mesh.shape[name] == 1 for name in auto) and not typed.mesh.empty:
        return typed.spec
    return None


def _goes_with(
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


def _only(spec: PartitionSpec, names: Sequence[str], ndim: int) -> PartitionSpec:
    """A spec of these axes of the mesh, written in one way, with an entry for every
    axis of an array."""
    entries = [tuple(name for name in _names(entry) if name in names) for entry in spec]
    entries += [()] * (ndim - len(entries))
    return PartitionSpec(
        *(entry[0] if len(entry) == 1 else (entry or None) for entry in entries)
    )


def _names(entry: Any) -> tuple[str, ...]:
    if entry is None:
        return ()
    return tuple(entry) if isinstance(entry, (tuple, list)) else (entry,)


def mesh_text(mesh: Mesh | AbstractMesh) -> str:
    sizes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    return f"({sizes})"
