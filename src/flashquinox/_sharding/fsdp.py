"""Fully sharded data parallelism: every device has an equal part of every weight."""

import math
from collections.abc import Callable
from typing import Any

from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from .._common.text import shown
from .._model.blocks import part_of
from .._model.trees import flatten, is_array
from .._storage.defaults import check_group_size, GROUP_SIZE, Unknown


def fsdp_shardings(
    model: PyTree,
    mesh: Mesh | AbstractMesh,
    *,
    blocks: Callable[[PyTree], PyTree] | None = None,
    group_size: int = int(GROUP_SIZE),
) -> PyTree[NamedSharding | None]:
    """How to divide every array of a model among all devices of a mesh, such that each
    of them holds whole groups of moments.

    An array is divided along its longest axis of which every device gets a multiple of
    `group_size`. If it has no such axis, along the longest of which every device gets
    the same, unless it has one axis alone: then groups run along another. Otherwise it
    is whole on every device, as small vectors are.

    ??? Example

        ```python
        mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
        arrays, rest = eqx.partition(model, eqx.is_array)
        arrays = jax.device_put(arrays, fq.fsdp_shardings(arrays, mesh))
        model = eqx.combine(arrays, rest)
        ```

    **Arguments:**

    - `model`: any pytree, of arrays or of `jax.ShapeDtypeStruct`s.
    - `mesh`: the devices, over all axes of which every array is divided. It may be a
        `jax.sharding.AbstractMesh`.
    - `blocks`: a function from the model to its stacked blocks. The first axis of these
        is that of the layers, and is not divided.
    - `group_size`: that of the optimizer.

    **Returns:**

    A pytree like `model`, of `jax.sharding.NamedSharding`s, with `None` for leaves that
    are no arrays. It can be the `shardings` of an optimizer.

    **Raises:**

    `ValueError` if `blocks` gives no part of the model, or for a `group_size` that no
    optimizer takes; `TypeError` if `mesh` is none.
    """
    call = "fsdp_shardings"
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise TypeError(
            f"`{call}(model, mesh)` takes a `jax.sharding.Mesh` or an `AbstractMesh`; "
            f"got {shown(mesh)}."
        )
    size = check_group_size(call, group_size)
    assert not isinstance(size, Unknown)
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
    """The axis to divide, from `first` on."""
    if math.prod(shape) == 0:
        return None
    for multiple in (devices * group_size, devices):
        axes = [i for i in range(first, len(shape)) if shape[i] % multiple == 0]
        if axes and (len(shape) > 1 or multiple > devices):
            return max(axes, key=lambda i: shape[i])
    return None
