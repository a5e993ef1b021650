"""The engine of optimizers that accumulate gradients."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree, ScalarLike

from .._common import memory
from .._common.number_checks import is_number, known_number
from .._common.text import function_name, shown
from .._model.trained import has_gradient
from .._model.trees import flatten, Leaf, match, Model, Updates, with_values
from .._model.variables import without_variables
from .accumulate_step import AccumulatedStep, Arrays
from .accumulation_state import (
    AccumulationState,
    are_moments,
    check_accumulation_state,
    check_sum,
    initial_accumulation,
    SUM_UNIT,
)
from .argument_checks import check_max_norm
from .call_checks import (
    check_grads,
    check_has_values,
    check_model,
    check_order,
    check_update,
)
from .engine import StepEngine
from .leaf_checks import check_grad
from .settings import Settings
from .state import OptimizerState, StepCount
from .sums_as_gradients import SumReader


# A count of additions that is far from overflow. Thresholds of rounding then start
# anew.
_LAST_COUNT = 2**30 - 1


class AccumulateEngine(eqx.Module):
    """The methods of [`flashquinox.accumulate`][].

    A sum of gradients is a weight of 24 bits, or a moment, that an optimizer adds each
    gradient to. So it has the kernels, the shardings and the checks of every other
    optimizer.
    """

    inner: StepEngine
    # Of the optimizer that adds.
    adding: Settings
    every: int | Callable[[Any], Any]
    bits: int = eqx.field(static=True)
    mean: bool = eqx.field(static=True)

    def init(self, params: PyTree) -> AccumulationState:
        inner = self.inner.init(params)
        call = f"{self.adding.call}(...).init"
        return initial_accumulation(call, self.adding, params, inner)

    def update(
        self,
        updates: Updates,
        state: AccumulationState,
        params: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[Updates, AccumulationState]:
        check_update(f"{self.adding.call}(...).update", params, extra_args)
        return self.advance("update", params, state, updates)  # pyright: ignore

    def advance(
        self,
        method: str,
        params: Model,
        state: AccumulationState,
        grads: PyTree,
        max_norm: ScalarLike | None = None,
    ) -> tuple[Model, AccumulationState]:
        """Adds gradients, and takes a step if these are the last. `method` is "step" or
        "update", as of [`StepEngine.advance`][]."""
        call = f"{self.adding.call}(...).{method}"
        check_max_norm(call, max_norm)
        check_model(call, params)
        check_accumulation_state(call, state)
        leaves, rebuild = flatten(params)
        dtypes = _gradient_dtypes(call, self.adding, params, leaves, state, grads)

        counts = without_variables((state.mini_step, state.rounding_count))
        mini_step, before = memory.to_device(jtu.tree_map(jnp.asarray, counts))
        sums, corrections, count = self._added(params, state, before, grads)
        # What is not finite was not added, where that is asked for.
        mini_step = mini_step + (count != before).astype(jnp.int32)
        is_last = (count != before) & (mini_step >= self._every(state))

        inner, structure = jtu.tree_flatten(state.inner_state)
        step = AccumulatedStep(
            engine=self.inner,
            reader=SumReader(
                call=call,
                adding=self.adding,
                leaves=leaves,
                rebuild=rebuild,
                dtypes=dtypes,
                shardings=state.inner_state.shardings,
            ),
            method=method,
            leaves=leaves,
            rebuild=rebuild,
            dtypes=dtypes,
            structure=structure,
            max_norm=max_norm,
            divisor=SUM_UNIT * (mini_step.astype(jnp.float32) if self.mean else 1),
            is_last=is_last,
        )
        at = partial(_arrays_at, call, leaves=leaves, numbers=dtypes)
        old = Arrays(
            weights=[jnp.asarray(leaves[i].value) for i in dtypes],
            inner=inner,
            sums=at("state.sums", sums),
            corrections=at("state.corrections", corrections),
        )
        new, structure = step.take_if_last(old)
        by_path = lambda found: {
            leaves[i].unwrapped: x for i, x in zip(dtypes, found, strict=True)
        }
        stored = [
            with_values(tree, by_path(found))
            for tree, found in (
                (state.sums, new.sums),
                (state.corrections, new.corrections),
            )
        ]
        return step.model(new.weights), AccumulationState(
            mini_step=jnp.where(is_last, 0, mini_step),
            rounding_count=count & _LAST_COUNT,
            sums=stored[0],
            corrections=stored[1],
            inner_state=structure.unflatten(new.inner),
        )

    def _added(
        self, params: PyTree, state: AccumulationState, count: Array, grads: PyTree
    ) -> tuple[PyTree, PyTree, Array]:
        """The sums with these gradients, their corrections, and how many additions
        there were."""
        engine, are_weights = StepEngine(self.adding), not are_moments(self.adding)
        model, added = engine.advance(
            "step",
            state.sums if are_weights else params,
            OptimizerState(
                steps=StepCount(count),
                moments={} if are_weights else {"sum": state.sums},
                corrections=state.corrections,
                shardings=state.inner_state.shardings,
            ),
            grads,
        )
        sums = model if are_weights else added.moments["sum"]
        return sums, added.corrections, added.count

    def _every(self, state: AccumulationState) -> ScalarLike:
        if not callable(self.every):
            return self.every
        name = f"`{self.adding.call}(every=...)`"
        found = self.every(jnp.asarray(state.count))
        number = known_number(found) if is_number(found) else 0.0
        if number is not None and number < 1:
            raise ValueError(
                f"{name}: the schedule {function_name(self.every)} returned "
                f"{shown(found)}. It must return a number of gradients of at least 1."
            )
        return found


def _gradient_dtypes(
    call: str,
    adding: Settings,
    params: PyTree,
    leaves: list[Leaf],
    state: AccumulationState,
    grads: Any,
) -> dict[int, Any]:
    """The dtypes of the gradients that there are, by the numbers of their leaves."""
    check_grads(call, grads, params)
    check_has_values(call, model=params, state=state, grads=grads)
    sums = match(call, "state.sums", state.sums, leaves)
    matched = match(call, "grads", grads, leaves)
    check_order(call, leaves, matched)
    found = {}
    for i, (leaf, total, grad) in enumerate(zip(leaves, sums, matched, strict=True)):
        if has_gradient(call, leaf, grad, total is not None):
            check_grad(call, leaf, grad)
            check_sum(call, adding, leaf, total)
            found[i] = jnp.dtype(grad.dtype)
    return found


def _arrays_at(
    call: str, name: str, tree: PyTree, leaves: list[Leaf], numbers: Iterable[int]
) -> list[Any]:
    values = match(call, name, tree, leaves)
    return [values[i] for i in numbers]
