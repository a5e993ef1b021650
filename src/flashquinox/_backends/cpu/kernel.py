"""Programs for CPUs as custom calls: one for many leaves."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Shaped

from ..._tile.step import LeafScalars, StepScalars, StepStructure, TileState
from ..base import takes_place_of_gradient, Unsupported
from ..cpp.common import common_of, joined, new_states, parts
from ..cpp.members import launched
from ..cpp.translation import GRAD, translation_of, WEIGHT
from ..cpp.view import View
from ..cpp.words import Words
from . import compiler
from .source import groups_together, lines, most_together, Source


# As many blocks are enough for threads to end at the same time. A block takes at least
# 10 microseconds, as long as a thread needs to begin, and at most 40.
_BLOCKS = 64
_FEWEST_TIMES, _MOST_TIMES = 8, 32


class Kernel(NamedTuple):
    """A custom call of some leaves. Hashable.

    Its operands are the words of the scalars, arrays of states that all leaves have in
    one, and of each leaf in turn the gradient and the other arrays of its state; its
    results, the arrays of the new states.
    """

    target: str
    views: tuple[View, ...]
    # How many arrays all leaves have in one, and how many each has.
    common: int
    own: int
    # The dtype of new weights, where old ones are not read. Or `None`.
    fresh: str | None
    # See `gpu.source.Kernel`.
    strides: tuple[int, ...]
    # The array whose place the first result takes.
    first: int = WEIGHT
    members: int = 1

    @property
    def plan(self) -> np.ndarray:
        """What the call knows of the leaves: see `call.h`."""
        groups = self.members * sum([view.groups for view in self.views])
        of_block = _groups_of_block(groups, most_together(self.views[0].group_size))
        blocks = [-(-view.groups // of_block) for view in self.views]
        starts = [0, *itertools.accumulate(blocks)]
        strides = [*self.strides, 0, 0][:2]
        # Small leaves are blocks of fewer groups.
        threads = -(-groups // of_block)
        leaves, elements_before, groups_before = [], 0, 0
        for first, view in zip(starts, self.views, strict=False):
            leaves += [first, view.number or 0, view.groups, view.size, view.run]
            leaves += [view.groups_of_run, view.columns, view.is_consecutive]
            leaves += [elements_before, groups_before]
            elements_before += view.size
            groups_before += view.groups
        numbers = [len(self.views), self.members, starts[-1], of_block, threads]
        numbers += [elements_before, groups_before, *strides, *leaves]
        return np.array(numbers, np.int64)


def _groups_of_block(groups: int, together: int) -> int:
    """How many groups a block has, of so many in all: a multiple of those that a thread
    has at a time."""
    times = groups // (_BLOCKS * together)
    return together * min(max(times, _FEWEST_TIMES), _MOST_TIMES)


def update_leaves(
    structure: StepStructure,
    views: tuple[View, ...],
    scalars: StepScalars,
    leaves: tuple[LeafScalars, ...],
    grads: tuple[Shaped[Array, "..."], ...],
    old: tuple[TileState, ...],
) -> tuple[TileState, ...]:
    """One step of leaves that are stored alike. See `AbstractBackend.load`."""
    words = Words.of(scalars, leaves, all(view.number is not None for view in views))
    translation = translation_of(structure, scalars, grads[0], old[0], lines, True)
    each = [jtu.tree_leaves(x) for x in zip(grads, old, strict=True)]
    common = common_of(structure, len(each[0]))
    # Of a direction, nobody reads weights.
    read = [i for i in range(len(each[0])) if i != WEIGHT or not structure.as_direction]
    own = tuple([i for i in read if i not in common])
    source = Source(
        translation,
        views[0].group_size,
        groups_together(views),
        words.scalars,
        len(words.arrays),
        tuple(common),
        own,
    )
    try:
        target = compiler.target_of(source.text)
    except compiler.CompilationError as error:
        raise Unsupported(
            f"a program that the C++ compiler refuses ({error})"
        ) from None
    fresh = str(old[0].weight.dtype) if structure.as_direction else None
    strides = (0,) * len(words.arrays)
    as_grad = takes_place_of_gradient(structure, grads[0], old[0])
    first = GRAD if as_grad else WEIGHT
    kernel = Kernel(target, views, len(common), len(own), fresh, strides, first)
    # XLA would copy what is reshaped.
    operands = [of_leaf[i] for of_leaf in each for i in own]
    new = launched(_run, kernel)(*words.arrays, *joined(each, common), *operands)
    found = {
        i: parts(x, [of_leaf[i].size for of_leaf in each])
        for i, x in zip(common, new, strict=False)
    }
    return new_states(old, found, list(new[len(common) :]))


def _run(kernel: Kernel, *operands: Shaped[Array, "..."]) -> Sequence[Array]:
    words, like = len(kernel.strides), lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    first_leaf = words + kernel.common
    results: list[Any] = [like(x) for x in operands[words:first_leaf]]
    aliases = {words + i: i for i in range(kernel.common)}
    for first in range(first_leaf, len(operands), kernel.own):
        grad, *arrays = map(like, operands[first : first + kernel.own])
        if kernel.fresh is not None:
            results.append(jax.ShapeDtypeStruct(grad.shape, jnp.dtype(kernel.fresh)))
        for i, x in enumerate(arrays, start=WEIGHT):
            is_first = kernel.fresh is None and i == WEIGHT
            aliases[first + (kernel.first if is_first else i)] = len(results)
            results.append(x)
    call = jax.ffi.ffi_call(kernel.target, results, input_output_aliases=aliases)
    return call(*operands, plan=kernel.plan)
