"""Planning the memory of a device: what training holds, before anything is
allocated."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from .._common import meshes
from .._common.dtypes import NARROW_DTYPES
from .._common.text import shown
from .._model.blocks import part_of
from .._model.trained import TRAINABLE_DTYPES
from .._model.trees import flatten, is_array, Leaf, match
from .._optimizer.accumulate import AccumulatingOptimizer
from .._optimizer.ema import EMA
from .._optimizer.optimizer import Optimizer, settings_of
from .._optimizer.state import OptimizerState
from .._sharding.fsdp import fsdp_shardings
from .._sharding.resolve import as_explicit
from .._storage.quant_moment import QuantMoment
from .._storage.storage import Storage
from .accumulated import without_sums
from .away import Recorded
from .device_bytes import (
    arrays_of_state,
    as_struct,
    bytes_on_device,
    elements_on_device,
)
from .released import released_gradients
from .report import DeviceMemory, MemoryPlan


# JAX counts devices in 32 bits.
MOST_DEVICES = 2**31 - 1


def memory_plan(
    model: PyTree,
    optim: optax.GradientTransformation | optax.MultiSteps,
    mesh: Mesh | AbstractMesh | int | None = None,
    *,
    blocks: Callable[[PyTree], PyTree] | None = None,
    prologue: Callable[[PyTree], PyTree] | None = None,
    epilogue: Callable[[PyTree], PyTree] | None = None,
    trainable: PyTree | None = None,
    ema: EMA | None = None,
) -> MemoryPlan:
    r"""The memory of each device in training: weights, corrections, moments, scales,
    gradients, their sums and averages of weights. Nothing is allocated, and no devices
    are needed.

    The state is the one that `optim.init` would make, so that codecs, partial groups
    and uncompressed vectors are counted exactly. It is divided like the weights. These
    are divided by the optimizer's `shardings`; by their own, if an array or
    `jax.ShapeDtypeStruct` has one; and otherwise by [`flashquinox.fsdp_shardings`][].

    With gradient release, let $g$ be the bytes of a gradient, $P$ the weights that the
    prologue reads, $E$ those that the epilogue reads, and $L$ the number of layers. The
    most gradients at one time are

    $$\max\left(\sum_{E} g, \; \frac1L \sum_\text{blocks} g + \sum_{P \cap E} g, \;
    \sum_{P} g\right)$$

    because weights that only the epilogue reads are updated before the blocks, and
    weights that the prologue reads, such as a tied embedding, after them.

    Activations and the temporaries of a step are not included.

    ??? Example

        ```python
        model = eqx.filter_eval_shape(make_model, key)
        print(fq.memory_plan(model, fq.adamw(1e-3), mesh=8))
        ```

    **Arguments:**

    - `model`: any pytree, of arrays or of `jax.ShapeDtypeStruct`s, as from
        `eqx.filter_eval_shape`; in the dtypes that training has.
    - `optim`: a [`flashquinox.Optimizer`][], one of [`flashquinox.accumulate`][], or
        one that is wrapped by Optax.
    - `mesh`: the devices that the model is divided among: a `jax.sharding.Mesh`, an
        `AbstractMesh`, or a number of devices. `None` means the devices of the
        weights, or one device if they have no shardings.
    - `blocks`: for gradient release: a function from the model to its stacked blocks,
        every array of which has the layers along its first axis.
    - `prologue`, `epilogue`: for gradient release: functions from the model to the
        parts that are read before and after the blocks. `None` means everything outside
        of the blocks.
    - `trainable`: which leaves are trained, if not all: a tree of `True` and `False`
        of the structure of the model, or a prefix of it, as for `eqx.partition`. The
        others are frozen; they may be codes and scales of quantized weights.
        Elements of fewer than 8 bits share bytes.
    - `ema`: the average of weights that is kept, of [`flashquinox.ema`][], if one is.

    **Returns:**

    A [`flashquinox.MemoryPlan`][].

    **Raises:**

    `TypeError` or `ValueError` if model, optimizer and mesh do not fit together. The
    message names the leaf.
    """
    call = "memory_plan"
    if not hasattr(optim, "init"):
        raise TypeError(
            f"`{call}`: `optim` is no optimizer but {shown(optim)}. Pass "
            "`flashquinox.adamw(1e-3)`, say, or a transformation of Optax with such an "
            "optimizer in it."
        )
    if not isinstance(ema, EMA | None):
        raise TypeError(
            f"`{call}(ema=...)` takes a `flashquinox.EMA`, as `flashquinox.ema(0.999)` "
            f"makes one; got {shown(ema)}."
        )
    leaves, rebuild = flatten(model)
    parts = {
        name: None if choose is None else set(part_of(call, name, choose, model)[0])
        for name, choose in (
            ("blocks", blocks),
            ("prologue", prologue),
            ("epilogue", epilogue),
        )
    }
    explicit = _shardings(call, model, leaves, optim, mesh, blocks)
    may_train = _trainable(call, trainable, leaves)
    leaves = [
        leaf._replace(value=as_struct(leaf.value, sharding))
        if is_array(leaf.value)
        else leaf
        for leaf, sharding in zip(leaves, explicit, strict=True)
    ]
    part = [
        leaf.value if chosen else None
        for leaf, chosen in zip(leaves, may_train, strict=True)
    ]
    init = Recorded(optim.init)
    state = _made(explicit, init, rebuild(part))
    away = init.paths(state)
    states = [x for x in _nodes(state, OptimizerState) if isinstance(x, OptimizerState)]
    if not states:
        raise TypeError(
            f"`{call}`: the state of `optim` has no `flashquinox.OptimizerState` in "
            f"it; got {shown(optim)}. Pass `flashquinox.adamw(1e-3)`, say, or a "
            "transformation of Optax with such an optimizer in it."
        )
    # The shardings that `init` would record.
    there = {path: sharding for x in states for path, sharding in x.shardings}
    arrays = {
        i: as_struct(leaf.value, there.get(leaf.unwrapped, leaf.value.sharding))
        for i, leaf in enumerate(leaves)
        if is_array(leaf.value)
    }
    trained = {
        i: x for i, x in arrays.items() if x.dtype in TRAINABLE_DTYPES and may_train[i]
    }
    trees = [tree for x in states for tree in x.moments.values()]
    moments = arrays_of_state(trees, there)
    corrections = arrays_of_state([x.corrections for x in states], there)
    codes = [x.codes if isinstance(x, QuantMoment) else x for x in moments]
    rest, of_sums = without_sums(state)
    sums = arrays_of_state(of_sums, there)
    rest = [
        [] if isinstance(x, OptimizerState) else x for x in _nodes(rest, OptimizerState)
    ]
    averages: list[Any] = []
    of_averages: list[PyTree] = []
    if ema is not None:
        average = _made(explicit, ema.init, rebuild(part), state)
        of_averages = [average.weights, average.corrections]
        averages = arrays_of_state(of_averages, there)
        rest += [average.count, average.steps_seen]
    everywhere = meshes.everywhere(list(there.values()))
    devices = 1 if everywhere is None else everywhere.mesh.size
    parameters = sum(math.prod(x.shape) for x in trained.values())
    weights = bytes_on_device(trained.values())
    on_host = lambda trees: arrays_of_state(trees, there, away)
    moments_away = on_host(trees)
    codes_away = [x.codes if isinstance(x, QuantMoment) else x for x in moments_away]
    scales_away = [x.scales for x in moments_away if isinstance(x, QuantMoment)]
    left = lambda arrays, away: bytes_on_device(arrays) - bytes_on_device(away)
    corrections_away = on_host([x.corrections for x in states])
    every_away = [
        *codes_away,
        *scales_away,
        *corrections_away,
        *on_host(of_sums),
        *on_host(of_averages),
    ]
    step = DeviceMemory(
        parameters=parameters / devices,
        weights=weights,
        corrections=left(corrections, corrections_away),
        master_weights=0,
        moments=left(codes, codes_away),
        scales=left(jtu.tree_leaves(moments), [*codes, *scales_away]),
        gradients=weights,
        accumulators=left(sums, on_host(of_sums)),
        averages=left(averages, on_host(of_averages)),
        frozen=bytes_on_device(arrays.values()) - weights,
        other=bytes_on_device(jtu.tree_leaves([rest, [x.steps for x in states]])),
        host=bytes_on_device(every_away),
    )
    in_float32 = 4 * sum(map(elements_on_device, trained.values()))
    released = None
    if not sums:
        released = released_gradients(call, leaves, trained, **parts)
    narrow = [x for x in trained.values() if x.dtype in NARROW_DTYPES]
    whole = [x for x in trained.values() if elements_on_device(x) == math.prod(x.shape)]
    return MemoryPlan(
        parameters=parameters,
        devices=devices,
        step=step,
        gradient_release=dataclasses.replace(step, gradients=released),
        mixed_precision=dataclasses.replace(
            step,
            corrections=0,
            host=0,
            master_weights=4 * sum(map(elements_on_device, narrow)),
            moments=4 * sum(map(elements_on_device, codes)),
            scales=0,
            accumulators=in_float32 if sums else 0,
            averages=in_float32 if averages else 0,
        ),
        whole=bytes_on_device(whole) if devices > 1 else 0,
    )


def _trainable(call: str, trainable: PyTree | None, leaves: list[Leaf]) -> list[bool]:
    if trainable is None:
        return [True] * len(leaves)
    found = match(call, "trainable", trainable, leaves, prefix=True)
    for leaf, value in zip(leaves, found, strict=True):
        if not isinstance(value, bool | np.bool_ | None):
            raise TypeError(
                f"`{call}(trainable=...)` takes a tree of True and False of the "
                f"structure of the model, or a prefix of it; got {shown(value)} for "
                f"`{leaf.name}`."
            )
    return [bool(x) for x in found]


def _nodes(tree: PyTree, kind: type) -> list[Any]:
    """The leaves of a tree, where values of this class count as leaves."""
    return jtu.tree_leaves(tree, is_leaf=lambda x: isinstance(x, kind))


def _made(
    explicit: list[NamedSharding | None], init: Callable[..., Any], *of: PyTree
) -> Any:
    """The shapes and shardings of what `init` would make."""
    # The mesh also applies to arrays that `init` makes from nothing. It replaces any
    # mesh that the caller has set.
    nowhere = AbstractMesh((), ())
    mesh: Any = next((x.mesh for x in explicit if x is not None), nowhere)
    with jax.sharding.use_abstract_mesh(mesh):
        return eqx.filter_eval_shape(init, *of)


#
# Devices
#


def _shardings(
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


#
# Gradient release
#
