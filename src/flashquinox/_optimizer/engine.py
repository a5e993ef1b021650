"""The engine behind every optimizer: its three methods."""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import PyTree, ScalarLike

from .._model.trained import has_gradient
from .._model.trees import match, Model, Updates
from .._tile.step import TileState
from .._tile.stored_gradient import StoredGradient
from .argument_checks import check_max_norm
from .call_checks import check_grads, check_has_values, check_order, check_update
from .close_step import close_step
from .device_checks import warn_of_parts
from .gradients import clipping
from .initial_state import initial_state
from .leaf_checks import check_grad
from .open_step import open_step
from .settings import Settings
from .state import OptimizerState


class StepEngine(eqx.Module):
    """The methods of an optimizer, bound to its settings."""

    settings: Settings

    def init(self, params: PyTree) -> OptimizerState:
        return initial_state(self.settings, params)

    def advance(
        self,
        method: str,
        params: Model,
        state: OptimizerState,
        grads: PyTree,
        max_norm: ScalarLike | None = None,
    ) -> tuple[Model, OptimizerState]:
        """One step. `method` is "step", which gives the new model, or "update", which
        gives what to add to the old one."""
        model, state, _ = self.advance_by_sums(
            method, params, state, grads, max_norm, None, {}
        )
        return model, state

    def advance_by_sums(
        self,
        method: str,
        params: Model,
        state: OptimizerState,
        grads: PyTree,
        max_norm: ScalarLike | None,
        divisor: ScalarLike | None,
        stored: Mapping[tuple[Any, ...], StoredGradient],
    ) -> tuple[Model, OptimizerState, dict[tuple[Any, ...], TileState]]:
        """One step by sums of gradients, which are divided by a number where they are
        read. Gradients may be the bits of bfloat16 numbers, as integers. `stored` are
        those in host memory, by their paths; what has become of their sums is
        returned."""
        call = f"{self.settings.call}(...).{method}"
        check_max_norm(call, max_norm)
        step = open_step(self.settings, call, params, state)
        check_grads(call, grads, params)
        check_has_values(call, grads=grads)
        matched = match(call, "grads", grads, step.leaves, rebuild=step.rebuild)
        check_order(call, step.leaves, matched)
        arrived, with_gradient = {}, set()
        for index, (leaf, grad) in enumerate(zip(step.leaves, matched, strict=True)):
            grad = stored.get(leaf.unwrapped, grad)
            if has_gradient(call, leaf, grad, index in step.stored):
                if not isinstance(grad, StoredGradient):
                    check_grad(call, leaf, grad, may_be_bits=divisor is not None)
                    grad = jnp.asarray(grad)
                step.check(index)
                with_gradient.add(index)
                if leaf.value.size > 0:
                    arrived[index] = grad
        step = step.verified()
        if max_norm is not None:
            of = [step.leaves[index] for index in arrived]
            warn_of_parts(call, of, "`max_norm` is for the norm", state.shardings)
        there = [step.shardings[index] for index in arrived]
        clip = clipping([*arrived.values()], there, max_norm, divisor)
        as_update = method == "update"
        all_finite = step.update(arrived, clip, as_update=as_update)
        new = close_step(step, all_finite, with_gradient if as_update else None)
        return *new, {step.leaves[i].unwrapped: x for i, x in step.totals.items()}

    def update(
        self,
        updates: Updates,
        state: OptimizerState,
        params: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[Updates, OptimizerState]:
        check_update(f"{self.settings.call}(...).update", params, extra_args)
        assert params is not None
        return self.advance("update", params, state, updates)
