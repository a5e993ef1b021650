"""Rows of `benchmarks/horizon.py` that train a model: a network that is pruned, and an
embedding whose tokens vanish."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from _elements import Contender, full_weights, take_step
from _horizon_figures import at_most, Figure, Setup
from jaxtyping import PyTree, Scalar

import flashquinox as fq


_LEARNING_RATE = 1e-3

#
# A pruned network
#

_PRUNED_AT = 500
_PRUNED_FOR = 4000


def pruned(setup: Setup) -> Iterator[Figure]:
    """A network of one hidden layer whose smaller half of weights is set to zero, and
    gets no gradient from then on."""
    for b2, most_loss, most_drift in ((0.95, 0.040, 3.0), (0.999, None, None)):
        case = f"Adam, b2 {b2}"
        loss = Figure("pruned", case, "loss: mean of seeds", at_most(most_loss))
        drift = Figure("pruned", case, "drift, lr: mean", at_most(most_drift))
        for contender in setup.contenders:
            runs = [_prune(setup, contender, b2, seed) for seed in range(setup.seeds)]
            losses, drifts = zip(*runs, strict=True)
            loss.add(contender, np.stack(losses))
            drift.add(contender, np.concatenate(drifts))
        yield from (loss, drift)


class _Task(eqx.Module):
    """A student of a network of one layer."""

    teacher: jax.Array
    student: eqx.nn.MLP
    batches: jax.Array

    @staticmethod
    def of(seed: int) -> "_Task":
        keys = jax.random.split(jax.random.key(seed), 3)
        teacher = jax.random.normal(keys[0], (64, 64)) / 8
        student = fq.cast(eqx.nn.MLP(64, 64, 256, 1, key=keys[1]), jnp.bfloat16)
        return _Task(teacher, student, keys[2])

    def loss(self, params: PyTree, t: Any) -> Scalar:
        student = eqx.combine(params, self.student)
        for_inputs, for_noise = jax.random.split(jax.random.fold_in(self.batches, t))
        x = jax.random.normal(for_inputs, (64, 64))
        y = jnp.tanh(x @ self.teacher.T)
        y = y + 0.1 * jax.random.normal(for_noise, y.shape)
        found = jax.vmap(student)(x.astype(student.layers[0].weight.dtype))
        return jnp.mean((found.astype(jnp.float32) - y) ** 2)


def _prune(
    setup: Setup, contender: Contender, b2: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The loss at the end, and how far weights moved that were set to zero, in learning
    rates."""
    task = _Task.of(seed)
    params = eqx.filter(fq.cast(task.student, contender.dtype), eqx.is_inexact_array)
    carry = params, contender.optimizer("adamw", _LEARNING_RATE, b2).init(params)
    mask = jtu.tree_map(lambda x: np.ones(x.shape, bool), params)
    chunk = setup.steps(100)
    before, after = setup.steps(_PRUNED_AT), setup.steps(_PRUNED_FOR)
    for first in range(0, before + after, chunk):
        if first == before:
            params, state = carry
            mask = jtu.tree_map(_largest_half, params)
            params = jtu.tree_map(lambda x, m: jnp.where(m, x, 0), params, mask)
            carry = params, state
        carry = _train_pruned(
            contender, chunk, jnp.float32(b2), task, mask, carry, jnp.int32(first)
        )
    losses, weights = jax.device_get(_judge(contender, task, carry))
    drifts = [
        np.abs(w[~m]) / _LEARNING_RATE
        for w, m in zip(jtu.tree_leaves(weights), jtu.tree_leaves(mask), strict=True)
    ]
    return losses.mean(), np.concatenate(drifts)


def _largest_half(x: jax.Array) -> np.ndarray:
    """Of weights; all of biases."""
    size = np.abs(np.asarray(x, np.float32))
    return size > np.median(size) if x.ndim == 2 else np.ones(x.shape, bool)


