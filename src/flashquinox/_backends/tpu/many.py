"""Kernels for several leaves, all of which are in VMEM at once.

A kernel for each small leaf would mostly start and end.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, PyTree, Shaped

from ..._tile.step import StepScalars, StepStructure, TileState
from ..._tile.tile import no_update
from ..base import takes_place_of_gradient
from ..interpreter.scalars import pack, with_leaf
from .block import AbstractBlock
from .chip import Chip
from .chunk import ChunkStep
from .kernel import cost_of
from .scratch import scratch_shapes


# Leaves of a kernel, at most: more take the compiler longer than several kernels.
MOST_LEAVES = 24


@dataclasses.dataclass(frozen=True)
class Inside:
    """What a kernel for several leaves has, once all of them are in VMEM."""

    # References to the gradient of each leaf and to the arrays of its state. If leaves
    # are alike, those of all leaves are one array, with an axis of leaves.
    copies: Sequence[Sequence[Any]]
    # References to the arrays that were asked for.
    scratch: Sequence[Any]
    lengths: Any
    # From the number of an entry of `own`, where in a grid a block is, and references
    # to its gradient and state: the step of its chunks.
    chunks: Callable[..., ChunkStep]


def update_many(
    structure: StepStructure,
    block: AbstractBlock,
    scalars: StepScalars,
    own: PyTree[Array],
    grads: Sequence[Shaped[Array, "..."]],
    old: Sequence[TileState],
    scratch: Sequence[Any],
    body: Callable[[Inside], Callable[[], None]],
    interpret: bool,
    alike: bool = False,
    lengths: Sequence[int] = (0,),
) -> list[TileState]:
    """One step of several leaves.

    **Arguments:**

    - `own`: scalars that are not the same for all leaves, each in an array.
    - `scratch`: shapes of arrays in VMEM.
    - `body`: what is called when all leaves are in VMEM. It returns a function that
        takes the step.
    - `alike`: whether leaves have the same shape.
    - `lengths`: numbers that the body may ask for, one at a time.
    """
    chip = Chip.current()
    arithmetic = chip.arithmetic.exact if interpret else chip.arithmetic
    treedef = jtu.tree_structure(old[0])
    arrays = [[g, *jtu.tree_leaves(x)] for g, x in zip(grads, old, strict=True)]
    flat = [x for of_leaf in arrays for x in of_leaf]
    width = len(arrays[0])
    # All but the gradients, or the weights, are updated in place.
    results = [i for i in range(len(flat)) if i % width > 0]
    as_grad = takes_place_of_gradient(structure, grads[0], old[0])
    written = [i - 1 if as_grad and i % width == 1 else i for i in results]

    *packed, unpack = pack(scalars)
    own, own_structure = jtu.tree_flatten(own)
    small = (*packed, jnp.asarray(lengths, jnp.int32), *own)
    small = [x.reshape(1, -1) for x in small]

    copied = [pltpu.VMEM(x.shape, x.dtype) for x in flat]
    if alike:
        count = len(arrays)
        copied = [pltpu.VMEM((count, *x.shape), x.dtype) for x in arrays[0]]

    def kernel(floats: Any, integers: Any, lengths: Any, *refs: Any) -> None:
        parts = len(own), len(flat), len(results), len(copied), len(scratch)
        own_refs, inputs, outputs, copies, own_scratch, rest = _split(refs, parts)
        *rest, semaphore = rest
        scalars = unpack(lambda i: floats[0, i], lambda i: integers[0, i])

        def chunks(
            index: Any, block_index: Any, grad: Any, state: TileState
        ) -> ChunkStep:
            here = own_structure.unflatten([x[0, index] for x in own_refs])
            return ChunkStep.of(
                structure,
                with_leaf(scalars, here),
                arithmetic=arithmetic,
                block=block,
                block_index=block_index,
                grad=grad,
                old=state,
                new=state,
                scratch=tuple(rest),
                zero=integers[0, 0],
            )

        each = [copies[i : i + width] for i in range(0, len(copies), width)]
        if alike:
            copies = [x.at[i] for i in range(len(arrays)) for x in copies]
        _copy(inputs, copies, semaphore)
        step = body(Inside(each, own_scratch, lengths, chunks))
        if scalars.take is None:
            step()
        else:
            pl.when(scalars.take)(step)
            if structure.as_update:
                stay = partial(_no_updates, [refs[1] for refs in each])
                pl.when(jnp.logical_not(scalars.take))(stay)
        _copy([copies[i] for i in results], outputs, semaphore)

    new = pl.pallas_call(
        kernel,
        out_shape=[_memory(flat[i])(flat[i].shape, flat[i].dtype) for i in results],
        in_specs=[
            *[pl.BlockSpec(memory_space=pltpu.SMEM) for _ in small],
            *[pl.BlockSpec(memory_space=_memory(x)) for x in flat],
        ],
        out_specs=[pl.BlockSpec(memory_space=_memory(flat[i])) for i in results],
        scratch_shapes=[
            *copied,
            *scratch,
            *scratch_shapes(structure, block),
            pltpu.SemaphoreType.DMA,
        ],
        input_output_aliases={len(small) + i: j for j, i in enumerate(written)},
        compiler_params=pltpu.CompilerParams(
            vmem_limit_bytes=chip.vmem_limit, disable_bounds_checks=True
        ),
        cost_estimate=cost_of(grads, old),
        interpret=interpret,
        name=f"flashquinox_{type(structure.rule).__name__.lower()}_of_many",
    )(*small, *flat)
    each = width - 1
    return [treedef.unflatten(new[i : i + each]) for i in range(0, len(new), each)]


def _memory(x: Array) -> Any:
    """Where a kernel finds an array. Those of one element, such as the scales of a leaf
    of one group, are in the memory of scalars for the compiler, which for tpu7x
    compiles no program that says otherwise. If nothing is said, it copies them."""
    return pl.ANY if x.size == 1 else pltpu.HBM


def _split(refs: tuple[Any, ...], sizes: tuple[int, ...]) -> list[tuple[Any, ...]]:
    ends = np.cumsum([0, *sizes])
    parts = [refs[i:j] for i, j in itertools.pairwise(ends)]
    return [*parts, refs[ends[-1] :]]


def _copy(sources: Sequence[Any], targets: Sequence[Any], semaphore: Any) -> None:
    """All at the same time."""
    copies = [
        pltpu.make_async_copy(source, target, semaphore)
        for source, target in zip(sources, targets, strict=True)
    ]
    for copy in copies:
        copy.start()
    for copy in copies:
        copy.wait()


def _no_updates(weights: Sequence[Any]) -> None:
    for weight in weights:
        weight[...] = no_update(weight[...])
