"""Checks of single weights, gradients and master weights."""

from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp

from .._common.dtypes import BITS_DTYPE, compute_dtype, NARROW_DTYPES
from .._common.text import shown
from .._model.trained import is_float_array, TRAINABLE_DTYPES
from .._model.trees import Leaf
from .._storage.storage import Storage


def check_floating_dtype(call: str, value: Any) -> Any:
    """An argument that names a floating-point dtype, as a NumPy dtype."""
    try:
        # NumPy takes None for float64.
        dtype = None if value is None else jnp.dtype(value)
    except (TypeError, ValueError):
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"`{call}` takes a floating-point dtype, such as `jnp.bfloat16` or "
            f"'bfloat16'; got {shown(value) if dtype is None else repr(dtype.name)}."
        )
    return dtype


def check_correction_has_effect(
    call: str, storage: Storage, trained: list[Leaf]
) -> None:
    bits = storage.master_weight_bits
    if bits in (None, "auto") or not trained:
        return
    if any(jnp.dtype(leaf.value.dtype) in NARROW_DTYPES for leaf in trained):
        return
    raise ValueError(
        f"`{call}`: `Storage(master_weight_bits={bits})` has no effect: none of the "
        f"{len(trained)} weights is bfloat16 or float16 (`{trained[0].name}` is "
        f"{trained[0].value.dtype}). Cast the model too, by "
        "`model, state = flashquinox.prepare(model, optim)`, or pass "
        "`master_weight_bits=None`, or leave it out."
    )


def check_grad(call: str, leaf: Leaf, grad: Any, may_be_bits: bool = False) -> None:
    if not eqx.is_array_like(grad) or not hasattr(grad, "dtype"):
        raise TypeError(
            f"`{call}`: the gradient at `{leaf.name}` is no array but {shown(grad)}. "
            "Pass an array, or None to leave this weight as it is."
        )
    if grad.shape != leaf.value.shape:
        raise ValueError(
            f"`{call}`: the gradient at `{leaf.name}` has shape {grad.shape}, its "
            f"weight {leaf.value.shape}. Pass gradients of this model."
        )
    if may_be_bits and grad.dtype == BITS_DTYPE:
        return
    if jnp.dtype(grad.dtype) not in TRAINABLE_DTYPES:
        raise TypeError(
            f"`{call}`: the gradient at `{leaf.name}` is {grad.dtype}; gradients must "
            "be bfloat16, float16, float32 or float64."
        )


def check_not_traced(call: str, leaf: Leaf) -> None:
    if isinstance(leaf.value, jax.core.Tracer):
        raise TypeError(
            f"`{call}`: the weight at `{leaf.name}` is traced, and its size not known. "
            f"Call `{call}` outside of `jit`, between steps."
        )


def check_master_weight(call: str, leaf: Leaf, master: Any) -> None:
    dtype = jnp.dtype(compute_dtype(leaf.value.dtype))
    if not is_float_array(master) or master.dtype != dtype:
        what = getattr(master, "dtype", repr(master))
        raise TypeError(
            f"`{call}`: the master weight at `{leaf.name}` is {what}; of a "
            f"{leaf.value.dtype} weight it must be an array of {dtype}. Cast it with "
            "`flashquinox.cast`, or pass None to leave this weight as it is."
        )
    if master.shape != leaf.value.shape:
        raise ValueError(
            f"`{call}`: the master weight at `{leaf.name}` has shape {master.shape}, "
            f"its weight {leaf.value.shape}. Pass the weights of this model."
        )
