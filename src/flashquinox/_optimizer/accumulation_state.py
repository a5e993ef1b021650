"""The state of an optimizer that accumulates gradients."""

import dataclasses
import functools
from collections.abc import Sequence
from functools import partial
from typing import Any, get_args, Literal, TypeAlias

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8, Int32, PyTree

from .._common import eager
from .._common.text import shown
from .._model.trained import is_trainable
from .._model.trees import flatten, Leaf
from .._model.variables import without_variables
from .._rules.added import Added
from .._rules.summed import Summed
from .._storage.full_precision import FullPrecision
from .._storage.moment_codecs import MomentCodecs
from .._storage.quant_moment import QuantMoment
from .._storage.storage import Storage
from .._storage.tapered import TaperedCodec
from .._storage.tapered_read import TaperedReader
from .groups import AbstractChoice, Group, LeafRule
from .initial_state import make_states, stored_zeros
from .settings import Settings
from .state import OptimizerState
from .weight_decay import l2


SumBits: TypeAlias = Literal[16, 24, 32]


# What gradients are multiplied by before they are added: up to 2^16 of them then have a
# mean wherever each is finite. A power of two, so that only numbers below 2^-102 are
# stored in fewer bits.
SUM_UNIT = 2.0**-16


class _Wide(AbstractChoice):
    """Sums of float64 weights are float64, whatever others are."""

    def __call__(
        self,
        call: str,
        params: PyTree,
        leaves: Sequence[Leaf],
        groups: tuple[Group, ...],
    ) -> list[LeafRule]:
        del call, params
        rule, exact = groups[0].rule, Summed("exact")
        is_wide = lambda x: getattr(x.value, "dtype", None) == jnp.float64
        return [LeafRule(0, exact if is_wide(leaf) else rule) for leaf in leaves]


# A storage traces its codecs when it is made.
@functools.cache
def _storage(bits: SumBits) -> Storage:
    """How sums of so many bits are stored: as weights with corrections that a rule adds
    to, or as moments."""
    if bits == 24:
        return Storage(master_weight_bits=24)
    codecs = "float32"
    if bits == 16:
        codecs = MomentCodecs(TaperedCodec(), FullPrecision())
    return Storage(master_weight_bits=None, moments=codecs)


class AccumulationState(eqx.Module):
    r"""What an optimizer of [`flashquinox.accumulate`][] keeps between calls. `sums`
    and `corrections` are trees of the structure of the model, with `None` for leaves
    that are not trained.

    - `mini_step`: how many gradients the sums hold: 0 after a step.
    - `rounding_count`: which threshold the next sums are rounded by.
    - `sums`: $2^{-16}$ times the sum of the gradients since the last step, for each
        weight, so that up to $2^{16}$ large gradients do not overflow. With `bits=24`,
        bfloat16; with `bits=16`, a `QuantMoment` by a [`flashquinox.TaperedCodec`][],
        or float32 for vectors of fewer than 4096 elements; with `bits=32`, float32.
        Those of float64 weights are float64.
    - `corrections`: with `bits=24`, the `int8` that extends each sum: see
        [`flashquinox.ECCWeight`][]. Otherwise `None` for all weights.
    - `inner_state`: the state of the optimizer.
    - `count`: the number of steps that were taken, not of gradients.
    """

    mini_step: Int32[Array, "*ensemble"]
    rounding_count: Int32[Array, "*ensemble"]
    sums: PyTree[Float[Array, "..."] | QuantMoment | None]
    corrections: PyTree[Int8[Array, "..."] | None]
    inner_state: OptimizerState

    @property
    def count(self) -> Int32[Array, "*ensemble"]:
        """The number of steps taken."""
        return self.inner_state.count


def adding_settings(call: str, settings: Settings, bits: Any) -> Settings:
    """Those of the optimizer that adds gradients to sums, which are its weights or its
    moments: as gradients are divided, computed with and checked for these settings."""
    is_integer = type(bits) is int or isinstance(bits, np.integer)
    if not is_integer or bits not in get_args(SumBits):
        raise ValueError(
            f"`{call}(bits=...)` must be 16, 24 or 32: the bits in which gradients are "
            f"summed; got {shown(bits)}."
        )
    return dataclasses.replace(
        settings,
        call=call,
        groups=(Group(Added() if bits == 24 else Summed(), SUM_UNIT, l2(0.0, None)),),
        choice=None if bits == 24 else _Wide(),
        storage=_storage(int(bits)),  # pyright: ignore[reportArgumentType]
        verify_weights=None,
    )


def reading_settings(adding: Settings) -> Settings:
    """Those of the optimizer that makes bfloat16 numbers of sums of 16 bits, in their
    memory."""
    codecs = MomentCodecs(TaperedReader(), FullPrecision())
    return dataclasses.replace(
        adding,
        groups=(Group(Summed(is_read=True), 1.0, l2(0.0, None)),),
        choice=None,
        storage=Storage(master_weight_bits=None, moments=codecs),
        skip_nonfinite=False,
    )


def are_moments(adding: Settings) -> bool:
    """Whether sums are moments of the optimizer that adds; otherwise its weights."""
    return bool(adding.moments)


def initial_accumulation(
    call: str, adding: Settings, params: PyTree, inner: OptimizerState
) -> AccumulationState:
    """The state before the first gradient. `inner` is that of the optimizer."""
    leaves, rebuild = flatten(params)
    trained = [is_trainable(leaf.value) for leaf in leaves]
    shardings, _ = adding.resolve_shardings(call, leaves, trained, inner.shardings)
    rules = adding.rules(call, params, leaves)
    numbers = [i for i, is_trained in enumerate(trained) if is_trained]
    makers = {
        i: partial(_zeros, adding, rules[i].rule, leaves[i], shardings[i])
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


def _zeros(adding: Settings, rule: Any, leaf: Leaf, sharding: Any) -> tuple[Any, Any]:
    """A sum, and its correction."""
    if are_moments(adding):
        moments, _ = stored_zeros(adding, rule, leaf, sharding)
        return moments["sum"], None
    shape = leaf.value.shape
    if leaf.value.dtype == jnp.float64:
        return eager.zeros(shape, jnp.float64), None
    assert adding.storage.correction_dtype is not None
    correction = eager.zeros(shape, adding.storage.correction_dtype)
    return eager.zeros(shape, jnp.bfloat16), correction


def check_sum(call: str, adding: Settings, leaf: Leaf, total: Any) -> None:
    """A sum must be stored in the bits of the optimizer."""
    found = 16 if isinstance(total, QuantMoment) else _SUM_DTYPES.get(str(total.dtype))
    if found is None or leaf.value.dtype == jnp.float64:
        return
    wanted = 24
    if are_moments(adding):
        moment = adding.groups[0].rule.moments["sum"]
        codec = adding.storage.codecs.of(moment, leaf.value.shape)
        wanted = 32 if isinstance(codec, FullPrecision) else 16
    if found != wanted:
        raise ValueError(
            f"`{call}`: the sum at `{leaf.name}` in the state has {found} bits, and "
            f"this optimizer keeps {wanted} there. Pass the same "
            "`accumulate(bits=...)` as when the state was made, or make a new state "
            "with `init`."
        )


# The bits of sums that are no moments: with a correction or without.
_SUM_DTYPES = {"bfloat16": 24, "float32": 32}


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
