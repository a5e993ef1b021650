"""Defaults that more than one file needs."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar


_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


class _Static:
    """An argument that `optax.inject_hyperparams` leaves alone."""

    def __init__(self, value: Any):
        self.value = value

    def __repr__(self) -> str:
        return repr(self.value)


class _Signature(inspect.Signature):
    """That of a function with a mask. `optax.inject_hyperparams`, which binds arguments
    to it, takes every function for a schedule: the mask of a step count is False, or
    True, for all weights."""

    def bind(self, /, *args: Any, **kwargs: Any) -> inspect.BoundArguments:
        bound = super().bind(*args, **kwargs)
        if callable(bound.arguments.get("mask")):
            bound.arguments["mask"] = _Static(bound.arguments["mask"])
        return bound


def with_static_defaults(
    function: Callable[_Parameters, _Result],
) -> Callable[_Parameters, _Result]:
    """A function whose defaults `optax.inject_hyperparams` leaves alone: it looks them
    up in the signature, and makes arrays of what it knows as numbers. In the dtype of
    bfloat16 weights, 0.999 would be 1. So it does with masks.
    """
    signature = inspect.signature(function)

    def hidden(parameter: inspect.Parameter) -> inspect.Parameter:
        # Booleans and NumPy's integers stay what they are.
        if type(parameter.default) not in (int, float):
            return parameter
        return parameter.replace(default=_Static(parameter.default))

    @functools.wraps(function)
    def call(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        known: Any = {name: _value(x) for name, x in kwargs.items()}
        return function(*map(_value, args), **known)  # pyright: ignore

    call.__signature__ = _Signature(  # pyright: ignore
        [hidden(parameter) for parameter in signature.parameters.values()],
        return_annotation=signature.return_annotation,
    )
    return call


def _value(argument: Any) -> Any:
    return argument.value if isinstance(argument, _Static) else argument
