"""A row of `benchmarks/horizon.py`: weight decay at small rates."""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _elements import Contender, full_weights, take_step
from _horizon_figures import Figure, Setup
from _storages import PAPER

import flashquinox as fq


# Shares of a weight that one step subtracts: learning rate times weight decay.
_SHARES = (1e-5, 1e-6, 3e-7, 1e-7, 3e-8)
_STEPS, _WEIGHTS = 100_000, 1024
_LEARNING_RATE = 1e-3


def decays(setup: Setup) -> Iterator[Figure]:
    """100,000 steps of weights from 1 to 2, without gradients and with gradients that
    cancel: how much they decay, over what they should."""
    # In a tiny run, a hundredth of the steps.
    steps = _STEPS // 100 if setup.tiny else _STEPS
    columns = [(x, "float32 or 32 bits") for x in setup.contenders]
    columns += [
        (_with_24_bits(x), "24 bits") for x in setup.contenders[1:] if _has_master(x)
    ]
    for rule in ("adamw", "sgdw"):
        for share in _SHARES:
            figures = {}
            for contender, bits in columns:
                case = f"{_NAMES[rule]}, {share:g} a step, master weights of {bits}"
                if bits not in figures:
                    reach = (0.99, 1.01) if share >= _REACHED else None
                    figures[bits] = Figure("decays", case, "share: mean", reach)
                before, after = jax.device_get(
                    _run(contender, rule, steps, jnp.float32(share))
                )
                before, after = before.astype(np.float64), after.astype(np.float64)
                found = np.log(after / before) / (steps * np.log1p(-share))
                figures[bits].add(contender, found)
            yield from figures.values()


_NAMES = {"adamw": "AdamW, no gradients", "sgdw": "SGDW, gradients that cancel"}
# The least share for which the mean of all weights is to be within 1 %. It is 8 to 17
# units in the last place of a float32.
_REACHED = 1e-6


def _has_master(contender: Contender) -> bool:
    return contender.storage is not None and contender.storage.master_weight_bits == 32


def _with_24_bits(contender: Contender) -> Contender:
    if contender.name == "flashoptim":
        return Contender(contender.name, PAPER)
    assert contender.storage is not None
    storage = dataclasses.replace(contender.storage, master_weight_bits=24)
    return Contender(contender.name, storage)


def _optimizer(contender: Contender, rule: str, weight_decay: Any) -> Any:
    if contender.storage is not None:
        make = fq.adamw if rule == "adamw" else fq.sgdw
        return make(
            _LEARNING_RATE, weight_decay=weight_decay, storage=contender.storage
        )
    if rule == "adamw":
        return optax.adamw(_LEARNING_RATE, weight_decay=weight_decay)
    decay = optax.add_decayed_weights(weight_decay)
    return optax.chain(decay, optax.sgd(_LEARNING_RATE))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _run(contender: Contender, rule: str, steps: int, share: Any) -> Any:
    """Master weights before and after."""
    optim = _optimizer(contender, rule, share / _LEARNING_RATE)
    params = jnp.exp2(jnp.arange(_WEIGHTS) / _WEIGHTS).reshape(-1, 32)
    if contender.storage is None:
        state = optim.init(params)
    else:
        params, state = fq.prepare(params, optim)

    def step(carry: Any, t: Any) -> tuple[Any, None]:
        weights, state = carry
        grads = jnp.zeros(weights.shape)
        if rule == "sgdw":
            # Steps of 1/2000 of a weight and their opposites, which move each weight
            # over all remainders of rounding, and cancel.
            key = jax.random.fold_in(jax.random.key(0), t // 2)
            sign = jnp.where(t % 2 == 0, 1, -1)
            grads = 0.5 * sign * jax.random.normal(key, weights.shape)
        return take_step(optim, weights, state, grads), None

    carry = jax.lax.scan(step, (params, state), jnp.arange(steps))[0]
    return full_weights(contender, params, state), full_weights(contender, *carry)
