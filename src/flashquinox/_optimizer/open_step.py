"""Taking a model and its state apart, for one step."""

import jax.numpy as jnp
from jaxtyping import PyTree

from .._common import memory
from .._model.trained import with_state
from .._model.trees import flatten, match
from .._sharding import state_specs
from .call_checks import check_has_values, check_model
from .settings import Settings
from .state import OptimizerState
from .state_checks import check_not_ensemble, check_state
from .step_in_progress import all_passes, StepInProgress
from .stored_leaf import StoredLeaf


def open_step(
    settings: Settings, call: str, params: PyTree, state: OptimizerState
) -> StepInProgress:
    """Takes a model and its state apart, for one step."""
    check_model(call, params)
    leaves, rebuild = flatten(params)
    check_state(call, state, settings.moments)
    check_not_ensemble(call, state)
    check_has_values(call, model=params, state=state)
    names = settings.moments
    rules = settings.rules(call, params, leaves)
    moments = [
        match(call, f"state.moments[{name!r}]", state.moments[name], leaves)
        for name in names
    ]
    corrections = match(call, "state.corrections", state.corrections, leaves)
    checksums = match(call, "state.checksums", state.checksums, leaves)
    trained = with_state(leaves, dict(zip(names, moments, strict=True)), corrections)
    shardings, unknown = settings.resolve_shardings(
        call, leaves, trained, state.shardings
    )
    stored = {}
    for index, sharding in enumerate(shardings):
        if trained[index]:
            own = rules[index].rule.moments
            of_leaf = {
                name: column[index]
                for name, column in zip(names, moments, strict=True)
                if name in own
            }
            of_leaf, correction = state_specs.where_the_weight_is(
                (of_leaf, corrections[index]), sharding
            )
            stored[index] = StoredLeaf(of_leaf, correction, checksums[index])
    count = memory.to_device(jnp.asarray(state.count))
    rates = settings.rates(count)
    decays = settings.decayed(call, params, leaves, rules)
    return StepInProgress(
        call=call,
        settings=settings,
        leaves=leaves,
        rebuild=rebuild,
        decayed=decays,
        shardings=shardings,
        # XLA cannot divide a kernel, nor a loop over chunks.
        way="divisible" if unknown else settings.backend,
        recorded=state.shardings,
        count=count,
        old_count=state.count,
        rules=rules,
        rates=rates,
        stored=stored,
        passes=all_passes(
            call, settings, rates, count, leaves, rules, decays, [*stored]
        ),
    )
