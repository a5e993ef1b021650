"""The scalars of a step as two small arrays, which kernels take."""

from collections.abc import Callable

import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float32, Int32, PyTree, Scalar


def pack(
    scalars: PyTree[Scalar],
) -> tuple[
    Float32[Array, " floats"], Int32[Array, " integers"], Callable[..., PyTree[Scalar]]
]:
    """The floats, the integers (and booleans), and a function that makes the scalars
    again of functions that read those arrays at an index. The first integer is zero:
    none of the scalars, but a number that a compiler does not know.
    """
    leaves, structure = jtu.tree_flatten(scalars)
    floats = [x for x in leaves if x.dtype == jnp.float32]
    integers = [x for x in leaves if x.dtype != jnp.float32]
    dtypes = [x.dtype for x in leaves]

    def unpack(float_at: Callable, integer_at: Callable) -> PyTree[Scalar]:
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
