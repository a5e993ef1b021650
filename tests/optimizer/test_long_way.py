"""Three hundred steps of a small network, beside Optax in float32: how far master
weights are apart, as a share of the way that they went."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flashquinox as fq

from ..helpers import float64, slow


_SHAPES = {"up": (64, 96), "bias": (96,), "down": (96, 64)}
_X, _TARGET = (
    np.random.default_rng(i).standard_normal((256, 64)).astype(np.float32)
    for i in (0, 1)
)
# As weights usually begin. Where rows are nearly 0, the first gradients decide what is
# made of them, and a rounding is never forgotten: Optax itself, by gradients at
# weights that are rounded to bfloat16, is then 14 % from its own way of AdEMAMix.
_START = {
    name: np.random.default_rng(2 + i).standard_normal(shape).astype(np.float32) / 8
    for i, (name, shape) in enumerate(_SHAPES.items())
}
_PAIRS = {
    "adafactor": (partial(fq.adafactor, 1e-2, 32), partial(optax.adafactor, 1e-2, 32)),
    "adafactor-momentum": (
        partial(fq.adafactor, 1e-2, 32, momentum=0.9, weight_decay_rate=1e-4),
        partial(optax.adafactor, 1e-2, 32, momentum=0.9, weight_decay_rate=1e-4),
    ),
    "lamb": (partial(fq.lamb, 1e-3), partial(optax.lamb, 1e-3)),
    "lars": (
        partial(fq.lars, 0.03, trust_coefficient=0.01),
        partial(optax.lars, 0.03, trust_coefficient=0.01),
    ),
    "rmsprop": (partial(fq.rmsprop, 1e-4), partial(optax.rmsprop, 1e-4)),
    "ademamix": (
        partial(fq.ademamix, 3e-4, weight_decay=0.1),
        partial(optax.contrib.ademamix, 3e-4, weight_decay=0.1),
    ),
    "schedule_free_adamw": (
        partial(fq.schedule_free_adamw, 1e-3, warmup_steps=20, weight_decay=0.1),
        partial(
            optax.contrib.schedule_free_adamw, 1e-3, warmup_steps=20, weight_decay=0.1
        ),
    ),
    "adan": (partial(fq.adan, 3e-4, b2=0.5), partial(optax.adan, 3e-4, b2=0.5)),
}


def _loss(params):
    wide = {name: x.astype(jnp.float32) for name, x in params.items()}
    hidden = jnp.tanh(_X @ wide["up"] + wide["bias"][None])
    return jnp.mean((hidden @ wide["down"] - _TARGET) ** 2)


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [None, 0.9])
def test_way_of_adafactor(momentum):
    """Optax's, whose vectors stay as they are, with bfloat16 weights in 24 bits."""
    theirs = optax.adafactor(1e-2, min_dim_size_to_factor=32, momentum=momentum)
    ours = optax.chain(fq.compress(theirs), fq.add_updates())

    def step(optim, carry, _):
        params, state = carry
        updates, state = optim.update(jax.grad(_loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    def run(optim, carry):
        scan = lambda carry: jax.lax.scan(partial(step, optim), carry, length=300)[0]
        with jax.numpy_dtype_promotion("standard"):
            return jax.jit(scan)(carry)

    found = fq.master_weights(*run(ours, fq.prepare(_START, ours)))
    expected, _ = run(theirs, (_START, theirs.init(_START)))
    for key, before in _START.items():
        way = np.linalg.norm(float64(expected[key]) - float64(before))
        distance = np.linalg.norm(float64(found[key]) - float64(expected[key]))
        assert distance <= 0.03 * way, (key, distance / way)


@pytest.mark.parametrize("name", [slow(name) for name in _PAIRS])
def test_way_of_300_steps(name):
    ours, theirs = (make() for make in _PAIRS[name])

    def step(carry, _):
        params, state = carry
        return ours.step(params, state, jax.grad(_loss)(params)), None

    def of_optax(carry, _):
        params, state = carry
        updates, state = theirs.update(jax.grad(_loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    run = lambda step, carry: jax.jit(
        lambda carry: jax.lax.scan(step, carry, length=300)[0]
    )(carry)
    found = fq.master_weights(*run(step, fq.prepare(_START, ours)))
    with jax.numpy_dtype_promotion("standard"):
        expected, _ = run(of_optax, (_START, theirs.init(_START)))
    for key, before in _START.items():
        way = np.linalg.norm(float64(expected[key]) - float64(before))
        distance = np.linalg.norm(float64(found[key]) - float64(expected[key]))
        assert distance <= 0.03 * way, (key, distance / way)
