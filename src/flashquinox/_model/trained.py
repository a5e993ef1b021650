"""Which leaves of a model an optimizer trains, and what may come as the gradient of the
others."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._common.dtypes import NARROW_DTYPES
from .trees import Leaf


TRAINABLE_DTYPES = (*NARROW_DTYPES, jnp.dtype(jnp.float32), jnp.dtype(jnp.float64))


def is_float_array(x: Any) -> bool:
    """Also of those that cannot be trained: float8 and complex ones. (NumPy takes
    bfloat16 for no number.)"""
    is_array = isinstance(x, jax.Array | np.ndarray | np.generic)
    return is_array and jnp.issubdtype(x.dtype, jnp.inexact)


def is_trainable(x: Any) -> bool:
    """Whether a leaf is an array that an optimizer can train. Others (float8, complex,
    integers, functions) have no state."""
    return is_float_array(x) and x.dtype in TRAINABLE_DTYPES


def with_state(
    leaves: Sequence[Leaf],
    moments: Mapping[str, Sequence[Any]],
    corrections: Sequence[Any],
) -> list[bool]:
    """For each leaf of a model, whether a state was made to train it: `init` may have
    got a part of the model, with `None` for what is frozen.

    An optimizer without moments keeps nothing for a float32 weight, so every such
    weight may be trained; and if there are no corrections at all, every narrow one.
    """
    any_corrections = any(correction is not None for correction in corrections)

    def one(index: int, leaf: Leaf) -> bool:
        if not is_trainable(leaf.value):
            return False
        if moments:
            return any(stored[index] is not None for stored in moments.values())
        is_narrow = leaf.value.dtype in NARROW_DTYPES
        return corrections[index] is not None or not (is_narrow and any_corrections)

    return [one(index, leaf) for index, leaf in enumerate(leaves)]


def has_gradient(call: str, leaf: Leaf, grad: Any, trained: bool) -> bool:
    """Whether a gradient came for a leaf that is trained.

    A leaf that is not trained may have none: `None`, what `jax.grad(allow_int=True)`
    gives for an integer, or anything else that is no array of floating-point numbers.

    **Raises:**

    `TypeError` or `ValueError` if one came for it all the same.
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
