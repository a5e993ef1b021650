"""Leaves, states and devices that do not fit, found before anything is computed.

Each message says which call it was, which leaf, what came, and what to do. Arguments
are checked in `_argument_checks.py`, what came in the wrong place in `_call_checks.py`.
"""

import warnings
from collections.abc import Mapping
from typing import Any, Literal

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array

from .._common import meshes
from .._common.dtypes import compute_dtype, NARROW_DTYPES
from .._common.text import shown
from .._model.trained import is_float_array, TRAINABLE_DTYPES
from .._model.trees import Leaf, path_name
from .._rules.rule import AbstractRule
from .._sharding import state_specs
from .._storage.codec import QuantMoment, StoredMoment
from .._storage.defaults import AUTO_BITS, StaticBits, Unknown
from .._storage.full_precision import FullPrecision
from .._storage.moment_codecs import MomentCodecs
from .._storage.split import Correction, CORRECTION_DTYPES
from . import state_dtypes as _dtypes
from .state import OptimizerState


#
# Leaves
#


def floating_dtype(call: str, value: Any) -> Any:
    """An argument that says in which dtype floating-point numbers shall be."""
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


def correction_has_effect(call: str, bits: StaticBits, trained: list[Leaf]) -> None:
    if bits in (None, "auto") or not trained:
        return
    if any(jnp.dtype(leaf.value.dtype) in NARROW_DTYPES for leaf in trained):
        return
    raise ValueError(
        f"`{call}(master_weight_bits={bits})` has no effect: none of the "
        f"{len(trained)} weights is bfloat16 or float16 (`{trained[0].name}` is "
        f"{trained[0].value.dtype}). Cast the model first, "
        "`model = flashquinox.cast(model, jnp.bfloat16)`, or pass "
        "`master_weight_bits=None`, or leave it out."
    )


def structure_is_known(
    call: str, bits: StaticBits, size: int | Unknown
) -> tuple[Any, int]:
    """The dtype of corrections and the group size, which `init` must know."""
    for name, value in (("master_weight_bits", bits), ("group_size", size)):
        if value is Unknown.TRACED:
            raise TypeError(
                f"`{call}({name}=...)` is a traced array, but decides the "
                "structure of the state. With `optax.inject_hyperparams`, pass "
                f'`static_args=("master_weight_bits", "group_size")`, or leave it out.'
            )
    assert not isinstance(bits, Unknown) and not isinstance(size, Unknown)
    return correction_dtype(bits), size


def correction_dtype(bits: int | Literal["auto"] | None) -> Any:
    """Of corrections of so many bits, master weight and all. `None` for none."""
    if bits is None:
        return None
    return CORRECTION_DTYPES[AUTO_BITS if bits == "auto" else bits]


def grad_fits(call: str, leaf: Leaf, grad: Any) -> None:
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
    if jnp.dtype(grad.dtype) not in TRAINABLE_DTYPES:
        raise TypeError(
            f"`{call}`: the gradient at `{leaf.name}` is {grad.dtype}; gradients must "
            "be bfloat16, float16, float32 or float64."
        )


#
# State
#


def is_state(call: str, state: Any, rule: AbstractRule | None) -> None:
    if not isinstance(state, OptimizerState):
        raise TypeError(
            f"`{call}`: the state is no `flashquinox.OptimizerState` but a "
            f"{type(state).__name__}. Pass what `init` or the previous step returned; "
            "the model comes before the state in `step`, the gradients before it in "
            "`update`."
        )
    _dtypes.count_fits(call, state)
    if rule is not None and set(state.moments) != set(rule.moments):
        raise ValueError(
            f"`{call}`: this is the state of another optimizer: it has the moments "
            f"{sorted(state.moments)}, where this one keeps {sorted(rule.moments)}. "
            "Make a new state with `init`."
        )


def is_one_state(call: str, state: OptimizerState) -> None:
    """Whether this is the state of one model, not of an ensemble of them."""
    shape = np.shape(state.count)
    if shape != ():
        raise ValueError(
            f"`{call}`: the state has counts of shape {shape}: it is one of an "
            f"ensemble, which `vmap` made. Take the step under `vmap` too, as "
            "`eqx.filter_vmap(optim.step)(model, state, grads)`, or make the state "
            "with `init` alone."
        )


def has_state(call: str, state: Any, found: list[OptimizerState]) -> None:
    if not found:
        raise TypeError(
            f"`{call}`: there is no `flashquinox.OptimizerState` in the state, which "
            f"is a {type(state).__name__}. Pass what `init` or the previous step "
            "returned, of an optimizer of this library or of a wrapper around one (the "
            "`nnx.Optimizer` itself, not its `nnx.state`); the model comes before it."
        )
    for one in found:
        _dtypes.count_fits(call, one)


def has_one_state(call: str, found: list[OptimizerState]) -> None:
    if len(found) > 1:
        raise ValueError(
            f"`{call}`: there are {len(found)} `flashquinox.OptimizerState`s in the "
            "state, and it cannot be told which is meant. Pass the part of it that has "
            "the one."
        )


