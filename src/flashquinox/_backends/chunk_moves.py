"""The arrays of a chunk: taken from leaves, and put back into them."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, Shaped

from .._tile.step import map_arrays, TileState
from .chunk_plan import Piece
from .groups import Groups, put


class Chunk(NamedTuple):
    """Groups of whichever leaves, in arrays of one axis. `leaf` tells the number of the
    leaf of each group."""

    leaf: Int32[Array, " groups"]
    grad: Shaped[Array, " elements"]
    old: TileState


class Starts(NamedTuple):
    """Where a window begins."""

    element: Int32[Array, ""]
    group: Int32[Array, ""]


Leaves: TypeAlias = dict[int, TileState]


def load_window(
    number: int,
    size: int,
    leaf: int,
    starts: Starts,
    grads: dict[int, Array],
    state: Leaves,
    before: Chunk,
) -> Chunk:
    del before

    def take(start: Array, length: int) -> Callable[[Array], Array]:
        return lambda x: lax.dynamic_slice(
            x, (start,), (length,), allow_negative_indices=False
        )

    elements, groups = take(starts.element, number * size), take(starts.group, number)
    return Chunk(
        jnp.full(number, leaf, jnp.int32),
        elements(grads[leaf]),
        map_arrays(elements, groups, state[leaf]),
    )


def store_window(leaf: int, starts: Starts, new: TileState, state: Leaves) -> Leaves:
    elements = lambda x, part: put(x, starts.element, part)
    groups = lambda x, part: put(x, starts.group, part)
    return {leaf: map_arrays(elements, groups, state[leaf], new)}


def load_pieces(
    leaves: tuple[Groups, ...],
    pieces: tuple[Piece, ...],
    starts: Starts,
    grads: dict[int, Array],
    state: Leaves,
    before: Chunk,
) -> Chunk:
    """The rest of the chunk is as it was before."""
    del starts
    first, chunk = 0, before
    for piece in pieces:
        loaded = joined(leaves, (piece,), grads, state)
        elements = lambda x, part, first=first: put(x, first * leaves[0].size, part)
        groups = lambda x, part, first=first: put(x, first, part)
        chunk = Chunk(
            groups(chunk.leaf, loaded.leaf),
            elements(chunk.grad, loaded.grad),
            map_arrays(elements, groups, chunk.old, loaded.old),
        )
        first += piece.number
    return chunk


def joined(
    leaves: tuple[Groups, ...],
    pieces: tuple[Piece, ...],
    grads: dict[int, Array],
    state: Leaves,
) -> Chunk:
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
    return Chunk(
        jnp.asarray(leaf),
        elements(*[grads[piece.leaf] for piece in pieces]),
        map_arrays(elements, groups, *[state[piece.leaf] for piece in pieces]),
    )


def store_pieces(
    leaves: tuple[Groups, ...],
    pieces: tuple[Piece, ...],
    starts: Starts | None,
    new: TileState,
    state: Leaves,
) -> Leaves:
    del starts
    first, stored = 0, {}
    for leaf, start, number in pieces:
        size, end = leaves[leaf].size, first + number
        own = map_arrays(
            lambda x, first=first * size, end=end * size: x[first:end],
            lambda x, first=first, end=end: x[first:end],
            new,
        )
        stored[leaf] = map_arrays(
            lambda x, part, leaf=leaf, start=start: leaves[leaf].put(x, start, part),
            lambda x, part, start=start: put(x, start, part),
            state[leaf],
            own,
        )
        first = end
    return stored
