"""A step of one leaf as one kernel.

A leaf is seen as matrices whose groups run along the rows: 32 rows of 128 lanes are one
tile of 8-bit integers, and four registers of float32. A grid of blocks covers the
matrices; the pipeline copies a block into VMEM while the one before it is computed.
Inside of a block, a loop takes a *chunk* at a time: see `chunk.py`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Shaped

from ..._storage.layout import Layout
from ..._tile.tile import LeafScalars, no_update, StepScalars, StepStructure, TileState
from ..interpreter.arithmetic import Arithmetic
from ..interpreter.scalars import pack
from .block import Block, choose_block
from .chip import Chip
from .chunk import ChunkStep
from .layout import transposed
from .scratch import scratch_shapes


def update_leaf(
    structure: StepStructure,
    views: tuple[Layout, ...],
    scalars: StepScalars,
    leaves: tuple[LeafScalars, ...],
    grads: tuple[Float[Array, "..."], ...],
    old: tuple[TileState, ...],
    interpret: bool = False,
) -> tuple[TileState, ...]:
    """One step of one leaf. See `AbstractBackend.load`."""
    # A leaf is a batch, and `scalars` are its own.
    del leaves
    (layout,), (grad,), (state,) = views, grads, old
    rows_last = layout.axes == (-1,)
    if rows_last:
        # In memory, its columns are the rows.
        layout = transposed(layout)
    to_matrices, from_matrices = _reshaping(layout, rows_last)
    grad, state = jtu.tree_map(to_matrices, (grad, state))
    chip = Chip.current()
    block = choose_block(structure, layout, chip, grad, state)
    arithmetic = chip.arithmetic.exact if interpret else chip.arithmetic

    threshold = scalars.weight_threshold if structure.dither_weights else None
    *packed, unpack = pack((scalars, scalars.dithers(structure), threshold))
    arrays, treedef = jtu.tree_flatten(state)
    in_scalars = pl.BlockSpec(memory_space=pltpu.SMEM)
    of_elements, of_state = _block_specs(block, state)
    new = pl.pallas_call(
        partial(_kernel, structure, arithmetic, block, unpack, treedef),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays],
        grid=(
            grad.shape[0],
            pl.cdiv(grad.shape[1], block.rows),
            pl.cdiv(grad.shape[2], block.columns),
        ),
        in_specs=[*[in_scalars for _ in packed], of_elements, *of_state],
        out_specs=of_state,
        scratch_shapes=scratch_shapes(structure, block),
        input_output_aliases={len(packed) + 1 + i: i for i in range(len(arrays))},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel"),
            vmem_limit_bytes=chip.vmem_limit,
            # All accesses are inside of blocks, and the pipeline cuts off blocks at the
            # edges. The checks take some hundred instructions for each block.
            disable_bounds_checks=True,
        ),
        # Lets XLA overlap other work. An element takes about 50 operations.
        cost_estimate=pl.CostEstimate(
            flops=50 * grad.size,
            transcendentals=4 * grad.size,
            bytes_accessed=_bytes(grad) + 2 * _bytes(state),
        ),
        interpret=interpret,
        name=f"flashquinox_{type(structure.rule).__name__.lower()}",
    )(*packed, grad, *arrays)
    return (jtu.tree_map(from_matrices, jtu.tree_unflatten(treedef, new)),)


def _reshaping(
    layout: Layout, rows_last: bool
) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """From arrays of a leaf to matrices whose rows are the last axis but one, and back.
    All of it moves nothing in memory."""
    leading = layout.shape[:-2]

    def to_matrices(x: Shaped[Array, "..."]) -> Shaped[Array, "matrices rows columns"]:
        if rows_last:
            x = jnp.swapaxes(x, -1, -2)
        return x.reshape(math.prod(leading), *x.shape[-2:])

    def from_matrices(
        x: Shaped[Array, "matrices rows columns"],
    ) -> Shaped[Array, "..."]:
        x = x.reshape(*leading, *x.shape[-2:])
        return jnp.swapaxes(x, -1, -2) if rows_last else x

    return to_matrices, from_matrices


def _block_specs(block: Block, state: TileState) -> tuple[Any, list[Any]]:
    """How arrays with an entry for each element are cut into blocks, and how each array
    of the state is."""
    here = lambda i, j, k: (i, j, k)
    of_elements = pl.BlockSpec((1, block.rows, block.columns), here)
    of_scales = pl.BlockSpec((1, block.rows // block.group_size, block.columns), here)
    elements = (state.weight, state.correction, state.codes)
    return of_elements, [
        *[of_elements for _ in jtu.tree_leaves(elements)],
        *[of_scales for _ in jtu.tree_leaves(state.scales)],
    ]


def _bytes(tree: Any) -> int:
    return sum([x.size * x.dtype.itemsize for x in jtu.tree_leaves(tree)])


def _kernel(
    structure: StepStructure,
    arithmetic: Arithmetic,
    block: Block,
    unpack: Callable[..., Any],
    treedef: Any,
    floats: Any,
    integers: Any,
    grad: Any,
    *refs: Any,
) -> None:
    *state, constants, maxima, prepared = refs
    old, new = [
        jtu.tree_unflatten(treedef, x)
        for x in (state[: len(state) // 2], state[len(state) // 2 :])
    ]
    scalars, dithers, threshold = unpack(floats.__getitem__, integers.__getitem__)
    chunks = ChunkStep(
        structure=structure,
        arithmetic=arithmetic,
        block=block,
        scalars=scalars,
        dithers=dithers,
        threshold=threshold,
        grad=grad,
        old=old,
        new=new,
        scratch=(constants, maxima, prepared),
        zero=integers[0],
    )
    step = partial(lax.fori_loop, 0, math.prod(block.chunks), chunks.update, None)
    if scalars.take is None:
        step()
    else:
        pl.when(scalars.take)(step)
        pl.when(jnp.logical_not(scalars.take))(partial(_stay, structure, old, new))


def _stay(structure: StepStructure, old: TileState, new: TileState) -> None:
    """A step that is not taken."""
    for source, target in zip(jtu.tree_leaves(old), jtu.tree_leaves(new), strict=True):
        target[...] = source[...]
    if structure.as_update:
        new.weight[...] = no_update(old.weight[...])
