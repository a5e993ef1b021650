"""The engine of optimizers that accumulate gradients."""

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.core
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree, ScalarLike

from .._common import memory
from .._common.number_checks import is_number, known_number
from .._common.text import function_name, shown
from .._model.trained import has_gradient
from .._model.trees import (
    flatten,
    Leaf,
    match,
    Model,
    Rebuild,
    Updates,
    with_values,
)
from .._model.variables import without_variables
from .._storage.split import Correction, decode_weight
from .._tile.tile import no_update
from .accumulation_state import (
    AccumulationState,
    check_accumulation_state,
    initial_accumulation,
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


# A count of additions that is far from overflow. Thresholds of rounding then start
# anew.
_LAST_COUNT = 2**30 - 1


class AccumulateEngine(eqx.Module):
    """The methods of [`flashquinox.accumulate`][].

    A sum of gradients is a weight of 24 bits that an optimizer adds each gradient to.
    So it has the kernels, the shardings and the checks of every other optimizer.
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
        return initial_accumulation(call, self.adding, self.bits, params, inner)

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
        dtypes = _gradient_dtypes(call, params, leaves, state, grads)

        counts = without_variables((state.mini_step, state.rounding_count))
        mini_step, before = memory.to_device(jtu.tree_map(jnp.asarray, counts))
        sums, added = StepEngine(self.adding).advance(
            "step",
            memory.to_device(state.sums),
            OptimizerState(
                steps=StepCount(before),
                moments={},
                corrections=memory.to_device(state.corrections),
                shardings=state.inner_state.shardings,
            ),
            grads,
        )
        # What is not finite was not added, where that is asked for.
        mini_step = mini_step + (added.count != before).astype(jnp.int32)
        is_last = (added.count != before) & (mini_step >= self._every(state))

        inner, structure = jtu.tree_flatten(state.inner_state)
        step = _Step(
            engine=self.inner,
            method=method,
            leaves=leaves,
            rebuild=rebuild,
            dtypes=dtypes,
            structure=structure,
            max_norm=max_norm,
            divisor=mini_step if self.mean else None,
            is_last=is_last,
        )
        at = partial(_arrays_at, call, leaves=leaves, numbers=dtypes)
        old = _Arrays(
            weights=[jnp.asarray(leaves[i].value) for i in dtypes],
            inner=inner,
            sums=at("state.sums", sums),
            corrections=at("state.corrections", added.corrections),
        )
        new, structure = step.take_if_last(old)
        by_path = lambda found: {
            leaves[i].unwrapped: x for i, x in zip(dtypes, found, strict=True)
        }
        stored = memory.where(
            (
                with_values(sums, by_path(new.sums)),
                with_values(added.corrections, by_path(new.corrections)),
            ),
            (state.sums, state.corrections),
        )
        return step.model(new.weights), AccumulationState(
            mini_step=jnp.where(is_last, 0, mini_step),
            rounding_count=added.count & _LAST_COUNT,
            sums=stored[0],
            corrections=stored[1],
            inner_state=structure.unflatten(new.inner),
        )

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


class _Arrays(NamedTuple):
    """What a step changes: arrays of the leaves that have gradients, and the leaves of
    the state of the optimizer. With `update`, updates in place of weights."""

    weights: list[Array]
    inner: list[Array]
    sums: list[Array]
    corrections: list[Correction | None]


@dataclasses.dataclass(frozen=True)
class _Step:
    """The step of an optimizer by the gradients in sums.

    - `leaves`, `rebuild`: the model.
    - `dtypes`: of leaves that have gradients, the dtypes of these.
    - `structure`: that of the state of the optimizer.
    - `divisor`: what sums are divided by.
    - `is_last`: whether to take it.
    """

    engine: StepEngine
    method: str
    leaves: list[Leaf]
    rebuild: Rebuild
    dtypes: dict[int, Any]
    structure: Any
    max_norm: ScalarLike | None
    divisor: ScalarLike | None
    is_last: Array

    def take_if_last(self, old: _Arrays) -> tuple[_Arrays, Any]:
        """The arrays after this step, if it is to be taken, and the structure of the
        state of the optimizer."""
        if not isinstance(self.is_last, jax.core.Tracer):
            not_taken = self._not_taken(old), self.structure
            return self._taken(old) if self.is_last else not_taken
        structure = []

        def taken(old: _Arrays) -> _Arrays:
            new, found = self._taken(old)
            structure.append(found)
            return new

        new = lax.cond(self.is_last, taken, self._not_taken, old)
        return new, structure[0]

    def model(self, weights: list[Array]) -> PyTree:
        """The model with these weights. Of an update, `None` for all others."""
        as_update = self.method == "update"
        values = [None if as_update else leaf.value for leaf in self.leaves]
        return self.rebuild(_replaced(values, self.dtypes, weights))

    def _taken(self, old: _Arrays) -> tuple[_Arrays, Any]:
        grads = map(_as_gradient, old.sums, old.corrections, self.dtypes.values())
        nothing = [None for _ in self.leaves]
        values = _replaced([x.value for x in self.leaves], self.dtypes, old.weights)
        model, state = self.engine.advance(
            self.method,
            self.rebuild(values),
            self.structure.unflatten(old.inner),
            self.rebuild.state(_replaced(nothing, self.dtypes, [*grads])),
            self.max_norm,
            self.divisor,
        )
        new, _ = flatten(model)
        weights = [new[i].value for i in self.dtypes]
        inner, structure = jtu.tree_flatten(state)
        # The sums are read by then, so that zeros can be in their place.
        weights, sums = lax.optimization_barrier((weights, (old.sums, old.corrections)))
        zero = lambda x: jnp.where(self.is_last, jnp.zeros_like(x), x)
        sums, corrections = jtu.tree_map(zero, sums)
        return _Arrays(weights, inner, sums, corrections), structure

    def _not_taken(self, old: _Arrays) -> _Arrays:
        if self.method == "step":
            return old
        return old._replace(weights=[*map(no_update, old.weights)])


def _as_gradient(total: Array, correction: Correction | None, dtype: Any) -> Array:
    """A sum as a gradient. Where gradients are bfloat16, that nearest to the sum, which
    needs no other memory."""
    is_narrow = dtype == jnp.bfloat16
    return total if is_narrow else decode_weight(total, correction)


def _replaced(values: list[Any], numbers: Iterable[int], new: list[Any]) -> list[Any]:
    """A list with others at these numbers."""
    changed = list(values)
    for i, x in zip(numbers, new, strict=True):
        changed[i] = x
    return changed


def _gradient_dtypes(
    call: str, params: PyTree, leaves: list[Leaf], state: AccumulationState, grads: Any
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
            found[i] = jnp.dtype(grad.dtype)
    return found


def _arrays_at(
    call: str, name: str, tree: PyTree, leaves: list[Leaf], numbers: Iterable[int]
) -> list[Any]:
    values = match(call, name, tree, leaves)
    return [values[i] for i in numbers]
