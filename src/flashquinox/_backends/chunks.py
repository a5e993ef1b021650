"""Plain XLA for CPUs: leaves in chunks of a fixed number of groups, in place.

XLA makes a pass over memory of whatever it does not fuse, and compiles the passes of
each leaf anew. So a loop brings one chunk of some leaf after another into the same
arrays, which stay in the caches, and a program has one step: that of a chunk.

A window of a long leaf is a chunk; the last one is moved back to be as long as the
others. What it shares with the window before is updated twice, from the same old state:
a chunk is loaded before the one in front of it is stored. Shorter leaves share chunks.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Int32, Shaped

from .._tile.step import LeafScalars, map_arrays, StepScalars, StepStructure, TileState
from .._tile.tile import update_tile
from .chunk_moves import Chunk, SharedCase
from .chunk_plan import Plan, plan_chunks
from .chunk_turns import (
    after,
    cases_of,
    from_case,
    load_batch,
    look_up,
    store_batch,
    together,
)
from .groups import flat, Groups, joined


# Elements of a chunk; its arrays fill 5 MB. The fastest on two cores of an EPYC 7763
# among 2^13 to 2^19: XLA divides a pass among threads from 2^16 elements on, and each
# pass begins when all threads have done the one before.
_ELEMENTS = 1 << 18
# XLA's indices are of 32 bits.
_MOST_ELEMENTS = 1 << 31
_Leaves: TypeAlias = dict[int, TileState]
# XLA of JAX 0.10 copies the state in each turn of a loop: a step of 14 million
# parameters took 6 times as long as with whole leaves (`benchmarks/cpu.py`).
_LOOPS_COPY = jax.__version_info__ < (0, 11)

# Cases of one `switch`, all of whose leaves go through each of them.
_CASES = 4


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
    """How many groups of these leaves a chunk has. It has temporaries of up to 32 bytes
    for each element: if there were fewer than 32 chunks, these would be more than a
    byte for each parameter."""
    most = _most_groups(leaves[0].size)
    number = sum([leaf.number for leaf in leaves])
    if number <= most or number >= 32 * most:
        return most
    # Groups that do not lie in order are those of one chunk.
    return max([most // 2, 1, *[x.number for x in leaves if not x.in_order]])


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
    plan = plan_chunks(numbers, _chunk_groups(leaves))
    update = partial(_update_chunk, structure, size, scalars, of_leaves)
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
        updated = _boundary(update(_boundary(chunk)))
        new = dict(zip(case.leaves, case.moves.store(None, updated, own), strict=True))
    else:
        new = _loop(leaves, plan, update, flat_grads, state)
    return jtu.tree_map(
        lambda x, like: x if x.shape == like.shape else lax.reshape(x, like.shape),
        tuple(new[i] for i in range(len(old))),
        old,
    )


def _loop(
    leaves: tuple[Groups, ...],
    plan: Plan,
    update: Callable[[Chunk], TileState],
    grads: dict[int, Array],
    old: _Leaves,
) -> _Leaves:
    cases, table = cases_of(leaves, plan)
    batches = [cases[i : i + _CASES] for i in range(0, len(cases), _CASES)]
    end = len(table.case) - 1

    def load(i: Int32[Array, ""], state: _Leaves, chunk: Chunk) -> Chunk:
        turn = look_up(table, i)
        for k, batch in enumerate(batches):
            these, same = together(batch)
            own = from_case(turn, k * _CASES)
            of_grads, of_state = ([every[j] for j in these] for every in (grads, state))
            chunk = load_batch(same, own, tuple(of_grads), tuple(of_state), chunk)
        return chunk

    def store(i: Int32[Array, ""], new: TileState, state: _Leaves) -> _Leaves:
        turn = look_up(table, i)
        for k, batch in enumerate(batches):
            these, same = together(batch)
            own = from_case(turn, k * _CASES)
            stored = store_batch(same, own, new, tuple([state[j] for j in these]))
            state = state | dict(zip(these, stored, strict=True))
        return state

    def turn(i: Int32[Array, ""], carry: tuple[_Leaves, Chunk]) -> Any:
        state, chunk = carry
        new = _boundary(update(chunk))
        # In this order, in which XLA copies neither the chunk nor the state.
        chunk = load(after(i + 1, end, new), state, chunk)
        return store(after(i, end, chunk), new, state), chunk

    size = leaves[0].size
    # Loaded in the first turn, or left as it is and not used.
    nothing = Chunk(
        jnp.zeros(plan.size, jnp.int32),
        jnp.zeros(plan.size * size, grads[0].dtype),
        map_arrays(
            lambda x: jnp.zeros(plan.size * size, x.dtype),
            lambda x: jnp.zeros(plan.size, x.dtype),
            old[0],
        ),
    )
    first = cases[0]
    turn_0 = look_up(table, after(jnp.int32(0), end, old[0]))
    chunk = first.moves.load(
        turn_0,
        tuple([grads[j] for j in first.leaves]),
        tuple([old[j] for j in first.leaves]),
        nothing,
    )
    state, _ = lax.fori_loop(0, end, turn, (old, _boundary(chunk)))
    return state


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
            lambda *x: _stacked(x).at[chunk.leaf].get(mode="promise_in_bounds"),
            *of_leaves,
        )
    tile = lambda x: x.reshape(-1, size)
    update = jax.vmap(partial(_update_group, structure), (None, axis, 0, 0))
    new = update(scalars, leaf, tile(chunk.grad), chunk.old.map(tile))
    return new.map(jnp.ravel)


def _stacked(numbers: Sequence[Array]) -> Shaped[Array, " n"]:
    return joined([lax.reshape(jnp.asarray(x), (1,)) for x in numbers])


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
