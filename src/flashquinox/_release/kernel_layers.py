"""Layers of a state in host memory that kernels copy, as those of 8-bit stacks on TPUs.

In each turn of the backward pass, the state of this layer is read and what the one
after it has become is written, both while this layer is computed again and pulled back.
So the device holds these two layers, beside that of the update.

For all other arrays, see `host_layers.py`.
"""

from typing import NamedTuple, TypeVar

import equinox as eqx
import jax.lax as lax
import jax.tree_util as jtu
from jaxtyping import Array, PyTree, ScalarLike

from .._backends import host_copies


T = TypeVar("T")
U = TypeVar("U")


class Crossing(NamedTuple):
    """Layers on their way, of `stacks`."""

    stacks: list[Array]
    reads: host_copies.Reads | None
    writes: host_copies.Writes | None


def split(tree: dict[int, T], mask: PyTree) -> tuple[dict[int, T], dict[int, T]]:
    """A tree as two, with `None` in place of the others: the arrays that kernels copy,
    as the mask says, and all others."""
    own = {i: mask[i] for i in tree}
    return eqx.partition(tree, own)


def depart(
    stacks: PyTree[Array], leaving: PyTree[Array], layer: ScalarLike, inputs: T
) -> tuple[Crossing, T]:
    """Begins to read this layer, and to write the one after it, if there is one. Both
    have begun when the inputs are there."""
    arrays, parts = jtu.tree_leaves(stacks), jtu.tree_leaves(leaving)
    if not arrays:
        return Crossing([], None, None), inputs
    arrays, reads = host_copies.start_reads(layer, 1, arrays)
    writes = None
    if parts:
        parts = [x[None] for x in parts]
        arrays, writes = host_copies.start_writes(layer + 1, arrays, parts)
    crossing = Crossing(arrays, reads, writes)
    return lax.optimization_barrier((crossing, inputs))


def land(crossing: Crossing, stacks: T, results: U) -> tuple[T, T, U]:
    """Ends what `depart` began once the results are there: the stacks, this layer of
    them, and the results."""
    if not crossing.stacks:
        return stacks, stacks, results
    structure = jtu.tree_structure(stacks)
    (arrays, reads, writes), results = lax.optimization_barrier((crossing, results))
    assert reads is not None
    arrays, parts = host_copies.finish_reads(arrays, reads)
    if writes is not None:
        arrays = host_copies.finish_writes(arrays, writes)
    parts = structure.unflatten([lax.squeeze(x, (0,)) for x in parts])
    return structure.unflatten(arrays), parts, results


def write_last(stacks: T, leaving: PyTree[Array]) -> T:
    """Writes the first layer, after the last turn."""
    arrays, structure = jtu.tree_flatten(stacks)
    if not arrays:
        return stacks
    parts = [x[None] for x in jtu.tree_leaves(leaving)]
    arrays, writes = host_copies.start_writes(0, arrays, parts)
    return structure.unflatten(host_copies.finish_writes(arrays, writes))
