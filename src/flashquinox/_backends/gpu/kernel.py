"""Pallas for GPUs, by way of Triton: one kernel for several leaves.

Every program takes one tile of one leaf. Leaves that are stored alike share a kernel,
whatever their shapes: a program finds its leaf by binary search on its program id and
loads its tile from there; from then on it runs the same code as all others.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import equinox as eqx
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
from ..interpreter.scalars import pack
from .arithmetic import ARITHMETIC
from .views import AbstractPart, AbstractView, Tile


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
    # Parts of leaves, with the numbers of the leaves; and the number of the first tile
    # of each part, and of all tiles.
    parts = [(i, part) for i, view in enumerate(views) for part in view.parts]
    tiles = [0, *itertools.accumulate(part.tiles for _, part in parts)]
    owners = [i for i, _ in parts]
    firsts = [tiles[owners.index(i)] for i in range(len(views))]
    arithmetic = ARITHMETIC.exact if interpret else ARITHMETIC
    # The scalars of all leaves are one array, which is the same for all kernels of a
    # step, and those of each leaf another one: XLA would make every further array by
    # another launch.
    of_one = lambda x: x.leaf
    floats, integers, unpack = pack(eqx.tree_at(of_one, scalars, None))
    words = lax.bitcast_convert_type(floats, jnp.int32)
    own, own_structure = jtu.tree_flatten(scalars.leaf)
    arguments = (
        jnp.concatenate([words, integers]),
        jnp.stack([_word(x) for x in jtu.tree_leaves(leaves)]),
    )
    # Of each leaf, the gradient and the arrays of its state, of which the last ones are
    # scales.
    scales = len(jtu.tree_leaves(old[0].scales))
    arrays = [
        [x.ravel() for x in (grad, *jtu.tree_leaves(state))]
        for grad, state in zip(grads, old, strict=True)
    ]
    width = len(arrays[0])
    state_structure = jtu.tree_structure(old[0])
    scalar_leaves, scalar_structure = jtu.tree_flatten(scalars)
    static = {"structure": structure, "axis": views[0].axis, "keep_unmoved": False}

    def kernel(words, leaves, *refs):
        inputs = [refs[i * width : (i + 1) * width] for i in range(len(views))]
        outputs = refs[len(views) * width :]
        program = pl.program_id(0)
        part = _last_below(tiles[1:-1], program)
        leaf = _last_below(firsts[1:], program)
        # The first of the integers is 0, which Triton does not know.
        zero = words[len(floats)]

        def of_part(function: Callable[[int, AbstractPart, Tile], Any]) -> Any:
            """What a function of the leaf's number, the part and the tile gives."""
            branches = [
                partial(function, *of_leaf, Tile(program - first, zero))
                for of_leaf, first in zip(parts, tiles[:-1], strict=True)
            ]
            return _choose(part, branches)

        grad, *state = of_part(lambda i, part, tile: part.load(inputs[i], scales, tile))
        here = unpack(
            lambda i: lax.bitcast_convert_type(words[i], jnp.float32),
            lambda i: words[len(floats) + i],
        )
        own_words = [leaves[leaf * len(own) + i] for i in range(len(own))]
        own_here = jtu.tree_unflatten(
            own_structure,
            [_of_word(x, like.dtype) for x, like in zip(own_words, own, strict=True)],
        )
        here = eqx.tree_at(of_one, here, own_here, is_leaf=lambda x: x is None)
        here = [
            x.astype(like.dtype)
            for x, like in zip(jtu.tree_leaves(here), scalar_leaves, strict=True)
        ]
        operands = {
            "scalars": scalar_structure.unflatten(here),
            "grad": grad,
            "old": state_structure.unflatten(state),
        }
        new = arithmetic.trace(update_tile, **operands, static=static)(**operands)
        new, size = jtu.tree_leaves(new), width - 1
        of_part(
            lambda i, part, tile: part.store(
                outputs[i * size : (i + 1) * size], scales, tile, new
            )
        )

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    flat = [x for of_leaf in arrays for x in of_leaf]
    # The numbers of the arrays of states among all.
    states = [i for i in range(len(flat)) if i % width > 0]
    new = pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct(flat[i].shape, flat[i].dtype) for i in states],
        grid=(tiles[-1],),
        in_specs=[anywhere] * (len(arguments) + len(flat)),
        out_specs=[anywhere] * len(states),
        input_output_aliases={len(arguments) + i: j for j, i in enumerate(states)},
        compiler_params=plt.CompilerParams(num_warps=views[0].warps),
        interpret=interpret,
        name=f"flashquinox_{type(structure.rule).__name__.lower()}",
    )(*arguments, *flat)
    like, structure_of_all = jtu.tree_flatten(old)
    new = [x.reshape(y.shape) for x, y in zip(new, like, strict=True)]
    return structure_of_all.unflatten(new)


def _last_below(starts: Sequence[int], program: Any) -> Any:
    """How many of these numbers are at most that of a program."""
    return sum([(program >= start).astype(jnp.int32) for start in starts], jnp.int32(0))


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
