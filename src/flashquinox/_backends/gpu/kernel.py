"""Kernels for GPUs, in CUDA C++: one for many leaves."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Shaped

from ..._common import memory
from ..._tile.step import LeafScalars, StepScalars, StepStructure, TileState
from ..base import takes_place_of_gradient
from ..cpp.common import common_of, joined, new_states, parts
from ..cpp.members import launched, Run
from ..cpp.translation import GRAD, translation_of, WEIGHT
from ..cpp.view import View
from ..cpp.words import Words
from ..groups import flat
from . import host_arrays, nvrtc
from .launch import Launch, launch
from .source import Kernel
from .threads import THREADS, Threads


def update_leaves(
    run: Run,
    threads_of: Callable[[Sequence[View]], Threads],
    structure: StepStructure,
    views: tuple[View, ...],
    scalars: StepScalars,
    leaves: tuple[LeafScalars, ...],
    grads: tuple[Shaped[Array, "..."], ...],
    old: tuple[TileState, ...],
) -> tuple[TileState, ...]:
    """One step of leaves that are stored alike. See `AbstractBackend.load`."""
    words = Words.of(scalars, leaves, all(view.number is not None for view in views))
    of_leaf = jtu.tree_leaves((grads[0], old[0]))
    from_stack = structure.in_stack and not structure.as_direction
    in_one = {GRAD} if from_stack else set[int]()
    if structure.as_direction:
        # Nobody reads weights.
        in_one.add(WEIGHT)
    common = common_of(structure, len(of_leaf))
    as_grad = not in_one and takes_place_of_gradient(structure, grads[0], old[0])
    kernel = Kernel(
        f"flashquinox_{type(structure.rule).__name__.lower()}",
        translation_of(structure, scalars, grads[0], old[0]),
        views,
        threads_of(views),
        words.scalars,
        (0,) * len(words.arrays),
        results=_results(old, structure.as_direction) - len(common) * (len(old) - 1),
        own=tuple([i for i in range(len(of_leaf)) if i not in {*in_one, *common}]),
        first=GRAD if as_grad else WEIGHT,
        fresh=str(old[0].weight.dtype) if structure.as_direction else None,
        shape=grads[0].shape if structure.as_direction and structure.in_stack else None,
    )
    # XLA takes a reshape of what is in host memory for work of the host.
    in_a_row = lambda x: x if memory.is_on_host(x) else flat(x)
    each = [jtu.tree_leaves(x) for x in zip(grads, old, strict=True)]
    arrays = [in_a_row(of_leaf[i]) for of_leaf in each for i in kernel.own]
    whole = joined(each, common)
    if from_stack:
        whole = [flat(jnp.stack(grads)), *whole]
    new = list(launched(run, kernel, _through_device)(*words.arrays, *whole, *arrays))
    found: dict[int, list[Any]] = {}
    if structure.as_direction:
        found[WEIGHT] = _directions(kernel, new.pop(0))
    for i in common:
        found[i] = parts(new.pop(0), [x[i].size for x in each])
    return new_states(old, found, new)


def _directions(kernel: Kernel, x: Shaped[Array, "..."]) -> list[Array]:
    """Those of all leaves, from the array that they are in."""
    numbers = range(len(kernel.views))
    if kernel.shape is not None:
        return [lax.index_in_dim(x, i, keepdims=False) for i in numbers]
    starts = [kernel.before(i, WEIGHT) for i in numbers]
    return [
        lax.slice_in_dim(x, start, start + view.size)
        for start, view in zip(starts, kernel.views, strict=True)
    ]


def _results(old: tuple[TileState, ...], with_stack: bool) -> int:
    """How many results XLA knows: of new weights in one array, one."""
    here = sum([not memory.is_on_host(x) for x in jtu.tree_leaves(old)])
    return here - len(old) + 1 if with_stack else here


def most_leaves(arrays: int, structure: StepStructure) -> int:
    """How many leaves share a kernel at most, of so many arrays each. Each launch takes
    time, but the arguments of a kernel are limited."""
    common = len(common_of(structure, arrays))
    of_leaf = 2 * (arrays - common) - 1
    return (nvrtc.most_pointers() - 2 - 2 * common) // of_leaf


def _through_device(
    kernel: Kernel, run: Run, size: int, is_mapped: Sequence[bool], args: Any
) -> Any:
    """A step of an ensemble with its state in host memory."""
    flat = [
        x.reshape(*x.shape[: int(mapped)], -1)
        for x, mapped in zip(memory.to_device(list(args)), is_mapped, strict=True)
    ]
    olds = [args[i] for i in kernel.states(len(args))]
    launch = launched(run, kernel._replace(results=len(olds)), _through_device)
    in_axes = tuple([0 if mapped else None for mapped in is_mapped])
    new = jax.vmap(launch, in_axes, axis_size=size)(*flat)
    new = [
        memory.where(x.reshape(size, *old.shape[-old.ndim + 1 :]), old)
        if memory.is_on_host(old)
        else x
        for x, old in zip(new, olds, strict=True)
    ]
    return new, [True] * len(new)


def run_on_gpu(
    kernel: Kernel, *operands: Shaped[Array, "..."]
) -> Sequence[Shaped[Array, "..."]]:
    """Launches a kernel. XLA loads it and puts the addresses into its arguments."""
    states = kernel.states(len(operands))
    away = [i for i in states if memory.is_on_host(operands[i])]
    here = [i for i in states if i not in set(away)]
    opened, addresses = host_arrays.lend([operands[i] for i in away])
    known = dict(enumerate(operands)) | dict(zip(away, opened, strict=True))
    own = kernel.own_results(operands)
    new = launch(
        Launch(kernel.name, kernel.source, kernel.blocks * kernel.members, THREADS),
        [*known.values()],
        aliases={i: j + len(own) for j, i in enumerate(here)},
        fresh=dict(enumerate(own)),
        writes_operands=bool(away),
    )
    first = list(new[: len(own)]) if kernel.fresh is not None else []
    waited, new = new[-1:], new[len(own) :]
    closed = host_arrays.give_back(opened, addresses, waited)
    known |= dict(zip(here, new, strict=True)) | dict(zip(away, closed, strict=True))
    return first + [known[i] for i in states]
