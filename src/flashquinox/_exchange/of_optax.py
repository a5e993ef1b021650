"""Conversion between the states of Optax's optimizers and of this library's."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jaxtyping import PyTree

from .._model.trees import flatten, Leaf, match, State
from .._model.variables import without_variables
from .._optimizer.accumulation_state import AccumulationState
from .._optimizer.call_checks import check_has_values
from .._optimizer.state import OptimizerState, StepCount
from .._optimizer.states import bases, find
from .._storage import moment_values
from .._storage.moment_bases import bases_first
from .._storage.quant_moment import StoredMoment
from .optax_counts import (
    as_count,
    CALL_COUNTERS,
    count_field,
    counts_of_steps,
    is_traced,
    schedule_states,
    the_one_count,
    with_counts,
)


# Optax's states with moments of these names.
_STATES = {
    frozenset({"mu", "nu"}): optax.ScaleByAdamState,
    frozenset({"m", "v", "n", "g"}): optax.ScaleByAdanState,
    frozenset({"mu"}): optax.ScaleByLionState,
    frozenset({"trace"}): optax.TraceState,
}

_T = TypeVar("_T")


def from_optax(optax_state: PyTree, state: State) -> State:
    """Resumes a run of `optax.adamw`, `optax.adam`, `optax.nadam`, `optax.adan`,
    `optax.lion` or `optax.sgd`: fills moments and count from its state.

    | moments of `state` | come from |
    | --- | --- |
    | `mu`, `nu` | `optax.ScaleByAdamState` |
    | `m`, `v`, `n`, `g` | `optax.ScaleByAdanState` |
    | `mu` | `optax.ScaleByLionState` |
    | `trace` | `optax.TraceState` |

    The state is found wherever it is, as inside of `optax.chain`, `optax.MultiSteps`,
    `optax.inject_hyperparams` or `optax.masked`.

    ??? Example

        ```python
        model, state = fq.prepare(float32_model, optim)
        state = from_optax(optax_state, state)
        ```

    **Arguments:**

    - `optax_state`: the state of the Optax optimizer, for a model of the same
        structure and shapes, in any floating-point dtypes. A state of
        `optax.MultiSteps` must not hold accumulated gradients.
    - `state`: the [`flashquinox.OptimizerState`][] to fill, as `init` made it, or a
        state of an Optax wrapper with one inside. It decides how moments are stored,
        and on which devices.

    **Returns:**

    `state` with these moments: rounded to nearest where they are compressed, otherwise
    cast. Its count, and the counts of schedules in it, are that of the Optax state. If
    that has no count, as `optax.sgd` with a constant learning rate, they stay (set them
    with `optax.tree.set(state, count=...)`). Corrections stay.

    **Raises:**

    `ValueError` or `TypeError` if there is no such state, or more than one; if it has
    other moments, as that of `optax.adamw` has for Lion; if counts differ; if
    accumulated gradients would be lost; or if a leaf does not fit. The message names
    the leaf.
    """
    call = "from_optax"
    check_has_values(call, optax_state=optax_state)
    target = _only(call, "state", state, OptimizerState)
    _check_nothing_accumulated(call, optax_state)
    source: Any = None
    new_moments: dict[str, Any] = {}
    if target.moments:
        source = _only(call, "optax_state", optax_state, _source(call, target))
        for name in bases_first(target.moments):
            stored = target.moments[name]
            new_moments[name] = _map(
                call,
                f"optax_state.{name}",
                _of_leaf(call, name, moment_values.store, bases(new_moments, stored)),
                getattr(source, name),
                stored,
            )
    else:
        _check_no_moments(call, optax_state)
    count = the_one_count(call, counts_of_steps(optax_state, source))
    if count is None:
        count = target.count
    filled = dataclasses.replace(
        target,
        steps=StepCount(as_count(call, count, target.count)),
        moments=new_moments,
    )
    return with_counts(call, find(state).replace([filled]), count)


def to_optax(state: PyTree, optax_state: State) -> State:
    """The inverse of [`flashquinox.exchange.from_optax`][]: continues with an Optax
    optimizer, in full precision.

    ??? Example

        ```python
        float32_model = fq.master_weights(model, state)
        params = eqx.filter(float32_model, eqx.is_inexact_array)
        optax_state = to_optax(state, optax.adamw(1e-3).init(params))
        ```

    **Arguments:**

    - `state`: a [`flashquinox.OptimizerState`][], or a state of an Optax wrapper with
        one inside.
    - `optax_state`: the state to fill, as the `init` of the Optax optimizer made it. It
        decides the dtypes and the devices of moments.

    **Returns:**

    `optax_state` with the moments of `state`, decoded, and its count, also in the
    states of schedules. A round trip of moments changes the numbers by at most half a
    step between two codes and half a step of the scale of their group.

    **Raises:**

    The errors of [`flashquinox.exchange.from_optax`][].
    """
    call = "to_optax"
    check_has_values(call, state=state)
    source = _only(call, "state", state, OptimizerState)
    _check_nothing_accumulated(call, state)
    _check_nothing_accumulated(call, optax_state)
    count = source.count
    if source.moments:
        kind = _source(call, source)
        target = _only(call, "optax_state", optax_state, kind)
        fields: dict[str, Any] = {}
        for name, stored in source.moments.items():
            fields[name] = _map(
                call,
                f"state.moments[{name!r}]",
                _of_leaf(call, name, moment_values.load, bases(source.moments, stored)),
                stored,
                getattr(target, name),
            )
        field = count_field(target)
        if field is not None:
            fields[field] = as_count(call, count, getattr(target, field))
        filled = target._replace(**fields)
        optax_state = find(optax_state, kind).replace([filled])
    else:
        _check_no_moments(call, optax_state)
    return with_counts(call, optax_state, count)


def _source(call: str, state: OptimizerState) -> Any:
    """The class of Optax's states with these moments."""
    names = frozenset(state.moments)
    if names not in _STATES:
        known = ", ".join(str(sorted(names)) for names in _STATES)
        raise ValueError(
            f"`{call}`: the state has the moments {sorted(names)}. Optax's optimizers "
            f"that can be exchanged have {known}: move others one by one."
        )
    return _STATES[names]


