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
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Int32, Shaped

from .._tile.tile import (
    LeafScalars,
    StepScalars,
    StepStructure,
    TileState,
    update_tile,
)
from .chunk_plan import Piece, Plan, plan_chunks
from .groups import Groups, put


# Elements of a chunk; its arrays fill 5 MB. The fastest on two cores of an EPYC 7763
# among 2^13 to 2^19: XLA divides a pass among threads from 2^16 elements on, and each
# pass begins when all threads have done the one before.
_ELEMENTS = 1 << 18
# XLA's indices are of 32 bits.
_MOST_ELEMENTS = 1 << 31
# Cases of one `switch`, all of whose leaves go through each of them.
_CASES = 4


class _Chunk(NamedTuple):
    """Groups of whichever leaves, in arrays of one axis. `leaf` tells the number of the
    leaf of each group."""

    leaf: Int32[Array, " groups"]
    grad: Shaped[Array, " elements"]
    old: TileState


class _Starts(NamedTuple):
    """Where a window begins."""

    element: Int32[Array, ""]
    group: Int32[Array, ""]


_Leaves: TypeAlias = dict[int, TileState]


class _Case(NamedTuple):
    """What a turn of the loop does if its chunk is one of these leaves."""

    leaves: tuple[int, ...]
    load: Callable[[_Starts, dict[int, Array], _Leaves, _Chunk], _Chunk]
    store: Callable[[_Starts, TileState, _Leaves], _Leaves]


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
        i: _map(partial(flat, leaf), jnp.ravel, own)
        for i, (leaf, own) in enumerate(zip(leaves, old, strict=True))
    }
    if not plan.windows and len(plan.shared) == 1:
        (pieces,) = plan.shared
        chunk = _boundary(_joined(leaves, pieces, flat_grads, state))
        new = _store_pieces(leaves, pieces, None, _boundary(update(chunk)), state)
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
    update: Callable[[_Chunk], TileState],
    grads: dict[int, Array],
    old: _Leaves,
) -> _Leaves:
    cases, turns = _cases(leaves, plan)
    batches = [cases[i : i + _CASES] for i in range(0, len(cases), _CASES)]
    size = leaves[0].size
    moved = any([window.done > 0 for window in plan.windows])

    def turn(i: Int32[Array, ""], carry: tuple[_Leaves, _Chunk]) -> Any:
        state, chunk = carry
        # XLA may compile a loop into one function for one thread, and takes minutes to
        # compile this one so: but no loop with a sort in it.
        i = lax.sort(jnp.stack([i, np.int32(len(turns))]))[0]
        number, group, done = jnp.asarray(turns).at[i].get(mode="promise_in_bounds")
        starts = _Starts(group * size, group)
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
    nothing = _Chunk(
        jnp.zeros(plan.size, jnp.int32),
        jnp.zeros(plan.size * size, grads[0].dtype),
        _map(
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

    return _map(of_elements, partial(jnp.where, done), old, new)


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
            load = partial(_load_window, plan.size, leaves[leaf].size, leaf)
            cases.append(_Case((leaf,), load, partial(_store_window, leaf)))
        turns.append((len(cases) - 1, window.start, window.done))
    for pieces in plan.shared:
        load = partial(_load_pieces, leaves, pieces)
        store = partial(_store_pieces, leaves, pieces)
        turns.append((len(cases), 0, 0))
        cases.append(_Case(tuple([piece.leaf for piece in pieces]), load, store))
    return cases, np.asarray(turns, np.int32)


def _load_window(
    number: int,
    size: int,
    leaf: int,
    starts: _Starts,
    grads: dict[int, Array],
    state: _Leaves,
    before: _Chunk,
) -> _Chunk:
    del before

    def take(start: Array, length: int) -> Callable[[Array], Array]:
        return lambda x: lax.dynamic_slice(
            x, (start,), (length,), allow_negative_indices=False
        )

    elements, groups = take(starts.element, number * size), take(starts.group, number)
    return _Chunk(
        jnp.full(number, leaf, jnp.int32),
        elements(grads[leaf]),
        _map(elements, groups, state[leaf]),
    )


def _store_window(
    leaf: int, starts: _Starts, new: TileState, state: _Leaves
) -> _Leaves:
    elements = lambda x, part: put(x, starts.element, part)
    groups = lambda x, part: put(x, starts.group, part)
    return {leaf: _map(elements, groups, state[leaf], new)}


def _load_pieces(
    leaves: tuple[Groups, ...],
    pieces: tuple[Piece, ...],
    starts: _Starts,
    grads: dict[int, Array],
    state: _Leaves,
    before: _Chunk,
) -> _Chunk:
    """The rest of the chunk is as it was before."""
    del starts
    first, chunk = 0, before
    for piece in pieces:
        loaded = _joined(leaves, (piece,), grads, state)
        elements = lambda x, part, first=first: put(x, first * leaves[0].size, part)
        groups = lambda x, part, first=first: put(x, first, part)
        chunk = _Chunk(
            groups(chunk.leaf, loaded.leaf),
            elements(chunk.grad, loaded.grad),
            _map(elements, groups, chunk.old, loaded.old),
        )
        first += piece.number
    return chunk


def _joined(
    leaves: tuple[Groups, ...],
    pieces: tuple[Piece, ...],
    grads: dict[int, Array],
    state: _Leaves,
) -> _Chunk:
    """These groups, one after another."""

    def join(parts: list[Array]) -> Array:
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts)

    def elements(*arrays: Array) -> Array:
        each = zip(pieces, arrays, strict=True)
        return join([leaves[p.leaf].take(x, p.start, p.number) for p, x in each])

    def groups(*arrays: Array) -> Array:
        each = zip(pieces, arrays, strict=True)
        return join([lax.slice_in_dim(x, p.start, p.start + p.number) for p, x in each])

    leaf = np.repeat(
        np.asarray([piece.leaf for piece in pieces], np.int32),
        [piece.number for piece in pieces],
    )
    return _Chunk(
        jnp.asarray(leaf),
        elements(*[grads[piece.leaf] for piece in pieces]),
        _map(elements, groups, *[state[piece.leaf] for piece in pieces]),
    )


def _store_pieces(
    leaves: tuple[Groups, ...],
    pieces: tuple[Piece, ...],
    starts: _Starts | None,
    new: TileState,
    state: _Leaves,
) -> _Leaves:
    del starts
    first, stored = 0, {}
    for leaf, start, number in pieces:
        size, end = leaves[leaf].size, first + number
        own = _map(
            lambda x, first=first * size, end=end * size: x[first:end],
            lambda x, first=first, end=end: x[first:end],
            new,
        )
        stored[leaf] = _map(
            lambda x, part, leaf=leaf, start=start: leaves[leaf].put(x, start, part),
            lambda x, part, start=start: put(x, start, part),
            state[leaf],
            own,
        )
        first = end
    return stored


def _call_load(case: _Case, *operands: Any) -> _Chunk:
    return case.load(*operands)


def _call_store(
    case: _Case, starts: _Starts, new: TileState, state: _Leaves
) -> _Leaves:
    return state | case.store(starts, new, state)


def _map(
    of_elements: Callable[..., Array], of_groups: Callable[..., Array], *each: TileState
) -> TileState:
    """Applies functions to the arrays of several states that correspond: to those with
    an entry for each element, and to those with one for each group."""
    of = lambda state: (state.weight, state.correction, state.codes)
    weight, correction, codes = jtu.tree_map(of_elements, *map(of, each))
    scales = jtu.tree_map(of_groups, *[state.scales for state in each])
    return TileState(weight, correction, codes, scales)


def _update_chunk(
    structure: StepStructure,
    size: int,
    scalars: StepScalars,
    of_leaves: tuple[LeafScalars, ...],
    chunk: _Chunk,
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