@eqx.filter_jit
def _train_pruned(
    contender: Contender,
    chunk: int,
    b2: Scalar,
    task: _Task,
    mask: PyTree,
    carry: Any,
    first: Scalar,
) -> Any:
    optim = contender.optimizer("adamw", _LEARNING_RATE, b2)

    def step(carry: Any, t: Scalar) -> tuple[Any, None]:
        params, state = carry
        grads = jax.grad(task.loss)(params, t)
        grads = jtu.tree_map(lambda g, m: jnp.where(m, g, 0), grads, mask)
        return take_step(optim, params, state, grads), None

    return jax.lax.scan(step, carry, first + jnp.arange(chunk))[0]


@eqx.filter_jit
def _judge(contender: Contender, task: _Task, carry: Any) -> tuple[jax.Array, PyTree]:
    """Losses of batches that were not trained on, and weights."""
    later = 10**6 + jnp.arange(16)
    losses = jax.vmap(lambda t: task.loss(carry[0], t))(later)
    return losses, full_weights(contender, *carry)


#
# An embedding
#

_BOTH = 300
_WITHOUT = 3000


def vanished(setup: Setup) -> Iterator[Figure]:
    """Rows of an embedding whose tokens do not occur any more; with groups along the
    vocabulary, as on a TPU."""
    for b2, most in ((0.95, 3.0), (0.999, None)):
        case = f"Adam, b2 {b2}, groups along the vocabulary"
        figure = Figure("vanished", case, "drift, lr: mean", at_most(most))
        for contender in setup.contenders:
            figure.add(contender, _vanish(setup, contender, b2))
        yield figure


_VOCABULARY, _WIDTH = 512, 128


def _vanish(setup: Setup, contender: Contender, b2: float) -> np.ndarray:
    """How far the elements of rows moved, in learning rates."""
    ranks = 1 + np.random.default_rng(1).permutation(_VOCABULARY)
    before = 1 / ranks**0.7
    gone = np.random.default_rng(2).random(_VOCABULARY) < 0.3
    after = np.where(gone, 0, before)
    before, after = (np.asarray(p / p.sum(), np.float32) for p in (before, after))
    shape = (_VOCABULARY, _WIDTH)
    params = {"e": (0.02 * jax.random.normal(jax.random.key(0), shape))}
    params = fq.cast(fq.cast(params, jnp.bfloat16), contender.dtype)
    # A state that is made for a TPU has its groups along rows.
    options = {} if contender.storage is None else {"backend": "tpu"}
    init = contender.optimizer("adamw", _LEARNING_RATE, b2, **options).init
    carry = params, init(params)
    chunk = setup.steps(100)
    batch = 128 if setup.tiny else 4096
    train = partial(_train_embedding, contender, chunk, batch, jnp.float32(b2))
    weights = []
    start = 0
    for steps, odds in ((_BOTH, before), (_WITHOUT, after)):
        for first in range(start, start + setup.steps(steps), chunk):
            carry = train(odds, carry, first)
        start += setup.steps(steps)
        weights.append(np.asarray(full_weights(contender, *carry)["e"]))
    return np.abs(weights[1] - weights[0])[gone] / _LEARNING_RATE


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def _train_embedding(
    contender: Contender,
    chunk: int,
    batch: int,
    b2: Scalar,
    odds: jax.Array,
    carry: Any,
    first: Any,
) -> Any:
    optim = contender.optimizer("adamw", _LEARNING_RATE, b2)

    def step(carry: Any, t: Scalar) -> tuple[Any, None]:
        params, state = carry
        for_tokens, for_noise = jax.random.split(
            jax.random.fold_in(jax.random.key(3), t)
        )
        tokens = jax.random.choice(for_tokens, _VOCABULARY, (batch,), p=odds)
        noise = 0.1 * jax.random.normal(for_noise, (batch, _WIDTH)) / batch
        grads = {"e": jnp.zeros((_VOCABULARY, _WIDTH)).at[tokens].add(noise)}
        return take_step(optim, params, state, grads), None

    return jax.lax.scan(step, carry, first + jnp.arange(chunk))[0]
