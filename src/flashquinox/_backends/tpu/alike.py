"""A step of small leaves of one shape as one kernel."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Shaped

from ..._storage.tpu_memory import LANES, TILE_ROWS
from ..._tile.step import LeafScalars, StepScalars, StepStructure, TileState
from .block import unravel
from .chip import Chip
from .kernel import choose_block
from .many import Inside, MOST_LEAVES, update_many
from .view import View


def most_alike(view: View, grad: Array, old: TileState) -> int:
    """How many leaves of this sort share a kernel: as many as VMEM has room for."""
    *outer, rows, columns = view.elements.lengths
    filled = pl.cdiv(rows, TILE_ROWS) * TILE_ROWS * pl.cdiv(columns, LANES) * LANES
    element = sum([x.dtype.itemsize for x in jtu.tree_leaves((grad, old))])
    room = Chip.current().block_bytes // (math.prod(outer) * filled * element)
    return max(1, min(MOST_LEAVES, room - 1))


def update_alike(
    structure: StepStructure,
    views: tuple[View, ...],
    scalars: StepScalars,
    leaves: tuple[LeafScalars, ...],
    grads: tuple[Shaped[Array, "..."], ...],
    old: tuple[TileState, ...],
    interpret: bool = False,
) -> tuple[TileState, ...]:
    """One step of several leaves with the same view. See `AbstractBackend.load`."""
    view = views[0]
    grads = tuple(map(view.elements.of, grads))
    old = tuple(map(view.of, old))
    block = choose_block(structure, view, Chip.current(), grads[0], old[0])
    treedef, arrays = jtu.tree_structure(old[0]), [grads[0], *jtu.tree_leaves(old[0])]
    # Which of them have an entry for each element.
    elements = [True, *[not of_groups for of_groups in old[0].are_of_groups]]
    full = [
        tuple([n * size for n, size in zip(grid, sizes, strict=True)])
        for grid, sizes in (
            (block.scales_at(*block.grid), block.scales),
            (block.grid, block.elements),
        )
    ]

    def body(inside: Inside) -> Callable[[], None]:
        (copies,) = inside.copies

        def update(leaf: Any, carry: None) -> None:
            del carry
            # The pipeline of a grid would fill up blocks at the edges.
            for source, target in zip(copies, inside.scratch, strict=True):
                target[_inside(source)] = source[leaf]

            def update_block(number: Any, carry: None) -> None:
                del carry
                index = unravel(number, block.grid)
                grad, *state = [
                    ref.at[_slices(index, block.elements)]
                    if of_elements
                    else ref.at[_slices(block.scales_at(*index), block.scales)]
                    for ref, of_elements in zip(inside.scratch, elements, strict=True)
                ]
                chunks = inside.chunks(leaf, index, grad, treedef.unflatten(state))
                lax.fori_loop(0, block.chunks, chunks.update, None)

            lax.fori_loop(0, math.prod(block.grid), update_block, None)
            for source, target in zip(inside.scratch[1:], copies[1:], strict=True):
                target[leaf] = source[_inside(target)]

        return partial(lax.fori_loop, 0, len(views), update, None)

    new = update_many(
        structure,
        block,
        scalars,
        jtu.tree_map(lambda *xs: jnp.stack(xs), *leaves),
        grads,
        old,
        [
            pltpu.VMEM(full[of_elements], x.dtype)
            for x, of_elements in zip(arrays, elements, strict=True)
        ],
        body,
        interpret,
        alike=True,
    )
    return tuple(map(view.restore, new))


def _inside(ref: Any) -> tuple[slice, ...]:
    """Where one of the arrays of a reference is in a larger one."""
    return tuple([slice(0, length) for length in ref.shape[1:]])


def _slices(index: tuple[Any, ...], sizes: tuple[int, ...]) -> tuple[Any, ...]:
    return tuple(
        [
            pl.ds(
                i * size if isinstance(i, int) else pl.multiple_of(i * size, size), size
            )
            for i, size in zip(index, sizes, strict=True)
        ]
    )
