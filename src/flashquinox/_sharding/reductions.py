"""Reductions over all gradients of a step: whether a rule can take them, their norm.

Each device reduces its own parts, and one collective combines the results.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.lax as lax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, ScalarLike

from .._common import meshes
from .._common.pieces import in_pieces
from .._tile.clipping import Clipping, clipping, sums_of_squares
from .._tile.stored_gradient import Gradient, on_device, StoredGradient
from .parts import by_mesh, on_parts


def all_within(
    grads: Sequence[Gradient],
    limits: list[float],
    shardings: list[NamedSharding | None],
) -> Bool[Array, ""]:
    """Whether all gradients are numbers of at most these magnitudes on all devices. One
    collective for each mesh, and one for each gradient in host memory, which is on the
    device once the one before it has been looked at."""
    within = jnp.asarray(True)
    for mesh, indices in by_mesh(shardings).items():
        for run in _runs(grads, indices):
            here = [on_device(grads[i], within) for i in run]
            most = tuple([limits[i] for i in run])
            if mesh is None:
                within &= _all_within(most, here)
                continue
            specs = tuple(sharding.spec for i in run if (sharding := shardings[i]))
            within &= _all_parts_within(mesh, specs, most, here)
    return within


def _runs(grads: Sequence[Gradient], indices: list[int]) -> list[list[int]]:
    """The numbers of gradients in order, those in host memory one by one."""
    found: list[list[int]] = []
    previous = True
    for i in indices:
        is_alone = isinstance(grads[i], StoredGradient)
        if is_alone or previous:
            found.append([])
        found[-1].append(i)
        previous = is_alone
    return found


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
        most = min(limit, float(jnp.finfo(grad.dtype).max))
        # False for NaN, where the largest one may not be: XLA leaves NaN out of the
        # maximum of an array on CPUs.
        within = within & in_pieces(partial(_is_within, most), jnp.all, grad)
    return within


def _is_within(most: float, grad: Array) -> Bool[Array, ""]:
    return jnp.all(jnp.abs(grad) <= most)


def clip(
    grads: Sequence[Gradient],
    shardings: list[NamedSharding | None],
    max_norm: ScalarLike,
    divisor: ScalarLike | None = None,
) -> Clipping:
    """The scaling of all gradients, divided by a number, on all devices, to at most
    this norm. One collective for each mesh. Gradients in host memory are on the device
    one after the other."""
    is_double = any(grad.dtype == jnp.float64 for grad in grads)
    dtype = jnp.dtype(jnp.float64 if is_double else jnp.float32)
    sums = jnp.zeros(3, dtype)
    for mesh, indices in by_mesh(shardings).items():
        if mesh is None:
            of_leaves = jnp.zeros(3, dtype)
            for i in indices:
                grad = on_device(grads[i], of_leaves)
                of_leaves += sums_of_squares(grad, dtype)
            sums += of_leaves
            continue
        # None before the first gradients.
        of_parts: list[Array] = []
        runs = _runs(grads, indices)
        for run in runs:
            here = [on_device(grads[i], of_parts) for i in run]
            divided = tuple(shardings[i] for i in run)
            is_last = run is runs[-1]
            found = _sums_of_all_parts(dtype, is_last, divided, of_parts, here)  # pyright: ignore
            of_parts = [found]
        sums += of_parts[0]
    return clipping(sums, max_norm, divisor)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _sums_of_all_parts(
    dtype: Any,
    is_last: bool,
    shardings: tuple[NamedSharding, ...],
    before: list[Float[Array, "devices 3"]],
    grads: list[Array],
) -> Float[Array, "..."]:
    """The sums of each device with those of these gradients, after others, if there
    were any. The last time, of all devices."""
    mesh = shardings[0].mesh
    axes = tuple(meshes.free_axes(mesh))

    def everywhere(before: list[Array], grads: list[Array]) -> Array:
        total = sum([x[0] for x in before], jnp.zeros(3, dtype))
        for grad, sharding in zip(grads, shardings, strict=True):
            own = sums_of_squares(grad, dtype)
            divided = {name for names in meshes.mesh_axes(sharding) for name in names}
            alike = tuple(name for name in axes if name not in divided)
            # Where several devices hold the same part, only one of them counts it.
            counts = lax.axis_index(alike) == 0 if alike else True
            total += jnp.where(counts, own, 0.0)
        return lax.psum(total, axes) if is_last else total[None]

    of_devices = PartitionSpec(axes)
    in_specs = [of_devices for _ in before], [x.spec for x in shardings]
    out_specs = PartitionSpec() if is_last else of_devices
    return on_parts(everywhere, mesh, in_specs, out_specs)(before, grads)
