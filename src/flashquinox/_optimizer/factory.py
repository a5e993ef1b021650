"""How the functions that make optimizers take their arguments."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from .._common.short_types import short_types
from . import options
from .options import DEFAULTS, Options


_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")

_OF_STORAGE = ("master_weight_bits", "moments", "group_size", "dither_weights")


class _Static:
    """An argument that `optax.inject_hyperparams` leaves alone."""

    def __init__(self, value: Any):
        self.value = value

    def __repr__(self) -> str:
        return repr(self.value)


# Arguments that may be functions of the model.
_OF_MODELS = ("mask", "weight_decay_mask", "weight_dimension_numbers")
# Numbers that programs depend on.
_LENGTHS = ("min_dim_size_to_factor", "ns_steps")


class _Signature(inspect.Signature):
    """Hides functions of the model from `optax.inject_hyperparams`, which binds
    arguments to this signature and takes every function for a schedule: it would call
    them with the number of steps. And lengths, of which it would make arrays."""

    def bind(self, /, *args: Any, **kwargs: Any) -> inspect.BoundArguments:
        bound = super().bind(*args, **kwargs)
        for name in _OF_MODELS:
            if callable(bound.arguments.get(name)):
                bound.arguments[name] = _Static(bound.arguments[name])
        for name in _LENGTHS:
            if type(bound.arguments.get(name)) is int:
                bound.arguments[name] = _Static(bound.arguments[name])
        return bound


def factory(
    function: Callable[_Parameters, _Result],
) -> Callable[_Parameters, _Result]:
    """A decorator for functions that make an optimizer and have an argument
    `**options: Unpack[Options]`.

    - Their signature names each option, for `help` and for `optax.inject_hyperparams`,
        which binds arguments to it. It shows short types; `typing.get_type_hints` has
        the whole ones.
    - An unknown keyword argument is an error that names the call.
    - `optax.inject_hyperparams` leaves defaults alone. Of those that it finds in a
        signature, it turns numbers into arrays in the dtype of the weights: in
        bfloat16, 0.999 is 1.
    """
    names = inspect.unwrap(function).__globals__
    declared = short_types(inspect.signature(function), names)
    parameters: list[inspect.Parameter] = []
    for parameter in declared.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            parameters.extend(_options())
            continue
        if type(parameter.default) in (int, float):
            # Optax leaves booleans alone.
            parameter = parameter.replace(default=_Static(parameter.default))
        parameters.append(parameter)
    signature = _Signature(parameters, return_annotation=declared.return_annotation)

    @functools.wraps(function)
    def call(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        _check_names(function.__name__, kwargs, signature)
        known: Any = {name: _value(x) for name, x in kwargs.items()}
        return function(*map(_value, args), **known)  # pyright: ignore

    call.__signature__ = signature  # pyright: ignore
    return call


@functools.cache
def _options() -> tuple[inspect.Parameter, ...]:
    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=DEFAULTS[name],
            annotation=annotation,
        )
        for name, annotation in Options.__annotations__.items()
    ]
    signature = short_types(inspect.Signature(parameters), vars(options))
    return tuple(signature.parameters.values())


def _check_names(
    call: str, arguments: dict[str, Any], signature: inspect.Signature
) -> None:
    for name in arguments:
        if name in signature.parameters:
            continue
        remedy = f"It takes {', '.join(signature.parameters)}."
        if name in _OF_STORAGE:
            remedy = f"Pass `storage=flashquinox.Storage({name}=...)`."
        raise TypeError(f"`{call}` has no argument `{name}`. {remedy}")


def _value(argument: Any) -> Any:
    return argument.value if isinstance(argument, _Static) else argument
