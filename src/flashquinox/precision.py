"""The precision of a model."""

import jax.numpy as jnp
import jax.tree_util as jtu
from jax.typing import DTypeLike
from jaxtyping import PyTree

from ._checks import is_float_array


def cast(model: PyTree, dtype: DTypeLike) -> PyTree:
    """Casts the floating-point arrays of a model.

    **Arguments:**

    - `model`: any pytree.
    - `dtype`: a floating-point dtype, such as `jnp.bfloat16`.

    **Returns:**

    A pytree like `model`. Integers, complex arrays, functions and all other leaves are
    left alone.

    **Raises:**

    `TypeError` if `dtype` is not floating-point.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            "`cast(model, dtype)` takes a floating-point dtype; got "
            f"{jnp.dtype(dtype)}."
        )

    def cast_leaf(x):
        if is_float_array(x) and jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.asarray(x, dtype)
        return x

    return jtu.tree_map(cast_leaf, model)
