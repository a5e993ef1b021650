"""The start of training: weights, corrections and state from a float32 model."""

from collections.abc import Callable
from functools import partial
from typing import Any, overload

import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import PyTree

from .._common.dtypes import NARROW_DTYPES
from .._common.number_checks import check_flag
from .._common.placement import compute_like
from .._common.text import shown
from .._model.quantized import check_no_scales
from .._model.selection import Selectors
from .._model.trained import is_trainable
from .._model.trees import flatten, Leaf, match, Model
from .._optimizer.accumulate import AccumulatingOptimizer
from .._optimizer.accumulation_state import AccumulationState
from .._optimizer.call_checks import check_has_values, check_model
from .._optimizer.for_init import for_init
from .._optimizer.master_weights import split_master_weight, with_encoded
from .._optimizer.optimizer import Optimizer, settings_of
from .._optimizer.state import OptimizerState
from .._optimizer.states import find, open_states
from .._storage.split import Correction, CORRECTION_DTYPES
from .._storage.spread import spread_correction
from .._storage.storage import AUTO_BITS
from .cast import cast_for


_CALL = "prepare"


@overload
def prepare(
    model: Model,
    optim: Optimizer,
    dtype: DTypeLike = ...,
    keep: Selectors = ...,
    *,
    wrap: bool = ...,
    spread_lower_bits: bool = ...,
) -> tuple[Model, OptimizerState]: ...


@overload
def prepare(
    model: Model,
    optim: AccumulatingOptimizer,
    dtype: DTypeLike = ...,
    keep: Selectors = ...,
    *,
    wrap: bool = ...,
    spread_lower_bits: bool = ...,
) -> tuple[Model, AccumulationState]: ...


@overload
def prepare(
    model: Model,
    optim: optax.GradientTransformation | optax.MultiSteps | Callable[[Model], PyTree],
    dtype: DTypeLike = ...,
    keep: Selectors = ...,
    *,
    wrap: bool = ...,
    spread_lower_bits: bool = ...,
) -> tuple[Model, Any]: ...


def prepare(
    model: Model,
    optim: optax.GradientTransformation | optax.MultiSteps | Callable[[Model], PyTree],
    dtype: DTypeLike = jnp.bfloat16,
    keep: Selectors = None,
    *,
    wrap: bool = True,
    spread_lower_bits: bool = False,
) -> tuple[Model, Any]:
    """Casts a float32 model for training, and makes the optimizer's state, which keeps
    the bits of each weight that `dtype` cannot hold.

    [`flashquinox.cast`][] and `optim.init` alone would round every master weight to
    `dtype`. Here, [`flashquinox.master_weights`][] of the result are the weights of
    `model`: rounded to 24 bits, or, with `Storage(master_weight_bits=32)` and bfloat16,
    bit for bit. With `Storage(master_weight_bits=None)` there is nothing to keep the
    lower bits in, and the result is that of `cast` and `init`.

    Weights that come in `dtype` already, as from a bfloat16 checkpoint, have no lower
    bits: they stay as they are, and their master weights are equal to them. Steps of
    less than half a unit in the last place then change nothing at first that the model
    sees. `spread_lower_bits` is for these.

    ??? Example

        ```python
        optim = fq.adamw(1e-3)
        model, state = fq.prepare(float32_model, optim)

        # Inside of `jit`, the float32 model need not be in memory as a whole.
        make = lambda key: fq.prepare(eqx.nn.MLP(64, 10, 256, 2, key=key), optim)
        model, state = eqx.filter_jit(make)(jax.random.key(0))
        ```

    **Arguments:**

    - `model`: the model, such as `optim.init` takes, with its weights in float32, as
        JAX arrays in any sharding or NumPy arrays. Weights of other floating-point
        dtypes are first rounded or widened to float32.
    - `optim`: the optimizer: one of this library, or a wrapper with one or more inside,
        such as `optax.chain` or `optax.partition`, whose `init` gets the floating-point
        arrays of the cast model alone. Or a function from the cast model to its state,
        such as `lambda model: nnx.Optimizer(model, optim, wrt=nnx.Param)` or
        `lambda model: optim.init(eqx.filter(model, is_trained))`.
    - `dtype`, `keep`, `wrap`: as in [`flashquinox.cast`][]: a floating-point dtype, the
        parts that stay in float32, and whether layers among these are wrapped in
        [`flashquinox.Float32Layer`][].
    - `spread_lower_bits`: whether weights that come in `dtype` get lower bits: each
        correction is drawn evenly from all that belong to the weight, by a hash of its
        position. The weights themselves do not change, the mean is that of the weights,
        and the result is the same on all devices and in all shardings. Weights that are
        0, such as pruned ones, keep a correction of 0. Float32 weights keep their own
        lower bits: if they hold numbers of bfloat16, `cast` them first.

    **Returns:**

    A 2-tuple of the new model, as of `cast`, and its state, as of `optim.init`. Both
    are sharded like the model. Weights that `optim` does not train are rounded to
    `dtype`.

    **Raises:**

    `TypeError` or `ValueError` for an argument that is none of these, or if there is no
    [`flashquinox.OptimizerState`][] in the state; `ValueError` with `spread_lower_bits`
    if no weight that is trained comes in `dtype`, or none has a correction. Otherwise
    the errors are those of `cast` and of `optim.init`.
    """
    check_model(_CALL, model)
    _check_optimizer(model, optim)
    check_has_values(_CALL, model=model)
    check_flag(_CALL, "spread_lower_bits", spread_lower_bits)
    leaves, rebuild = flatten(cast_for(_CALL, model, dtype, keep, wrap))
    masters = match(_CALL, "model", model, leaves)
    narrow = [i for i, leaf in enumerate(leaves) if _is_narrow(leaf.value)]
    has_lower_bits = {i: masters[i].dtype != leaves[i].value.dtype for i in narrow}
    # Weights are split before `init`, so that it sees what is returned, and so that
    # there are no two copies of them beside the state.
    usual = _usual_correction_dtype(optim)
    split = {
        i: split_master_weight(_CALL, leaves[i], masters[i], usual)
        for i in narrow
        if has_lower_bits[i]
    }
    weights = [leaf.value for leaf in leaves]
    for i, (weight, _) in split.items():
        weights[i] = weight
    new = rebuild(weights)
    del leaves, rebuild, weights
    init: Any = getattr(optim, "init", optim)
    given = for_init(optim, new)
    state = init(given)
    _check_has_state(state)
    opened = open_states(_CALL, new, state)
    if given is not new:
        # `init` has not seen the codes.
        trained = [i for i, is_trained in enumerate(opened.trained) if is_trained]
        check_no_scales(_CALL, opened.leaves, trained)

    def encode(i: int, leaf: Leaf, zeros: Correction | None) -> tuple[Any, Any]:
        if not has_lower_bits[i]:
            return leaf.value, _spread(leaf, zeros, i)
        _, correction = split.pop(i)
        if _dtype_name(correction) == _dtype_name(zeros):
            return leaf.value, correction
        # A wrapper does not tell its storage, and need not train all weights.
        found = None if zeros is None else zeros.dtype
        return split_master_weight(_CALL, leaf, masters[i], found)

    to_spread = []
    if spread_lower_bits:
        without = [i for i in narrow if not has_lower_bits[i]]
        to_spread = [i for i in without if opened.corrections[i] is not None]
        _check_has_effect(jnp.dtype(dtype), without, to_spread)
    return with_encoded(_CALL, opened, [*split, *to_spread], encode)