def is_in_no_other_state(call: str, leaf: Leaf, owner: int | None) -> None:
    if owner is not None:
        raise ValueError(
            f"`{call}`: two `flashquinox.OptimizerState`s in the state have the weight "
            f"at `{leaf.name}`, and it cannot be told which of them trains it. Pass "
            "the part of the state that has the one."
        )


def moments_fit(
    call: str,
    leaf: Leaf,
    stored: Mapping[str, StoredMoment | None],
    rule: AbstractRule,
    codecs: MomentCodecs,
    size: int | Unknown,
) -> None:
    for name, kind in rule.moments.items():
        moment = stored[name]
        _moment_fits(call, leaf, name, moment, codecs.of(kind, leaf.value.shape))
        if size is Unknown.TRACED or not isinstance(moment, QuantMoment):
            continue
        if moment.group_size != size:
            raise ValueError(
                f"`{call}`: the state at `{leaf.name}` was made with "
                f"`group_size={moment.group_size}`, this optimizer with "
                f"`group_size={size}`. Make a new state with `init`, or pass "
                "the state's group size."
            )


def width_fits(
    call: str, leaf: Leaf, correction: Correction | None, bits: StaticBits
) -> None:
    """Whether a correction has the width that was asked for, or more: the state
    decides, as `flashquinox.widen` changes it leaf by leaf."""
    dtype = jnp.dtype(leaf.value.dtype)
    if correction is not None and dtype not in NARROW_DTYPES:
        raise ValueError(
            f"`{call}`: the weight at `{leaf.name}` is {dtype}, but the state has an "
            f"{correction.dtype} correction for it: when the state was made, it was "
            "bfloat16 or float16. Cast the model back, or make a new state with `init`."
        )
    if isinstance(bits, Unknown) or dtype not in NARROW_DTYPES:
        return
    expected = correction_dtype(bits)
    found = None if correction is None else jnp.dtype(correction.dtype)
    if found == expected:
        return
    remedy = ""
    if found is not None and expected is not None:
        if found.itemsize > expected.itemsize:
            return
        remedy = ", or move it to more bits with `flashquinox.widen`"
    widths = {width_dtype: width for width, width_dtype in CORRECTION_DTYPES.items()}
    wanted = f"{AUTO_BITS}`, as 'auto' is here" if bits == "auto" else f"{bits}`"
    raise ValueError(
        f"`{call}`: at `{leaf.name}`, a {dtype} weight, the state was made with "
        f"`master_weight_bits={None if found is None else widths[found]}`, this "
        f"optimizer with `master_weight_bits={wanted}. Make a new state with `init`, "
        f"or pass the state's width{remedy}."
    )


