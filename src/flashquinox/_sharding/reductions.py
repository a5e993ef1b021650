"""Reductions over all gradients of a step: whether they are finite, and their norm.

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


def all_finite(
    grads: list[Array], shardings: list[NamedSharding | None]
) -> Bool[Array, ""]:
    """Whether all gradients are finite on all devices. One collective for each mesh."""
    finite = jnp.asarray(True)
    for mesh, indices in by_mesh(shardings).items():
        here = [grads[i] for i in indices]
        if mesh is None:
            finite &= _all_finite(here)
            continue
        specs = tuple(sharding.spec for i in indices if (sharding := shardings[i]))
        finite &= _all_parts_finite(mesh, specs, here)
    return finite


@partial(jax.jit, static_argnums=(0, 1))
def _all_parts_finite(
    mesh: Mesh | AbstractMesh, specs: tuple[PartitionSpec, ...], grads: list[Array]
) -> Bool[Array, ""]:
    def everywhere(grads: list[Array]) -> Array:
        finite = _all_finite(grads).astype(jnp.int32)
        return lax.pmin(finite, tuple(meshes.free_axes(mesh)))

    found = on_parts(everywhere, mesh, (list(specs),), PartitionSpec())(grads)
    return found.astype(bool)


def _all_finite(grads: list[Array]) -> Bool[Array, ""]:
    finite = jnp.asarray(True)
    for grad in grads:
        finite = finite & jnp.all(jnp.isfinite(grad))
    return finite


def clip(
    grads: list[Array], shardings: list[NamedSharding | None], max_norm: ScalarLike
) -> Clipping:
    """The scaling of all gradients, on all devices, to at most this norm. One
    collective for each mesh."""
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
    return clipping(sums, max_norm)


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
