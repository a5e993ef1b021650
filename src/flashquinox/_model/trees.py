"""Taking a model and trees like it apart into leaves with paths, and matching them."""

import dataclasses
import functools
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import PyTree

from .._storage.quant_moment import QuantMoment
from .float32_layer import Float32Layer
from .variables import (
    around_leaves,
    flax_types,
    has_variables,
    is_variable,
    like,
    take_apart,
    without_variables,
)


# Types of the caller's trees. Functions return the type that they get.
Model = TypeVar("Model")
State = TypeVar("State")
Updates = TypeVar("Updates")


class Leaf(NamedTuple):
    """A leaf of the model. `None` counts as a leaf.

    `unwrapped` is its path without the wrappers of [`flashquinox.cast`][] and without
    Flax's `Variable`s. Its keys are plain names and numbers, so that the attribute of a
    module and the entry of a Flax `State` are equal.
    """

    path: tuple[Any, ...]
    value: Any
    unwrapped: tuple[Any, ...]

    @property
    def name(self) -> str:
        return path_name(self.path)


def is_array(x: Any) -> bool:
    """Whether a leaf is an array or a `jax.ShapeDtypeStruct`."""
    return isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def path_name(path: tuple[Any, ...]) -> str:
    """How a path is written in messages: `.layers[0].weight`."""
    return jtu.keystr(path) if path else "(the root)"


def dotted_name(path: tuple[Any, ...]) -> str:
    """How a path is written in arguments and tables: `layers.0.weight`."""
    return jtu.keystr(path, simple=True, separator=".")


@dataclasses.dataclass(frozen=True)
class Rebuild:
    """A function from as many values as a tree has leaves to such a tree.

    `tree` is the tree of the leaves. `put_together` turns such a tree into what was
    flattened, which differs for a Flax NNX module. `state` makes a tree for an
    optimizer state out of moments or corrections: each array is in a Flax `Variable`
    where the weight is in one.
    """

    tree: PyTree
    treedef: Any
    put_together: Callable[[PyTree], PyTree]
    # Whether there may be `Variable`s in the tree.
    has_variables: bool

    def __call__(self, values: list[Any]) -> PyTree:
        return self.put_together(self.treedef.unflatten(values))

    def values_of(self, tree: PyTree) -> list[Any] | None:
        """The values of a tree of just this structure, in which nothing is wrapped.
        `None` for others."""
        if self.has_variables:
            return None
        try:
            values = self.treedef.flatten_up_to(tree)
        except (TypeError, ValueError):
            return None
        kinds = (QuantMoment, jax.Array, np.ndarray, types.NoneType)
        if not all([isinstance(x, kinds) for x in values]):
            return None
        # A `Variable` may be around the arrays of a moment.
        codes = [x.codes for x in values if isinstance(x, QuantMoment)]
        return values if all([isinstance(x, kinds[1:]) for x in codes]) else None

    def like_before(self, values: list[Any]) -> PyTree:
        """The tree with these values, which have the structure of the leaves, and with
        the `Variable`s that were around arrays inside of the leaves."""
        before = jtu.tree_leaves(self.tree, is_leaf=_is_leaf)
        return self(
            [
                jtu.tree_structure(old).unflatten(jtu.tree_leaves(new))
                for old, new in zip(before, values, strict=True)
            ]
        )

    def state(self, values: list[Any]) -> PyTree:
        if not self.has_variables:
            return self.treedef.unflatten(values)
        bare = without_variables(self.tree)
        if bare is self.tree:
            return self.treedef.unflatten(values)
        variables = around_leaves(self.tree, _is_leaf)
        treedef = jtu.tree_structure(bare, is_leaf=_is_leaf)
        return treedef.unflatten(map(like, variables, values))


def flatten(tree: PyTree) -> tuple[list[Leaf], Rebuild]:
    """The leaves of a tree in order, and a function from as many values to such a
    tree."""
    return _flatten_plain(tree) or _flatten_wrapped(tree)


def _flatten_plain(tree: PyTree) -> tuple[list[Leaf], Rebuild] | None:
    """[`flatten`][] of a tree in which nothing is wrapped, in one pass; `None` for
    others."""
    wrappers = (Float32Layer, optax.MaskedNode, *flax_types())
    whole = (QuantMoment, *wrappers)
    is_leaf = lambda x: x is None or isinstance(x, whole)
    leaves, treedef = jtu.tree_flatten_with_path(tree, is_leaf=is_leaf)
    # A `Variable` may be around the arrays of a moment.
    values = [x.codes if isinstance(x, QuantMoment) else x for _, x in leaves]
    if any([isinstance(x, wrappers) for x in values]):
        return None
    named = [Leaf(path, value, _plain_path(path)) for path, value in leaves]
    return named, Rebuild(tree, treedef, _as_it_is, has_variables=False)


def _flatten_wrapped(tree: PyTree) -> tuple[list[Leaf], Rebuild]:
    tree, put_together = take_apart(tree)
    leaves, treedef = jtu.tree_flatten_with_path(tree, is_leaf=_is_leaf)
    wraps = set(_wraps((), tree))
    named = [
        Leaf(path, without_variables(value), _unwrapped(wraps, path))
        for path, value in leaves
    ]
    return named, Rebuild(tree, treedef, put_together, has_variables=True)


def _as_it_is(tree: PyTree) -> PyTree:
    return tree


