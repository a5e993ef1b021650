"""The numbers that an optimizer is made of."""

import dataclasses
import math
from typing import Any

import jax

from .._common.dtypes import NARROW_DTYPES
from .._common.number_checks import check_flag, check_in_range, known_number
from .._common.text import shown
from .._rules.checks import check_rule
from .._rules.rule import AbstractRule, ranges_of
from .schedules import check_takes_count


def check_hyperparameters(
    call: str, rule: Any, learning_rate: Any, weight_decay: Any
) -> None:
    if not isinstance(rule, AbstractRule):
        hint = ""
        if isinstance(rule, type) and issubclass(rule, AbstractRule):
            hint = f" Make one: `{rule.__name__}(...)`."
        raise TypeError(
            f"`{call}(rule=...)` takes an instance of a subclass of "
            f"`flashquinox.AbstractRule`; got {shown(rule)}.{hint}"
        )
    for field in dataclasses.fields(rule):
        if field.type in (bool, "bool"):
            check_flag(call, field.name, getattr(rule, field.name))
    for name, (low, high) in ranges_of(rule).items():
        check_in_range(call, name, getattr(rule, name), low, high)
        if high <= 1:
            _check_exact(call, name, getattr(rule, name))
    for name, value in (
        ("learning_rate", learning_rate),
        ("weight_decay", weight_decay),
    ):
        if callable(value):
            check_takes_count(call, name, value)
        else:
            check_in_range(call, name, value, 0.0, math.inf)
    check_rule(call, rule)


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
