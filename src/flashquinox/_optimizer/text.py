"""An optimizer as one line of text."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.core
import numpy as np

from .._common.number_checks import is_zero
from .._common.text import function_name, shown
from .._storage.defaults import GROUP_SIZE, MASTER_WEIGHT_BITS
from .._storage.moment_codecs import MomentCodecs
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
    arguments["weight_decay"] = optim.weight_decay
    others = {
        "decoupled": (optim.decoupled or optim.call != "optimizer", True),
        "decouple_lr": (optim.peak_learning_rate is not None, False),
        "peak_learning_rate": (optim.peak_learning_rate, None),
        "mask": (optim.mask, None),
        "master_weight_bits": (optim.master_weight_bits, MASTER_WEIGHT_BITS),
        "moments": (_name(optim.codecs), "flashquinox"),
        "group_size": (optim.group_size, GROUP_SIZE),
        "skip_nonfinite": (optim.skip_nonfinite, False),
        "dither_weights": (optim.dither_weights, False),
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


def _is_default(value: Any, default: Any) -> bool:
    is_plain = isinstance(value, bool | int | str | None)
    return is_plain and bool(value == default)


def _name(codecs: MomentCodecs) -> Any:
    """What `moments=` may be for these codecs."""
    names = MomentCodecs.names()
    for signed in names:
        if MomentCodecs.named(signed) == codecs:
            return signed
    for signed in names:
        for nonnegative in names:
            if MomentCodecs.named((signed, nonnegative)) == codecs:
                return signed, nonnegative
    return codecs


def _joined(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{name}={_short(x)}" for name, x in arguments.items())


def _short(value: Any) -> str:
    if isinstance(value, jax.core.Tracer):
        return f"<traced {jax.typeof(value).str_short()}>"
    if isinstance(value, MomentCodecs):
        return f"MomentCodecs({value.signed!r}, {value.nonnegative!r})"
    if isinstance(value, eqx.Module):
        return f"{type(value).__name__}(...)"
    if isinstance(value, jax.Array) and value.is_deleted():
        return "<deleted>"
    if isinstance(value, jax.Array | np.ndarray | np.number) and value.ndim == 0:
        return str(value)
    return function_name(value) if callable(value) else shown(value)