def _map(
    call: str,
    text: str,
    function: Callable[[Leaf, Any, Any], StoredMoment],
    given: PyTree,
    like: PyTree,
) -> PyTree:
    """A tree like `like`: of `function(leaf, given value, like value)`."""
    leaves, rebuild = flatten(like)
    values = match(call, text, given, leaves)
    new = []
    for leaf, value in zip(leaves, values, strict=True):
        if (value is None) != (leaf.value is None):
            has, lacks = f"`{text}`", "the other state"
            if value is None:
                has, lacks = lacks, has
            raise ValueError(
                f"`{call}`: at `{leaf.name}`, {has} has an array, but {lacks} has None:"
                " it does not train this leaf. Pass states of the same model."
            )
        new.append(None if value is None else function(leaf, value, leaf.value))
    return rebuild(new)


def _of_leaf(
    call: str,
    name: str,
    convert: Callable[..., Any],
    relative_to: dict[Any, StoredMoment],
) -> Callable[[Leaf, Any, Any], Any]:
    """What stores or loads the moment of this name of a leaf."""

    def convert_leaf(leaf: Leaf, given: Any, like: Any) -> Any:
        what, base = f"{name!r} at `{leaf.name}`", relative_to.get(leaf.unwrapped)
        return convert(call, what, given, like, base)

    return convert_leaf


#
# States within states
#


def _only(call: str, name: str, tree: PyTree, kind: type[_T]) -> _T:
    found = find(tree, kind).values
    if len(found) == 1:
        return found[0]
    if not found:
        raise ValueError(
            f"`{call}`: there is no `{kind.__name__}` in `{name}`, which is a "
            f"{type(tree).__name__}. Pass the state of the optimizer with the same "
            "moments."
        )
    raise ValueError(
        f"`{call}`: there are {len(found)} `{kind.__name__}`s in `{name}`, and it "
        "cannot be told which is meant. Pass the part of it that has the one."
    )


def _check_no_moments(call: str, optax_state: PyTree) -> None:
    """The state must be that of an optimizer without moments, such as `optax.sgd`
    without momentum."""

    moments = frozenset().union(*_STATES)

    def keeps(x: Any) -> bool:
        is_optax = type(x).__module__.partition(".")[0] == "optax"
        return is_optax and not moments.isdisjoint(getattr(x, "_fields", ()))

    for node in jtu.tree_leaves(optax_state, is_leaf=keeps):
        if keeps(node):
            raise ValueError(
                f"`{call}`: the `{type(node).__name__}` in `optax_state` has moments, "
                "but `state` has none, as of `flashquinox.sgd` without momentum. Pass "
                "states of optimizers with the same moments."
            )
    kinds = optax.EmptyState, *schedule_states(), *CALL_COUNTERS
    if not any(find(optax_state, kind).values for kind in kinds):
        raise ValueError(
            f"`{call}`: `state` has no moments, but `optax_state`, which is a "
            f"{type(optax_state).__name__}, is no state of an Optax optimizer without "
            "moments. Pass one of `optax.sgd`."
        )


def _check_nothing_accumulated(call: str, tree: PyTree) -> None:
    for kind, name in (
        (optax.MultiStepsState, "optax.MultiSteps"),
        (AccumulationState, "flashquinox.accumulate"),
    ):
        for state in find(tree, kind).values:
            number = without_variables(state.mini_step)
            if not is_traced(number) and jnp.any(number != 0):
                raise ValueError(
                    f"`{call}`: `{name}` has accumulated {number} gradients, which "
                    "would be lost. Call it until it has taken a step."
                )
