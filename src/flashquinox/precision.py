"""The precision of a model: narrow weights, and the master weights behind them."""

import jax.numpy as jnp
import jax.tree_util as jtu
from jax.typing import DTypeLike
from jaxtyping import PyTree

from . import _checks as checks
from ._split import decode_weight
from ._state import OptimizerState
from ._trees import flatten, match


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
        if checks.is_float_array(x) and jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.asarray(x, dtype)
        return x

    return jtu.tree_map(cast_leaf, model)


def master_weights(model: PyTree, state: OptimizerState) -> PyTree:
    """The model with its weights in float32 (float64 where they are), corrections
    included: for evaluation, export, or a comparison.

    **Arguments:**

    - `model`: the model.
    - `state`: its optimizer state, which holds the corrections.

    **Returns:**

    A pytree like `model`. Leaves that are not floating-point arrays are left alone.

    **Raises:**

    `ValueError` if the state is not one of this model; `TypeError` if it is no
    [`flashquinox.OptimizerState`][].
    """
    leaves, rebuild = flatten(model)
    checks.is_state("master_weights", state, rule=None)
    corrections = match(
        "master_weights", "state.corrections", state.corrections, leaves
    )
    new = []
    for leaf, correction in zip(leaves, corrections, strict=True):
        if checks.is_trained(leaf, "master_weights"):
            checks.correction_fits("master_weights", leaf, correction)
            new.append(decode_weight(jnp.asarray(leaf.value), correction))
        else:
            new.append(leaf.value)
    return rebuild(new)
