"""Which leaves of a model an optimizer trains, and which gradients they may have."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._common.dtypes import NARROW_DTYPES
from .trees import Leaf


TRAINABLE_DTYPES = (*NARROW_DTYPES, jnp.dtype(jnp.float32), jnp.dtype(jnp.float64))


def is_float_array(x: Any) -> bool:
    """Whether a leaf is a floating-point array, including float8 and complex ones,
    which cannot be trained. (NumPy does not count bfloat16 as a floating-point
    type.)"""
    is_array = isinstance(x, jax.Array | np.ndarray | np.generic)
    return is_array and jnp.issubdtype(x.dtype, jnp.inexact)


def is_trainable(x: Any) -> bool:
    """Whether a leaf is an array that an optimizer can train. Others (float8, complex,
    integers, functions) have no state."""
    is_array = isinstance(x, jax.Array | np.ndarray | np.generic)
    return is_array and x.dtype in TRAINABLE_DTYPES


def with_state(
    leaves: Sequence[Leaf],
    moments: Mapping[str, Sequence[Any]],
    corrections: Sequence[Any],
) -> list[bool]:
    """For each leaf of a model, whether a state trains it. `init` may have been called
    with a part of the model, with `None` for frozen leaves.

    The state of a rule without moments has nothing for a float32 weight, so that every
    such weight is trained. If it has no corrections either, every narrow weight is
    trained as well.
    """
    any_corrections = any([correction is not None for correction in corrections])
    result = []
    for index, leaf in enumerate(leaves):
        if not is_trainable(leaf.value):
            result.append(False)
        elif moments:
            stored = [values[index] for values in moments.values()]
            result.append(any([x is not None for x in stored]))
        else:
            is_narrow = leaf.value.dtype in NARROW_DTYPES
            has_correction = corrections[index] is not None
            result.append(has_correction or not (is_narrow and any_corrections))
    return result


def has_gradient(call: str, leaf: Leaf, grad: Any, trained: bool) -> bool:
    """Whether a leaf is trained and has a gradient.

    A leaf that is not trained must not have a gradient. `None`, the zeros that
    `jax.grad(allow_int=True)` gives for integers, and all else that is no
    floating-point array count as no gradient.

    **Raises:**

    `TypeError` or `ValueError` if a leaf that is not trained has a gradient.
    """
    if grad is None:
        return False
    if trained:
        return True
    if not is_float_array(grad):
        return False
    came = f"`{call}`: there is a gradient at `{leaf.name}`, but"
    if is_trainable(leaf.value):
        raise ValueError(
            f"{came} the state has nothing for this weight: where `init` was called, "
            "it was frozen (None), or no floating-point array. Pass None as its "
            "gradient, or make a new state with `init` of a tree that has it."
        )
    if leaf.value is None:
        raise ValueError(
            f"{came} the model has None there. Pass None as its gradient, or the model "
            "with this weight."
        )
    if not is_float_array(leaf.value):
        what = getattr(leaf.value, "dtype", type(leaf.value).__name__)
        raise TypeError(
            f"{came} what the model has there, {what}, is not trained. Pass None as "
            "its gradient, or make it a floating-point array."
        )
    dtype = jnp.dtype(leaf.value.dtype)
    remedy = "Cast it"
    if jnp.issubdtype(dtype, jnp.complexfloating):
        remedy = "Store its real and imaginary parts as two arrays"
    raise TypeError(
        f"{came} the weight there is {dtype}; weights that are trained must be "
        f"bfloat16, float16, float32 or float64. {remedy}, or pass None as its "
        "gradient to leave it as it is."
    )
