"""The `Variable`s of Flax NNX: pytrees around each weight, with one child and metadata.

A compressed moment has several arrays. A single `Variable` around all of them would be
lost in a step, because `nnx.Optimizer` updates the arrays of a state one by one. So
each array that a state has for a weight gets a `Variable` like that of the weight.

Flax is never imported here. If it is not imported, no object is a `Variable`.
"""

import sys
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu
from jax.sharding import PartitionSpec
from jaxtyping import PyTree


def is_variable(x: Any) -> bool:
    return _is("Variable", x)


def flax_types() -> tuple[type, ...]:
    """The types of Flax NNX that this library sees into, if Flax was imported."""
    nnx = sys.modules.get("flax.nnx")
    # Missing while Flax is being imported.
    found = [getattr(nnx, name, None) for name in ("Variable", "Module")]
    return tuple([kind for kind in found if kind is not None])


def is_statistic(x: Any) -> bool:
    """Whether this is a `Variable` that holds a running average, not a weight."""
    return _is("BatchStat", x)


def _is(name: str, x: Any) -> bool:
    # Missing while Flax is being imported.
    kind = getattr(sys.modules.get("flax.nnx"), name, None)
    return kind is not None and isinstance(x, kind)


def has_variables(tree: PyTree) -> bool:
    return any(map(is_variable, jtu.tree_leaves(tree, is_leaf=is_variable)))


def take_apart(model: PyTree) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
    """A Flax NNX module as a tree of its `Variable`s, and a function from such a tree
    to such a module. A `Variable` that occurs several times, as for tied weights, is in
    the tree once. Any other tree is returned as it is."""
    if not _is("Module", model):
        return model, lambda tree: tree
    nnx = sys.modules["flax.nnx"]
    graph, tree = nnx.split(model)
    return tree, lambda tree: nnx.merge(graph, tree)


def with_values_of(model: PyTree, other: PyTree) -> PyTree:
    """A Flax NNX module like `model`, with the values of `other`; `other` itself if
    `model` is no such module. Where `other` has different values for weights that are
    tied in `model`, the widest is taken."""
    if not _is("Module", model):
        return other
    leaves, others = (jtu.tree_leaves(x, is_leaf=is_variable) for x in (model, other))
    widest = {}
    for leaf, new in zip(leaves, others, strict=True):
        if id(leaf) not in widest or _bytes(new) > _bytes(widest[id(leaf)]):
            widest[id(leaf)] = new
    tree, put_together = take_apart(model)
    return put_together(
        jtu.tree_map(lambda x: widest[id(x)], tree, is_leaf=is_variable)
    )


def _bytes(variable: Any) -> int:
    value = without_variables(variable)
    return value.dtype.itemsize if hasattr(value, "dtype") else 0


def without_variables(tree: PyTree) -> PyTree:
    """A tree in which every `Variable` is replaced by its value."""
    if not flax_types():
        return tree
    if not is_variable(tree):
        leaves, treedef = jtu.tree_flatten(tree, is_leaf=is_variable)
        if not any(map(is_variable, leaves)):
            return tree
        return treedef.unflatten(map(without_variables, leaves))
    return without_variables(tree.get_raw_value())


def like(variable: Any, tree: PyTree) -> PyTree:
    """A tree with a `Variable` like this one around each array; the tree itself if
    there is no `Variable`."""
    if variable is None:
        return tree
    shape = jnp.shape(without_variables(variable))

    def one(x: Any) -> Any:
        metadata = {
            name: _axes_of(x.shape, shape, axes)
            for name, axes in variable.get_metadata().items()
            if name in _SHARDINGS and axes is not None
        }
        return variable.replace(x, **metadata)

    return jtu.tree_map(one, tree)


# Metadata that give, for each axis of an array, axes of a mesh or their logical names.
_SHARDINGS = ("out_sharding", "optimizer_sharding", "sharding", "sharding_names")


def _axes_of(
    shape: tuple[int, ...], weight: tuple[int, ...], axes: Any
) -> tuple[Any, ...] | None:
    """Such metadata for an array that is stored for a weight. Scales have the axes of
    the weight, but that of groups in place of one axis or of several: it is divided as
    the first one of them. Other arrays of other shapes are not divided."""
    if shape == weight:
        return axes
    merged = len(weight) - len(shape) + 1
    if not isinstance(axes, tuple | PartitionSpec) or len(shape) == 0 or merged < 1:
        return None
    axes = (*axes, *[None] * (len(weight) - len(axes)))
    pairs = enumerate(zip(shape, weight, strict=False))
    group = next((i for i, (x, y) in pairs if x != y), len(shape) - 1)
    if shape[group + 1 :] != weight[group + merged :]:
        return None
    names = (*axes[: group + 1], *axes[group + merged :])
    return tuple(
        name if length > 1 else None for name, length in zip(names, shape, strict=True)
    )


def around_leaves(tree: PyTree, is_leaf: Any) -> list[Any]:
    """For each leaf, the innermost `Variable` around it, or `None`."""
    found = []
    for node in jtu.tree_leaves(tree, is_leaf=lambda x: is_variable(x) or is_leaf(x)):
        if not is_variable(node):
            found.append(None)
            continue
        inner = around_leaves(node.get_raw_value(), is_leaf)
        found += [node if x is None else x for x in inner]
    return found
