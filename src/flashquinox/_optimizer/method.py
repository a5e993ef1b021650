"""Methods that `jax.jit` can take, whatever the object that they are bound to holds."""

from collections.abc import Hashable
from typing import Any

import equinox as eqx
import jax.tree_util as jtu


class Method(eqx.Module):
    """A method of a module, bound to it.

    Like the methods that Equinox binds, it is a pytree: arrays in the module are
    arguments of a program that the method is passed to. Unlike those, it always has a
    hash, by which `jax.jit` finds what it has compiled. Arrays in the module, and other
    things without a hash, are told apart by their identity; so two methods are only
    equal if they compute the same, and comparing them never looks into a traced array.
    """

    module: eqx.Module
    name: str = eqx.field(static=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.module, self.name)(*args, **kwargs)

    @property
    def __name__(self) -> str:
        return self.name

    def __hash__(self) -> int:
        return hash(_key(self))

    def __eq__(self, other: object) -> bool:  # pyright: ignore
        return isinstance(other, Method) and _key(self) == _key(other)


def _key(method: Method) -> Hashable:
    leaves, structure = jtu.tree_flatten(method)
    return structure, tuple(map(_leaf_key, leaves))


def _leaf_key(leaf: Any) -> Hashable:
    try:
        hash(leaf)
    except TypeError:
        return id(leaf)
    # With its type, as 1, 1.0 and True are equal.
    return type(leaf), leaf
