"""The state of a model that has not been trained yet."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import PyTree

from .._backends import dispatch
from .._common import eager, memory, meshes
from .._common.dtypes import compute_dtype, NARROW_DTYPES
from .._model.quantized import check_no_scales
from .._model.trained import is_trainable
from .._model.trees import flatten, Leaf, Rebuild
from .._rules.whole_leaf import AbstractMatrixRule, AbstractMeansRule, AnyRule
from .._sharding import new_arrays, record
from .._storage.layout import Layout
from .._storage.quant_moment import StoredMoment, zeros
from .._storage.split import Correction
from . import state_memory
from .call_checks import check_model, warn_of_nothing_to_train
from .checksums import checksums
from .device_checks import warn_of_divided_groups
from .leaf_checks import check_correction_has_effect
from .packing import Packing
from .passes import axes_of, check_has_axes
from .settings import Settings
from .state import OptimizerState, StepCount
from .weight_dtypes import record_dtypes


def initial_state(settings: Settings, params: PyTree) -> OptimizerState:
    call = f"{settings.call}(...).init"
    check_model(call, params)
    leaves, rebuild = flatten(params)
    trained = {
        index: leaf for index, leaf in enumerate(leaves) if is_trainable(leaf.value)
    }
    warn_of_nothing_to_train(call, leaves, trained)
    check_no_scales(call, leaves, trained)
    rules = settings.rules(call, params, leaves)
    if trained:
        # What a step would find wrong.
        settings.decayed(call, params, leaves, rules)
        settings.rates(jnp.zeros((), jnp.int32))
    check_correction_has_effect(call, settings.storage, list(trained.values()))
    are_trained = [index in trained for index in range(len(leaves))]
    shardings, unknown = settings.resolve_shardings(
        call, leaves, are_trained, recorded=()
    )
    for index, leaf in trained.items():
        rule = rules[index].rule
        if isinstance(rule, AbstractMatrixRule):
            axes_of(call, rule, leaf)
        if isinstance(rule, AbstractMeansRule):
            check_has_axes(call, rule, leaf)
    makers = {
        index: partial(
            stored_zeros, settings, rules[index].rule, leaf, shardings[index]
        )
        for index, leaf in trained.items()
    }
    states, (count,) = make_states(
        settings, call, makers, leaves, shardings, [lambda: jnp.zeros((), jnp.int32)]
    )
    moments = {name: [None for _ in leaves] for name in settings.moments}
    corrections: list[Any] = [None for _ in leaves]
    for index in trained:
        stored, correction = states[index]
        sharding = shardings[index]
        if sharding is not None:
            warn_of_divided_groups(call, leaves[index], stored, sharding)
        corrections[index] = correction
        for name, moment in stored.items():
            moments[name][index] = moment
    trees = (
        {name: rebuild.state(x) for name, x in moments.items()},
        rebuild.state(corrections),
        _checksums(settings, leaves, corrections, rebuild),
    )
    apart = [
        leaves[i].path
        for i in trained
        if (x := shardings[i]) is not None and not x.is_fully_replicated
    ]
    return OptimizerState(
        StepCount(count),
        moments=trees[0],
        corrections=trees[1],
        checksums=trees[2],
        shardings=record.record(leaves, shardings, ()),
        weight_dtypes=record_dtypes(leaves, corrections),
        # What may be divided stays as it is.
        packing=Packing.of(trees, 0 if unknown else settings.storage.pack_below, apart),
    )


def make_states(
    settings: Settings,
    call: str,
    makers: dict[int, Callable[[], PyTree]],
    leaves: list[Leaf],
    shardings: list[NamedSharding | None],
    others: list[Callable[[], PyTree]],
) -> tuple[dict[int, PyTree], list[PyTree]]:
    """What these make for the leaves of these numbers, divided like them, in the memory
    that the settings say; and what others make, which belongs to no leaf."""
    is_traced = record.are_traced(leaves)
    makers, away = dict(makers), dict[int, Any]()
    if settings.state_memory == memory.HOST_KIND:
        trained = {i: leaves[i] for i in makers}
        state_memory.check_has_host_memory(call, list(trained.values()))
        away = {i: x for i, x in trained.items() if state_memory.is_worth_it(x)}
    if not is_traced:
        made = state_memory.make(
            call,
            [makers.pop(i) for i in away],
            list(away.values()),
            [shardings[i] for i in away],
        )
        away = dict(zip(away, made, strict=True))
    everywhere = meshes.everywhere(shardings)
    made = new_arrays.make(
        [*makers.values(), *others],
        [*(shardings[index] for index in makers), *([everywhere] * len(others))],
        is_traced=is_traced,
    )
    states = dict(zip(makers, made[: len(makers)], strict=True))
    if is_traced:
        away = {i: state_memory.moved(states[i]) for i in away}
    return states | away, made[len(makers) :]


def _checksums(
    settings: Settings,
    leaves: list[Leaf],
    corrections: list[Any],
    rebuild: Rebuild,
) -> PyTree:
    if settings.verify_weights is None:
        return None
    new: list[Any] = [None for _ in leaves]
    kept = [i for i, correction in enumerate(corrections) if correction is not None]
    found = checksums([jnp.asarray(leaves[i].value) for i in kept])
    for index, x in zip(kept, found, strict=True):
        new[index] = x
    return rebuild.state(new)


def stored_zeros(
    settings: Settings, rule: AnyRule, leaf: Leaf, sharding: NamedSharding | None
) -> tuple[dict[str, StoredMoment], Correction | None]:
    """The moments and the correction of a leaf that has not been trained yet."""
    shape, dtype = leaf.value.shape, jnp.dtype(leaf.value.dtype)
    layout, codecs = _new_layout(settings, shape, sharding), settings.storage.codecs
    wide = compute_dtype(dtype)
    moments = {
        name: eager.zeros(moment.shape(shape), wide)
        if moment.mean_over
        else zeros(
            codecs.of(moment, shape), layout, wide, codecs.base_of(moment, shape)
        )
        for name, moment in rule.moments.items()
    }
    if settings.storage.correction_dtype is None or dtype not in NARROW_DTYPES:
        return moments, None
    return moments, eager.zeros(shape, settings.storage.correction_dtype)


def _new_layout(
    settings: Settings, shape: tuple[int, ...], sharding: NamedSharding | None
) -> Layout:
    cut = None if sharding is None else meshes.divisions(sharding)
    rows = dispatch.prefers_rows(settings.backend)
    return settings.storage.codecs.layout(
        shape, settings.storage.group_size, prefer_rows=rows, parts=cut
    )
