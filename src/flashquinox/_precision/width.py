"""Changing how many bits the corrections of chosen weights have."""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import PyTree

from .._common import eager
from .._common.placement import compute_like, put_like
from .._model.selection import chosen_leaves, Selection, Selectors
from .._model.trained import is_trainable
from .._model.trees import dotted_name, State
from .._optimizer.state_checks import check_has_correction
from .._optimizer.states import open_states
from .._storage.split import change_width, CORRECTION_DTYPES


def widen_corrections(model: PyTree, state: State, leaves: Selectors = None) -> State:
    r"""Widens the corrections of weights from `int8` to `int16`, where master weights
    of 24 bits are too coarse for the steps: see [`flashquinox.check_numerics`][].

    Every master weight keeps its value. The same optimizer takes the new state: with
    `Storage(master_weight_bits=24)`, corrections may have either width.

    $$\ell_{16} = 2^8 \, \ell_8 \text{ (bfloat16)}, \qquad
    \ell_{16} = 2^5 \, \ell_8 \text{ (float16)}$$

    **Arguments:**

    - `model`: the model.
    - `state`: its optimizer state, or the state of a wrapper, such as `optax.chain` or
        `optax.partition`, with one or more inside.
    - `leaves`: which weights, as `keep` in [`flashquinox.cast`][]: patterns for dotted
        paths, types, modules or functions of an array. By default, all weights that
        the state trains. Those with an `int16` correction, and those in float32 or
        float64, stay as they are.

    **Returns:**

    A new state, of the structure of `state`. `model` and `state` are not changed.

    **Raises:**

    `ValueError` if a chosen weight has no correction, as with
    `Storage(master_weight_bits=None)`; if the state is not one of this model; or for a
    pattern that is nowhere in it.

    ??? cite "Reference"

        FlashOptim, [arXiv:2602.23349](https://arxiv.org/abs/2602.23349), Section 3.1,
        has corrections of both widths, of which one is chosen for a whole model.
    """
    return _change("widen_corrections", 32, model, state, leaves)


def narrow_corrections(model: PyTree, state: State, leaves: Selectors = None) -> State:
    """Narrows corrections from `int16` to `int8`: the inverse of
    [`flashquinox.widen_corrections`][].

    Master weights are rounded to 24 bits. The error is at most half a unit in the last
    place, or one unit where a master weight is nearly half way to the next narrow
    weight: the weights of the model do not change.

    Arguments, results and errors are those of [`flashquinox.widen_corrections`][]. An
    optimizer with `Storage(master_weight_bits=32)` does not take the new state: make
    one with 24.
    """
    return _change("narrow_corrections", 24, model, state, leaves)


def _change(
    call: str, bits: int, model: PyTree, state: PyTree, chosen: Selectors
) -> PyTree:
    opened = open_states(call, model, state)
    selection = Selection(call, "leaves", "*" if chosen is None else chosen)
    names = {dotted_name(path) for path in chosen_leaves(model, selection)}
    # By default, weights that another optimizer trains, or none, are left out.
    owned = any(owner is not None for owner in opened.owners)
    new: list[Any] = []
    for leaf, owner, correction in zip(
        opened.leaves, opened.owners, opened.corrections, strict=True
    ):
        named = dotted_name(leaf.path) in names
        meant = named and not (chosen is None and owned and owner is None)
        taken = meant and is_trainable(leaf.value)
        if taken and jnp.finfo(leaf.value.dtype).bits < 32:
            check_has_correction(call, leaf, correction)
            dtype = CORRECTION_DTYPES[bits]
            change = eager.elementwise(partial(change_width, dtype=dtype))
            stored = [leaf.value, correction]
            changed = compute_like(call, leaf.name, change, stored, stored)
            correction = put_like(call, leaf.name, changed, correction)
        new.append(correction)
    return opened.with_corrections(new)
