"""A step of one leaf as one kernel.

A leaf is seen with its axes in the order of memory. A grid of blocks covers it; the
pipeline copies a block into VMEM while the one before it is computed. Inside of a
block, a loop takes a *chunk* at a time: see `block.py` and `chunk.py`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, PyTree, Shaped

from ..._tile.step import (
    LeafScalars,
    StepScalars,
    StepStructure,
    TileState,
)
from ..._tile.tile import no_update
from ..base import takes_place_of_gradient
from ..interpreter.arithmetic import Arithmetic
from ..interpreter.scalars import pack, with_leaf
from .block import AbstractGridBlock
from .chip import Chip
from .chunk import ChunkStep
from .matrices import matrices_block
from .pairs import PairsRef
from .planes import planes_block
from .reordering import reordered, Reordering
from .rows import rows_block
from .scratch import scratch_shapes
from .vectors import vector_block
from .view import View


def update_leaf(
    structure: StepStructure,
    views: tuple[View, ...],
    scalars: StepScalars,
    leaves: tuple[LeafScalars, ...],
    grads: tuple[Shaped[Array, "..."], ...],
    old: tuple[TileState, ...],
    interpret: bool = False,
) -> tuple[TileState, ...]:
    """One step of one leaf. See `AbstractBackend.load`."""
    # A leaf is a batch, and `scalars` are its own.
    del leaves
    (view,), (grad,), (state,) = views, grads, old
    chip = Chip.current()
    moved = reordered(view, chip, grad, state)
    seen = view if moved is None else moved.orders
    grad, state = seen.of_elements(grad), seen.of(state)
    # The kernel's own pipeline copies operands into VMEM. XLA would copy small ones
    # there first: they would move twice.
    kind = jax.ShapeDtypeStruct if structure.in_loop else pltpu.HBM
    if not (structure.in_loop or interpret):
        grad = _in_hbm(grad)
    if moved is None:
        block = choose_block(structure, view, chip, grad, state)
        of_grad, of_state = _block_specs(view, block, grad, state)
    else:
        block = moved.block
        of_grad, *of_state = moved.specs
    arithmetic = chip.arithmetic.exact if interpret else chip.arithmetic

    # What is the same for all leaves is computed once in a step, and what is not in the
    # kernel: every operation of XLA on a number is a program of its own.
    *packed, unpack = pack(scalars)
    own, own_structure = jtu.tree_flatten(scalars.leaf)
    # Of two axes, of which `vmap` does not divide the last ones.
    packed = [x.reshape(1, -1) for x in (*packed, *own)]
    arrays, treedef = jtu.tree_flatten(state)
    in_scalars = pl.BlockSpec(memory_space=pltpu.SMEM)
    # Operands after the scalars: the gradient, then the arrays.
    written = range(1, len(arrays) + 1)
    if takes_place_of_gradient(structure, grad, state):
        written = 0, *written[1:]
    new = pl.pallas_call(
        partial(
            _kernel,
            structure,
            arithmetic,
            view,
            block,
            moved,
            unpack,
            own_structure,
            treedef,
        ),
        out_shape=[kind(x.shape, x.dtype) for x in arrays],
        grid=block.grid,
        in_specs=[*[in_scalars for _ in packed], of_grad, *of_state],
        out_specs=of_state,
        scratch_shapes=[
            *scratch_shapes(structure, block),
            *(moved.scratch_shapes if moved is not None else []),
        ],
        input_output_aliases={len(packed) + x: i for i, x in enumerate(written)},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(
                *["parallel" for _ in block.grid[1:]],
                # Scales stay in VMEM from one block to the next.
                "parallel"
                if moved is None or moved.block.sharing == 1
                else "arbitrary",
            ),
            vmem_limit_bytes=chip.vmem_limit,
            # All accesses are inside of blocks, and the pipeline cuts off blocks at the
            # edges. The checks take some hundred instructions for each block.
            disable_bounds_checks=True,
        ),
        cost_estimate=cost_of(grad, state),
        interpret=interpret,
        name=f"flashquinox_{type(structure.rule).__name__.lower()}",
    )(*packed, grad, *arrays)
    return (seen.restore(jtu.tree_unflatten(treedef, new)),)


# Results, and what they alias, say where they are by their types. Older versions of JAX
# cannot batch this for a gradient.
def _in_hbm(x: Array) -> Array:
    if jax.__version_info__ < (0, 12):
        return x
    return pltpu.with_memory_space_constraint(x, pltpu.HBM)


def choose_block(
    structure: StepStructure, view: View, chip: Chip, grad: Array, old: TileState
) -> AbstractGridBlock:
    """As many whole chunks as there is room for in VMEM."""
    arrays = zip(jtu.tree_leaves(old), old.are_of_groups, strict=True)
    element = grad.dtype.itemsize + 2 * sum(
        [x.dtype.itemsize for x, of_groups in arrays if not of_groups]
    )
    # Two buffers, and an eighth more for scales and scratch.
    room = chip.block_bytes // (2 * element * 9 // 8)
    shape, size = view.elements.lengths, view.group_size
    if view.kind == "vector":
        return vector_block(view, room)
    if view.kind == "planes":
        return planes_block(shape, size, room)
    groups = groups_of_chunk(structure)
    if view.kind == "matrices":
        return matrices_block(view, groups, room)
    # Loads with a stride, as of words, are from arrays of no more lanes.
    return rows_block(shape, size, groups, room, chip.arithmetic.only_words)


def groups_of_chunk(structure: StepStructure) -> int:
    """The groups of a chunk, at most. Many, so that the beginning and end of its phases
    matter little; not so many that the compiler schedules badly (found by looking at
    schedules)."""
    return 32 if len(structure.codecs) <= 1 else 16


def _block_specs(
    view: View, block: AbstractGridBlock, grad: Array, state: TileState
) -> tuple[Any, list[Any]]:
    """How the gradient is cut into blocks, and how each array of the state is."""

    def of_elements(x: Array) -> Any:
        if view.view_of(x.dtype) is view.elements:
            return pl.BlockSpec(block.elements, lambda *index: index)
        return pl.BlockSpec(block.scales_at(*block.elements), block.scales_at)

    of_scales = pl.BlockSpec(block.scales, block.scales_at)
    arrays = zip(jtu.tree_leaves(state), state.are_of_groups, strict=True)
    return of_elements(grad), [
        of_scales if of_groups else of_elements(x) for x, of_groups in arrays
    ]


def cost_of(grads: PyTree[Array], old: PyTree[Array]) -> pl.CostEstimate:
    """Lets XLA overlap other work. An element takes about 50 operations."""
    size = sum([x.size for x in jtu.tree_leaves(grads)])
    moved = [*jtu.tree_leaves(grads), *2 * jtu.tree_leaves(old)]
    return pl.CostEstimate(
        flops=50 * size,
        transcendentals=4 * size,
        bytes_accessed=sum([x.size * x.dtype.itemsize for x in moved]),
    )


def _kernel(
    structure: StepStructure,
    arithmetic: Arithmetic,
    view: View,
    block: AbstractGridBlock,
    moved: Reordering | None,
    unpack: Callable[..., Any],
    own_structure: Any,
    treedef: Any,
    floats: Any,
    integers: Any,
    *refs: Any,
) -> None:
    count = own_structure.num_leaves
    own, refs = refs[:count], refs[count:]
    count = treedef.num_leaves
    old, new, refs = (
        refs[: 1 + count],
        refs[1 + count : 1 + 2 * count],
        refs[1 + 2 * count :],
    )
    scratch, copies = refs[:3], refs[3:]
    if moved is None:
        before = after = lambda: None
        are_of_groups = treedef.unflatten(new).are_of_groups
        seen = lambda refs, are_of_groups: [
            ref if of_groups else _seen(view, block, ref)
            for ref, of_groups in zip(refs, are_of_groups, strict=True)
        ]
        old_seen = seen(old, [False, *are_of_groups])
        new_seen = seen(new, are_of_groups)
    else:
        old_seen, new_seen, before, after = moved.inside(old, new, copies)
    grad, *state = old_seen
    shared = unpack(lambda i: floats[0, i], lambda i: integers[0, i])
    own = own_structure.unflatten([x[0, 0] for x in own])
    scalars = with_leaf(shared, own)
    chunks = ChunkStep.of(
        structure,
        scalars,
        arithmetic=arithmetic,
        block=block,
        block_index=tuple([pl.program_id(axis) for axis in range(len(block.grid))]),
        grad=grad,
        old=treedef.unflatten(state),
        new=treedef.unflatten(new_seen),
        scratch=scratch,
        zero=integers[0, 0],
    )

    def step() -> None:
        before()
        lax.fori_loop(0, block.chunks, chunks.update, None)
        after()

    if scalars.take is None:
        step()
    else:
        stay = partial(
            _stay, structure, treedef.unflatten(old[1:]), treedef.unflatten(new)
        )
        pl.when(scalars.take)(step)
        pl.when(jnp.logical_not(scalars.take))(stay)


def _seen(view: View, block: AbstractGridBlock, ref: Any) -> Any:
    """A reference by indices of the view's elements."""
    if view.view_of(ref.dtype) is view.elements:
        return ref
    axes = range(len(view.elements.axes))
    return PairsRef(ref, block.scales_at(*axes))


def _stay(structure: StepStructure, old: TileState, new: TileState) -> None:
    """A step that is not taken."""
    for source, target in zip(jtu.tree_leaves(old), jtu.tree_leaves(new), strict=True):
        target[...] = source[...]
    if structure.as_update:
        new.weight[...] = no_update(old.weight[...])
