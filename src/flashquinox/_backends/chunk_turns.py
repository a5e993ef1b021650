"""What the turns of the loop over chunks do."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Int32

from .._tile.step import TileState
from .chunk_moves import Chunk, SharedCase, Turn, WindowCase
from .chunk_plan import Plan
from .groups import Groups, hidden


class Case(NamedTuple):
    """What a turn of the loop does if its chunk is one of these leaves."""

    leaves: tuple[int, ...]
    moves: WindowCase | SharedCase


# Cases of one choice, all of whose leaves are operands of each of them.
_CASES = 8


def cases_of(leaves: tuple[Groups, ...], plan: Plan) -> tuple[list[Case], Turn]:
    """The cases, and all turns. Leaves of one length follow one another, so that more
    batches are equal."""
    size = leaves[0].size
    cases: list[Case] = []
    turns: list[Turn] = []
    for leaf, start in sorted(plan.windows, key=lambda x: leaves[x.leaf].number):
        if not cases or cases[-1].leaves != (leaf,):
            cases.append(Case((leaf,), WindowCase(plan.size, size)))
        turns.append(Turn(len(cases) - 1, leaf, start * size, start))
    for pieces in plan.shared:
        turns.append(Turn(len(cases), 0, 0, 0))
        these = tuple(dict.fromkeys([piece.leaf for piece in pieces]))
        own = tuple([piece._replace(leaf=these.index(piece.leaf)) for piece in pieces])
        own_leaves = tuple([leaves[leaf] for leaf in these])
        is_only = len(plan.shared) == 1
        moves = SharedCase(own_leaves, own, these, plan.size, is_only)
        cases.append(Case(these, moves))
    columns = np.asarray(turns, np.int32).T
    return cases, Turn(*[np.ascontiguousarray(column) for column in columns])


def look_up(table: Turn, i: Int32[Array, ""]) -> Turn:
    """The turn of this number."""
    columns = jnp.asarray(np.stack(table, axis=1))
    row = lax.dynamic_slice_in_dim(
        columns, _unknown(i), 1, allow_negative_indices=False
    )
    return Turn(*[row[0, k] for k in range(len(table))])


def leaf_of_groups(cases: list[Case], turn: Turn) -> Int32[Array, "..."]:
    """The number of the leaf of each group of a chunk; of a window, one for all."""
    rows = [x.moves.leaf_of_groups for x in cases if isinstance(x.moves, SharedCase)]
    if not rows:
        return turn.leaf
    windows = len(cases) - len(rows)
    row = jnp.maximum(turn.case - windows, 0)
    (shared,) = lax.dynamic_slice_in_dim(jnp.asarray(np.stack(rows)), row, 1)
    return jnp.where(turn.case < windows, turn.leaf, shared)


def first_turn(table: Turn) -> Turn:
    # Hidden, so that what is compiled for the other turns loads its window too.
    return Turn(*hidden([int(column[0]) for column in table]))


def first_chunk(
    cases: list[Case],
    turn: Turn,
    grads: dict[int, Array],
    state: dict[int, TileState],
) -> Chunk:
    """The chunk of the first turn, for whose case it needs no choice."""
    leaves, moves = cases[0]
    own = lambda every: tuple([every[leaf] for leaf in leaves])
    return moves.load(turn, own(grads), own(state))


def load(
    cases: list[Case],
    turn: Turn,
    grads: dict[int, Array],
    state: dict[int, TileState],
    chunk: Chunk,
) -> Chunk:
    """The chunk of a turn, in place of the one before."""
    firsts = range(0, len(cases), _CASES)
    for first, hidden_first in zip(firsts, hidden(firsts), strict=True):
        some = cases[first : first + _CASES]
        these = list(dict.fromkeys([leaf for case in some for leaf in case.leaves]))
        places = tuple([tuple(map(these.index, case.leaves)) for case in some])
        chunk = _load(
            tuple(zip(places, [case.moves for case in some], strict=True)),
            len(some) == len(cases),
            turn._replace(case=turn.case - hidden_first),
            tuple([grads[leaf] for leaf in these]),
            tuple([state[leaf] for leaf in these]),
            chunk,
        )
    return chunk


def store(
    cases: list[Case], turn: Turn, new: TileState, state: dict[int, TileState]
) -> dict[int, TileState]:
    """The state with what a turn has computed."""
    numbers = hidden(range(len(cases)))
    if len(cases) <= _CASES:
        return _store_one_of(cases, turn, new, numbers, state)
    # Each choice takes a microsecond of each turn, so those that are not the turn's are
    # passed over a few at a time.
    for first in range(0, len(cases), _CASES):
        some = slice(first, first + _CASES)
        own = {leaf: state[leaf] for case in cases[some] for leaf in case.leaves}
        own_numbers = numbers[some]
        stored = lax.cond(
            (turn.case >= own_numbers[0]) & (turn.case <= own_numbers[-1]),
            partial(_store_one_of, cases[some]),
            lambda *x: x[-1],
            *(turn, new, own_numbers, own),
        )
        state = state | stored
    return state


def _store_one_of(
    cases: list[Case],
    turn: Turn,
    new: TileState,
    numbers: list[Int32[Array, ""]],
    state: dict[int, TileState],
) -> dict[int, TileState]:
    """The state of the leaves of these cases, if the turn's is one of them."""
    for case, number in zip(cases, numbers, strict=True):
        taken = None if len(cases) == 1 else turn.case == number
        own = tuple([state[leaf] for leaf in case.leaves])
        stored = _store(case.moves, taken, turn, new, own)
        state = state | dict(zip(case.leaves, stored, strict=True))
    return state


