"""Checks of arguments that are numbers, or True or False.

Of a traced value, only the shape and the dtype are checked.
"""

import math
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from .dtypes import NARROW_DTYPES
from .text import shown


def check_flag(call: str, name: str, value: Any) -> bool:
    """The argument must be True or False. It decides the structure of a program: a
    string would always count as true, and the value of an array may not be known."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(
            f"`{call}({name}=...)` must be True or False; got {shown(value)}."
        )
    return bool(value)


def check_function(call: str, name: str, value: Any) -> None:
    if not callable(value):
        raise TypeError(f"`{call}({name}=...)` takes a function; got {shown(value)}.")


def check_constant(call: str, name: str, value: Any) -> None:
    """The argument must be a number and no array: it is part of a hash, and decides the
    structure of a program."""
    is_array = isinstance(value, jax.Array | np.ndarray)
    if is_array or not is_number(value):
        raise TypeError(f"`{call}({name}=...)` takes a number; got {shown(value)}.")


def check_number(call: str, name: str, value: Any) -> None:
    if not is_number(value):
        raise TypeError(
            f"`{call}({name}=...)` takes a number or a scalar array; got "
            f"{shown(value)}."
        )


def check_in_range(call: str, name: str, value: Any, low: float, high: float) -> None:
    check_number(call, name, value)
    number = known_number(value)
    if number is None or low <= number < high:
        return
    hint = ""
    if isinstance(value, jax.Array) and value.dtype in NARROW_DTYPES:
        hint = (
            f" It arrived as {value.dtype}, which rounds: with "
            "`optax.inject_hyperparams`, pass `hyperparam_dtype=jnp.float32`."
        )
    elif low <= value < high:
        hint = " It is rounded to float32."
    raise ValueError(
        f"`{call}({name}=...)` must be at least {low:g} and less than {high:g}; got "
        f"{value}.{hint}"
    )


def is_zero(value: Any) -> bool:
    """Whether a value is a number that is known to be 0 when the program is built."""
    is_constant = isinstance(value, int | float | np.number)
    return is_constant and not isinstance(value, bool) and bool(value == 0)


def is_number(value: Any) -> bool:
    """Whether a value is a real number, or a scalar array of one. Booleans are not."""
    if isinstance(value, bool | complex) or not eqx.is_array_like(value):
        return False
    if isinstance(value, int | float):
        return True
    dtype = jnp.result_type(value)
    is_real = jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.floating)
    return is_real and np.ndim(value) == 0


def known_number(value: Any) -> float | None:
    """The number that a step computes with. `None` if it is traced.

    Steps compute in float32, unless `jax_enable_x64` is set: 1 - 1e-9 is 1, and 1e39 is
    infinite.
    """
    if isinstance(value, jax.core.Tracer):
        return None
    with np.errstate(over="ignore"):
        try:
            number = float(np.asarray(value))
        except OverflowError:
            # A Python integer beyond the range of floats.
            return math.inf if value > 0 else -math.inf
        return number if jax.config.jax_enable_x64 else float(np.float32(number))
