"""Reductions over all gradients of a step: whether a rule can take them, their norm.

Each device reduces its own parts, and one collective combines the results.
"""

from functools import partial
from typing import Any

import jax
import jax.lax as lax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, ScalarLike

from .._common import meshes
from .._tile.clipping import Clipping, clipping, sums_of_squares
from .parts import by_mesh, on_parts


def all_within(
    grads: list[Array], limits: list[float], shardings: list[NamedSharding | None]
) -> Bool[Array, ""]:
    """Whether all gradients are numbers of at most these magnitudes on all devices. One
    collective for each mesh."""
    within = jnp.asarray(True)
    for mesh, indices in by_mesh(shardings).items():
        here, most = [grads[i] for i in indices], tuple([limits[i] for i in indices])
        if mesh is None:
            within &= _all_within(most, here)
            continue
        specs = tuple(sharding.spec for i in indices if (sharding := shardings[i]))
        within &= _all_parts_within(mesh, specs, most, here)
    return within


@partial(jax.jit, static_argnums=(0, 1, 2))
def _all_parts_within(
    mesh: Mesh | AbstractMesh,
    specs: tuple[PartitionSpec, ...],
    limits: tuple[float, ...],
    grads: list[Array],
) -> Bool[Array, ""]:
    def everywhere(grads: list[Array]) -> Array:
        within = _all_within(limits, grads).astype(jnp.int32)
        return lax.pmin(within, tuple(meshes.free_axes(mesh)))

    found = on_parts(everywhere, mesh, (list(specs),), PartitionSpec())(grads)
    return found.astype(bool)


def _all_within(limits: tuple[float, ...], grads: list[Array]) -> Bool[Array, ""]:
    within = jnp.asarray(True)
    for grad, limit in zip(grads, limits, strict=True):
        if limit < float(jnp.finfo(grad.dtype).max):
            # Also false for NaN.
            within = within & jnp.all(jnp.abs(grad) <= limit)
        else:
            within = within & jnp.all(jnp.isfinite(grad))
    return within


def clip(
    grads: list[Array],
    shardings: list[NamedSharding | None],
    max_norm: ScalarLike,
    divisor: ScalarLike | None = None,
) -> Clipping:
    """The scaling of all gradients, divided by a number, on all devices, to at most
    this norm. One collective for each mesh."""
    is_double = any(grad.dtype == jnp.float64 for grad in grads)
    dtype = jnp.dtype(jnp.float64 if is_double else jnp.float32)
    sums = jnp.zeros(3, dtype)
    for mesh, indices in by_mesh(shardings).items():
        here = [grads[i] for i in indices]
        if mesh is None:
            sums += sum(sums_of_squares(grad, dtype) for grad in here)
        else:
            divided = tuple(shardings[i] for i in indices)
            sums += _sums_of_all_parts(dtype, divided, here)  # pyright: ignore
    return clipping(sums, max_norm, divisor)


@partial(jax.jit, static_argnums=(0, 1))
def _sums_of_all_parts(
    dtype: Any, shardings: tuple[NamedSharding, ...], grads: list[Array]
) -> Float[Array, "3"]:
    mesh = shardings[0].mesh
    axes = tuple(meshes.free_axes(mesh))

    def everywhere(grads: list[Array]) -> Array:
        sums = jnp.zeros(3, dtype)
        for grad, sharding in zip(grads, shardings, strict=True):
            own = sums_of_squares(grad, dtype)
            divided = {name for names in meshes.mesh_axes(sharding) for name in names}
            alike = tuple(name for name in axes if name not in divided)
            # Where several devices hold the same part, only one of them counts it.
            counts = lax.axis_index(alike) == 0 if alike else True
            sums += jnp.where(counts, own, 0.0)
        return lax.psum(sums, axes)

    in_specs = ([sharding.spec for sharding in shardings],)
    return on_parts(everywhere, mesh, in_specs, PartitionSpec())(grads)