# What is alike for other leaves is traced once.
@partial(jax.jit, static_argnums=(0, 1))
def _load(
    cases: tuple[tuple[tuple[int, ...], WindowCase | SharedCase], ...],
    all_cases: bool,
    turn: Turn,
    grads: tuple[Array, ...],
    states: tuple[TileState, ...],
    chunk: Chunk,
) -> Chunk:
    """By one of these cases, each with the places of its leaves among these; the chunk
    that came, if it is none of them."""

    def load(
        places: tuple[int, ...], moves: WindowCase | SharedCase, *operands: Any
    ) -> Chunk:
        turn, grads, states, _ = operands
        own = lambda every: tuple([every[place] for place in places])
        return moves.load(turn, own(grads), own(states))

    loads = [partial(load, *case) for case in cases]
    operands = turn, grads, states, chunk
    if all_cases and len(cases) == 1:
        return loads[0](*operands)
    if all_cases:
        return lax.switch(turn.case, loads, *operands)
    nothing = lambda *x: x[-1]
    return lax.switch(turn.case + 1, [nothing, *loads, nothing], *operands)


@partial(jax.jit, static_argnums=0)
def _store(
    moves: WindowCase | SharedCase,
    taken: Bool[Array, ""] | None,
    turn: Turn,
    new: TileState,
    states: tuple[TileState, ...],
) -> tuple[TileState, ...]:
    if taken is None:
        return moves.store(turn, new, states)
    # Without a case, the last operand: XLA does not copy it.
    return lax.cond(taken, moves.store, lambda *x: x[-1], turn, new, states)


@custom_vmap
def _unknown(i: Int32[Array, ""]) -> Int32[Array, ""]:
    """`i`, by a sort: that keeps a loop from being compiled into one function for one
    thread, which would take minutes."""
    return lax.sort(jnp.stack([i, np.int32(2**31 - 1)]))[0]


@_unknown.def_vmap
def _unknown_of_all(axis_size: int, is_batched: Any, i: Array) -> tuple[Array, bool]:
    # The same for all, or a choice between cases would take all of them.
    del axis_size, is_batched
    return _unknown(i), False
