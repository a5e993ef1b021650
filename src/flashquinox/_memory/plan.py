"""Planning the memory of a device: what training holds, before anything is
allocated."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jaxtyping import PyTree

from .._common import meshes
from .._common.dtypes import NARROW_DTYPES
from .._common.text import shown
from .._model.blocks import part_of
from .._model.trained import TRAINABLE_DTYPES
from .._model.trees import flatten, is_array, Leaf, match
from .._optimizer.ema import EMA
from .._optimizer.for_init import for_init
from .._optimizer.states import find
from .away import Recorded
from .contents import Contents, contents
from .device_bytes import as_struct, bytes_on_device, elements_on_device
from .released import released_gradients, waiting_leaves
from .report import DeviceMemory, MemoryPlan
from .shardings import planned_shardings


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
    explicit = planned_shardings(call, model, leaves, optim, mesh, blocks)
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
    init = Recorded(lambda model: optim.init(for_init(optim, model)))
    state = _made(explicit, init, rebuild(part))
    states = find(state).values
    if not states:
        raise TypeError(
            f"`{call}`: the state of `optim` has no `flashquinox.OptimizerState` in "
            f"it; got {shown(optim)}. Pass `flashquinox.adamw(1e-3)`, say, or a "
            "transformation of Optax with such an optimizer in it."
        )
    average = None
    if ema is not None:
        average = _made(explicit, ema.init, rebuild(part), state)
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
    held = contents(state, average, there, init.paths(state))
    parameters = sum(math.prod(x.shape) for x in trained.values())
    weights = bytes_on_device(trained.values())
    everywhere = meshes.everywhere(list(there.values()))
    devices = 1 if everywhere is None else everywhere.mesh.size
    step = DeviceMemory(
        parameters=parameters / devices,
        weights=weights,
        corrections=held.corrections.device_bytes,
        master_weights=0,
        moments=held.codes.device_bytes,
        scales=held.scales.device_bytes,
        gradients=weights,
        accumulators=held.sums.device_bytes,
        averages=held.averages.device_bytes,
        frozen=bytes_on_device(arrays.values()) - weights,
        other=bytes_on_device(held.other),
        host=held.host_bytes,
    )
    released = None
    if not held.sums.arrays:
        wait = waiting_leaves(call, optim, rebuild(part), leaves)
        released = released_gradients(call, leaves, trained, **parts, waiting=wait)
    whole = [x for x in trained.values() if elements_on_device(x) == math.prod(x.shape)]
    return MemoryPlan(
        parameters=parameters,
        devices=devices,
        step=step,
        gradient_release=dataclasses.replace(step, gradients=released),
        mixed_precision=_in_mixed_precision(step, held, list(trained.values())),
        whole=bytes_on_device(whole) if devices > 1 else 0,
    )


def _in_mixed_precision(
    step: DeviceMemory, held: Contents, trained: list[Any]
) -> DeviceMemory:
    """The same training with float32 state, on the device."""
    in_float32 = lambda arrays: 4 * sum(map(elements_on_device, arrays))
    narrow = [x for x in trained if x.dtype in NARROW_DTYPES]
    return dataclasses.replace(
        step,
        corrections=0,
        host=0,
        master_weights=in_float32(narrow),
        moments=in_float32(held.codes.arrays),
        scales=0,
        accumulators=in_float32(trained) if held.sums.arrays else 0,
        averages=in_float32(trained) if held.averages.arrays else 0,
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
