"""An optimizer as one line of text."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.core
import numpy as np

from .._common.number_checks import is_zero
from .._common.text import function_name, shown
from .._storage.storage import Storage
from .groups import AbstractChoice
from .options import DEFAULTS
from .settings import Settings


def optimizer_text(settings: Settings) -> str:
    """The call that makes this optimizer: with its learning rate, its hyperparameters,
    its weight decay, and all other arguments that are not at their defaults."""
    group, *more = settings.groups
    of_rule = _of_rule(group.rule)
    arguments = {"learning_rate": group.learning_rate, **of_rule}
    first = []
    if settings.call == "optimizer":
        first = [f"{type(group.rule).__name__}({_joined(of_rule)})"]
        arguments = {"learning_rate": group.learning_rate}
    arguments[group.decay.rate_name] = group.decay.rate
    for other in more:
        if not other.prefix:
            # It has the arguments of the first.
            continue
        of_group = {"learning_rate": other.learning_rate, **_of_rule(other.rule)}
        of_group[other.decay.rate_name] = other.decay.rate
        arguments |= {f"{other.prefix}{name}": x for name, x in of_group.items()}
    arguments |= _of_choice(settings.choice)
    others = {
        group.decay.mask_name: (group.decay.mask, None),
        "decay": (group.decay.form, _default_form(settings)),
        "peak_learning_rate": (group.decay.peak_learning_rate, None),
        "storage": (settings.storage, Storage()),
    }
    for name in ("skip_nonfinite", "verify_weights", "backend", "state_memory"):
        others[name] = (getattr(settings, name), DEFAULTS[name])
    arguments |= {
        name: value
        for name, (value, default) in others.items()
        if not _is_default(value, default)
    }
    parts = [*first, _joined(arguments)]
    if settings.shardings[0]:
        # A tree of them would be long.
        parts.append("shardings=...")
    return f"{settings.call}({', '.join(parts)})"


def _of_rule(rule: Any) -> dict[str, Any]:
    """The hyperparameters of a rule, but for those that are off, and static ones at
    their defaults."""
    found = {}
    for field in dataclasses.fields(rule):
        value = getattr(rule, field.name)
        is_off = is_zero(value) and is_zero(field.default)
        if field.metadata.get("static", False):
            is_off = value == field.default
        elif value is None:
            is_off = field.default is None
        if not is_off:
            found[field.name] = value
    return found


def _of_choice(choice: AbstractChoice | None) -> dict[str, Any]:
    """The arguments that say which leaves are of which group."""
    fields = [] if choice is None else dataclasses.fields(choice)
    values = {field.name: getattr(choice, field.name) for field in fields}
    return {name: value for name, value in values.items() if value is not None}


def _default_form(settings: Settings) -> str:
    """The form of weight decay without an argument `decay`. Factories other than
    `optimizer` either have no such argument, or no L2 regularization."""
    is_named = settings.call != "optimizer"
    form = settings.groups[0].decay.form
    return form if is_named and form in ("l2", "unscaled") else "decoupled"


def _is_default(value: Any, default: Any) -> bool:
    is_plain = isinstance(value, bool | int | str | Storage | None)
    return is_plain and bool(value == default)


def _joined(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{name}={_short(x)}" for name, x in arguments.items())


def _short(value: Any) -> str:
    if isinstance(value, jax.core.Tracer):
        return f"<traced {jax.typeof(value).str_short()}>"
    if isinstance(value, Storage):
        return repr(value)
    if isinstance(value, eqx.Module):
        return f"{type(value).__name__}(...)"
    if isinstance(value, jax.Array) and value.is_deleted():
        return "<deleted>"
    if isinstance(value, jax.Array | np.ndarray | np.number) and value.ndim == 0:
        return str(value)
    return function_name(value) if callable(value) else shown(value)
