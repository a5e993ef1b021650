"""Applying a mask: which weights decay."""

from typing import Any

import equinox as eqx
import jax
import jax.core
import numpy as np
from jaxtyping import PyTree

from .._common.text import shown
from .._model.trained import is_float_array
from .._model.trees import Leaf, match


def decayed(
    call: str, mask: Any, params: PyTree, leaves: list[Leaf], name: str = "mask"
) -> list[bool]:
    """For each leaf, whether weight decay applies to it. `name` is that of the mask
    in the call that made the optimizer."""
    if mask is None:
        return [True for _ in leaves]
    # A mask with the structure of an Equinox model is a module, which may be callable.
    if callable(mask) and not isinstance(mask, eqx.Module):
        try:
            mask = mask(eqx.filter(params, is_float_array))
        except Exception as error:
            error.add_note(f"In the mask of `{call}`.")
            raise
        if mask is None:
            raise TypeError(
                f"`{call}`: the function for the `{name}` returned None. It must "
                "return a tree of True and False like the one that it gets, or a "
                "prefix of it."
            )
    matched = match(call, name, mask, leaves, prefix=True)
    return [
        _is_decayed(call, leaf, value, name)
        for leaf, value in zip(leaves, matched, strict=True)
    ]


def _is_decayed(call: str, leaf: Leaf, value: Any, name: str) -> bool:
    if value is None or not is_float_array(leaf.value):
        return False
    if isinstance(value, bool | np.bool_):
        return bool(value)
    hint = ""
    if isinstance(value, jax.Array | np.ndarray) and value.dtype == np.bool_:
        if isinstance(value, jax.core.Tracer):
            hint = " A mask is part of the program, and cannot be traced."
        elif value.ndim == 0:
            return bool(value)
        else:
            hint = " A mask is of whole leaves, not of their elements."
    raise TypeError(
        f"`{call}`: the `{name}` at `{leaf.name}` must be True or False; got "
        f"{shown(value)}.{hint}"
    )