def checksum_fits(
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


def has_correction(call: str, leaf: Leaf, correction: Any) -> None:
    if correction is None:
        raise ValueError(
            f"`{call}`: the state has no correction for the {leaf.value.dtype} weight "
            f"at `{leaf.name}`. Make a state with `init`, of an optimizer with "
            "`master_weight_bits=24` or 32."
        )


def is_concrete(call: str, leaf: Leaf) -> None:
    if isinstance(leaf.value, jax.core.Tracer):
        raise TypeError(
            f"`{call}`: the weight at `{leaf.name}` is traced, and its size not known. "
            f"Call `{call}` outside of `jit`, between steps."
        )


def _moment_fits(call: str, leaf: Leaf, name: str, moment: Any, codec: Any) -> None:
    where = f"`{call}`: the state's moment {name!r} at `{leaf.name}`"
    if moment is None:
        raise ValueError(
            f"{where} is missing: when the state was made, this leaf was no "
            "floating-point array. Make a new state with `init`."
        )
    found = moment.codec if isinstance(moment, QuantMoment) else FullPrecision()
    if found != codec:
        raise ValueError(
            f"{where} was stored by {found}, but this optimizer uses {codec}. Make a "
            "new state with `init`, or pass the same `moments=...`."
        )
    _dtypes.moment_fits(call, leaf, name, moment)
    codes = moment.codes if isinstance(moment, QuantMoment) else moment
    if not eqx.is_array_like(codes) or codes.shape != leaf.value.shape:
        raise ValueError(
            f"{where} has shape {np.shape(codes)}, the weight {leaf.value.shape}. Pass "
            "the state of this model."
        )
    if isinstance(moment, QuantMoment):
        if moment.scales.shape != moment.layout.scale_shape:
            raise ValueError(
                f"{where} has scales of shape {moment.scales.shape}; its groups need "
                f"{moment.layout.scale_shape}. Pass the state as `init` laid it out."
            )


def correction_fits(call: str, leaf: Leaf, correction: Array | None) -> None:
    if correction is None:
        return
    _dtypes.correction_fits(call, leaf, correction)
    if correction.shape != leaf.value.shape:
        raise ValueError(
            f"`{call}`: the state's correction at `{leaf.name}` has shape "
            f"{correction.shape}, the weight {leaf.value.shape}. Pass the state of "
            "this model."
        )


def master_fits(call: str, leaf: Leaf, master: Any) -> None:
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


#
# Devices
#


def is_known_how_divided(call: str, unknown: list[Leaf]) -> None:
    """Warns of weights of which only XLA knows how they are divided."""
    if not unknown:
        return
    others = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
    mesh = jax.typeof(unknown[0].value).sharding.mesh
    warnings.warn(
        f"`{call}`: the weight at `{unknown[0].name}`{others} is on the mesh "
        f"{meshes.mesh_text(mesh)}, and it is not known how it is divided there: "
        "inside `jit` and `vmap`, JAX does not tell. XLA divides the program, without "
        "this library's kernels, and may communicate. For kernels, call `init` outside "
        "of `jit`, on the weights where they shall be, and the state knows; or use a "
        "mesh with axes of type `Explicit`; or pass `shardings=...` to the optimizer: "
        "a `NamedSharding` for each weight, which under `vmap` is that of one member.",
        stacklevel=2,
    )


def groups_are_whole(
    call: str,
    leaf: Leaf,
    stored: dict[str, StoredMoment],
    sharding: NamedSharding | None,
) -> None:
    """Warns of what is correct, but slow."""
    for moment in stored.values():
        if sharding is None or not isinstance(moment, QuantMoment):
            continue
        if not state_specs.holds_whole_groups(moment.layout, sharding):
            warnings.warn(
                f"`{call}`: the weight at `{leaf.name}`, of shape {leaf.value.shape}, "
                f"is sharded by {sharding.spec} into {meshes.divisions(sharding)} "
                f"parts, which hold no whole groups of {moment.group_size} elements "
                f"along {_axis_text(moment)}. Every step gathers it on every device. "
                "Shard it along another axis, or make its axes multiples of the parts "
                "times the group size; a state from elsewhere may need a new `init`.",
                stacklevel=2,
            )
            return


def _axis_text(moment: QuantMoment) -> str:
    return "the flattened leaf" if moment.axis is None else f"axis {moment.axis}"


def state_is_there(
    call: str,
    leaf: Leaf,
    stored: dict[str, StoredMoment],
    correction: Correction | None,
    sharding: NamedSharding | None,
) -> None:
    """Whether the state is where its weight is."""
    if sharding is None:
        return
    state = stored, correction
    found = jtu.tree_leaves(state)
    expected = jtu.tree_leaves(state_specs.of_arrays(state, sharding))
    for x, there in zip(found, expected, strict=True):
        if not meshes.is_there(x, there):
            raise ValueError(
                f"`{call}`: the state at `{leaf.name}` is sharded by "
                f"{jax.typeof(x).sharding}, and should be by {there.spec} on the mesh "
                "of its weight. Put it there with `jax.device_put`, or restore it with "
                "`flashquinox.checkpoint` into a state that `init` made."
            )


#
# Layers
#


def is_layered_loss(call: str, loss: Any, kind: type) -> None:
    if not isinstance(loss, kind):
        raise TypeError(
            f"`{call}`: the loss is no `flashquinox.{kind.__name__}` but "
            f"{shown(loss)}. Only of one in parts can the backward pass be taken layer "
            "by layer."
        )


def block_keeps_shapes(call: str, x: Any, new: Any) -> None:
    structures = [jtu.tree_structure(tree) for tree in (x, new)]
    if structures[0] != structures[1]:
        raise ValueError(
            f"`{call}`: `block` got {structures[0]} and returned {structures[1]}. "
            "Return a tree of the structure of `x`."
        )
    for (path, old), y in zip(
        jtu.tree_leaves_with_path(x), jtu.tree_leaves(new), strict=True
    ):
        types = [jax.typeof(value) for value in (old, y)]
        if len({(one.shape, one.dtype) for one in types}) > 1:
            raise ValueError(
                f"`{call}`: `block` got {types[0].str_short()} at `{path_name(path)}` "
                f"of `x`, and returned {types[1].str_short()}. Return the shapes and "
                "dtypes that it gets, as the next layer gets what it returns; cast at "
                "the end of `prologue` and of `block`."
            )


def is_random_key(call: str, key: Any) -> None:
    dtype = getattr(key, "dtype", None)
    is_typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if (is_typed and key.ndim == 0) or dtype == jnp.uint32:
        return
    raise TypeError(
        f"`{call}(key=...)` takes a random key, as `jax.random.key(0)` makes one; got "
        f"{shown(key)}."
    )


def is_loss(call: str, loss: Any) -> None:
    if not is_float_array(loss) or loss.ndim != 0:
        found = jax.typeof(loss).str_short() if eqx.is_array(loss) else repr(loss)
        raise TypeError(
            f"`{call}`: `epilogue` returned {found}. Return the loss: a floating-point "
            "scalar."
        )


def layers_are_whole(call: str, leaf: Leaf, sharding: NamedSharding | None) -> None:
    if sharding is None or meshes.divisions(sharding)[0] == 1:
        return
    raise ValueError(
        f"`{call}`: the weight at `{leaf.name}`, of shape {leaf.value.shape}, is "
        f"sharded by {sharding.spec}: its layers lie on different devices, but all "
        "devices work on one layer at a time. Shard it along another axis."
    )
