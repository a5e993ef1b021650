"""Which leaves have their state in host memory."""

from collections.abc import Callable
from typing import Any

import jax.tree_util as jtu
from jaxtyping import PyTree

from .._common import memory
from .._model.trees import flatten
from .._optimizer.states import find


class Recorded:
    """`init`, and in which memory the arrays are that it made, which the shapes that
    JAX makes of them do not tell."""

    def __init__(self, init: Callable[[PyTree], PyTree]):
        self._init = init
        self._is_away: list[bool] = []

    def __call__(self, model: PyTree) -> PyTree:
        state = self._init(model)
        self._is_away = [memory.is_on_host(x) for x in jtu.tree_leaves(state)]
        return state

    def paths(self, state: PyTree) -> set[tuple[Any, ...]]:
        """The leaves of the model whose state is in host memory, by their paths, given
        the shapes of what it made."""
        flags = jtu.tree_structure(state).unflatten(self._is_away)
        return {
            leaf.unwrapped
            for one in find(flags).values
            for tree in (*one.moments.values(), one.corrections)
            for leaf in flatten(tree)[0]
            if any(jtu.tree_leaves(leaf.value))
        }
