"""A step of leaves whose state is in host memory.

The state goes through the device in portions. While one is updated, the next one
arrives and the one before it leaves: both copies run beside the kernels, and beside
each other. Large leaves are several portions, small ones share one.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.core
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._common import memory
from .._tile.step import TileState
from .kernel_copies import KernelCopies
from .part import Advanced, Part
from .slices import Slice


# The elements of a portion on each device. Of AdamW they have 105 MB: enough for copies
# to take no notice of how they begin, and little beside the weights.
PORTION = 2**25
# How many portions are on the device: one arrives, one is updated, and one leaves.
_DEPTH = 3


class Piece(NamedTuple):
    """A leaf, by its number among those of the step, or a slice of it."""

    leaf: int
    slice: Slice | None


Portion: TypeAlias = list[Piece]


def stream(
    of: Sequence[Part],
    portions: Sequence[Portion],
    update: Callable[[list[Part]], list[Advanced]],
    as_update: bool,
) -> dict[int, Advanced]:
    """One step of leaves, portion by portion. `update` takes a step of parts whose
    state is on the device."""
    stream = _Stream(of, portions, as_update)
    done: dict[int, Advanced] = {}
    coming = stream.arrive(0)
    for number, portion in enumerate(portions):
        here, coming = stream.copies.finish_read(coming), []
        if number + 1 < len(portions):
            # From what was there before this portion leaves.
            coming = stream.arrive(number + 1)
        here = stream.copies.beside(here)
        new = update([stream.part(*x) for x in zip(portion, here, strict=True)])
        new = stream.copies.beside(new)
        stream.copies.finish_write()
        coming = stream.before_leaving(number, coming)
        for piece, advanced in zip(portion, new, strict=True):
            stream.leave(piece, advanced.new)
            done[piece.leaf] = advanced
    stream.copies.finish_write()
    return {i: x._replace(new=stream.held[i]) for i, x in done.items()}


class _Stream:
    """Leaves on their way: `held` is what they are now."""

    def __init__(
        self, of: Sequence[Part], portions: Sequence[Portion], as_update: bool
    ):
        self._of, self._portions = of, portions
        pieces = [piece for portion in portions for piece in portion]
        self.held = {piece.leaf: of[piece.leaf].old for piece in pieces}
        # What weights are read from, if not from what is written to.
        self._weights: dict[int, Array] = {}
        for index in {piece.leaf for piece in pieces if piece.slice and as_update}:
            weight = self.held[index].weight
            self._weights[index] = weight
            new = jnp.zeros_like(weight)
            self.held[index] = dataclasses.replace(self.held[index], weight=new)
        rows: dict[int, int] = {}
        for piece in pieces:
            if piece.slice is not None and of[piece.leaf].sharding is None:
                start, end = piece.slice.rows
                rows[piece.leaf] = math.gcd(rows.get(piece.leaf, 0), start, end)
        self.copies = KernelCopies(self.held, rows)

    def arrive(self, number: int) -> list[TileState]:
        """Begins to copy a portion to the device, when there is room for it."""
        portion = self._portions[number]
        if number >= _DEPTH:
            indices = [x.leaf for x in (*portion, *self._portions[number - _DEPTH])]
            states = {i: self.held[i] for i in indices}
            self.held.update(_in_order(states, memory.is_on_host))
        for piece in portion:
            if piece.slice is not None:
                self.copies.start_read(piece.leaf, piece.slice)
        return [memory.to_device(self._read(piece)) for piece in portion]

    def part(self, piece: Piece, state: TileState) -> Part:
        """A piece as a part of the step. Its weight is read now."""
        x, weight = self._of[piece.leaf], self._read(piece).weight
        if memory.is_on_host(weight):
            # Sums of gradients are weights that arrive like the rest.
            weight = state.weight
        grad = x.grad
        if piece.slice is not None:
            grad = piece.slice.rows_of(grad)
            original = self._weights.get(piece.leaf)
            weight = weight if original is None else piece.slice.rows_of(original)
        return x._replace(old=dataclasses.replace(state, weight=weight), grad=grad)

    def before_leaving(self, number: int, coming: list[TileState]) -> list[TileState]:
        """The next portion, which has arrived before this one is written: of a leaf
        that is in both, XLA would otherwise keep a second copy."""
        if number + 1 == len(self._portions):
            return coming
        nows = {x.leaf for x in self._portions[number]}
        nexts = [x.leaf for x in self._portions[number + 1]]
        both = {i: self.held[i] for i in nexts if i in nows}
        if not both:
            return coming
        # Weights are read when they are needed.
        is_copied = lambda x: memory.is_on_host(x) or any(x is y for y in copied)
        copied = [
            x
            for piece, state in zip(self._portions[number + 1], coming, strict=True)
            for x in _beside_weight(state, self.held[piece.leaf])
        ]
        both, coming = _in_order((both, coming), is_copied)
        self.held.update(both)
        return coming

    def leave(self, piece: Piece, new: TileState) -> None:
        """Begins to copy a new state back."""
        old = self.held[piece.leaf]
        if piece.slice is None:
            self.held[piece.leaf] = memory.where(new, old)
            return
        written = piece.slice.write(old, memory.where(new, old))
        self.copies.start_write(piece.leaf, piece.slice, new)
        others = self.copies.others(piece.leaf, written)
        self.held[piece.leaf] = eqx.combine(others, self.held[piece.leaf])

    def _read(self, piece: Piece) -> TileState:
        """What XLA copies."""
        state = self.held[piece.leaf]
        if piece.slice is None:
            return state
        return self.copies.others(piece.leaf, piece.slice.read(state))


def _beside_weight(state: TileState, old: TileState) -> list[Array]:
    """What has arrived of a leaf: all but a weight that is on the device."""
    weight = state.weight if memory.is_on_host(old.weight) else None
    return jtu.tree_leaves((weight, state.correction, state.codes, state.scales))


def _in_order(tree: PyTree, is_chosen: Callable[[Array], bool]) -> PyTree:
    """The same tree. What uses one of the chosen arrays of it waits for all of them."""
    leaves, structure = jtu.tree_flatten(tree)
    chosen = [i for i, x in enumerate(leaves) if is_chosen(x)]
    # Without `jit`, everything is in order.
    if any([isinstance(leaves[i], jax.core.Tracer) for i in chosen]):
        tied = lax.optimization_barrier([leaves[i] for i in chosen])
        for i, x in zip(chosen, tied, strict=True):
            leaves[i] = x
    return structure.unflatten(leaves)
