"""The state of an optimizer that accumulates gradients."""

import dataclasses
from functools import partial
from typing import Any, get_args, Literal, TypeAlias

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8, Int32, PyTree

from .._common.text import shown
from .._model.trained import is_trainable
from .._model.trees import flatten
from .._model.variables import without_variables
from .._rules.added import Added
from .._storage.storage import Storage
from .groups import Group
from .initial_state import make_states
from .settings import Settings
from .state import OptimizerState
from .weight_decay import l2


SumBits: TypeAlias = Literal[16, 24, 32]

# How sums of so many bits are stored: the dtype, and what of it is no part of it.
_STORAGES = {
    16: Storage(master_weight_bits=None, dither_weights=True),
    24: Storage(master_weight_bits=24, dither_weights=True),
    32: Storage(master_weight_bits=None),
}


class AccumulationState(eqx.Module):
    """What an optimizer of [`flashquinox.accumulate`][] keeps between calls. `sums` and
    `corrections` are trees of the structure of the model, with `None` for leaves that
    are not trained.

    - `mini_step`: how many gradients the sums hold: 0 after a step.
    - `rounding_count`: which threshold the next sums are rounded by.
    - `sums`: the sum of the gradients since the last step, for each weight: bfloat16,
        or float32 with `bits=32`. Those of float64 weights are float64.
    - `corrections`: with `bits=24`, the `int8` that extends each sum: see
        [`flashquinox.ECCWeight`][].
    - `inner_state`: the state of the optimizer.
    - `count`: the number of steps that were taken, not of gradients.
    """

    mini_step: Int32[Array, "*ensemble"]
    rounding_count: Int32[Array, "*ensemble"]
    sums: PyTree[Float[Array, "..."] | None]
    corrections: PyTree[Int8[Array, "..."] | None]
    inner_state: OptimizerState

    @property
    def count(self) -> Int32[Array, "*ensemble"]:
        """The number of steps taken."""
        return self.inner_state.count


def adding_settings(call: str, settings: Settings, bits: Any) -> Settings:
    """Those of the optimizer that adds gradients to sums, which are its weights: as
    gradients are divided, computed with and checked for these settings."""
    if type(bits) is not int and not isinstance(bits, np.integer):
        bits = None
    if bits not in get_args(SumBits):
        raise ValueError(
            f"`{call}(bits=...)` must be 16, 24 or 32: the bits in which gradients are "
            f"summed; got {shown(bits)}."
        )
    return dataclasses.replace(
        settings,
        call=call,
        groups=(Group(Added(), 1.0, l2(0.0, None)),),
        choice=None,
        storage=_STORAGES[int(bits)],
        verify_weights=None,
    )


def initial_accumulation(
    call: str, adding: Settings, bits: int, params: PyTree, inner: OptimizerState
) -> AccumulationState:
    """The state before the first gradient. `inner` is that of the optimizer."""
    leaves, rebuild = flatten(params)
    trained = [is_trainable(leaf.value) for leaf in leaves]
    shardings, _ = adding.resolve_shardings(call, leaves, trained, inner.shardings)
    numbers = [i for i, is_trained in enumerate(trained) if is_trained]
    makers = {
        i: partial(
            _zeros, adding.storage, leaves[i].value.shape, _sum_dtype(leaves[i], bits)
        )
        for i in numbers
    }
    zero = lambda: jnp.zeros((), jnp.int32)
    made, (mini_step, rounding_count) = make_states(
        adding, call, makers, leaves, shardings, [zero, zero]
    )
    sums: list[Any] = [None for _ in leaves]
    corrections: list[Any] = [None for _ in leaves]
    for i in numbers:
        sums[i], corrections[i] = made[i]
    return AccumulationState(
        mini_step=mini_step,
        rounding_count=rounding_count,
        sums=rebuild.state(sums),
        corrections=rebuild.state(corrections),
        inner_state=inner,
    )


def _sum_dtype(leaf: Any, bits: int) -> DTypeLike:
    if jnp.dtype(leaf.value.dtype) == jnp.float64:
        return jnp.float64
    return jnp.float32 if bits == 32 else jnp.bfloat16


def _zeros(
    storage: Storage, shape: tuple[int, ...], dtype: DTypeLike
) -> tuple[Array, Array | None]:
    total = jnp.zeros(shape, dtype)
    if storage.correction_dtype is None or dtype != jnp.bfloat16:
        return total, None
    return total, jnp.zeros(shape, storage.correction_dtype)


def check_accumulation_state(call: str, state: Any) -> None:
    if not isinstance(state, AccumulationState):
        raise TypeError(
            f"`{call}`: the state is no `flashquinox.AccumulationState` but a "
            f"{type(state).__name__}. Pass what `init` or the previous call returned; "
            "the model comes before the state in `step`, the gradients before it in "
            "`update`."
        )
    shape = np.shape(without_variables(state.mini_step))
    if shape != ():
        raise ValueError(
            f"`{call}`: the state has counts of shape {shape}: it is one of an "
            "ensemble, which `vmap` made. Take the step under `vmap` too, as "
            "`eqx.filter_vmap(optim.step)(model, state, grads)`, or make the state "
            "with `init` alone."
        )
