"""Moments as numbers, to be edited: whatever they are stored in."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from . import _checks as checks
from ._call_checks import check_has_values
from ._codec import QuantMoment, StoredMoment
from ._exchange.moments import is_of_one_leaf, load, store
from ._states import find
from ._trees import flatten, match, without_masked


def map_moments(
    function: Callable[..., Any],
    state: PyTree,
    *rest: PyTree,
    names: str | Sequence[str] | None = None,
) -> PyTree:
    """Applies a function to the moments in a state: as numbers, whatever they are
    stored in. Its results are stored as the moments were, rounded to nearest.

    ??? Example

        ```python
        # The moments of dead neurons, and of no others, begin anew.
        dead = {"w": dead_neurons[:, None], "b": dead_neurons}
        state = fq.map_moments(lambda m, d: jnp.where(d, 0, m), state, dead)
        ```

    A group of a compressed moment has one scale: numbers beside those that the function
    changes are rounded again, too. Leaves that it returns as they came (the same
    array) keep their bits.

    **Arguments:**

    - `function`: called as `function(moment, *others)` for each moment of each leaf,
        with `moment` a float32 array (float64 where that is stored) of the shape of the
        weight, and with what `rest` has there. Returns a floating-point array of that
        shape: finite, and of an average of squares at least 0.
    - `state`: an [`flashquinox.OptimizerState`][], or the state of a wrapper with some
        inside, such as that of `optax.chain`.
    - `rest`: each a tree like the model, or a prefix of one; or a state of the same
        kind as `state`, whose moments are passed as numbers: those of a smaller model,
        to grow.
    - `names`: which moments, such as `["nu"]`. All by default.

    **Returns:**

    A state like `state`. Counts and corrections are as they were.

    **Raises:**

    `TypeError` if there is no [`flashquinox.OptimizerState`][] in `state`, or the
    function returns no floating-point array; `ValueError` if that has another shape, or
    numbers that cannot be stored, or if a tree in `rest` has nothing for a leaf.
    """
    call = "map_moments"
    found = find(state)
    checks.has_state(call, state, found.values)
    check_has_values(call, state=state)
    known = sorted({name for one in found.values for name in one.moments})
    chosen = known if names is None else [names] if isinstance(names, str) else names
    for name in chosen:
        if name not in known:
            raise ValueError(
                f"`{call}(names=...)`: there is no moment {name!r}. The state has "
                f"{', '.join(map(repr, known))}."
            )
    others = [_opened(call, f"rest[{i}]", tree) for i, tree in enumerate(rest)]
    states = []
    for number, one in enumerate(found.values):
        moments = dict(one.moments)
        for name in (name for name in moments if name in chosen):
            leaves, rebuild = flatten(moments[name])
            given = [other(number, name, moments[name]) for other in others]
            moments[name] = rebuild.like_before(
                [
                    leaf.value
                    if leaf.value is None
                    else _changed(
                        call,
                        f"moments[{name!r}]{leaf.name}",
                        leaf.value,
                        function,
                        [values[leaf.unwrapped] for values in given],
                    )
                    for leaf in leaves
                ]
            )
        states.append(dataclasses.replace(one, moments=moments))
    return found.replace(states)


def encode(like: QuantMoment, values: Any) -> QuantMoment:
    """What `QuantMoment.encode` says."""
    call, name = "QuantMoment.encode", "`values`"
    new = _stored(call, name, values, like)
    assert isinstance(new, QuantMoment)
    return new


def _changed(
    call: str,
    name: str,
    stored: StoredMoment,
    function: Callable[..., Any],
    others: list[Any],
) -> StoredMoment:
    numbers = _numbers(call, name, stored)
    new = function(numbers, *others)
    if new is numbers:
        return stored
    what = f"what the function returned for `{name}`"
    return _stored(call, what, new, stored)


def _stored(call: str, name: str, values: Any, like: StoredMoment) -> StoredMoment:
    values = _storable(call, name, values, like)
    new = store(call, name, values, like)
    if not isinstance(new, QuantMoment):
        return new
    # Scales end before float32 does.
    given, found = _largest(values), _largest(_numbers(call, name, new))
    message = (
        f"`{call}`: {name} has numbers that are too large for the scales of "
        f"{type(new.codec).__name__}."
    )
    traced = isinstance(given, jax.core.Tracer) or isinstance(found, jax.core.Tracer)
    if not traced:
        given, found = float(given), float(found)
    wrong = ~jnp.isfinite(found) | ((given > 1) & (found < given / 2))
    if traced:
        return eqx.tree_at(
            lambda x: x.codes, new, replace_fn=lambda x: eqx.error_if(x, wrong, message)
        )
    if wrong:
        raise ValueError(message)
    return new


def _numbers(call: str, name: str, stored: Any) -> Any:
    if not isinstance(stored, QuantMoment):
        return stored
    if not is_of_one_leaf(stored):
        raise ValueError(
            f"`{call}`: {name} has scales of shape {stored.scales.shape}, where those "
            f"of one leaf have {stored.layout.scale_shape}. Call it under `jax.vmap` "
            "for an ensemble."
        )
    codes = stored.codes
    if isinstance(codes, jax.core.Tracer):
        return stored.decode()
    there = codes.sharding if isinstance(codes, jax.Array) and codes.committed else None
    like = jax.ShapeDtypeStruct(codes.shape, jnp.float32, sharding=there)
    return load(call, name, stored, like)


def _storable(call: str, name: str, values: Any, like: StoredMoment) -> Any:
    """Numbers of the shape of the moment: finite, and not negative where that cannot be
    stored."""
    shape = like.codes.shape if isinstance(like, QuantMoment) else like.shape
    dtype = getattr(values, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"`{call}`: {name} must be a floating-point array of shape {shape}; got "
            f"{dtype or type(values).__name__}."
        )
    if values.shape != shape:
        raise ValueError(
            f"`{call}`: {name} must have the shape {shape} of the weight; got "
            f"{values.shape}."
        )
    signed = not isinstance(like, QuantMoment) or like.codes.dtype != jnp.uint8
    wrong = _is_wrong(values, signed=signed)
    message = (
        f"`{call}`: {name} must be finite{'' if signed else ' and at least 0'}, and is "
        "not everywhere."
    )
    if isinstance(wrong, jax.core.Tracer):
        return eqx.error_if(values, wrong, message)
    if wrong:
        raise ValueError(message)
    return values


@jax.jit
def _largest(x: Float[Array, "*shape"]) -> Float[Array, ""]:
    return jnp.max(jnp.abs(x), initial=0)


@partial(jax.jit, static_argnames="signed")
def _is_wrong(x: Float[Array, "*shape"], signed: bool) -> Bool[Array, ""]:
    wrong = ~jnp.isfinite(x)
    return jnp.any(wrong if signed else wrong | (x < 0))


def _opened(
    call: str, what: str, tree: PyTree
) -> Callable[[int, str, PyTree], dict[tuple[Any, ...], Any]]:
    """A function from the number of a state, the name of a moment and the tree of such
    moments to what another tree has at each path of that."""
    states = find(tree).values

    def at_each_path(number: int, name: str, moments: PyTree) -> Any:
        leaves, _ = flatten(without_masked(moments))
        if not states:
            values = match(call, what, tree, leaves, prefix=True)
        elif number < len(states) and name in states[number].moments:
            values = match(call, what, states[number].moments[name], leaves)
            values = [_numbers(call, what, value) for value in values]
        else:
            raise ValueError(
                f"`{call}`: the state `{what}` has no moment {name!r}. Pass one of the "
                "same kind of optimizer, in the same wrappers."
            )
        paths = (leaf.unwrapped for leaf in leaves)
        return dict(zip(paths, values, strict=True))

    return at_each_path