def _is_narrow(x: Any) -> bool:
    return is_trainable(x) and jnp.dtype(x.dtype) in NARROW_DTYPES


def _usual_correction_dtype(optim: Any) -> Any:
    if isinstance(optim, AccumulatingOptimizer):
        optim = optim.inner
    if isinstance(optim, Optimizer):
        return settings_of(optim).storage.correction_dtype
    return CORRECTION_DTYPES[AUTO_BITS]


def _dtype_name(x: Any) -> str | None:
    return None if x is None else x.dtype.name


def _spread(leaf: Leaf, zeros: Any, index: int) -> Any:
    """The lower bits of a weight that has none, for the leaf of this number."""
    draw = partial(spread_correction, correction_dtype=zeros.dtype, leaf=index)
    return compute_like(_CALL, leaf.name, draw, [leaf.value], [leaf.value])


def _check_optimizer(model: Any, optim: Any) -> None:
    if isinstance(model, optax.GradientTransformation):
        raise TypeError(
            f"`{_CALL}(model, optim)`: an optimizer came where the model belongs: the "
            "model comes first."
        )
    if not callable(getattr(optim, "init", optim)):
        raise TypeError(
            f"`{_CALL}(model, optim)` takes an optimizer, such as "
            "`flashquinox.adamw(1e-3)`, or a function from the cast model to the "
            f"optimizer's state; got {shown(optim)}."
        )


def _check_has_state(state: Any) -> None:
    if not find(state).values:
        raise TypeError(
            f"`{_CALL}(model, optim)`: there is no `flashquinox.OptimizerState` in "
            f"what `optim` makes for the model, a {type(state).__name__}, so that "
            "nothing keeps the lower bits of the weights. Pass an optimizer of this "
            "library, or a wrapper around one; for others, `flashquinox.cast` and "
            "`init`."
        )


def _check_has_effect(dtype: Any, without: list[int], to_spread: list[int]) -> None:
    if to_spread:
        return
    what = f"no weight of the model comes in {dtype}"
    remedy = "Float32 weights keep their own lower bits: leave the argument out."
    if without:
        what = "no weight has a correction that could hold lower bits"
        remedy = "Pass `Storage(master_weight_bits=24)` or 32 to the optimizer."
    raise ValueError(
        f"`{_CALL}(spread_lower_bits=True)` has no effect: {what}. {remedy}"
    )
