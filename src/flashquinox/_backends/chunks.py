"""Plain XLA for CPUs: leaves in chunks of a fixed number of groups, in place.

XLA makes a pass over memory of whatever it does not fuse, and compiles the passes of
each leaf anew. So a loop brings one chunk of some leaf after another into the same
arrays, which stay in the caches, and a program has one step: that of a chunk.

A window of a long leaf is a chunk; the last one is moved back to be as long as the
others, and leaves what is done as it is. Shorter leaves share chunks.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Int32, Shaped

from .._tile.step import LeafScalars, map_arrays, StepScalars, StepStructure, TileState
from .._tile.tile import update_tile
from .chunk_moves import (
    Chunk,
    joined,
    Leaves,
    load_pieces,
    load_window,
    Starts,
    store_pieces,
    store_window,
)
from .chunk_plan import Plan, plan_chunks
from .groups import Groups


# Elements of a chunk; its arrays fill 5 MB. The fastest on two cores of an EPYC 7763
# among 2^13 to 2^19: XLA divides a pass among threads from 2^16 elements on, and each
# pass begins when all threads have done the one before.
_ELEMENTS = 1 << 18
# XLA's indices are of 32 bits.
_MOST_ELEMENTS = 1 << 31
# Cases of one `switch`, all of whose leaves go through each of them.
_CASES = 4


class _Case(NamedTuple):
    """What a turn of the loop does if its chunk is one of these leaves."""

    leaves: tuple[int, ...]
    load: Callable[[Starts, dict[int, Array], Leaves, Chunk], Chunk]
    store: Callable[[Starts, TileState, Leaves], Leaves]


def takes(leaf: Groups) -> bool:
    """Whether a leaf is taken: not one of several chunks whose groups would first have
    to be put in order."""
    few = leaf.in_order or leaf.number <= _most_groups(leaf.size)
    return few and leaf.number * leaf.size < _MOST_ELEMENTS


def _most_groups(size: int) -> int:
    return max(1, _ELEMENTS // size)


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
    numbers = tuple([(leaf.number, leaf.whole) for leaf in leaves])
    plan = plan_chunks(numbers, _most_groups(size))
    update = partial(_update_chunk, structure, size, scalars, of_leaves)
    # Once, and not in each turn.
    flat = lambda leaf, x: x.reshape(-1) if leaf.in_order else x
    flat_grads = dict(enumerate(map(flat, leaves, grads)))
    state = {
        i: map_arrays(partial(flat, leaf), jnp.ravel, own)
        for i, (leaf, own) in enumerate(zip(leaves, old, strict=True))
    }
    if not plan.windows and len(plan.shared) == 1:
        (pieces,) = plan.shared
        chunk = _boundary(joined(leaves, pieces, flat_grads, state))
        new = store_pieces(leaves, pieces, None, _boundary(update(chunk)), state)
    else:
        new = _loop(leaves, plan, update, flat_grads, state)
    return jtu.tree_map(
        lambda x, like: x.reshape(like.shape),
        tuple(new[i] for i in range(len(old))),
        old,
    )


def _loop(
    leaves: tuple[Groups, ...],
    plan: Plan,
    update: Callable[[Chunk], TileState],
    grads: dict[int, Array],
    old: Leaves,
) -> Leaves:
    cases, turns = _cases(leaves, plan)
    batches = [cases[i : i + _CASES] for i in range(0, len(cases), _CASES)]
    size = leaves[0].size
    moved = any([window.done > 0 for window in plan.windows])

    def turn(i: Int32[Array, ""], carry: tuple[Leaves, Chunk]) -> Any:
        state, chunk = carry
        # XLA may compile a loop into one function for one thread, and takes minutes to
        # compile this one so: but no loop with a sort in it.
        i = lax.sort(jnp.stack([i, np.int32(len(turns))]))[0]
        number, group, done = jnp.asarray(turns).at[i].get(mode="promise_in_bounds")
        starts = Starts(group * size, group)
        for k, batch in enumerate(batches):
            loads = [partial(_call_load, case) for case in batch]
            operands = starts, _of(batch, grads), _of(batch, state), chunk
            chunk = _choose(number - k * _CASES, loads, *operands)
        new = update(chunk)
        if moved:
            new = _unless(jnp.arange(plan.size) < done, chunk.old, new)
        new = _boundary(new)
        for k, batch in enumerate(batches):
            stores = [partial(_call_store, case) for case in batch]
            operands = starts, new, _of(batch, state)
            state = state | _choose(number - k * _CASES, stores, *operands)
        return state, chunk

    # Not read: each turn loads its own.
    nothing = Chunk(
        jnp.zeros(plan.size, jnp.int32),
        jnp.zeros(plan.size * size, grads[0].dtype),
        map_arrays(
            lambda x: jnp.zeros(plan.size * size, x.dtype),
            lambda x: jnp.zeros(plan.size, x.dtype),
            old[0],
        ),
    )
    state, _ = lax.fori_loop(0, len(turns), turn, (old, nothing))
    return state


def _choose(number: Int32[Array, ""], cases: list[Callable], *operands: Any) -> Any:
    """What the case of this number returns; without one, the last operand, which XLA
    does not copy."""
    nothing = lambda *x: x[-1]
    return lax.switch(number + 1, [nothing, *cases, nothing], *operands)


def _of(cases: list[_Case], every: dict[int, Any]) -> dict[int, Any]:
    """What the leaves of these cases have of it."""
    return {leaf: every[leaf] for case in cases for leaf in case.leaves}


def _unless(done: Bool[Array, " groups"], old: TileState, new: TileState) -> TileState:
    """The old state of the groups that are done, and the new one of the others."""

    def of_elements(old: Array, new: Array) -> Array:
        groups = done.size, -1
        chosen = jnp.where(done[:, None], old.reshape(groups), new.reshape(groups))
        return chosen.reshape(new.shape)

    return map_arrays(of_elements, partial(jnp.where, done), old, new)


def _cases(
    leaves: tuple[Groups, ...], plan: Plan
) -> tuple[list[_Case], Int32[np.ndarray, "turns 3"]]:
    """The cases, and of each turn the number of its case, and if it is of a window,
    where that begins, and how many groups are done."""
    cases: list[_Case] = []
    turns: list[tuple[int, int, int]] = []
    for window in plan.windows:
        leaf = window.leaf
        if not cases or cases[-1].leaves != (leaf,):
            load = partial(load_window, plan.size, leaves[leaf].size, leaf)
            cases.append(_Case((leaf,), load, partial(store_window, leaf)))
        turns.append((len(cases) - 1, window.start, window.done))
    for pieces in plan.shared:
        load = partial(load_pieces, leaves, pieces)
        store = partial(store_pieces, leaves, pieces)
        turns.append((len(cases), 0, 0))
        cases.append(_Case(tuple([piece.leaf for piece in pieces]), load, store))
    return cases, np.asarray(turns, np.int32)


def _call_load(case: _Case, *operands: Any) -> Chunk:
    return case.load(*operands)


def _call_store(case: _Case, starts: Starts, new: TileState, state: Leaves) -> Leaves:
    return state | case.store(starts, new, state)


def _update_chunk(
    structure: StepStructure,
    size: int,
    scalars: StepScalars,
    of_leaves: tuple[LeafScalars, ...],
    chunk: Chunk,
) -> TileState:
    # Each group is a tile, with the scalars of its own leaf.
    leaf, axis = of_leaves[0], None
    if len(of_leaves) > 1 and jtu.tree_leaves(leaf):
        axis = 0
        leaf = jtu.tree_map(
            lambda *x: jnp.stack(x).at[chunk.leaf].get(mode="promise_in_bounds"),
            *of_leaves,
        )
    tile = lambda x: x.reshape(-1, size)
    update = jax.vmap(partial(_update_group, structure), (None, axis, 0, 0))
    new = update(scalars, leaf, tile(chunk.grad), chunk.old.map(tile))
    return new.map(jnp.ravel)


# Traced once for all chunks.
@partial(jax.jit, static_argnums=0)
def _update_group(
    structure: StepStructure,
    scalars: StepScalars,
    leaf: LeafScalars,
    grad: Shaped[Array, " size"],
    old: TileState,
) -> TileState:
    scalars = dataclasses.replace(scalars, leaf=leaf)
    return update_tile(structure, scalars, -1, grad, old, boundary=_boundary)


def _boundary(values: Any) -> Any:
    # One by one: together, all would have the axis of groups.
    return jtu.tree_map(_stored, values)


@custom_vmap
def _stored(x: Array) -> Array:
    """The same array, which XLA fuses with nothing: it is stored."""
    return lax.optimization_barrier(x)


@_stored.def_vmap
def _stored_of_groups(
    axis_size: int, is_batched: list[bool], x: Array
) -> tuple[Array, bool]:
    # In arrays of one axis, loops over which are compiled to faster code, and sooner.
    del axis_size
    (batched,) = is_batched
    return lax.optimization_barrier(x.reshape(-1)).reshape(x.shape), batched
