"""The scalars of a step as two small arrays, which kernels take."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float32, Int32

from ..._tile.step import LeafScalars, StepScalars


def pack(
    scalars: StepScalars,
) -> tuple[
    Float32[Array, " floats"], Int32[Array, " integers"], Callable[..., StepScalars]
]:
    """Those that are the same for all leaves: the floats, the integers (and booleans),
    and a function that makes the scalars again of functions that read those arrays at
    an index; `with_leaf` completes them. The first integer is zero: none of the
    scalars, but a number that a compiler does not know.
    """
    leaves, structure = jtu.tree_flatten(eqx.tree_at(_of_leaf, scalars, None))
    floats = [x for x in leaves if x.dtype == jnp.float32]
    integers = [x for x in leaves if x.dtype != jnp.float32]
    dtypes = [x.dtype for x in leaves]

    def unpack(float_at: Callable, integer_at: Callable) -> StepScalars:
        next_float, next_integer = iter(range(len(floats))), iter(range(len(integers)))
        values = []
        for dtype in dtypes:
            if dtype == jnp.float32:
                values.append(float_at(next(next_float)))
            else:
                value = integer_at(1 + next(next_integer))
                values.append(value != 0 if dtype == jnp.bool_ else value)
        return jtu.tree_unflatten(structure, values)

    zero = jnp.zeros((), jnp.int32)
    return (
        jnp.stack(floats),
        jnp.stack([zero, *[x.astype(jnp.int32) for x in integers]]),
        unpack,
    )


def with_leaf(shared: StepScalars, own: LeafScalars) -> StepScalars:
    """The scalars that `pack` gave, for one leaf."""
    return eqx.tree_at(_of_leaf, shared, own, is_leaf=lambda x: x is None)


def _of_leaf(scalars: StepScalars) -> Any:
    return scalars.leaf
