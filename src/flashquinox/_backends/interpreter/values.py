"""What is known of the values of a function that is evaluated with a device's own
arithmetic.

A number that is rounded and then made a byte is one instruction. So a value knows how
it was made.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.core
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from .words import Words


class Field(NamedTuple):
    """Some bits of the elements of an array: from `first` upward."""

    source: Any
    first: int
    bits: int


@dataclasses.dataclass
class Value:
    """An array, or how to make it when it is needed, and what is known of it."""

    # The array (or number), unless `make` is there.
    held: Any
    make: Callable[[], Any] | None = None
    # Of an array of a narrow dtype.
    words: Words | None = None
    # x and c, of an array that is x * c with a power of two c.
    scaled: "tuple[Value, float] | None" = None
    # The same, of an array that is x * c rounded to integers.
    rounded: "tuple[Value, float] | None" = None
    # Of an array that holds some bits of another one.
    field: Field | None = None
    # The same, of an array that is a field of n bits less 2^(n - 1).
    centered: Field | None = None

    @staticmethod
    def of(x: Any) -> "Value":
        if isinstance(x, Words):
            return Value(None, partial(Words.narrow, x), words=x)
        return Value(x)

    @staticmethod
    def of_constant(x: Any) -> "Value":
        """An array that a function closes over: if it is not traced, as numbers."""
        is_known = not isinstance(x, jax.core.Tracer) and _is_numeric(x)
        return Value(np.asarray(x)[()] if is_known else x)

    @property
    def array(self) -> Any:
        if self.make is not None:
            self.held, self.make = self.make(), None
        return self.held

    def part(self, index: int) -> "Value":
        """The part with an index along the first axis."""
        x = self.array
        if isinstance(x, jax.Array):
            return Value(lax.index_in_dim(x, index, keepdims=False))
        return Value(np.asarray(x)[index])

    @property
    def constant(self) -> Any:
        """The number, if this is one that is known while the function is traced."""
        x = self.held
        if self.make is not None or isinstance(x, jax.Array) or np.ndim(x) > 0:
            return None
        return x


def results(eqn: Any, operands: Sequence[Value]) -> list[Value]:
    """The results of an operation as it is."""
    found = apply(eqn, operands)
    return [Value(x) for x in found] if isinstance(found, list) else [Value(found)]


def apply(eqn: Any, operands: Sequence[Value]) -> Any:
    """The result of an operation as it is, or a list of several results."""
    arrays = [x.held if x.make is None else x.array for x in operands]
    primitive = eqn.primitive
    params = primitive.get_bind_params(eqn.params)
    if any([not isinstance(x, jax.Array) and np.ndim(x) > 0 for x in arrays]):
        # Kernels take no constant arrays.
        if not any([isinstance(x, jax.Array) for x in arrays]):
            with jax.ensure_compile_time_eval():
                found = primitive.bind(*arrays, **params)
            found = [np.asarray(x)[()] for x in jtu.tree_leaves(found)]
            return found if primitive.multiple_results else found[0]
        arrays = [_filled(x) for x in arrays]
    return primitive.bind(*arrays, **params)


def _filled(x: Any) -> Any:
    """The same array. A constant whose elements are all the same becomes a number that
    is broadcast."""
    if isinstance(x, jax.Array) or np.ndim(x) == 0 or not _is_numeric(x):
        return x
    elements = np.unique(np.asarray(x))
    return jnp.broadcast_to(elements[0], np.shape(x)) if len(elements) == 1 else x


def _is_numeric(x: Any) -> bool:
    dtype = getattr(x, "dtype", None)
    if dtype is None:
        return False
    return jnp.issubdtype(dtype, np.number) or dtype == jnp.bool_
