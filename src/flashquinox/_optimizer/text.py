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
from .options import DEFAULTS
from .settings import Settings


def optimizer_text(settings: Settings) -> str:
    """The call that makes this optimizer: with its learning rate, its hyperparameters,
    its weight decay, and all other arguments that are not at their defaults."""
    of_rule = _of_rule(settings.rule)
    arguments = {"learning_rate": settings.learning_rate, **of_rule}
    first = []
    if settings.call == "optimizer":
        first = [f"{type(settings.rule).__name__}({_joined(of_rule)})"]
        arguments = {"learning_rate": settings.learning_rate}
    arguments["weight_decay"] = settings.decay.rate
    others = {
        "mask": (settings.decay.mask, None),
        "decay": (settings.decay.form, _default_form(settings)),
        "peak_learning_rate": (settings.decay.peak_learning_rate, None),
        "storage": (settings.storage, Storage()),
    }
    for name in ("skip_nonfinite", "verify_weights", "backend"):
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
    """The hyperparameters of a rule, but for those that are off."""
    found = {}
    for field in dataclasses.fields(rule):
        value = getattr(rule, field.name)
        is_off = is_zero(value) and is_zero(field.default)
        if value is not None and value is not False and not is_off:
            found[field.name] = value
    return found


def _default_form(settings: Settings) -> str:
    """The form of weight decay without an argument `decay`. Factories other than
    `optimizer` either have no such argument, or no L2 regularization."""
    is_named = settings.call != "optimizer"
    return "l2" if is_named and settings.decay.form == "l2" else "decoupled"


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
