"""Checks of states: of their kind, of their number, and of what they hold for a leaf.

Each message names the call, the leaf, what came, and the remedy. Other checks are in
`argument_checks.py` (arguments of a factory), `call_checks.py` (arguments in each
other's place), `leaf_checks.py` and `device_checks.py`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._common.dtypes import NARROW_DTYPES
from .._model.trees import Leaf
from .._rules.rule import Moment
from .._storage.full_precision import FullPrecision
from .._storage.quant_moment import QuantMoment, StoredMoment
from .._storage.split import Correction, CORRECTION_DTYPES
from .._storage.storage import AUTO_BITS, Storage
from .state import OptimizerState
from .state_dtypes import check_correction_dtype, check_count_dtype, check_moment_dtypes


def check_state(call: str, state: Any, moments: Sequence[str]) -> None:
    if not isinstance(state, OptimizerState):
        raise TypeError(
            f"`{call}`: the state is no `flashquinox.OptimizerState` but a "
            f"{type(state).__name__}. Pass what `init` or the previous step returned; "
            "the model comes before the state in `step`, the gradients before it in "
            "`update`."
        )
    check_count_dtype(call, state)
    if set(state.moments) != set(moments):
        raise ValueError(
            f"`{call}`: this is the state of another optimizer: it has the moments "
            f"{sorted(state.moments)}, where this one keeps {sorted(moments)}. "
            "Make a new state with `init`."
        )


def check_not_ensemble(call: str, count: Any) -> None:
    """The state of this count must be that of one model, not that of an ensemble."""
    shape = np.shape(count)
    if shape != ():
        raise ValueError(
            f"`{call}`: the state has counts of shape {shape}: it is one of an "
            f"ensemble, which `vmap` made. Take the step under `vmap` too, as "
            "`eqx.filter_vmap(optim.step)(model, state, grads)`, or make the state "
            "with `init` alone."
        )


def check_has_state(call: str, state: Any, found: list[OptimizerState]) -> None:
    if not found:
        raise TypeError(
            f"`{call}`: there is no `flashquinox.OptimizerState` in the state, which "
            f"is a {type(state).__name__}. Pass what `init` or the previous step "
            "returned, of an optimizer of this library or of a wrapper around one (the "
            "`nnx.Optimizer` itself, not its `nnx.state`); the model comes before it."
        )
    for one in found:
        check_count_dtype(call, one)


def check_has_one_state(call: str, found: list[OptimizerState]) -> None:
    if len(found) > 1:
        raise ValueError(
            f"`{call}`: there are {len(found)} `flashquinox.OptimizerState`s in the "
            "state, and it cannot be told which is meant. Pass the part of it that has "
            "the one."
        )


def check_not_in_two_states(call: str, leaf: Leaf, owner: int | None) -> None:
    if owner is not None:
        raise ValueError(
            f"`{call}`: two `flashquinox.OptimizerState`s in the state have the weight "
            f"at `{leaf.name}`, and it cannot be told which of them trains it. Pass "
            "the part of the state that has the one."
        )


def check_moments(
    call: str,
    leaf: Leaf,
    stored: Mapping[str, StoredMoment | None],
    moments: Mapping[str, Moment],
    storage: Storage,
) -> None:
    codecs = storage.codecs
    for name, of_rule in moments.items():
        moment = stored[name]
        shape = leaf.value.shape
        codec = codecs.of(of_rule, shape)
        _check_moment(call, leaf, name, moment, codec, of_rule.shape(shape))
        if not isinstance(moment, QuantMoment):
            continue
        if moment.group_size != storage.group_size:
            raise ValueError(
                f"`{call}`: the state at `{leaf.name}` was made with "
                f"`Storage(group_size={moment.group_size})`, this optimizer with "
                f"`Storage(group_size={storage.group_size})`. Make a new state with "
                "`init`, or pass the state's group size."
            )


def check_width(
    call: str, leaf: Leaf, correction: Correction | None, storage: Storage
) -> None:
    """A correction must have the width of `master_weight_bits`, or more: single leaves
    have more after `flashquinox.widen_corrections`."""
    dtype = jnp.dtype(leaf.value.dtype)
    if correction is not None and dtype not in NARROW_DTYPES:
        raise ValueError(
            f"`{call}`: the weight at `{leaf.name}` is {dtype}, but the state has an "
            f"{correction.dtype} correction for it: when the state was made, it was "
            "bfloat16 or float16. Cast the model back, or make a new state with `init`."
        )
    expected = storage.correction_dtype
    found = None if correction is None else jnp.dtype(correction.dtype)
    if found == expected or dtype not in NARROW_DTYPES:
        return
    remedy = ""
    if found is not None and expected is not None:
        if found.itemsize > expected.itemsize:
            return
        remedy = ", or move it to more bits with `flashquinox.widen_corrections`"
    widths = {width_dtype: width for width, width_dtype in CORRECTION_DTYPES.items()}
    bits = storage.master_weight_bits
    wanted = f"{AUTO_BITS})`, as 'auto' is here" if bits == "auto" else f"{bits})`"
    raise ValueError(
        f"`{call}`: at `{leaf.name}`, a {dtype} weight, the state was made with "
        f"`Storage(master_weight_bits={None if found is None else widths[found]})`, "
        f"this optimizer with `Storage(master_weight_bits={wanted}. Make a new state "
        f"with `init`, or pass the state's width{remedy}."
    )


def check_checksum(
    call: str, leaf: Leaf, correction: Correction | None, checksum: Any, verify: Any
) -> None:
    wanted = verify is not None and correction is not None
    if (checksum is not None) == wanted:
        return
    has, argument = "no checksum", "without `verify_weights`"
    remedy = "dataclasses.replace(state, checksums=optim.init(model).checksums)"
    if checksum is not None:
        has, argument = "a checksum", "with `verify_weights`"
        remedy = "dataclasses.replace(state, checksums=None)"
    raise ValueError(
        f"`{call}`: the state has {has} of the weight at `{leaf.name}`: it was made "
        f"{argument}, this optimizer with `verify_weights={verify!r}`. Pass the same, "
        f"or go on with `{remedy}`."
    )


def check_has_correction(call: str, leaf: Leaf, correction: Any) -> None:
    if correction is None:
        raise ValueError(
            f"`{call}`: the state has no correction for the {leaf.value.dtype} weight "
            f"at `{leaf.name}`. Make a state with `init`, of an optimizer with "
            "`Storage(master_weight_bits=24)` or 32."
        )


def _check_moment(
    call: str,
    leaf: Leaf,
    name: str,
    moment: Any,
    codec: Any,
    shape: tuple[int, ...],
) -> None:
    # Names of leaves take time, and are only needed for errors.
    where = lambda: f"`{call}`: the state's moment {name!r} at `{leaf.name}`"
    if moment is None:
        raise ValueError(
            f"{where()} is missing: when the state was made, this leaf was no "
            "floating-point array, or had other moments, as its shape and arguments "
            f"decide for some optimizers. Here, its shape is {leaf.value.shape}. Make "
            "a new state with `init`, or pass the state of this model."
        )
    found = moment.codec if isinstance(moment, QuantMoment) else FullPrecision()
    if found != codec:
        raise ValueError(
            f"{where()} was stored by {found}, but this optimizer uses {codec}. Make a "
            "new state with `init`, or pass the same `Storage(moments=...)`."
        )
    check_moment_dtypes(call, leaf, name, moment)
    codes = moment.codes if isinstance(moment, QuantMoment) else moment
    if not eqx.is_array_like(codes) or codes.shape != shape:
        raise ValueError(
            f"{where()} has shape {np.shape(codes)}; for the weight, of shape "
            f"{leaf.value.shape}, it must be {shape}. Pass the state of this model."
        )
    if isinstance(moment, QuantMoment):
        if moment.scales.shape != moment.layout.scale_shape:
            raise ValueError(
                f"{where()} has scales of shape {moment.scales.shape}; its groups need "
                f"{moment.layout.scale_shape}. Pass the state as `init` laid it out."
            )


def check_correction(call: str, leaf: Leaf, correction: Array | None) -> None:
    if correction is None:
        return
    check_correction_dtype(call, leaf, correction)
    if correction.shape != leaf.value.shape:
        raise ValueError(
            f"`{call}`: the state's correction at `{leaf.name}` has shape "
            f"{correction.shape}, the weight {leaf.value.shape}. Pass the state of "
            "this model."
        )
