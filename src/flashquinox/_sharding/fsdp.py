"""Fully sharded data parallelism: every device has an equal part of every weight."""

import math
from collections.abc import Callable
from typing import Any

from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from .._common.text import shown
from .._model.blocks import part_of
from .._model.trees import flatten, is_array
from .._storage.storage import check_storage, Storage


def fsdp_shardings(
    model: PyTree,
    mesh: Mesh | AbstractMesh,
    *,
    blocks: Callable[[PyTree], PyTree] | None = None,
    storage: Storage = Storage(),
) -> PyTree[NamedSharding | None]:
    """Shardings that divide every array of a model among all devices of a mesh, such
    that each device holds whole groups of moments.

    An array is divided along one axis. This is the longest axis whose length is a
    multiple of the number of devices times `storage.group_size`. If there is none, and
    the array has several axes, it is the longest whose length is a multiple of the
    number of devices: groups then run along another axis. Otherwise the array is
    replicated, as small vectors are.

    ??? Example

        ```python
        mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
        arrays, rest = eqx.partition(model, eqx.is_array)
        arrays = jax.device_put(arrays, fq.fsdp_shardings(arrays, mesh))
        model = eqx.combine(arrays, rest)
        ```

    **Arguments:**

    - `model`: any pytree, of arrays or of `jax.ShapeDtypeStruct`s.
    - `mesh`: a `jax.sharding.Mesh` or `jax.sharding.AbstractMesh`. Arrays are divided
        over all of its axes.
    - `blocks`: a function from the model to its stacked blocks. Their first axis, that
        of the layers, is not divided.
    - `storage`: that of the optimizer.

    **Returns:**

    A pytree like `model` of `jax.sharding.NamedSharding`s, with `None` for leaves that
    are no arrays. It can be passed as the `shardings` of an optimizer.

    **Raises:**

    `ValueError` if `blocks` gives no part of the model; `TypeError` if `mesh` or
    `storage` is none.
    """
    call = "fsdp_shardings"
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise TypeError(
            f"`{call}(model, mesh)` takes a `jax.sharding.Mesh` or an `AbstractMesh`; "
            f"got {shown(mesh)}."
        )
    size = check_storage(call, storage).group_size
    leaves, rebuild = flatten(model)
    stacked = (
        set() if blocks is None else set(part_of(call, "blocks", blocks, model)[0])
    )

    def one(x: Any, first: int) -> NamedSharding | None:
        if not is_array(x):
            return None
        axis = _axis(x.shape, first, mesh.size, size)
        names = mesh.axis_names[0] if len(mesh.axis_names) == 1 else mesh.axis_names
        spec = (names if i == axis else None for i in range(len(x.shape)))
        return NamedSharding(mesh, PartitionSpec(*spec))

    return rebuild(
        [one(leaf.value, int(i in stacked)) for i, leaf in enumerate(leaves)]
    )


def _axis(
    shape: tuple[int, ...], first: int, devices: int, group_size: int
) -> int | None:
    """The axis to divide, not before `first`. `None` to replicate the array."""
    if math.prod(shape) == 0:
        return None
    for multiple in (devices * group_size, devices):
        axes = [i for i in range(first, len(shape)) if shape[i] % multiple == 0]
        if axes and (len(shape) > 1 or multiple > devices):
            return max(axes, key=lambda i: shape[i])
    return None
