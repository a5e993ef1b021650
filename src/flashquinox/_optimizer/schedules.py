"""Learning rates and weight decays are numbers, or functions of the number of steps."""

import inspect
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax.core
from jaxtyping import Scalar, ScalarLike

from .._common.number_checks import is_number, known_number
from .._common.text import function_name, shown


ScalarOrSchedule: TypeAlias = ScalarLike | Callable[[Scalar], ScalarLike]


def check_takes_count(call: str, name: str, schedule: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(schedule)
    except (TypeError, ValueError):
        # Some callables, such as built-in ones, have no signature.
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
    """A learning rate or weight decay after `count` steps.

    A schedule must return a scalar. Outside of `jit`, where its value is known, it must
    also be in the range of the argument: at least 0 and finite.
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
