"""The arrays of a chunk: taken from leaves, and put back into them."""

import dataclasses
import itertools
from typing import Any, NamedTuple, TypeAlias

import jax.lax as lax
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Shaped

from .._tile.step import map_arrays, TileState
from .chunk_plan import Piece
from .groups import fill_of, Groups, hidden, joined, part_of, put, words_of


class Chunk(NamedTuple):
    """Groups of whichever leaves, in arrays of one axis."""

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

    def load(self, turn: Turn, grads: Grads, states: States) -> Chunk:
        """The chunk, in words."""
        (grad,), (state,) = grads, states
        length = self.groups * self.size
        elements = lambda x: words_of(part_of(x, turn.element, length))
        groups = lambda x: words_of(part_of(x, turn.group, self.groups))
        return Chunk(elements(grad), map_arrays(elements, groups, state))

    def store(self, turn: Turn, new: TileState, states: States) -> States:
        elements = lambda x, part: put(x, turn.element, part)
        groups = lambda x, part: put(x, turn.group, part)
        return (map_arrays(elements, groups, *states, new),)


@dataclasses.dataclass(frozen=True)
class SharedCase:
    """A chunk of several leaves: so many groups, of pieces of them whose `leaf` is the
    place among `leaves`. There may be room for more."""

    leaves: tuple[Groups, ...]
    pieces: tuple[Piece, ...]
    # The numbers of these leaves among all.
    numbers: tuple[int, ...]
    groups: int
    # Whether there is no other such chunk.
    is_only: bool

    def load(self, turn: Turn, grads: Grads, states: States) -> Chunk:
        """The chunk, in words."""
        del turn
        return jtu.tree_map(words_of, self.load_all(grads, states))

    def load_all(self, grads: Grads, states: States) -> Chunk:
        room = self.groups - sum([piece.number for piece in self.pieces])

        def filled(parts: list[Array], missing: int) -> Array:
            if missing and self.is_only:
                parts.append(fill_of(missing, parts[0].dtype))
            elif missing:
                # Joined by a kernel, which is compiled once for all that are equal.
                parts.append(lax.full((missing,), 0, parts[0].dtype))
            return joined(parts)

        def elements(*arrays: Array) -> Array:
            each = zip(self.pieces, arrays, strict=True)
            parts = [self.leaves[p.leaf].parts(x, p.start, p.number) for p, x in each]
            return filled(
                [x for part in parts for x in part], room * self.leaves[0].size
            )

        def groups(*arrays: Array) -> Array:
            each = zip(self.pieces, arrays, strict=True)
            parts = [lax.slice_in_dim(x, p.start, p.start + p.number) for p, x in each]
            return filled(parts, room)

        return Chunk(
            elements(*[grads[piece.leaf] for piece in self.pieces]),
            map_arrays(elements, groups, *[states[p.leaf] for p in self.pieces]),
        )

    @property
    def leaf_of_groups(self) -> np.ndarray:
        """For each group, the number of its leaf."""
        found = np.zeros(self.groups, np.int32)
        each = [self.numbers[piece.leaf] for piece in self.pieces]
        own = np.repeat(each, [piece.number for piece in self.pieces])
        found[: own.size] = own
        return found

    def store(self, turn: Turn | None, new: TileState, states: States) -> States:
        del turn
        size, stored = self.leaves[0].size, list(states)
        ends = itertools.accumulate([piece.number for piece in self.pieces])
        firsts = [0, *ends][:-1]
        of_elements = of_groups = hidden([size * first for first in firsts])
        if new.is_grouped:
            of_groups = hidden(firsts)
        pieces = zip(self.pieces, of_elements, of_groups, strict=True)
        for (place, start, number), element, group in pieces:
            leaf = self.leaves[place]
            length = leaf.elements(start, number) if leaf.in_order else size * number

            def put_elements(
                x: Array, new: Array, leaf=leaf, start=start, at=element, length=length
            ) -> Array:
                return leaf.put(x, start, part_of(new, at, length))

            def put_groups(
                x: Array, new: Array, start=start, at=group, length=number
            ) -> Array:
                return put(x, start, part_of(new, at, length))

            stored[place] = map_arrays(put_elements, put_groups, stored[place], new)
        return tuple(stored)
