"""Pallas for GPUs, by way of Triton: one kernel for several leaves.

Every program takes one tile of one leaf. Leaves that are stored alike share a kernel,
whatever their shapes: a program finds out from a table which leaf its tile is of, and
where in it; the arrays, by binary search. From then on it runs the same code as all
others.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Scalar

from ..._tile.tile import (
    LeafScalars,
    StepScalars,
    StepStructure,
    TileState,
    update_tile,
)
from ..interpreter.arithmetic import Arithmetic
from ..interpreter.scalars import pack, with_leaf
from .arithmetic import ARITHMETIC
from .views import AbstractPart, AbstractView, parts_of, Tile


def update_leaves(
    structure: StepStructure,
    views: tuple[AbstractView, ...],
    scalars: StepScalars,
    leaves: tuple[LeafScalars, ...],
    grads: tuple[Float[Array, "..."], ...],
    old: tuple[TileState, ...],
    interpret: bool = False,
) -> tuple[TileState, ...]:
    """One step of leaves that are stored alike. See `AbstractBackend.load`."""
    # Of each leaf, the gradient and the arrays of its state, of which the last ones are
    # scales.
    arrays = [
        [x.ravel() for x in (grad, *jtu.tree_leaves(state))]
        for grad, state in zip(grads, old, strict=True)
    ]
    for pairs in parts_of(views):
        numbers = [number for number, _ in pairs]
        parts = [part for _, part in pairs]
        kernel = _Kernel(
            structure,
            ARITHMETIC.exact if interpret else ARITHMETIC,
            [part.together(parts) for part in parts],
            scalars,
            old[0],
        )
        operands = [leaves[i] for i in numbers], [arrays[i] for i in numbers]
        updated = kernel.update(*operands, views[0], interpret)
        for number, new in zip(numbers, updated, strict=True):
            arrays[number][1:] = new
    like, structure_of_all = jtu.tree_flatten(old)
    new = [x for of_leaf in arrays for x in of_leaf[1:]]
    shaped = [x.reshape(y.shape) for x, y in zip(new, like, strict=True)]
    return structure_of_all.unflatten(shaped)


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """One kernel for parts of leaves that are of the same sort."""

    structure: StepStructure
    arithmetic: Arithmetic
    parts: Sequence[AbstractPart]
    # Of the first leaf.
    scalars: StepScalars
    like: TileState

    def update(
        self,
        leaves: Sequence[LeafScalars],
        arrays: Sequence[Sequence[Array]],
        view: AbstractView,
        interpret: bool,
    ) -> list[list[Array]]:
        """The arrays of the new states of these leaves, whose parts these are."""
        # The scalars of all leaves are one array, which is the same for all kernels of
        # a step, and those of each leaf another one: XLA would make every further array
        # by another launch.
        floats, integers, unpack = pack(self.scalars)
        words = lax.bitcast_convert_type(floats, jnp.int32)
        own = jnp.stack([_word(x) for x in jtu.tree_leaves(list(leaves))])
        arguments = jnp.concatenate([words, integers]), own
        width = len(arrays[0])
        kernel = partial(self._tile, width, view.axis, len(floats), unpack)
        anywhere = pl.BlockSpec(memory_space=pl.ANY)
        flat = [x for of_leaf in arrays for x in of_leaf]
        # The numbers of the arrays of states among all.
        states = [i for i in range(len(flat)) if i % width > 0]
        shapes = [jax.ShapeDtypeStruct(flat[i].shape, flat[i].dtype) for i in states]
        new = pl.pallas_call(
            kernel,
            out_shape=shapes,
            grid=(sum(part.tiles for part in self.parts),),
            in_specs=[anywhere] * (len(arguments) + len(flat)),
            out_specs=[anywhere] * len(states),
            input_output_aliases={len(arguments) + i: j for j, i in enumerate(states)},
            compiler_params=plt.CompilerParams(num_warps=view.warps),
            interpret=interpret,
            name=f"flashquinox_{type(self.structure.rule).__name__.lower()}",
        )(*arguments, *flat)
        size = width - 1
        return [list(new[i : i + size]) for i in range(0, len(new), size)]

    def _tile(
        self,
        width: int,
        axis: int,
        first_integer: int,
        unpack: Callable[..., Any],
        words: Any,
        own_words: Any,
        *refs: Any,
    ) -> None:
        """The program of one tile."""
        parts, scales = self.parts, len(jtu.tree_leaves(self.like.scales))
        inputs = [refs[i * width : (i + 1) * width] for i in range(len(parts))]
        outputs = refs[len(parts) * width :]
        size = width - 1
        outputs = [outputs[i : i + size] for i in range(0, len(outputs), size)]
        part, start, numbers = self._part_of(pl.program_id(0))
        # The first of the integers is 0, which Triton does not know.
        tile = Tile(pl.program_id(0) - start, numbers, words[first_integer])
        # Computed once where they are of all parts alike.
        places = None
        if len({x.code for x in parts}) == 1:
            places = parts[0].places(tile)

        def load(i: int) -> list[Array]:
            elements, groups = places or parts[i].places(tile)
            first = width - scales
            return elements.load(inputs[i][:first]) + groups.load(inputs[i][first:])

        def store(i: int) -> None:
            elements, groups = places or parts[i].places(tile)
            first = size - scales
            elements.store(outputs[i][:first], new[:first])
            groups.store(outputs[i][first:], new[first:])

        of_parts = range(len(parts))
        grad, *state = _choose(part, [partial(load, i) for i in of_parts])
        shared = unpack(
            lambda i: lax.bitcast_convert_type(words[i], jnp.float32),
            lambda i: words[first_integer + i],
        )
        operands = {
            "scalars": self._with_own(shared, own_words, part),
            "grad": grad,
            "old": jtu.tree_unflatten(jtu.tree_structure(self.like), state),
        }
        static = {"structure": self.structure, "axis": axis, "keep_unmoved": False}
        update = self.arithmetic.trace(update_tile, **operands, static=static)
        new = jtu.tree_leaves(update(**operands))
        _choose(part, [partial(store, i) for i in of_parts])

    def _part_of(self, program: Any) -> tuple[Any, Any, list[Any]]:
        """The part that a tile is of: its number, its first tile, and what it says of
        itself."""
        firsts = [0, *itertools.accumulate(x.tiles for x in self.parts[:-1])]
        table = [
            (i, first, *x.numbers)
            for i, (first, x) in enumerate(zip(firsts, self.parts, strict=True))
        ]
        found: Sequence[Any] = table[0]
        for row in table[1:]:
            is_later = program >= row[1]
            found = [
                y if x is y else jnp.where(is_later, jnp.int32(x), jnp.int32(y))
                for x, y in zip(row, found, strict=True)
            ]
        part, first, *numbers = found
        return part, first, numbers

    def _with_own(self, shared: StepScalars, own_words: Any, part: Any) -> StepScalars:
        """The scalars of all leaves, and those of the leaf of a part."""
        own, own_structure = jtu.tree_flatten(self.scalars.leaf)
        own_here = own_structure.unflatten(
            _of_word(own_words[part * len(own) + i], like.dtype)
            for i, like in enumerate(own)
        )
        here = with_leaf(shared, own_here)
        return jtu.tree_map(lambda x, like: x.astype(like.dtype), here, self.scalars)


def _word(x: Scalar) -> Scalar:
    """A scalar in 32 bits."""
    if x.dtype == jnp.float32:
        return lax.bitcast_convert_type(x, jnp.int32)
    return x.astype(jnp.int32)


def _of_word(word: Any, dtype: Any) -> Any:
    """The inverse of `_word`, but for narrow integers."""
    if dtype == jnp.float32:
        return lax.bitcast_convert_type(word, jnp.float32)
    return word


def _choose(index: Any, branches: Sequence[Callable[[], Any]], first: int = 0) -> Any:
    """The result of the branch with this index, by binary search."""
    if len(branches) == 1:
        return branches[0]()
    middle = len(branches) // 2
    return lax.cond(
        index < first + middle,
        lambda: _choose(index, branches[:middle], first),
        lambda: _choose(index, branches[middle:], first + middle),
    )
