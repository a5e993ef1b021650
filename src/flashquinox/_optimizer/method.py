"""Bound methods that can be passed to `jax.jit`, whatever their objects hold."""

from collections.abc import Hashable
from typing import Any

import equinox as eqx
import jax.tree_util as jtu


class Method(eqx.Module):
    """A method of a module, bound to it.

    Like the bound methods of Equinox, it is a pytree, so that `eqx.filter_jit` treats
    arrays in the module as arguments. Unlike those, it always has a hash, which
    `jax.jit` needs to find compiled programs. Arrays and other unhashable leaves are
    compared by identity. So equal methods always compute the same, and comparing them
    never needs the value of a traced array.
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
    # With its type, because 1, 1.0 and True are equal.
    return type(leaf), leaf
