"""Pytrees that should look like the model, leaf by leaf and with their paths."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.tree_util as jtu
from jaxtyping import PyTree

from ._codec import QuantMoment


class Leaf(NamedTuple):
    """A leaf of the model. `None` is a leaf here."""

    path: tuple[Any, ...]
    value: Any

    @property
    def name(self) -> str:
        return path_name(self.path)


def path_name(path: tuple[Any, ...]) -> str:
    """How a path is written in messages: `.layers[0].weight`."""
    return jtu.keystr(path) if path else "(the root)"


def dotted_name(path: tuple[Any, ...]) -> str:
    """How a path is written in arguments and tables: `layers.0.weight`."""
    return jtu.keystr(path, simple=True, separator=".")


def flatten(tree: PyTree) -> tuple[list[Leaf], Callable[[list[Any]], PyTree]]:
    """The leaves of a tree in order, and a function from as many values to such a
    tree."""
    leaves, treedef = jtu.tree_flatten_with_path(tree, is_leaf=_is_leaf)
    return [Leaf(path, value) for path, value in leaves], treedef.unflatten


def match(
    call: str, name: str, tree: PyTree, leaves: list[Leaf], prefix: bool = False
) -> list[Any]:
    """The entries of a tree, one for each leaf of the model, in the model's order.

    `None` in place of a subtree stands for `None` in all of it; with `prefix`, so does
    any other value. A subtree in place of a leaf is an entry if it holds the arrays of
    a `QuantMoment`, as a dictionary: Flax's `nnx.Optimizer` takes apart every pytree
    that it finds in a state.

    **Raises:**

    `ValueError` with the first path that only one of the two trees has.
    """
    entries = {leaf.path: leaf.value for leaf in flatten(tree)[0]}
    unused = set(entries)
    values = []
    for leaf in leaves:
        found = _find(entries, leaf.path, prefix)
        if found is not None:
            unused.discard(found)
            values.append(entries[found])
            continue
        parts = {path: _key(path) for path in entries if path[:-1] == leaf.path}
        if set(parts.values()) - {"parameter"} != {"codes", "scales"}:
            raise ValueError(
                f"`{call}`: `{name}` has nothing at `{leaf.name}`, where the model has "
                f"a leaf. Pass a `{name}` of the structure of the model"
                + _structure_hint(name)
            )
        unused.difference_update(parts)
        values.append({key: entries[path] for path, key in parts.items()})
    for path in entries:
        if path in unused and entries[path] is not None:
            raise ValueError(
                f"`{call}`: `{name}` has a leaf at `{path_name(path)}`, where the "
                f"model has none. Pass a `{name}` of the structure of the model"
                + _structure_hint(name)
            )
    return values


def _key(path: tuple[Any, ...]) -> Any:
    """The last key of a path, whatever kind of container it is a key of."""
    return jtu.keystr(path[-1:], simple=True)


def _find(
    entries: dict[tuple[Any, ...], Any], path: tuple[Any, ...], prefix: bool
) -> tuple[Any, ...] | None:
    if path in entries:
        return path
    for length in reversed(range(len(path))):
        ancestor = path[:length]
        if ancestor in entries and (prefix or entries[ancestor] is None):
            return ancestor
    return None


def _structure_hint(name: str) -> str:
    if name == "grads":
        return ", with `None` for what is frozen, as `eqx.filter_grad` gives."
    if name == "float32_model":
        return ", with `None` for what shall stay as it is."
    if name in ("mask", "shardings"):
        return ", or a prefix of it."
    return ": the state that this optimizer's `init` gave for this model."


def _is_leaf(x: Any) -> bool:
    return x is None or isinstance(x, QuantMoment)
