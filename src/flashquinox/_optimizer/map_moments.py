"""Editing the moments of a state as numbers, however they are stored."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import PyTree

from .._model.trees import flatten, match, without_masked
from .._storage.moment_values import _numbers, _stored
from .._storage.quant_moment import StoredMoment
from .call_checks import check_has_values
from .state_checks import check_has_state
from .states import find


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
