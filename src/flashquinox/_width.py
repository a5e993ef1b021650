"""Corrections of more or fewer bits, for some weights of a model."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import PyTree

from . import _checks as checks
from ._selection import chosen_leaves, Selection, Selectors
from ._split import change_width, CORRECTION_DTYPES
from ._state import OptimizerState
from ._trees import flatten, match


def widen(
    model: PyTree, state: OptimizerState, leaves: Selectors = None
) -> OptimizerState:
    r"""Moves weights from an `int8` to an `int16` correction, where 24 bits are too few
    for training to go on: see [`flashquinox.check_numerics`][].

    Every master weight keeps its value. The state then works with the same optimizer:
    one with `master_weight_bits=24` takes corrections of either width.

    $$\ell_{16} = 2^8 \, \ell_8 \text{ (bfloat16)}, \qquad
    \ell_{16} = 2^5 \, \ell_8 \text{ (float16)}$$

    **Arguments:**

    - `model`: the model.
    - `state`: its optimizer state.
    - `leaves`: which weights, as `keep` in [`flashquinox.cast`][]: patterns for dotted
        paths, types, modules or functions of an array. By default, all. Those that have
        an `int16` already, or are float32 or float64, stay as they are.

    **Returns:**

    A new state. `model` and `state` are not changed.

    **Raises:**

    `ValueError` if a chosen weight has no correction, as with
    `master_weight_bits=None`; if the state is not one of this model; or for a pattern
    that is nowhere in it.

    ??? cite "Reference"

        FlashOptim, [arXiv:2602.23349](https://arxiv.org/abs/2602.23349), Section 3.1,
        has corrections of both widths, of which one is chosen for a whole model.
    """
    return _change("widen", 32, model, state, leaves)


def narrow(
    model: PyTree, state: OptimizerState, leaves: Selectors = None
) -> OptimizerState:
    """The inverse of [`flashquinox.widen`][]: from an `int16` to an `int8` correction.

    Master weights are rounded to 24 bits, by at most half a unit in the last of them;
    or by one where they are nearly half way to the next narrow weight, as the weights
    of the model stay what they are.

    Arguments, results and errors are those of [`flashquinox.widen`][]. An optimizer
    with `master_weight_bits=32` does not take the new state: make one with 24.
    """
    return _change("narrow", 24, model, state, leaves)


def _change(
    call: str, bits: int, model: PyTree, state: OptimizerState, chosen: Selectors
) -> OptimizerState:
    checks.is_state(call, state, rule=None)
    leaves, rebuild = flatten(model)
    selection = Selection(call, "leaves", "*" if chosen is None else chosen)
    paths = chosen_leaves(model, selection)
    corrections = match(call, "state.corrections", state.corrections, leaves)
    new: list[Any] = []
    for leaf, correction in zip(leaves, corrections, strict=True):
        taken = leaf.path in paths and checks.is_trained(leaf, call)
        if taken and jnp.finfo(leaf.value.dtype).bits < 32:
            checks.has_correction(call, leaf, correction)
            checks.correction_fits(call, leaf, correction)
            weight = jnp.asarray(leaf.value)
            correction = change_width(weight, correction, CORRECTION_DTYPES[bits])
        new.append(correction)
    return OptimizerState(state.steps, state.moments, rebuild(new), state.shardings)
