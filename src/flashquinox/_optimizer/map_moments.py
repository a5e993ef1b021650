"""Editing the moments of a state as numbers, however they are stored."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from jaxtyping import PyTree

from .._common.text import shown
from .._model.trees import flatten, Leaf, match, without_masked
from .._storage.moment_bases import bases_first
from .._storage.moment_values import _numbers, _stored
from .._storage.quant_moment import StoredMoment
from .call_checks import check_has_values
from .state_checks import check_has_state
from .states import bases, find


def map_moments(
    function: Callable[..., Any],
    state: PyTree,
    *rest: PyTree,
    names: str | Sequence[str] | None = None,
) -> PyTree:
    """Applies a function to the moments in a state as arrays of numbers, however they
    are stored. The results are stored as the moments were, rounded to nearest.

    ??? Example

        ```python
        # Reset the moments of dead neurons.
        dead = {"w": dead_neurons[:, None], "b": dead_neurons}
        state = fq.map_moments(lambda m, d: jnp.where(d, 0, m), state, dead)
        ```

    The elements of a group share a scale. If the function changes some of them, the
    others are rounded again as well. A leaf keeps its bits if the function returns the
    same array object.

    **Arguments:**

    - `function`: called as `function(moment, *others)` for each moment of each leaf.
        `moment` is a float32 array (float64 where the weight is) of the shape of the
        weight, and `others` are the entries of `rest` there. It returns a finite
        floating-point array of that shape, at least 0 for averages of squares.
    - `state`: an [`flashquinox.OptimizerState`][], or the state of a wrapper with some
        inside, such as that of `optax.chain`.
    - `rest`: trees like the model, or prefixes of it; or states of the same kind as
        `state`, whose moments are passed as numbers: for example those of a smaller
        model that has been grown.
    - `names`: the names of the moments to change, such as `["nu"]`. By default, all.

    **Returns:**

    A state like `state`, with the same counts and corrections.

    **Raises:**

    `TypeError` if there is no [`flashquinox.OptimizerState`][] in `state`, or the
    function does not return a floating-point array; `ValueError` if that array has
    another shape, or numbers that cannot be stored, or if a tree in `rest` has no entry
    for a leaf.
    """
    call = "map_moments"
    if not callable(function):
        raise TypeError(
            f"`{call}(function, state)` takes a function first; got {shown(function)}."
        )
    found = find(state)
    check_has_state(call, state, found.values)
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
        old: dict[Any, StoredMoment] = {}
        new: dict[Any, StoredMoment] = {}
        for name in bases_first(moments):
            leaves, rebuild = flatten(moments[name])
            given = None
            if name in chosen:
                given = [other(number, name, moments[name]) for other in others]
            for leaf in leaves:
                if leaf.value is None:
                    continue
                old[name, leaf.path] = leaf.value
                base = getattr(leaf.value, "relative_to", None), leaf.path
                change = None
                if given is not None:
                    at_leaf = [values[leaf.unwrapped] for values in given]
                    change = partial(_call, function, at_leaf)
                new[name, leaf.path] = _changed(
                    call,
                    f"moments[{name!r}]{leaf.name}",
                    leaf.value,
                    (old.get(base), new.get(base)),
                    change,
                )
            moments[name] = rebuild.like_before(
                [new.get((name, leaf.path)) for leaf in leaves]
            )
        states.append(dataclasses.replace(one, moments=moments))
    return found.replace(states)


def _call(function: Callable[..., Any], others: list[Any], moment: Any) -> Any:
    return function(moment, *others)


def _changed(
    call: str,
    name: str,
    stored: StoredMoment,
    bases: tuple[StoredMoment | None, StoredMoment | None],
    change: Callable[[Any], Any] | None,
) -> StoredMoment:
    """A changed moment. One that is relative to another is stored again if that one,
    whose old and new forms are `bases`, has changed."""
    before, after = bases
    if change is None and before is after:
        return stored
    numbers = _numbers(call, name, stored, before)
    new = numbers if change is None else change(numbers)
    if new is numbers and before is after:
        return stored
    what = f"what the function returned for `{name}`"
    return _stored(call, what, new, stored, after)


def _opened(
    call: str, what: str, tree: PyTree
) -> Callable[[int, str, PyTree], dict[tuple[Any, ...], Any]]:
    """A function `(number of a state, name of a moment, tree of these moments) ->
    entries of another tree, by the paths in that tree of moments`."""
    states = find(tree).values

    def at_each_path(number: int, name: str, moments: PyTree) -> Any:
        leaves, _ = flatten(without_masked(moments))
        if not states:
            values = match(call, what, tree, leaves, prefix=True)
        elif number < len(states) and name in states[number].moments:
            values = _numbers_of(call, what, states[number].moments, name, leaves)
        else:
            raise ValueError(
                f"`{call}`: the state `{what}` has no moment {name!r}. Pass one of the "
                "same kind of optimizer, in the same wrappers."
            )
        paths = (leaf.unwrapped for leaf in leaves)
        return dict(zip(paths, values, strict=True))

    return at_each_path


def _numbers_of(
    call: str, what: str, moments: dict[str, PyTree], name: str, leaves: list[Leaf]
) -> list[Any]:
    """The moments of this name at these leaves, as numbers."""
    values = match(call, what, moments[name], leaves)
    relative_to = bases(moments, moments[name])
    return [
        _numbers(call, what, value, relative_to.get(leaf.unwrapped))
        for value, leaf in zip(values, leaves, strict=True)
    ]
