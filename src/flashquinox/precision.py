"""The precision of a model: narrow weights, and the master weights behind them."""

import jax.numpy as jnp
from jaxtyping import PyTree

from . import _checks as checks
from ._cast import cast as cast, Widened as Widened
from ._numerics import (
    check_numerics as check_numerics,
    ensure_precision as ensure_precision,
    LeafNumerics as LeafNumerics,
    NumericsError as NumericsError,
    NumericsReport as NumericsReport,
)
from ._split import decode_weight
from ._state import OptimizerState
from ._trees import flatten, match
from ._width import narrow as narrow, widen as widen


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
