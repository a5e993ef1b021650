"""Finding the states of this library's optimizers, alone or inside the states of
wrappers, such as those of `optax.chain` and `optax.partition`."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax.tree_util as jtu
from jaxtyping import PyTree

from .._model.trained import is_trainable, with_state
from .._model.trees import flatten, Leaf, match, path_name, with_values
from .._model.variables import has_variables
from .._storage.moment_bases import base_name
from .._storage.quant_moment import StoredMoment
from .call_checks import check_has_values
from .state import OptimizerState, with_fields
from .state_checks import (
    check_correction,
    check_has_one_state,
    check_has_state,
    check_not_in_two_states,
)
from .weight_dtypes import check_weight_dtypes, record_dtypes


class Found(NamedTuple):
    """The values of one class in a tree.

    - `paths`, `values`: the path of each, and the value itself, in the order of the
        tree.
    - `replace`: a function from as many values to a tree with these in their place.
    """

    paths: list[tuple[Any, ...]]
    values: list[Any]
    replace: Callable[[list[Any]], PyTree]


def find(tree: PyTree, kind: type = OptimizerState) -> Found:
    """All values of a class in a tree, except those inside of others."""
    is_found = lambda x: isinstance(x, kind)
    nodes, structure = jtu.tree_flatten_with_path(tree, is_leaf=is_found)
    found = {i: node for i, (_, node) in enumerate(nodes) if is_found(node)}
    replaced = lambda changed: structure.unflatten(
        [changed.get(i, node) for i, (_, node) in enumerate(nodes)]
    )
    replace = lambda new: replaced(dict(zip(found, new, strict=True)))
    return Found([nodes[i][0] for i in found], list(found.values()), replace)


def unpacked(tree: PyTree) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
    """The tree with each array of its states by itself, and a function from such a tree
    to one whose states are packed as these were."""
    found = find(tree)
    packings = [state.packing for state in found.values]
    if not any(packings):
        return tree, lambda new: new

    def again(new: PyTree) -> PyTree:
        states = find(new)
        pairs = zip(states.values, packings, strict=True)
        return states.replace([with_fields(x, packing) for x, packing in pairs])

    bare = [with_fields(state, None) for state in found.values]
    return found.replace(bare), again


def bases(moments: dict[str, PyTree], of: PyTree) -> dict[Any, StoredMoment]:
    """What the moments in the tree `of` are relative to, by the paths of their
    leaves."""
    name = base_name(of)
    leaves = [] if name is None else flatten(moments[name])[0]
    return {leaf.unwrapped: leaf.value for leaf in leaves}


def only(call: str, state: PyTree) -> tuple[OptimizerState, Callable[[Any], PyTree]]:
    """The single optimizer state inside a state, and a function that replaces it there.

    **Raises:**

    `TypeError` if there is none, and `ValueError` if there are several.
    """
    found = find(state)
    check_has_state(call, state, found.values)
    check_has_one_state(call, found.values)
    return found.values[0], lambda new: found.replace([new])


@dataclasses.dataclass(frozen=True)
class OpenedStates:
    """A model and the states of all optimizers that train it, as lists with an entry
    for each leaf of the model.

    - `rebuild`: a function from as many values to such a model.
    - `states`: the optimizer states; this list has an entry for each state.
    - `owners`: for each leaf, the number of the state that has arrays for it, or
        `None`.
    - `corrections`, `checksums`: for each leaf, from the state that owns it.
    - `trained`: whether one of these optimizers trains the leaf.
    - `replace`: a function from new states to a tree like the one that held the states.
    """

    leaves: list[Leaf]
    rebuild: Callable[[list[Any]], PyTree]
    states: list[OptimizerState]
    owners: list[int | None]
    corrections: list[Any]
    checksums: list[Any]
    trained: list[bool]
    replace: Callable[[list[Any]], PyTree]

    def with_corrections(
        self, new: list[Any], checksums: dict[int, Any] | None = None
    ) -> PyTree:
        """The tree that held the states, with new corrections for all leaves, and new
        checksums for the leaves of these numbers where states have checksums."""
        states, numbers = [], range(len(self.leaves))
        for number, state in enumerate(self.states):
            mine = [i for i, owner in enumerate(self.owners) if owner == number]
            edits = {i: new[i] for i in mine}
            sums = {i: x for i, x in (checksums or {}).items() if i in edits}
            states.append(
                dataclasses.replace(
                    state,
                    corrections=self._edited(state.corrections, edits),
                    checksums=self._edited(state.checksums, sums),
                    # Of a state that knows none, the structure stays as it is.
                    weight_dtypes=state.weight_dtypes
                    and record_dtypes(self.leaves, [edits.get(i) for i in numbers]),
                )
            )
        return self.replace(states)

    def _edited(self, tree: PyTree, edits: dict[int, Any]) -> PyTree:
        """A tree of a state with new values at the leaves of these numbers."""
        return with_values(
            tree, {self.leaves[i].unwrapped: x for i, x in edits.items()}
        )


def open_states(
    call: str, model: PyTree, state: PyTree, replaced: Sequence[Any] | None = None
) -> OpenedStates:
    """Finds the optimizer states inside a state, and their arrays for each leaf of the
    model. `replaced`: for each leaf, what replaces its weight and its correction, or
    `None`.

    **Raises:**

    `TypeError` if there is no optimizer state; `ValueError` if one is not of this
    model, or if two have arrays for the same leaf, so that it is unclear which trains
    it.
    """
    leaves, rebuild = flatten(model)
    found = find(state)
    check_has_state(call, state, found.values)
    check_has_values(call, model=model, state=state)
    # In Flax, filters drop leaves, where Equinox puts `None`.
    of_leaves = partial(match, call, leaves=leaves, partial=has_variables(rebuild.tree))
    owners: list[int | None] = [None for _ in leaves]
    corrections: list[Any] = [None for _ in leaves]
    checksums: list[Any] = [None for _ in leaves]
    trained = [False for _ in leaves]
    for number, (path, one) in enumerate(zip(found.paths, found.values, strict=True)):
        name = f"state{path_name(path) if path else ''}"
        own = of_leaves(f"{name}.corrections", one.corrections)
        sums = of_leaves(f"{name}.checksums", one.checksums)
        stored = {
            key: of_leaves(f"{name}.moments[{key!r}]", moments)
            for key, moments in one.moments.items()
        }
        for index, is_mine in enumerate(with_state(leaves, stored, own)):
            trained[index] |= is_mine
        for index, entries in enumerate(zip(own, *stored.values(), strict=True)):
            if all(entry is None for entry in entries):
                continue
            check_not_in_two_states(call, leaves[index], owners[index])
            owners[index], corrections[index] = number, own[index]
            checksums[index] = sums[index]
        check_weight_dtypes(call, leaves, own, one.weight_dtypes, replaced)
    for leaf, correction in zip(leaves, corrections, strict=True):
        if is_trainable(leaf.value):
            check_correction(call, leaf, correction)
    return OpenedStates(
        leaves,
        rebuild,
        found.values,
        owners,
        corrections,
        checksums,
        trained,
        found.replace,
    )
