"""Selecting parts of a model by name, by type, by identity or by a function."""

import fnmatch
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from .._common.text import function_name, shown
from .trees import dotted_name, is_array, path_name


Selector: TypeAlias = str | type | eqx.Module | Callable[[Any], bool]
Selectors: TypeAlias = Selector | tuple[Selector, ...] | list[Selector] | None

_LEAF = jtu.tree_structure(0)


class Selection:
    """The leaves and subtrees that one or several selectors select.

    - A string is a pattern for the dotted path of a leaf or of a subtree, such as
        `"layers.0"` or `"*.norm"`.
    - A type selects every subtree that is an instance of it; a module selects itself.
    - Any other function is called with each array or `jax.ShapeDtypeStruct`. Other
        leaves, such as activation functions, are not passed to it.
    """

    def __init__(self, call: str, argument: str, selectors: Selectors):
        several = isinstance(selectors, (tuple, list))
        self._selectors = list(selectors) if several else [selectors]
        self._selectors = [x for x in self._selectors if x is not None]
        self._call, self._argument = call, argument
        self._used: set[int] = set()
        for x in self._selectors:
            if not (isinstance(x, (str, eqx.Module)) or callable(x)):
                raise TypeError(
                    f"`{call}({argument}=...)` takes patterns such as 'layers.0.*', "
                    "modules, types of modules, functions of an array, or a list of "
                    f"these; got {shown(x)}."
                )

    def selects(self, path: tuple[Any, ...], node: Any) -> bool:
        """Whether a selector selects this leaf or subtree itself, not one around it."""
        selected = False
        for i, selector in enumerate(self._selectors):
            if self._selects_by(selector, path, node):
                self._used.add(i)
                selected = True
        return selected

    def _selects_by(self, selector: Any, path: tuple[Any, ...], node: Any) -> bool:
        if isinstance(selector, str) and not selector:
            # The empty path is that of a model that is a single array.
            return not path and is_array(node)
        if isinstance(selector, str):
            name = dotted_name(path)
            return name == selector or fnmatch.fnmatchcase(name, selector)
        if isinstance(selector, type):
            return isinstance(node, selector)
        if isinstance(selector, eqx.Module):
            return node is selector
        if not is_array(node):
            return False
        chosen = selector(node)
        is_scalar = isinstance(chosen, jax.Array) and chosen.ndim == 0
        if not isinstance(chosen, bool | np.bool_) and not is_scalar:
            raise TypeError(
                f"`{self._call}({self._argument}=...)`: {function_name(selector)} "
                f"returned {shown(chosen)} for the array at `{path_name(path)}`. It "
                "must return True or False."
            )
        return bool(chosen)

    def check_used(self, tree: PyTree) -> None:
        """Every name and every module must be in the tree, and something must have been
        selected. Single types and functions in a list may select nothing, so that a
        list can serve many models."""
        for i, selector in enumerate(self._selectors):
            is_named = isinstance(selector, (str, eqx.Module))
            if i in self._used or (self._used and not is_named):
                continue
            if isinstance(selector, str):
                what = f"{selector!r} is nowhere in the model"
            elif isinstance(selector, eqx.Module):
                what = f"This {type(selector).__name__} is nowhere in the model"
            elif isinstance(selector, type):
                what = f"there is no {selector.__name__} in the model"
            else:
                what = f"{function_name(selector)} is true of no array of the model"
            names = [dotted_name(path) for path, _ in jtu.tree_leaves_with_path(tree)]
            some = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
            raise ValueError(
                f"`{self._call}({self._argument}=...)`: {what}. Its leaves are {some}; "
                "`*` stands for any part of a name."
            )


def children(node: Any) -> tuple[list[tuple[Any, Any]], Callable[..., Any]] | None:
    """The children of a subtree, each with its key, and a function that rebuilds the
    subtree from its children. `None` for a leaf. `None`, `()` and modules with static
    fields alone are subtrees without children."""
    parts, treedef = jtu.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    if treedef == _LEAF:
        return None
    return [(path[0], child) for path, child in parts], treedef.unflatten


def chosen_leaves(tree: PyTree, selection: Selection) -> set[tuple[Any, ...]]:
    """The paths of all leaves that are selected, or lie in a selected subtree."""

    def visit(
        path: tuple[Any, ...], node: Any, inside: bool
    ) -> Iterator[tuple[Any, ...]]:
        inside = selection.selects(path, node) or inside
        parts = children(node)
        if parts is None:
            if inside:
                yield path
            return
        for key, child in parts[0]:
            yield from visit((*path, key), child, inside)

    found = set(visit((), tree, False))
    selection.check_used(tree)
    return found
