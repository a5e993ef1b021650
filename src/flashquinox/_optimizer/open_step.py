"""Taking a model and its state apart, for one step."""

from functools import partial

import jax.numpy as jnp
from jaxtyping import PyTree

from .._common import memory
from .._model.trained import with_state
from .._model.trees import flatten, match
from .._sharding import state_specs
from .call_checks import check_has_values, check_model
from .device_checks import warn_of_parts
from .passes import all_passes
from .settings import Settings
from .state import opened, OptimizerState
from .state_checks import check_not_ensemble, check_state
from .step_in_progress import StepInProgress
from .stored_leaf import StoredLeaf
from .weight_dtypes import check_weight_dtypes


def open_step(
    settings: Settings, call: str, params: PyTree, state: OptimizerState
) -> StepInProgress:
    """Takes a model and its state apart, for one step."""
    check_model(call, params)
    leaves, rebuild = flatten(params)
    names = settings.moments
    check_state(call, state, names)
    state = opened(state)
    old_count = state.count
    check_not_ensemble(call, old_count)
    check_has_values(call, model=params, state=state)
    rules = settings.rules(call, params, leaves)
    of_state = partial(match, call, leaves=leaves, rebuild=rebuild)
    moments = {
        name: of_state(f"state.moments[{name!r}]", tree)
        for name, tree in state.moments.items()
    }
    corrections = of_state("state.corrections", state.corrections)
    check_weight_dtypes(call, leaves, corrections, state.weight_dtypes)
    checksums = of_state("state.checksums", state.checksums)
    trained = with_state(leaves, moments, corrections)
    shardings, unknown = settings.resolve_shardings(
        call, leaves, trained, state.shardings
    )
    numbers = [i for i, is_trained in enumerate(trained) if is_trained]
    count = memory.to_device(jnp.asarray(old_count))
    rates = settings.rates(count)
    decays = settings.decayed(call, params, leaves, rules)
    passes = all_passes(call, settings, rates, count, leaves, rules, decays, numbers)
    warn_of_parts(
        call,
        [leaves[i] for i in numbers if passes[i].between is not None],
        "This rule takes norms, means or products",
        state.shardings,
    )
    stored, parts = {}, {id(x) for x in state.parts()}
    for i in numbers:
        of_leaf = {name: moments[name][i] for name in passes[i].moments}
        correction, sharding = corrections[i], shardings[i]
        if sharding is not None:
            of_leaf, correction = state_specs.where_the_weight_is(
                (of_leaf, correction), sharding
            )
        stored[i] = StoredLeaf.of(of_leaf, correction, checksums[i], parts)
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
        weight_dtypes=state.weight_dtypes,
        packing=state.packing,
        count=count,
        old_count=old_count,
        moments=names,
        rules=rules,
        rates=rates,
        stored=stored,
        passes=passes,
    )
