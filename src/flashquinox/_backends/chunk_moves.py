"""The arrays of a chunk: taken from leaves, and put back into them."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

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


class Turn(NamedTuple):
    """A turn of the loop: the number of its case, and of a window, that of its leaf and
    where it begins. Integers, or an array of all turns for each."""

    case: Any
    leaf: Any
    element: Any
    group: Any


# What a case has of each of its leaves.
Grads: TypeAlias = tuple[Array, ...]
States: TypeAlias = tuple[TileState, ...]


@dataclasses.dataclass(frozen=True)
class WindowCase:
    """A chunk of so many groups of one leaf."""

    groups: int
    size: int

    def load(self, turn: Turn, grads: Grads, states: States, before: Chunk) -> Chunk:
        del before
        (grad,), (state,) = grads, states

        def take(start: Array, length: int) -> Callable[[Array], Array]:
            return lambda x: lax.dynamic_slice(
                x, (start,), (length,), allow_negative_indices=False
            )

        elements = take(turn.element, self.groups * self.size)
        groups = take(turn.group, self.groups)
        return Chunk(
            jnp.broadcast_to(turn.leaf, (self.groups,)),
            elements(grad),
            map_arrays(elements, groups, state),
        )

    def store(self, turn: Turn, new: TileState, states: States) -> States:
        elements = lambda x, part: put(x, turn.element, part)
        groups = lambda x, part: put(x, turn.group, part)
        return (map_arrays(elements, groups, *states, new),)


@dataclasses.dataclass(frozen=True)
class SharedCase:
    """A chunk of several leaves: pieces of them, whose `leaf` is the place among
    `leaves`. The rest of the chunk is as it was before."""

    leaves: tuple[Groups, ...]
    pieces: tuple[Piece, ...]
    # The numbers of these leaves among all.
    numbers: tuple[int, ...]

    def load(self, turn: Turn, grads: Grads, states: States, before: Chunk) -> Chunk:
        del turn
        first, chunk, size = 0, before, self.leaves[0].size
        for piece in self.pieces:
            loaded = self._joined((piece,), grads, states)
            elements = lambda x, part, first=first: put(x, first * size, part)
            groups = lambda x, part, first=first: put(x, first, part)
            chunk = Chunk(
                groups(chunk.leaf, loaded.leaf),
                elements(chunk.grad, loaded.grad),
                map_arrays(elements, groups, chunk.old, loaded.old),
            )
            first += piece.number
        return chunk

    def load_all(self, grads: Grads, states: States) -> Chunk:
        """The chunk, if there is nothing else in it."""
        return self._joined(self.pieces, grads, states)

    def _joined(self, pieces: tuple[Piece, ...], grads: Grads, states: States) -> Chunk:
        """These groups, one after another."""

        def join(parts: list[Array]) -> Array:
            return parts[0] if len(parts) == 1 else jnp.concatenate(parts)

        def elements(*arrays: Array) -> Array:
            each = zip(pieces, arrays, strict=True)
            return join(
                [self.leaves[p.leaf].take(x, p.start, p.number) for p, x in each]
            )

        def groups(*arrays: Array) -> Array:
            each = zip(pieces, arrays, strict=True)
            return join(
                [lax.slice_in_dim(x, p.start, p.start + p.number) for p, x in each]
            )

        leaf = np.repeat(
            np.asarray([self.numbers[piece.leaf] for piece in pieces], np.int32),
            [piece.number for piece in pieces],
        )
        return Chunk(
            jnp.asarray(leaf),
            elements(*[grads[piece.leaf] for piece in pieces]),
            map_arrays(elements, groups, *[states[piece.leaf] for piece in pieces]),
        )

    def store(self, turn: Turn | None, new: TileState, states: States) -> States:
        del turn
        first, stored = 0, list(states)
        for place, start, number in self.pieces:
            leaf, end = self.leaves[place], first + number
            own = map_arrays(
                lambda x, first=first * leaf.size, end=end * leaf.size: x[first:end],
                lambda x, first=first, end=end: x[first:end],
                new,
            )
            stored[place] = map_arrays(
                lambda x, part, leaf=leaf, start=start: leaf.put(x, start, part),
                lambda x, part, start=start: put(x, start, part),
                stored[place],
                own,
            )
            first = end
        return tuple(stored)
