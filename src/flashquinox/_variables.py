"""Flax NNX keeps each weight in a `Variable`: a pytree with one child and metadata.

A moment is often several arrays, and a `Variable` around all of them would not come
back from a step: `nnx.Optimizer` writes the arrays of a new state one by one. So the
`Variable` of a weight goes around each of the arrays that a state has for it, and a
state holds no other containers than those that it was given.

Flax is never imported here: where there is none, no object is a `Variable`.
"""

import sys
from typing import Any

import jax.tree_util as jtu
from jaxtyping import PyTree


def is_variable(x: Any) -> bool:
    # Missing while Flax is being imported.
    variable = getattr(sys.modules.get("flax.nnx"), "Variable", None)
    return variable is not None and isinstance(x, variable)


def without_variables(tree: PyTree) -> PyTree:
    """A tree in which every `Variable` is replaced by its value."""
    if not is_variable(tree):
        leaves, treedef = jtu.tree_flatten(tree, is_leaf=is_variable)
        if not any(map(is_variable, leaves)):
            return tree
        return treedef.unflatten(map(without_variables, leaves))
    return without_variables(tree.get_raw_value())


def like(variable: Any, tree: PyTree) -> PyTree:
    """A tree with a `Variable` like this one around each of its arrays. A tree like it
    if this is `None`."""
    if variable is None:
        return tree
    return jtu.tree_map(variable.replace, tree)


def around_leaves(tree: PyTree, is_leaf: Any) -> list[Any]:
    """For each leaf, the innermost `Variable` that it is in, or `None`."""
    found = []
    for node in jtu.tree_leaves(tree, is_leaf=lambda x: is_variable(x) or is_leaf(x)):
        if not is_variable(node):
            found.append(None)
            continue
        inner = around_leaves(node.get_raw_value(), is_leaf)
        found += [node if x is None else x for x in inner]
    return found
