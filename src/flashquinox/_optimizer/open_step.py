"""Taking a model and its state apart, for one step."""

import jax.numpy as jnp
from jaxtyping import PyTree

from .._common.dtypes import compute_dtype
from .._model.trained import with_state
from .._model.trees import flatten, match
from .._rules.rule import rule_structure
from .._sharding import state_specs
from .call_checks import check_has_values, check_model
from .mask import decayed
from .settings import Settings
from .state import OptimizerState
from .state_checks import check_not_ensemble, check_state
from .step_in_progress import StepInProgress
from .stored_leaf import StoredLeaf


def open_step(
    settings: Settings, call: str, params: PyTree, state: OptimizerState
) -> StepInProgress:
    """Takes a model and its state apart, for one step."""
    check_model(call, params)
    leaves, rebuild = flatten(params)
    check_state(call, state, settings.rule)
    check_not_ensemble(call, state)
    check_has_values(call, model=params, state=state)
    names = [*settings.rule.moments]
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
            of_leaf = {
                name: column[index] for name, column in zip(names, moments, strict=True)
            }
            of_leaf, correction = state_specs.where_the_weight_is(
                (of_leaf, corrections[index]), sharding
            )
            stored[index] = StoredLeaf(of_leaf, correction, checksums[index])
    count = jnp.asarray(state.count)
    rates = settings.rates(count)
    # In an order that is the same in every process.
    dtypes = dict.fromkeys([compute_dtype(leaves[i].value.dtype) for i in stored])
    return StepInProgress(
        call=call,
        settings=settings,
        leaves=leaves,
        rebuild=rebuild,
        decayed=decayed(call, settings.decay.mask, params, leaves),
        shardings=shardings,
        # XLA cannot divide a kernel, nor a loop over chunks.
        way="divisible" if unknown else settings.backend,
        recorded=state.shardings,
        count=count,
        rule=rule_structure(settings.rule),
        rates=rates,
        scalars={dtype: settings.scalars(rates, count, dtype) for dtype in dtypes},
        stored=stored,
    )
