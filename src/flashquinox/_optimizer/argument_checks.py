"""The numbers that an optimizer is made of."""

import dataclasses
import math
from typing import Any

import jax

from .._common.dtypes import NARROW_DTYPES
from .._common.number_checks import check_flag, check_in_range, known_number
from .._common.text import shown
from .._rules.checks import check_moments_are_apart, check_rule
from .._rules.rule import ranges_of
from .._rules.whole_leaf import AnyRule, elementwise_parts
from .groups import Group
from .schedules import check_takes_count


def check_hyperparameters(call: str, group: Group) -> None:
    rule: Any = group.rule
    if not isinstance(rule, AnyRule):
        hint = ""
        if isinstance(rule, type) and issubclass(rule, AnyRule):
            hint = f" Make one: `{rule.__name__}(...)`."
        raise TypeError(
            f"`{call}(rule=...)` takes an instance of a subclass of "
            "`flashquinox.AbstractRule`, or of `AbstractWholeLeafRule`, "
            f"`AbstractMeansRule` or `AbstractMatrixRule`; got {shown(rule)}.{hint}"
        )
    for field in dataclasses.fields(rule):
        if field.type in (bool, "bool"):
            check_flag(call, f"{group.prefix}{field.name}", getattr(rule, field.name))
    for name, (low, high) in ranges_of(rule).items():
        argument = f"{group.prefix}{name}"
        check_in_range(call, argument, getattr(rule, name), low, high)
        if high <= 1:
            _check_exact(call, argument, getattr(rule, name))
    for name, value in (
        ("learning_rate", group.learning_rate),
        (group.decay.rate_name, group.decay.rate),
    ):
        if callable(value):
            check_takes_count(call, f"{group.prefix}{name}", value)
        else:
            check_in_range(call, f"{group.prefix}{name}", value, 0.0, math.inf)
    for part in elementwise_parts(rule):
        check_rule(call, part)
    check_moments_are_apart(call, rule)


def _check_exact(call: str, name: str, value: Any) -> None:
    """Of a decay rate, what counts is how far it is from 1."""
    if isinstance(value, jax.Array) and value.dtype in NARROW_DTYPES:
        raise ValueError(
            f"`{call}({name}=...)` arrived as {value.dtype}, in which 0.9 is 0.898 and "
            "0.999 is 1: with `optax.inject_hyperparams`, pass "
            "`hyperparam_dtype=jnp.float32`, or leave it out."
        )


def check_max_norm(call: str, max_norm: Any) -> None:
    if max_norm is None:
        return
    check_in_range(call, "max_norm", max_norm, 0.0, math.inf)
    if known_number(max_norm) == 0:
        raise ValueError(
            f"`{call}(max_norm=...)` must not be 0, which leaves nothing of any "
            "gradient. Pass None for no clipping."
        )
