"""How a planned model is divided among devices."""

from collections.abc import Callable
from typing import Any

import jax.tree_util as jtu
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from .._common import meshes
from .._common.text import shown
from .._model.trees import is_array, Leaf, match
from .._optimizer.accumulate import AccumulatingOptimizer
from .._optimizer.optimizer import Optimizer, settings_of
from .._sharding.fsdp import fsdp_shardings
from .._sharding.resolve import as_explicit
from .._storage.storage import Storage


# JAX counts devices in 32 bits.
MOST_DEVICES = 2**31 - 1


def planned_shardings(
    call: str,
    model: PyTree,
    leaves: list[Leaf],
    optim: optax.GradientTransformation | optax.MultiSteps,
    mesh: Mesh | AbstractMesh | int | None,
    blocks: Callable[[PyTree], PyTree] | None,
) -> list[NamedSharding | None]:
    """The sharding of each array, on a mesh with axes of type `Explicit`: then the
    types of arrays that are computed from them have shardings too. `None` on one
    device."""
    given, storage = [None] * len(leaves), Storage()
    if isinstance(optim, AccumulatingOptimizer):
        optim = optim.inner
    if isinstance(optim, Optimizer):
        settings = settings_of(optim)
        values, structure = settings.shardings
        tree = jtu.tree_unflatten(structure, values)
        given = match(call, "shardings", tree, leaves, prefix=True)
        storage = settings.storage
    own = [getattr(leaf.value, "sharding", None) for leaf in leaves]
    own = [x if isinstance(x, NamedSharding) and x.mesh.size > 1 else None for x in own]
    known = next((x.mesh for x in (*given, *own) if x is not None), None)
    devices = known if mesh is None else _as_mesh(call, mesh)
    if devices is None or devices.size == 1:
        return [None] * len(leaves)
    axes = AbstractMesh(
        devices.axis_sizes,
        devices.axis_names,
        axis_types=(AxisType.Explicit,) * len(devices.axis_names),
    )
    defaults = [NamedSharding(axes, PartitionSpec())] * len(leaves)
    if mesh is not None:
        tree = fsdp_shardings(model, axes, blocks=blocks, storage=storage)
        defaults = match(call, "shardings", tree, leaves)
    chosen = []
    for leaf, here, there, otherwise in zip(leaves, given, own, defaults, strict=True):
        if here is None and there is not None and there.mesh.shape != axes.shape:
            raise ValueError(
                f"`{call}`: the weight at `{leaf.name}` is on the mesh "
                f"{meshes.mesh_text(there.mesh)}, not on "
                f"{meshes.mesh_text(axes)}. Pass shapes, which are on none, as "
                "`eqx.filter_eval_shape` gives them; or leave `mesh` out."
            )
        sharding = here or there or otherwise
        if is_array(leaf.value) and sharding is not None:
            sharding = as_explicit(call, leaf, sharding, axes)
        chosen.append(sharding if is_array(leaf.value) else None)
    return chosen


def _as_mesh(call: str, mesh: Any) -> Mesh | AbstractMesh:
    if isinstance(mesh, Mesh | AbstractMesh):
        return mesh
    if isinstance(mesh, int) and not isinstance(mesh, bool):
        if 1 <= mesh <= MOST_DEVICES:
            return AbstractMesh((mesh,), ("fsdp",))
    raise TypeError(
        f"`{call}(mesh=...)` takes a `jax.sharding.Mesh`, an `AbstractMesh`, or a "
        f"number of devices from 1 to {MOST_DEVICES}; got {shown(mesh)}."
    )
