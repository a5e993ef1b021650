"""Meshes of devices, and how arrays are divided over their axes."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from . import memory


# What follows from shardings and meshes, a step asks at each leaf and each array.
@functools.lru_cache(maxsize=4096)
def divisions(sharding: NamedSharding) -> tuple[int, ...]:
    """The number of parts that each axis of an array is divided into."""
    sizes = sharding.mesh.shape
    return tuple(
        math.prod(sizes[name] for name in axis_names(entry)) for entry in sharding.spec
    )


@functools.lru_cache(maxsize=4096)
def mesh_axes(sharding: NamedSharding) -> tuple[tuple[str, ...], ...]:
    """The axes of the mesh that divide each axis of an array."""
    return tuple(axis_names(entry) for entry in sharding.spec)


def everywhere(shardings: Sequence[NamedSharding | None]) -> NamedSharding | None:
    """Replication over the mesh that these shardings are on. `None` if there is
    none."""
    mesh = next((sharding.mesh for sharding in shardings if sharding is not None), None)
    return None if mesh is None else NamedSharding(mesh, PartitionSpec())


def is_there(x: Any, sharding: NamedSharding) -> bool:
    """Whether an array has this sharding, as far as that can be seen."""
    seen, mesh = visible_spec(x), jax.typeof(x).sharding.mesh
    if mesh.empty or seen is None:
        return True
    free = free_axes(sharding.mesh)
    same = restrict(seen, free, x.ndim) == restrict(sharding.spec, free, x.ndim)
    return same and mesh.shape == sharding.mesh.shape


def as_typed(x: Array, sharding: NamedSharding | None) -> Array:
    """An array with this sharding on the `Explicit` axes of the mesh, where shardings
    are part of types. On other axes, XLA moves it when it is used."""
    if sharding is None:
        return x
    mesh = sharding.mesh
    explicit = axes_of_type(mesh, AxisType.Explicit)
    if not explicit:
        return x
    spec = restrict(sharding.spec, explicit, x.ndim)
    seen = jax.typeof(x).sharding
    if seen.mesh.shape == mesh.shape and restrict(seen.spec, explicit, x.ndim) == spec:
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, spec))


def constrain(x: Array, sharding: NamedSharding) -> Array:
    """A new array inside of `jit`, which XLA is told to divide like this."""
    x = as_typed(x, sharding)
    if not axes_of_type(sharding.mesh, AxisType.Auto):
        return x
    if memory.is_on_host(x):
        sharding = sharding.with_memory_kind(memory.HOST_KIND)
    return jax.lax.with_sharding_constraint(x, sharding)


def _abstract(mesh: Mesh | AbstractMesh) -> AbstractMesh:
    return mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh


@functools.lru_cache(maxsize=4096)
def axes_of_type(mesh: Mesh | AbstractMesh, *kinds: AxisType) -> tuple[str, ...]:
    types = _abstract(mesh).axis_types
    pairs = zip(mesh.axis_names, types, strict=True)
    return tuple([name for name, kind in pairs if kind in kinds])


def is_explicit(mesh: Mesh | AbstractMesh) -> bool:
    """Whether types have shardings: on at least one axis of the mesh."""
    return bool(axes_of_type(mesh, AxisType.Explicit))


@functools.lru_cache(maxsize=4096)
def free_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The axes of a mesh over which no enclosing `shard_map` divides the program."""
    return axes_of_type(mesh, AxisType.Auto, AxisType.Explicit)


def visible_spec(x: Any) -> PartitionSpec | None:
    """The spec of an array. `None` if it cannot be seen, as inside `jit` on axes of
    type `Auto`."""
    if not isinstance(x, jax.Array):
        return PartitionSpec()
    if not isinstance(x, jax.core.Tracer):
        if isinstance(x.sharding, NamedSharding):
            return x.sharding.spec
        # A program for many devices replicates an array that is on one.
        return PartitionSpec() if len(x.sharding.device_set) == 1 else None
    typed = jax.typeof(x).sharding
    auto = axes_of_type(typed.mesh, AxisType.Auto)
    if all(typed.mesh.shape[name] == 1 for name in auto) and not typed.mesh.empty:
        return typed.spec
    return None


def restrict(spec: PartitionSpec, names: Sequence[str], ndim: int) -> PartitionSpec:
    """A spec without other axes of the mesh, in canonical form: an entry for every axis
    of an array, and no tuples of one name."""
    entries = [
        tuple(name for name in axis_names(entry) if name in names) for entry in spec
    ]
    entries += [()] * (ndim - len(entries))
    return PartitionSpec(
        *(entry[0] if len(entry) == 1 else (entry or None) for entry in entries)
    )


def axis_names(entry: Any) -> tuple[str, ...]:
    if entry is None:
        return ()
    return tuple(entry) if isinstance(entry, (tuple, list)) else (entry,)


def spec_axes(spec: PartitionSpec) -> frozenset[str]:
    """All mesh axes that a spec names."""
    return frozenset(name for entry in spec for name in axis_names(entry))


def mesh_text(mesh: Mesh | AbstractMesh) -> str:
    sizes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    return f"({sizes})"
