"""Contenders and optimizers of the runs in this folder, and one training step of each.

Every contender of a seed starts from the same float32 weights, reads the same batches,
and differentiates by weights in bfloat16. A step computes in float32.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import _benchmarks  # noqa: F401
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
import optax.contrib
from _gpt import matrices_of_layers
from _storages import (
    BFLOAT16,
    MOMENTUM_16_BITS,
    NeverZero,
    PAPER,
    second_moments_alone,
)
from jaxtyping import Array, Float32, PyTree, Scalar

import flashquinox as fq


REFERENCE = "float32"
# The same from other weights (see `first_weights`): how far chance alone goes.
LAST_BITS = "float32-last-bits"

# `None` is Optax, with float32 master weights and moments.
CONTENDERS: dict[str, fq.Storage | None] = {
    REFERENCE: None,
    LAST_BITS: None,
    "ours": fq.Storage(),
    "flashoptim": PAPER,
    "bfloat16": BFLOAT16,
    "ours-32": fq.Storage(master_weight_bits=32),
    "ours-nearest": fq.Storage(dither_weights=False),
    "ours-16-bit-momentum": MOMENTUM_16_BITS,
    # To find causes: weights alone; the paper's second moments beside exact first ones.
    "exact-moments": fq.Storage(moments="float32", dither_weights=False),
    "flashoptim-v": second_moments_alone(fq.FlashOptimCodec("nonnegative")),
    "flashoptim-v-above-zero": second_moments_alone(NeverZero("nonnegative")),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """An optimizer with all but its learning rate. `rates` are those to choose from."""

    optimizer: str
    rates: tuple[float, ...]
    weight_decay: float
    b2: float = 0.0
    max_norm: float | None = None

    def build(
        self, storage: fq.Storage | None, schedule: Callable[[Any], Any]
    ) -> fq.Optimizer | optax.GradientTransformation:
        if self.optimizer == "muon":
            return self._muon(storage, schedule)
        decay: Any = {"weight_decay": self.weight_decay}
        if self.weight_decay:
            decay["mask"] = fq.decay_mask()
        if storage is not None:
            stored: Any = {"storage": storage, **decay}
            if self.optimizer == "sgd":
                return fq.sgd(schedule, momentum=0.9, **stored)
            make = {"adamw": fq.adamw, "lion": fq.lion}[self.optimizer]
            return make(schedule, b2=self.b2, **stored)
        if self.optimizer == "sgd":
            # L2: what decays is in the momentum.
            parts = [
                optax.add_decayed_weights(**decay),
                optax.sgd(schedule, momentum=0.9),
            ]
        else:
            make = {"adamw": optax.adamw, "lion": optax.lion}[self.optimizer]
            parts = [make(schedule, b2=self.b2, **decay)]
        return self._clipped(parts)

    def _muon(
        self, storage: fq.Storage | None, schedule: Callable[[Any], Any]
    ) -> fq.Optimizer | optax.GradientTransformation:
        """With updates as large as AdamW's, which trains what is no matrix, without
        weight decay: Optax has no mask for that."""
        shared: Any = {
            "consistent_rms": 0.2,
            "weight_decay": self.weight_decay,
            "adam_b2": self.b2,
        }
        if storage is not None:
            numbers = {"weight_dimension_numbers": matrices_of_layers}
            return fq.muon(schedule, storage=storage, **numbers, **shared)
        numbers = {"muon_weight_dimension_numbers": matrices_of_layers}
        return self._clipped([optax.contrib.muon(schedule, **numbers, **shared)])

    def _clipped(
        self, parts: list[optax.GradientTransformation]
    ) -> optax.GradientTransformation:
        if self.max_norm is not None:
            parts = [optax.clip_by_global_norm(self.max_norm), *parts]
        return optax.chain(*parts)


def recipes(
    rates: dict[str, tuple[float, ...]],
    decays: dict[str, float],
    adam_b2: float,
    max_norm: float | None,
) -> dict[str, Recipe]:
    b2s = {"adamw": adam_b2, "lion": 0.99, "sgd": 0.0, "muon": adam_b2}
    return {
        name: Recipe(name, rates[name], decays[name], b2s[name], max_norm)
        for name in rates
    }


def warmup_cosine(rate: Any, warm_up: Any, steps: Any) -> Callable[[Any], Scalar]:
    """From rate / warm_up to the rate, and down to zero at the end. All of these may be
    traced, so that runs of other lengths and rates share a program."""

    def schedule(count: Any) -> Scalar:
        done = (count - warm_up) / jnp.maximum(steps - warm_up, 1)
        falling = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(done, 0, 1)))
        return rate * jnp.minimum((count + 1) / warm_up, 1) * falling

    return schedule


@dataclasses.dataclass(frozen=True)
class Training:
    """One contender's steps. `rate` is the peak of the schedule."""

    recipe: Recipe
    storage: fq.Storage | None
    rate: Any
    warm_up: Any
    steps: Any

    @property
    def optim(self) -> Any:
        schedule = warmup_cosine(self.rate, self.warm_up, self.steps)
        return self.recipe.build(self.storage, schedule)

    def start(self, weights: PyTree) -> tuple[PyTree, PyTree]:
        """Of float32 weights: those of the contender, and its state."""
        if self.storage is None:
            return weights, self.optim.init(weights)
        return fq.prepare(weights, self.optim)

    def step(
        self, carry: tuple[PyTree, PyTree], loss: Callable[[PyTree], Scalar]
    ) -> tuple[tuple[PyTree, PyTree], tuple[Scalar, Scalar]]:
        """Also the loss before the step, and the largest update of a weight in units of
        the peak learning rate."""
        before = full_weights(self.storage, carry)
        new, value = self.advance(carry, loss)
        after = full_weights(self.storage, new)
        moved = jtu.tree_map(lambda x, y: jnp.max(jnp.abs(x - y)), after, before)
        largest = jnp.max(jnp.stack(jtu.tree_leaves(moved))) / self.rate
        return new, (value, largest)

    def advance(
        self, carry: tuple[PyTree, PyTree], loss: Callable[[PyTree], Scalar]
    ) -> tuple[tuple[PyTree, PyTree], Scalar]:
        """Also the loss before the step."""
        weights, state = carry
        value, grads = jax.value_and_grad(loss)(narrow(weights))
        if self.storage is None:
            grads = fq.cast(grads, jnp.float32)
            updates, state = self.optim.update(grads, state, weights)
            return (optax.apply_updates(weights, updates), state), value
        most = self.recipe.max_norm
        return self.optim.step(weights, state, grads, max_norm=most), value


def first_weights(contender: str, weights: PyTree) -> PyTree:
    """What a contender starts from: the float32 weights of its seed, in one case with
    the last bit of each flipped."""
    if contender != LAST_BITS:
        return weights

    def flipped(x: Float32[Array, "..."]) -> Float32[Array, "..."]:
        bits = lax.bitcast_convert_type(x, jnp.uint32)
        return lax.bitcast_convert_type(bits ^ 1, x.dtype)

    return jtu.tree_map(flipped, weights)


def narrow(weights: PyTree) -> PyTree:
    return fq.cast(weights, jnp.bfloat16)


def full_weights(storage: fq.Storage | None, carry: tuple[PyTree, PyTree]) -> PyTree:
    """In float32, with corrections."""
    weights, state = carry
    if storage is None:
        return weights
    return fq.cast(fq.master_weights(weights, state), jnp.float32)
