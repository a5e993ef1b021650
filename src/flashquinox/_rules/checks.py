"""Checks of rules when an optimizer is built, so that no error comes from a kernel."""

import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._common.elementwise_checks import check_array, check_elementwise, told
from .._common.text import shown
from .rule import AbstractRule, Moment, raw_scalars, rule_structure
from .whole_leaf import AbstractMeansRule, AnyRule


_REMEDY = (
    "Compute each element from the same element of the arguments alone; what is the "
    "same for all elements belongs into `scalars`, and what is not elementwise (norms, "
    "means, products) into a `flashquinox.AbstractWholeLeafRule` or "
    "`AbstractMatrixRule`, or into a transformation of the gradients."
)


def check_rule(call: str, rule: AbstractRule) -> None:
    """Raises if the parts of a rule do not fit together, or if its update is not
    elementwise."""
    call, kind = f"{call}(rule=...)", type(rule).__name__
    moments = rule.moments
    named = isinstance(moments, dict) and all(isinstance(x, str) for x in moments)
    if not named or not all(isinstance(x, Moment) for x in moments.values()):
        raise TypeError(
            f"`{call}`: `{kind}.moments` must be a dictionary from names to "
            "`flashquinox.Moment`s, such as `flashquinox.Moment('signed')` or "
            f"`flashquinox.Moment('nonnegative')`; got {shown(moments)}."
        )
    for name, moment in moments.items():
        if moment.mean_over:
            raise ValueError(
                f"`{call}`: in `{kind}.moments`, {name!r} has `mean_over`. An "
                "elementwise rule sees no whole leaf: write a "
                "`flashquinox.AbstractMeansRule`."
            )
    structure = rule_structure(rule)
    try:
        hash(structure)
    except TypeError as error:
        raise TypeError(
            f"`{call}`: {kind}'s static fields must have a hash, as they are compiled "
            f"in: {error}. Use tuples instead of lists, and no dictionaries."
        ) from error
    key = jax.config.jax_enable_x64, structure  # pyright: ignore
    if key not in _checked:
        names = _scalar_names(call, rule)
        _check_factors(call, rule, names)
        _check_relative(call, rule)
        _check_update(call, structure, names)
        if len(_checked) >= _MOST_CHECKED:
            _checked.clear()
        _checked.add(key)


def check_moments_are_apart(call: str, rule: AnyRule) -> None:
    """The two passes of a rule that needs whole leaves, and its means, must not have a
    moment of the same name."""
    if isinstance(rule, AbstractRule):
        return
    kind, before = type(rule).__name__, rule.before
    parts = {} if before is None else {"before": before.moments}
    parts["after"] = rule.after.moments
    if isinstance(rule, AbstractMeansRule):
        parts["means"] = _checked_means(f"{call}(rule=...)", rule)
    for (one, of_one), (other, of_other) in itertools.combinations(parts.items(), 2):
        both = sorted(set(of_one) & set(of_other))
        if both:
            raise ValueError(
                f"`{call}(rule=...)`: `{kind}.{one}` and `.{other}` both have a moment "
                f"{both[0]!r}. Give one of them another name."
            )


def _checked_means(call: str, rule: AbstractMeansRule) -> dict[str, Moment]:
    means, kind = rule.means, type(rule).__name__
    are_named = isinstance(means, dict) and all(isinstance(x, str) for x in means)
    if not are_named or not all(
        isinstance(x, Moment) and x.mean_over for x in means.values()
    ):
        raise TypeError(
            f"`{call}`: `{kind}.means` must be a dictionary from names to "
            f"`flashquinox.Moment`s with `mean_over`; got {shown(means)}."
        )
    return means


def check_transformed(
    call: str, rule: Any, result: Any, direction: Any, means: Mapping[str, Any]
) -> None:
    """What `transform` of a rule with means returned."""
    method = f"{type(rule).__name__}.transform"
    if (
        not isinstance(result, tuple)
        or len(result) != 2
        or not isinstance(result[1], dict)
        or set(result[1]) != set(means)
    ):
        raise TypeError(
            f"`{call}`: `{method}` must return a pair: an array like the direction, "
            f"and a dictionary of the new means {_names(means)}; it returned "
            f"{shown(result)}."
        )
    likes = {"the gradient of the second pass": (result[0], direction)}
    likes |= {f"the mean {k!r}": (result[1][k], like) for k, like in means.items()}
    for what, (x, like) in likes.items():
        check_like(call, method, what, x, like)


