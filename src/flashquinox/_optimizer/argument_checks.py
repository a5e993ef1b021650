"""The arguments that an optimizer is made of, and what its schedules return."""

import dataclasses
import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.core
import jax.tree_util as jtu
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Scalar, ScalarLike

from .._backends import platforms
from .._backends.dispatch import Backend, BACKENDS
from .._common.dtypes import NARROW_DTYPES
from .._common.number_checks import (
    check_flag,
    check_in_range,
    is_number,
    is_zero,
    known_number,
)
from .._common.text import function_name, shown
from .._model.trees import path_name
from .._rules.checks import check_rule
from .._rules.rule import AbstractRule, ranges_of
from .._storage.codec_checks import check_codec
from .._storage.defaults import _known_integer, StaticBits, Unknown
from .._storage.moment_codecs import MomentCodecs
from .._storage.split import CORRECTION_DTYPES


#
# Arguments of optimizers
#


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


def check_decoupling(call: str, decoupled: Any, decouple_lr: Any) -> None:
    is_decoupled = check_flag(call, "decoupled", decoupled)
    if check_flag(call, "decouple_lr", decouple_lr) and not is_decoupled:
        raise ValueError(
            f"`{call}(decouple_lr=True)` only has a meaning with `decoupled=True`: L2 "
            "regularization goes into the gradient."
        )


def check_peak(
    call: str, learning_rate: Any, decouple_lr: Any, peak_learning_rate: Any
) -> Any:
    """The peak learning rate of decoupled decay, or None if it is not wanted."""
    if not check_flag(call, "decouple_lr", decouple_lr):
        if peak_learning_rate is not None:
            raise ValueError(
                f"`{call}(peak_learning_rate=...)` only has a meaning with "
                "`decouple_lr=True`."
            )
        return None
    if peak_learning_rate is not None:
        name = "peak_learning_rate"
        check_in_range(call, name, peak_learning_rate, 0.0, math.inf)
        if known_number(peak_learning_rate) == 0:
            raise ValueError(f"`{call}(peak_learning_rate=...)` must not be 0.")
        return peak_learning_rate
    # `optax.inject_hyperparams` gives an array, also where it is not traced, and
    # another one in each step.
    if callable(learning_rate) or isinstance(learning_rate, jax.Array | np.ndarray):
        raise ValueError(
            f"`{call}(decouple_lr=True)` divides by the peak of the learning rate, "
            "which a schedule or an array does not tell: pass "
            "`peak_learning_rate=...`."
        )
    # A constant learning rate of 0 is its own peak as well.
    return 1.0 if known_number(learning_rate) == 0 else learning_rate


def check_max_norm(call: str, max_norm: Any) -> None:
    if max_norm is None:
        return
    check_in_range(call, "max_norm", max_norm, 0.0, math.inf)
    if known_number(max_norm) == 0:
        raise ValueError(
            f"`{call}(max_norm=...)` must not be 0, which leaves nothing of any "
            "gradient. Pass None for no clipping."
        )


def check_mask(call: str, mask: Any, weight_decay: Any) -> None:
    """Warns of a mask that has no effect."""
    if mask is not None and is_zero(weight_decay):
        warnings.warn(
            f"`{call}(mask=...)` has no effect: the mask says which weights decay, and "
            "`weight_decay` is 0. Pass `weight_decay=...`, or leave the mask out.",
            stacklevel=5,
        )


def check_moments(call: str, moments: Any) -> MomentCodecs:
    if isinstance(moments, MomentCodecs):
        for codec in (moments.signed, moments.nonnegative):
            check_codec(call, codec)
        return moments
    known = MomentCodecs.names()
    is_known = lambda name: isinstance(name, str) and name in known
    if is_known(moments):
        return MomentCodecs.named(moments)
    if isinstance(moments, tuple | list) and len(moments) == 2:
        signed, nonnegative = moments
        if is_known(signed) and is_known(nonnegative):
            return MomentCodecs.named((signed, nonnegative))
    names = ", ".join(map(repr, known))
    raise ValueError(
        f"`{call}(moments=...)` must be one of {names}, a pair of these (for signed "
        "moments and for averages of squares), or a `flashquinox.MomentCodecs`; got "
        f"{shown(moments)}."
    )


def check_backend(call: str, backend: Any) -> Backend:
    if isinstance(backend, str) and backend in BACKENDS:
        if backend in ("gpu", "tpu"):
            platforms.require(call, backend)
        elif backend == "auto":
            platforms.load()
        return backend
    names = ", ".join(repr(name) for name in BACKENDS)
    raise ValueError(
        f"`{call}(backend=...)` must be one of {names}; got {shown(backend)}."
    )


#
# How weights and moments are stored, and where
#


def check_master_weight_bits(call: str, value: Any) -> StaticBits:
    """The argument of this name, as a Python number if it is a known one."""
    bits = _known_integer(value)
    if bits is None or bits is Unknown.TRACED:
        return bits
    if isinstance(bits, int | str) and bits in (*CORRECTION_DTYPES, "auto"):
        return cast(StaticBits, bits)
    raise ValueError(
        f"`{call}(master_weight_bits=...)` must be 'auto', 24, 32 or None; got "
        f"{shown(value)}."
    )


def check_dither_weights(call: str, value: Any, bits: StaticBits) -> bool:
    if check_flag(call, "dither_weights", value) and bits is not None:
        raise ValueError(
            f"`{call}(dither_weights=True)` has no effect on weights with a "
            "correction, which lose no steps to begin with: pass "
            "`master_weight_bits=None` too, or leave it out."
        )
    return bool(value)


def check_shardings(call: str, value: Any) -> tuple[tuple[NamedSharding, ...], Any]:
    """The argument of this name, as its leaves and their structure."""
    for path, x in jtu.tree_leaves_with_path(value):
        if not isinstance(x, NamedSharding):
            raise TypeError(
                f"`{call}(shardings=...)` takes a tree of `jax.sharding.NamedSharding`s"
                f"; got {shown(x)} at `{path_name(path)}`."
            )
    leaves, structure = jtu.tree_flatten(value)
    return tuple(leaves), structure


#
# Schedules
#


def check_takes_count(call: str, name: str, schedule: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(schedule)
    except (TypeError, ValueError):
        # Some callables have none that Python knows.
        return
    try:
        signature.bind(0)
    except TypeError as error:
        raise TypeError(
            f"`{call}({name}=...)` takes a number, or a schedule: a function of the "
            f"number of steps taken. {function_name(schedule)} cannot be "
            f"called with one argument ({error})."
        ) from None


def scheduled(call: str, name: str, value: Any, count: Scalar) -> ScalarLike:
    """A learning rate or weight decay in the step after so many.

    What a schedule returns must be a number. If that is known, as it is outside of
    `jit`, it must also be one that the argument itself could be.
    """
    if not callable(value):
        return value
    try:
        result: Any = value(count)
    except Exception as error:
        error.add_note(f"In the schedule of `{call}({name}=...)`.")
        raise
    returned = f"`{call}({name}=...)`: the schedule {function_name(value)} returned "
    if not is_number(result):
        raise TypeError(
            f"{returned}{shown(result)}. It must return a number or a scalar array."
        )
    number = known_number(result)
    if number is not None and not 0 <= number < math.inf:
        when = "" if isinstance(count, jax.core.Tracer) else f" after {count} steps"
        raise ValueError(
            f"{returned}{result}{when}. It must return at least 0 and less than inf."
        )
    return result
