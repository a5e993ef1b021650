"""A step of leaves whose state is in host memory, or their gradient.

They go through the device in portions. While one is updated, the next one arrives and
the one before it leaves: both copies run beside the kernels, and beside each other.
Large leaves are several portions, small ones share one.

A gradient in host memory is a sum of gradients: zeros leave in its place.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

import equinox as eqx
import jax
import jax.core
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array

from .._backends import host_copies
from .._common import memory, meshes
from .._tile.step import TileState
from .._tile.stored_gradient import StoredGradient
from .kernel_copies import KernelCopies
from .part import Advanced, Part
from .slices import Slice


# The elements of a portion on each device. Of AdamW they have 105 MB: enough for copies
# to take no notice of how they begin, and little beside the weights.
PORTION = 2**25
# How many portions are on the device: one arrives, one is updated, and one leaves.
_DEPTH = 3


class Piece(NamedTuple):
    """A leaf, by its number among those of the step, or a slice of it: that of its
    state, and that of the sum that its gradient is stored in, if it is."""

    leaf: int
    slices: tuple[Slice, ...] | None


Portion: TypeAlias = list[Piece]
# The state of a leaf, and the arrays of the sum.
Held: TypeAlias = tuple[TileState, ...]
Tree = TypeVar("Tree")


class Stream:
    """One step of leaves, portion by portion. Of leaves that are not `streamed`, the
    state stays where it is, and only the gradient arrives.

    `_held` is what the others are now. Of a leaf whose state stays, it is the new
    weight alone, once that is known.
    """

    def __init__(
        self,
        of: Sequence[Part],
        portions: Sequence[Portion],
        streamed: Sequence[bool],
        as_update: bool,
    ):
        self._of, self._portions, self._streamed = of, portions, streamed
        pieces = [piece for portion in portions for piece in portion]
        self._held = {piece.leaf: self._before(piece.leaf) for piece in pieces}
        # What weights are read from, if not from what is written to.
        self._weights: dict[int, Array] = {}
        for index in {piece.leaf for piece in pieces if piece.slices and as_update}:
            state, *total = self._held[index]
            self._weights[index] = state.weight
            new = dataclasses.replace(state, weight=jnp.zeros_like(state.weight))
            self._held[index] = new, *total
        rows: dict[int, int] = {}
        for piece in pieces:
            if piece.slices is not None and of[piece.leaf].sharding is None:
                start, end = piece.slices[0].rows
                rows[piece.leaf] = math.gcd(rows.get(piece.leaf, 0), start, end)
        self._copies = KernelCopies(self._held, rows)
        # For each portion, an array of each piece that its step has computed.
        self._updated: list[list[Array]] = []

    def update(
        self, take: Callable[[list[Part]], list[Advanced]]
    ) -> dict[int, Advanced]:
        """The leaves after the step. `take` takes a step of parts on the device."""
        done: dict[int, Advanced] = {}
        coming = self._arrive(0)
        for number, portion in enumerate(self._portions):
            here, coming = self._copies.finish_read(coming), []
            if number + 1 < len(self._portions):
                # From what was there before this portion leaves.
                coming = self._arrive(number + 1)
            here = self._copies.beside(here)
            new = take([self._part(*x) for x in zip(portion, here, strict=True)])
            new = self._copies.beside(new)
            self._copies.finish_write()
            coming = self._before_leaving(number, coming)
            self._updated.append([jtu.tree_leaves(x.new)[0] for x in new])
            for piece, advanced, old in zip(portion, new, here, strict=True):
                self._leave(piece, advanced.new, old)
                done[piece.leaf] = advanced
        self._copies.finish_write()
        return {i: self._after(i, x) for i, x in done.items()}

    def _before(self, leaf: int) -> Held:
        state, grad = self._of[leaf].old, self._of[leaf].grad
        if not self._streamed[leaf]:
            state = TileState(None, None, {}, {})
        return (state, grad.arrays) if isinstance(grad, StoredGradient) else (state,)

    def _after(self, leaf: int, advanced: Advanced) -> Advanced:
        state, *total = self._held[leaf]
        if self._streamed[leaf]:
            advanced = advanced._replace(new=state)
        else:
            new = dataclasses.replace(advanced.new, weight=state.weight)
            advanced = advanced._replace(new=new)
        return advanced._replace(total=total[0] if total else None)

    def _arrive(self, number: int) -> list[Held]:
        """Begins to copy a portion to the device, when there is room for it."""
        portion = self._portions[number]
        if number >= _DEPTH:
            before = [x.leaf for x in self._portions[number - _DEPTH]]
            held = {i: self._held[i] for i in [x.leaf for x in portion] + before}
            left = [self._held[i][0].weight for i in before if not self._streamed[i]]
            held = _in_order(held, lambda x: memory.is_on_host(x) or _is_any(x, left))
            self._held.update(held)
            self._wait_by_kernel(portion, number - _DEPTH)
        for piece in portion:
            if piece.slices is not None:
                self._copies.start_read(piece.leaf, piece.slices[0])
        return [memory.to_device(self._read(piece)) for piece in portion]

    def _wait_by_kernel(self, coming: Portion, before: int) -> None:
        """Has what is read of a portion wait for another one to have left, where XLA
        ignores barriers. Later slices of a leaf are behind the earlier ones anyway, in
        the same arrays."""
        held: dict[int, Held] = {}
        for piece in (*coming, *self._portions[before]):
            leaf, of_leaf = piece.leaf, self._held[piece.leaf]
            if piece.slices is None:
                held[leaf] = of_leaf
            elif piece in coming and piece.slices[0].rows.start == 0:
                held[leaf] = self._copies.own(leaf, of_leaf)
        arrays, structure = jtu.tree_flatten(held)
        away = [i for i, x in enumerate(arrays) if memory.is_on_host(x)]
        tied = host_copies.in_order([arrays[i] for i in away], self._updated[before])
        for i, x in zip(away, tied, strict=True):
            arrays[i] = x
        for leaf, new in structure.unflatten(arrays).items():
            self._held[leaf] = eqx.combine(new, self._held[leaf])

    def _part(self, piece: Piece, here: Held) -> Part:
        """A piece as a part of the step. Its weight is read now."""
        x, (state, *total) = self._of[piece.leaf], here
        grad, rows_of = x.grad, lambda x: x
        if piece.slices is not None:
            rows_of = piece.slices[0].rows_of
        if total:
            grad = meshes.as_typed(grad.decode(total[0]), x.sharding)
        else:
            grad = rows_of(grad)
        if not self._streamed[piece.leaf]:
            return x._replace(grad=grad)
        weight = self._read(piece)[0].weight
        if memory.is_on_host(weight):
            # Sums of gradients are weights that arrive like the rest.
            weight = state.weight
        if piece.leaf in self._weights:
            weight = rows_of(self._weights[piece.leaf])
        return x._replace(old=dataclasses.replace(state, weight=weight), grad=grad)

    def _before_leaving(self, number: int, coming: list[Held]) -> list[Held]:
        """The next portion, which has arrived before this one is written: of a leaf
        that is in both, XLA would otherwise keep a second copy."""
        if number + 1 == len(self._portions):
            return coming
        nows = {x.leaf for x in self._portions[number]}
        nexts = [x.leaf for x in self._portions[number + 1]]
        both = {i: self._held[i] for i in nexts if i in nows}
        if not both:
            return coming
        # Weights are read when they are needed.
        copied = [
            x
            for piece, held in zip(self._portions[number + 1], coming, strict=True)
            for x in _beside_weight(held, self._held[piece.leaf])
        ]
        is_chosen = lambda x: memory.is_on_host(x) or _is_any(x, copied)
        both, coming = _in_order((both, coming), is_chosen)
        self._held.update(both)
        return coming

    def _leave(self, piece: Piece, new: TileState, here: Held) -> None:
        """Begins to copy a new state back, and zeros in place of the sum that was
        read."""
        leaf, slices = piece.leaf, piece.slices
        state, *total = old = self._held[leaf]
        cleared: list[TileState] = []
        if total and not self._of[leaf].grad.is_kept:
            cleared = [_zeros(here[1], new.weight)]
        if slices is not None:
            parts = new, *cleared
            written = [
                x.write(y, memory.where(part, y))
                for x, y, part in zip(slices, old, parts, strict=False)
            ]
            self._copies.start_write(leaf, slices[0], parts)
            others = self._copies.others(leaf, (*written, *old[len(written) :]))
            self._held[leaf] = eqx.combine(others, self._held[leaf])
            return
        if self._streamed[leaf]:
            state = memory.where(new, state)
        else:
            state = TileState(new.weight, None, {}, {})
        self._held[leaf] = state, *(memory.where(cleared, total) if cleared else total)

    def _read(self, piece: Piece) -> Held:
        """What XLA copies."""
        held = self._held[piece.leaf]
        if piece.slices is None:
            return held
        parts = [x.read(y) for x, y in zip(piece.slices, held, strict=True)]
        return self._copies.others(piece.leaf, tuple(parts))


def _zeros(arrays: TileState, after: Array) -> TileState:
    """Zeros of these shapes, once an array is computed. Otherwise XLA may have those of
    all leaves ready, early."""

    def zeros(x: Array) -> Array:
        if not isinstance(x, jax.core.Tracer):
            return jnp.zeros_like(x)
        zero, _ = lax.optimization_barrier((jnp.zeros((), x.dtype), after))
        return meshes.as_typed(jnp.broadcast_to(zero, x.shape), jax.typeof(x).sharding)

    return jtu.tree_map(zeros, arrays)


def _beside_weight(here: Held, old: Held) -> list[Array]:
    """What has arrived of a leaf: all but a weight that is on the device."""
    state, *total = here
    weight = state.weight if memory.is_on_host(old[0].weight) else None
    return jtu.tree_leaves((weight, state.correction, state.codes, state.scales, total))


def _in_order(tree: Tree, is_chosen: Callable[[Array], bool]) -> Tree:
    """The same tree. What uses one of the chosen arrays of it waits for all of them."""
    leaves, structure = jtu.tree_flatten(tree)
    chosen = [i for i, x in enumerate(leaves) if is_chosen(x)]
    # Without `jit`, everything is in order.
    if any([isinstance(leaves[i], jax.core.Tracer) for i in chosen]):
        tied = lax.optimization_barrier([leaves[i] for i in chosen])
        for i, x in zip(chosen, tied, strict=True):
            leaves[i] = x
    return structure.unflatten(leaves)


def _is_any(x: Array, arrays: list[Array]) -> bool:
    return any([x is y for y in arrays])
