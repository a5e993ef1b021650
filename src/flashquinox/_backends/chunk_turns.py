"""What the turns of the loop over chunks do."""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Int32

from .._tile.step import TileState
from .chunk_moves import Chunk, SharedCase, Turn, WindowCase
from .chunk_plan import Plan
from .groups import Groups


class Case(NamedTuple):
    """What a turn of the loop does if its chunk is one of these leaves."""

    leaves: tuple[int, ...]
    moves: WindowCase | SharedCase


class Batch(NamedTuple):
    """The cases of one `switch`, each with the places of its leaves among those of the
    batch. Equal batches are traced once."""

    places: tuple[tuple[int, ...], ...]
    moves: tuple[WindowCase | SharedCase, ...]


def cases_of(leaves: tuple[Groups, ...], plan: Plan) -> tuple[list[Case], Turn]:
    """The cases, and all turns, with one more at the end that has no case. Leaves of
    one length follow one another, so that more batches are equal."""
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
        moves = SharedCase(tuple([leaves[leaf] for leaf in these]), own, these)
        cases.append(Case(these, moves))
    turns.append(Turn(len(cases), 0, 0, 0))
    columns = np.asarray(turns, np.int32).T
    return cases, Turn(*[np.ascontiguousarray(column) for column in columns])


def together(batch: list[Case]) -> tuple[list[int], Batch]:
    """The leaves of a batch, and what it is whichever leaves these are."""
    these = list(dict.fromkeys([leaf for case in batch for leaf in case.leaves]))
    places = tuple([tuple(map(these.index, case.leaves)) for case in batch])
    return these, Batch(places, tuple([case.moves for case in batch]))


def look_up(table: Turn, i: Int32[Array, ""]) -> Turn:
    look = lambda x: lax.dynamic_slice(x, (i,), (1,), allow_negative_indices=False)
    return jtu.tree_map(lambda x: look(jnp.asarray(x)).reshape(()), table)


def from_case(turn: Turn, first: int) -> Turn:
    """The turn, whose case is counted from this one on."""
    return turn._replace(case=turn.case - first)


# Of equal batches, these are traced once.
@partial(jax.jit, static_argnums=0)
def load_batch(
    batch: Batch,
    turn: Turn,
    grads: tuple[Array, ...],
    states: tuple[TileState, ...],
    chunk: Chunk,
) -> Chunk:
    def load(
        places: tuple[int, ...], moves: WindowCase | SharedCase, *operands: Any
    ) -> Chunk:
        turn, grads, states, chunk = operands
        own = lambda every: tuple([every[place] for place in places])
        return moves.load(turn, own(grads), own(states), chunk)

    loads = [partial(load, *x) for x in zip(*batch, strict=True)]
    return _choose(turn.case, loads, turn, grads, states, chunk)


@partial(jax.jit, static_argnums=0)
def store_batch(
    batch: Batch, turn: Turn, new: TileState, states: tuple[TileState, ...]
) -> tuple[TileState, ...]:
    def store(
        places: tuple[int, ...], moves: WindowCase | SharedCase, *operands: Any
    ) -> tuple[TileState, ...]:
        turn, new, states = operands
        stored = moves.store(turn, new, tuple([states[place] for place in places]))
        every = dict(enumerate(states)) | dict(zip(places, stored, strict=True))
        return tuple(every.values())

    stores = [partial(store, *x) for x in zip(*batch, strict=True)]
    return _choose(turn.case, stores, turn, new, states)


def _choose(number: Int32[Array, ""], cases: list[Callable], *operands: Any) -> Any:
    """What the case of this number returns; without one, the last operand, which XLA
    does not copy."""
    nothing = lambda *x: x[-1]
    return lax.switch(number + 1, [nothing, *cases, nothing], *operands)


def after(i: Int32[Array, ""], end: int, arrays: Any) -> Int32[Array, ""]:
    """`i`, at most `end`, of which XLA cannot tell that it does not depend on these
    arrays: what depends on it is done after all that makes them.

    A sort also keeps a loop from being compiled into one function for one thread, which
    would take minutes.
    """
    return _smallest(i, np.int32(end), tuple(jtu.tree_leaves(arrays)))


@custom_vmap
def _smallest(
    i: Int32[Array, ""], end: Int32[Array, ""], arrays: tuple[Array, ...]
) -> Int32[Array, ""]:
    first = [x.reshape(-1)[0] == 0 for x in arrays]
    above = end + functools.reduce(jnp.logical_or, first).astype(jnp.int32)
    return lax.sort(jnp.stack([i, above]))[0]


@_smallest.def_vmap
def _smallest_of_all(axis_size: int, is_batched: Any, *args: Any) -> tuple[Array, bool]:
    # The same for all, or a choice between cases would take all of them.
    del axis_size, is_batched
    return _smallest(*args), False
