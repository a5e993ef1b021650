"""Plain XLA for CPUs: leaves in chunks of a fixed number of groups, in place.

XLA makes a pass over memory of whatever it does not fuse, and compiles the passes of
each leaf anew. So a loop brings one chunk of some leaf after another into the same
arrays, which stay in the caches, and a program has one step: that of a chunk.

A window of a long leaf is a chunk; the last one is moved back to be as long as the
others. It is loaded before the window before it is stored, so both have the same new
state of what they share. Shorter leaves share chunks.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Int32, Shaped

from .._tile.shapes import update_tile_of_any_shape
from .._tile.step import LeafScalars, map_arrays, StepScalars, StepStructure, TileState
from .boundary import boundary
from .chunk_moves import Chunk, SharedCase, Turn
from .chunk_plan import best_size, Plan, plan_chunks
from .chunk_turns import (
    cases_of,
    first_chunk,
    first_turn,
    leaf_of_groups,
    load,
    look_up,
    store,
)
from .groups import flat, from_words, Groups, joined, words_of


# Elements of a chunk; its arrays fill 5 MB. The fastest on two cores of an EPYC 7763
# among 2^13 to 2^19: XLA divides a pass among threads from 2^16 elements on, and each
# pass begins when all threads have done the one before.
_ELEMENTS = 1 << 18
# Of leaves that one chunk does not hold, there are at least so many: the temporaries of
# a chunk, up to 32 bytes for each of its elements, are then a byte for each parameter.
_CHUNKS = 32
# Whatever is in its chunk, a turn takes as long as so many elements more: so it was of
# ViT-B/16, ConvNeXt-T, ResNet-50 and Mamba with chunks of 2^17 to 2^18, within 3 %, on
# two cores of a Xeon.
_ELEMENTS_OF_TURN = 1 << 14
# XLA's indices are of 32 bits.
_MOST_ELEMENTS = 1 << 31
_Leaves: TypeAlias = dict[int, TileState]
# XLA of JAX 0.10 copies the state in each turn of a loop: a step of 14 million
# parameters took 6 times as long as with whole leaves (`benchmarks/cpu.py`).
_LOOPS_COPY = jax.__version_info__ < (0, 11)


def takes(leaf: Groups) -> bool:
    """Whether a leaf is taken: not one of several chunks whose groups would first have
    to be put in order."""
    few = leaf.in_order or leaf.number <= _most_groups(leaf.size)
    return few and leaf.number * leaf.size < _MOST_ELEMENTS


def take_together(leaves: Sequence[Groups]) -> bool:
    """Whether leaves that are stored alike are taken in chunks: where loops copy, those
    that fill one chunk together."""
    number = sum([leaf.number for leaf in leaves])
    return not _LOOPS_COPY or number <= _most_groups(leaves[0].size)


def _most_groups(size: int) -> int:
    return max(1, _ELEMENTS // size)


def _chunk_groups(leaves: Sequence[Groups]) -> int:
    """How many groups of these leaves a chunk has."""
    most = _most_groups(leaves[0].size)
    number = sum([leaf.number for leaf in leaves])
    if number <= most:
        return most
    share = min(most, -(-number // _CHUNKS))
    # Each chunk that leaves share has moves of its own to compile, where windows of a
    # leaf have the same: there are few of these chunks.
    while share < most // 2 and _number_in_short(leaves, share) > 2 * share:
        share = min(2 * share, most // 2)
    # Groups that do not lie in order are those of one chunk.
    least = max([1, *[leaf.number for leaf in leaves if not leaf.in_order]])
    of_turn = _ELEMENTS_OF_TURN // leaves[0].size
    return best_size(_numbers(leaves), least, max(share, least), of_turn)


def _numbers(leaves: Sequence[Groups]) -> tuple[tuple[int, int], ...]:
    return tuple([(leaf.number, leaf.whole) for leaf in leaves])


def _number_in_short(leaves: Sequence[Groups], most: int) -> int:
    """How many groups there are in leaves of fewer."""
    return sum([leaf.number for leaf in leaves if leaf.number < most])


def update_in_chunks(
    structure: StepStructure,
    leaves: tuple[Groups, ...],
    scalars: StepScalars,
    of_leaves: tuple[LeafScalars, ...],
    grads: tuple[Shaped[Array, "..."], ...],
    old: tuple[TileState, ...],
) -> tuple[TileState, ...]:
    """One step of leaves that are stored alike, in groups of one size."""
    size = leaves[0].size
    plan = plan_chunks(_numbers(leaves), _chunk_groups(leaves))
    like = Chunk(grads[0], old[0])
    update = partial(_update_chunk, structure, size, of_leaves, like)
    # Once, and not in each turn.
    in_order = lambda leaf, x: flat(x) if leaf.in_order else x
    flat_grads = dict(enumerate(map(in_order, leaves, grads)))
    state = {
        i: map_arrays(partial(in_order, leaf), flat, own)
        for i, (leaf, own) in enumerate(zip(leaves, old, strict=True))
    }
    if not plan.windows and len(plan.shared) == 1:
        (case,), _ = cases_of(leaves, plan)
        assert isinstance(case.moves, SharedCase)
        own = tuple([state[i] for i in case.leaves])
        # Arrays that are there are joined without a kernel.
        of_grads = tuple([flat_grads[i] for i in case.leaves])
        of_grads, own = lax.optimization_barrier((of_grads, own))
        chunk = case.moves.load_all(of_grads, own)
        of_groups = jnp.asarray(case.moves.leaf_of_groups)
        updated = boundary(update(scalars, of_groups, boundary(chunk)))
        new = dict(zip(case.leaves, case.moves.store(None, updated, own), strict=True))
    else:
        new = _loop(leaves, plan, update, scalars, flat_grads, state)
    return jtu.tree_map(
        lambda x, like: x if x.shape == like.shape else lax.reshape(x, like.shape),
        tuple(new[i] for i in range(len(old))),
        old,
    )


def _loop(
    leaves: tuple[Groups, ...],
    plan: Plan,
    update: Callable[..., TileState],
    scalars: StepScalars,
    grads: dict[int, Array],
    old: _Leaves,
) -> _Leaves:
    cases, table = cases_of(leaves, plan)
    # Else XLA makes other kernels of a leaf's first window than of the next ones.
    grads, old = lax.optimization_barrier((grads, old))

    def turn(carry: tuple[Int32[Array, ""], Turn, _Leaves, Chunk]) -> Any:
        i, now, state, chunk = carry
        # Not the same in all turns, for all that XLA knows: it would compile each
        # operation on them by itself, to be done before the loop.
        own_scalars, _ = lax.optimization_barrier((scalars, i))
        new = boundary(update(own_scalars, leaf_of_groups(cases, now), chunk))
        # In place of the chunk that was read, and before windows that share some of it
        # with the next chunk are stored.
        following = look_up(table, i + 1)
        following, new = lax.optimization_barrier((following, new))
        chunk = boundary(load(cases, following, grads, state, chunk))
        new, chunk = lax.optimization_barrier((new, chunk))
        return i + 1, following, store(cases, now, new, state), chunk

    # Not a `fori_loop`: of one with so many turns, JAX traces everything twice.
    last = np.int32(len(table.case))
    first = first_turn(table)
    carry = jnp.int32(0), first, old, first_chunk(cases, first, grads, old)
    return lax.while_loop(lambda carry: carry[0] < last, turn, carry)[2]


def _update_chunk(
    structure: StepStructure,
    size: int,
    of_leaves: tuple[LeafScalars, ...],
    like: Chunk,
    scalars: StepScalars,
    leaf_of_groups: Int32[Array, "..."],
    words: Chunk,
) -> TileState:
    """The new state of a chunk, in words, as the chunk comes. `like` has its dtypes."""
    # Each group is a tile, with the scalars of its own leaf.
    leaf, axis = of_leaves[0], None
    if len(of_leaves) > 1 and jtu.tree_leaves(leaf):
        axis = 0 if leaf_of_groups.ndim else None
        leaf = jtu.tree_map(
            lambda *x: _stacked(x).at[leaf_of_groups].get(mode="promise_in_bounds"),
            *of_leaves,
        )
    chunk = jtu.tree_map(lambda x, as_: from_words(x, as_.dtype), words, like)
    tile = lambda x: x.reshape(-1, size)
    update = jax.vmap(partial(_update_group, structure), (None, axis, 0, 0))
    new = update(scalars, leaf, tile(chunk.grad), chunk.old.map(tile))
    return jtu.tree_map(words_of, new).map(jnp.ravel)


def _stacked(numbers: Sequence[Array]) -> Shaped[Array, " n"]:
    return joined([lax.reshape(jnp.asarray(x), (1,)) for x in numbers])


def _update_group(
    structure: StepStructure,
    scalars: StepScalars,
    leaf: LeafScalars,
    grad: Shaped[Array, " size"],
    old: TileState,
) -> TileState:
    scalars = dataclasses.replace(scalars, leaf=leaf)
    return update_tile_of_any_shape(structure, scalars, -1, grad, old, boundary)
