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
from .engine import Transformation


def optimizer_text(optim: Transformation) -> str:
    """The call that makes such an optimizer: with its learning rate and
    hyperparameters, and what else is not as by default."""
    of_rule = _of_rule(optim.rule)
    arguments = {"learning_rate": optim.learning_rate, **of_rule}
    first = []
    if optim.call == "optimizer":
        first = [f"{type(optim.rule).__name__}({_joined(of_rule)})"]
        arguments = {"learning_rate": optim.learning_rate}
    arguments["weight_decay"] = optim.decay.rate
    others = {
        "mask": (optim.decay.mask, None),
        "decay": (optim.decay.form, _default_form(optim)),
        "peak_learning_rate": (optim.decay.peak_learning_rate, None),
        "storage": (optim.storage, Storage()),
        "skip_nonfinite": (optim.skip_nonfinite, False),
        "verify_weights": (optim.verify_weights, None),
        "backend": (optim.backend, "auto"),
    }
    arguments |= {
        name: value
        for name, (value, default) in others.items()
        if not _is_default(value, default)
    }
    parts = [*first, _joined(arguments)]
    if optim.shardings[0]:
        parts.append("shardings=...")
    return f"{optim.call}({', '.join(parts)})"


def _of_rule(rule: Any) -> dict[str, Any]:
    """The hyperparameters of a rule, but for those that are off."""
    found = {}
    for field in dataclasses.fields(rule):
        value = getattr(rule, field.name)
        is_off = is_zero(value) and is_zero(field.default)
        if value is not None and value is not False and not is_off:
            found[field.name] = value
    return found


def _default_form(optim: Transformation) -> str:
    """The form of weight decay without an argument `decay`. Factories other than
    `optimizer` either have no such argument, or no L2 regularization."""
    is_named = optim.call != "optimizer"
    return "l2" if is_named and optim.decay.form == "l2" else "decoupled"


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