def match(
    call: str,
    name: str,
    tree: PyTree,
    leaves: list[Leaf],
    prefix: bool = False,
    partial: bool = False,
    rebuild: Rebuild | None = None,
) -> list[Any]:
    """The entries of a tree, one for each leaf of the model, in the model's order. With
    `rebuild`, that of the model, trees of its structure need no paths.

    `None` in place of a subtree stands for `None` in all of it. So does
    `optax.MaskedNode`, which Optax puts in place of leaves that another optimizer
    trains. With `prefix`, any other value in place of a subtree also stands for all of
    it. With `partial`, the tree may lack leaves, whose entries are then `None`.
    Wrappers are ignored in both trees: those of [`flashquinox.cast`][] around layers,
    which the float32 original of a bfloat16 model does not have, and Flax's
    `Variable`s.

    **Raises:**

    `ValueError` with the first path that only one of the two trees has.
    """
    if tree is None:
        return [None for _ in leaves]
    if rebuild is not None and (values := rebuild.values_of(tree)) is not None:
        return values
    given, _ = _flatten_plain(tree) or _flatten_wrapped(without_masked(tree))
    entries = {leaf.unwrapped: leaf.value for leaf in given}
    unused = set(entries)
    values = []
    for leaf in leaves:
        found = leaf.unwrapped
        if found not in entries:
            found = _find(entries, found, prefix)
        if found is None and (partial or (prefix and leaf.value is None)):
            # The model has None here, or the tree may lack leaves.
            values.append(None)
            continue
        if found is None:
            raise ValueError(
                f"`{call}`: `{name}` has nothing at `{leaf.name}`, where the model has "
                f"a leaf. Pass a `{name}` of the structure of the model"
                + _structure_hint(name, tree)
            )
        unused.discard(found)
        values.append(entries[found])
    if prefix:
        absent = {leaf.unwrapped for leaf in leaves if leaf.value is None}
        unused = {path for path in unused if not is_within(path, absent)}
    for leaf in given:
        if leaf.unwrapped in unused and leaf.value is not None:
            raise ValueError(
                f"`{call}`: `{name}` has a leaf at `{leaf.name}`, where the "
                f"model has none. Pass a `{name}` of the structure of the model"
                + _structure_hint(name, tree)
            )
    return values


def with_values(tree: PyTree, values: Mapping[tuple[Any, ...], Any]) -> PyTree:
    """A tree of a state with new values at the leaves with these unwrapped paths. It
    keeps its structure, which may be that of a part of the model."""
    old, rebuild = flatten(tree)
    return rebuild([values.get(leaf.unwrapped, leaf.value) for leaf in old])


def without_masked(tree: PyTree) -> PyTree:
    """A tree with `None` in place of each `optax.MaskedNode`."""
    masked = []

    def is_leaf(x: Any) -> bool:
        if isinstance(x, optax.MaskedNode):
            masked.append(x)
            return True
        return x is None or isinstance(x, QuantMoment)

    leaves, treedef = jtu.tree_flatten(tree, is_leaf=is_leaf)
    if not masked:
        return tree
    return treedef.unflatten(
        [None if isinstance(x, optax.MaskedNode) else x for x in leaves]
    )


def _wraps(path: tuple[Any, ...], tree: PyTree) -> Iterator[tuple[Any, ...]]:
    """The paths of all `Float32Layer`s and `Variable`s in a tree."""
    is_wrap = lambda x: isinstance(x, Float32Layer) or is_variable(x)
    for below, node in jtu.tree_leaves_with_path(tree, is_leaf=is_wrap):
        if is_wrap(node) and not jtu.all_leaves([node]):
            yield (*path, *below)
            for key, inner in jtu.tree_leaves_with_path(
                node, is_leaf=lambda x, node=node: x is not node
            ):
                yield from _wraps((*path, *below, *key), inner)


def _unwrapped(wraps: set[tuple[Any, ...]], path: tuple[Any, ...]) -> tuple[Any, ...]:
    """A path that leaves out the step into each of these."""
    return _plain_path(
        tuple([key for i, key in enumerate(path) if path[:i] not in wraps])
    )


# A step flattens several trees that have the same paths.
@functools.lru_cache(maxsize=65536)
def _plain_path(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """A path by what its keys say, whatever kinds of containers they are keys of."""
    return tuple(map(_plain, path))


def _plain(key: Any) -> Any:
    for name in ("key", "name", "idx"):
        if hasattr(key, name):
            return getattr(key, name)
    return key


def _find(
    entries: dict[tuple[Any, ...], Any], path: tuple[Any, ...], prefix: bool
) -> tuple[Any, ...] | None:
    for length in reversed(range(len(path))):
        ancestor = path[:length]
        if ancestor in entries and (prefix or entries[ancestor] is None):
            return ancestor
    return None


def is_within(path: tuple[Any, ...], subtrees: set[tuple[Any, ...]]) -> bool:
    """Whether a path is one of these, or leads into the subtree at one of them."""
    return any(path[:length] in subtrees for length in range(len(path) + 1))


def _structure_hint(name: str, tree: PyTree) -> str:
    if has_variables(tree) and name.startswith(("grads", "state")):
        return (
            ". Of a module of Flax NNX, pass what is trained, `nnx.state(model, "
            "nnx.Param)`, here and to `init`; or let an `nnx.Optimizer` do so."
        )
    if name == "grads":
        return ", with `None` for what is frozen, as `eqx.filter_grad` gives."
    if name == "float32_model":
        return ", with `None` for what shall stay as it is."
    if name in ("mask", "shardings", "trainable", "weight_dimension_numbers"):
        return ", or a prefix of it."
    if name.startswith("rest["):
        return ", a prefix of it, or a state of the same kind."
    return ": the state that this optimizer's `init` gave for this model."


def _is_leaf(x: Any) -> bool:
    return x is None or isinstance(x, QuantMoment)