def check_like(call: str, method: str, what: str, x: Any, like: Any) -> None:
    shape, dtype = getattr(x, "shape", None), getattr(x, "dtype", None)
    if shape != like.shape or dtype != like.dtype:
        raise ValueError(
            f"`{call}`: `{method}` returned {what} as {dtype} of shape {shape}; it "
            f"must be {like.dtype} of shape {like.shape}."
        )


# The structures of rules that passed, so that each is traced once in a process.
_checked: set[Any] = set()
_MOST_CHECKED = 1024


def _scalar_names(call: str, rule: AbstractRule) -> list[str]:
    method = f"{type(rule).__name__}.scalars"
    one = jax.ShapeDtypeStruct((), jnp.float32)

    def scalars(count: Any, learning_rate: Any) -> dict[str, Any]:
        found = raw_scalars(rule, count, learning_rate, jnp.float32)
        if not isinstance(found, Mapping):
            raise TypeError(
                f"`{call}`: `{method}` must return a dictionary of scalars; it "
                f"returned {shown(found)}."
            )
        for name, value in found.items():
            if not isinstance(name, str) or np.ndim(value) != 0:
                raise TypeError(
                    f"`{call}`: `{method}` must return a dictionary from names to "
                    f"scalars; {name!r} is {shown(value)}."
                )
        return dict(found)

    return list(told(call, method, jax.eval_shape, scalars, one, one))


def _check_factors(call: str, rule: AbstractRule, scalars: list[str]) -> None:
    kind = type(rule).__name__
    for name, moment in rule.moments.items():
        for argument in ("before", "after"):
            factor = getattr(moment, argument)
            if factor is not None and factor not in scalars:
                raise ValueError(
                    f"`{call}`: in `{kind}.moments`, `{argument}` of {name!r} is "
                    f"{shown(factor)}, which is none of what `scalars` returns: "
                    f"{_names(scalars)}."
                )


def _check_relative(call: str, rule: AbstractRule) -> None:
    kind, moments = type(rule).__name__, rule.moments
    for name, moment in moments.items():
        base = moment.relative_to
        if base is None:
            continue
        if base not in moments or moments[base] != Moment(
            "nonnegative", kept=moments[base].kept
        ):
            raise ValueError(
                f"`{call}`: in `{kind}.moments`, `relative_to` of {name!r} is "
                f"{shown(base)}, which is no average of squares of the rule without "
                "`before` and `after`."
            )


def _check_update(call: str, rule: AbstractRule, scalars: list[str]) -> None:
    method = f"{type(rule).__name__}.update"
    one = jax.ShapeDtypeStruct((), jnp.float32)

    def arguments(shape: tuple[int, ...]) -> tuple[Any, ...]:
        tile = jax.ShapeDtypeStruct(shape, jnp.float32)
        moments = {name: tile for name in rule.moments}
        return tile, tile, moments, {name: one for name in scalars}

    def update(shape: tuple[int, ...], *args: Any) -> Any:
        result = _updated(call, method, rule, scalars, args)
        _check_result(call, method, rule, result, shape)
        return result

    check_elementwise(call, method, update, arguments, _REMEDY)


def _updated(
    call: str, method: str, rule: AbstractRule, scalars: list[str], args: Any
) -> Any:
    try:
        return rule.update(*args)
    except KeyError as error:
        name = error.args[0] if error.args else None
        if not isinstance(name, str) or name in rule.moments or name in scalars:
            raise
        raise ValueError(
            f"`{call}`: `{method}` asks for {name!r}. There are the moments "
            f"{_names(rule.moments)} and, of `scalars`, {_names(scalars)}. Add it to "
            "`moments` or to what `scalars` returns."
        ) from error


def _check_result(
    call: str, method: str, rule: AbstractRule, result: Any, shape: tuple[int, ...]
) -> None:
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(
            f"`{call}`: `{method}` must return a pair: the update, and a dictionary of "
            f"the new moments; it returned {shown(result)}."
        )
    update, moments = result
    if not isinstance(moments, dict):
        raise TypeError(
            f"`{call}`: `{method}` must return the new moments as a dictionary; it "
            f"returned {shown(moments)}."
        )
    if set(moments) != set(rule.moments):
        raise ValueError(
            f"`{call}`: `{method}` returned the moments {_names(moments)}, where "
            f"`moments` names {_names(rule.moments)}. Return just these."
        )
    named = {"the update": update}
    named |= {f"the moment {name!r}": x for name, x in moments.items()}
    for name, x in named.items():
        check_array(call, method, name, x, shape, jnp.float32)


def _names(names: Any) -> str:
    return ", ".join(map(repr, names)) or "none"
