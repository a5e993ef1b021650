"""Arrays that all leaves of a kernel have in one, the parts of one leaf after those of
another."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Shaped

from ..._tile.step import StepStructure, TileState
from ..groups import flat
from .translation import WEIGHT


def common_of(structure: StepStructure, arrays: int) -> range:
    """Which of the gradient of a leaf and the arrays of its state, so many in all, are
    parts of such arrays in a packed state: all but weights, which the caller has."""
    return range(WEIGHT + 1, arrays if structure.is_packed else WEIGHT + 1)


def joined(each: Sequence[Sequence[Any]], common: Sequence[int]) -> list[Array]:
    """Of the arrays of each leaf, those that all leaves have in one. Of parts of an
    array, in order, XLA makes that array, and copies nothing."""
    return [jnp.concatenate([flat(x[i]) for x in each]) for i in common]


def parts(x: Shaped[Array, " all"], sizes: Sequence[int]) -> list[Array]:
    """The arrays of so many elements that are one after the other in another one."""
    ends = itertools.accumulate(sizes)
    return [
        lax.slice_in_dim(x, end - size, end)
        for end, size in zip(ends, sizes, strict=True)
    ]


def new_states(
    old: tuple[TileState, ...], found: dict[int, list[Any]], others: list[Any]
) -> tuple[TileState, ...]:
    """The states of new arrays: those of these numbers, of which each leaf has one, and
    all others, leaf by leaf. They may have been flattened."""
    leaves, structure = jtu.tree_flatten(old)
    of_leaf = len(leaves) // len(old)
    of_number = {i: iter(arrays) for i, arrays in found.items()}
    rest = iter(others)
    new = [next(of_number.get(i % of_leaf + WEIGHT, rest)) for i in range(len(leaves))]
    return structure.unflatten(
        [
            x if x.shape == like.shape else lax.reshape(x, like.shape)
            for x, like in zip(new, leaves, strict=True)
        ]
    )
