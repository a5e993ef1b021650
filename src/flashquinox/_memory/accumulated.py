"""Sums of gradients in the state of an optimizer."""

from typing import Any

import jax.tree_util as jtu
import optax
from jaxtyping import PyTree

from .._optimizer.accumulation_state import AccumulationState


def without_sums(state: PyTree) -> tuple[PyTree, list[PyTree]]:
    """What else is in a state, and its sums of gradients: trees like the model."""
    sums: list[PyTree] = []

    def one(x: Any) -> Any:
        if isinstance(x, AccumulationState):
            sums.extend([x.sums, x.corrections])
            return x.mini_step, x.rounding_count, x.inner_state
        if isinstance(x, optax.MultiStepsState):
            sums.append(x.acc_grads)
            return x._replace(acc_grads=None)
        return x

    kinds = AccumulationState, optax.MultiStepsState
    rest = jtu.tree_map(one, state, is_leaf=lambda x: isinstance(x, kinds))
    return rest, sums
