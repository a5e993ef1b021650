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
from ..kernels import arrays


_SHAPES = {"up": (64, 96), "bias": (96,), "down": (96, 64)}
_X, _TARGET = (
    np.random.default_rng(i).standard_normal((256, 64)).astype(np.float32)
    for i in (0, 1)
)
_PAIRS = {
    "lamb": (partial(fq.lamb, 1e-3), partial(optax.lamb, 1e-3)),
    "lars": (
        partial(fq.lars, 0.03, trust_coefficient=0.01),
        partial(optax.lars, 0.03, trust_coefficient=0.01),
    ),
    "rmsprop": (partial(fq.rmsprop, 1e-4), partial(optax.rmsprop, 1e-4)),
    "adan": (partial(fq.adan, 3e-4, b2=0.5), partial(optax.adan, 3e-4, b2=0.5)),
}


def _loss(params):
    wide = {name: x.astype(jnp.float32) for name, x in params.items()}
    hidden = jnp.tanh(_X @ wide["up"] + wide["bias"][None])
    return jnp.mean((hidden @ wide["down"] - _TARGET) ** 2)


@pytest.mark.parametrize("name", [slow(name) for name in _PAIRS])
def test_way_of_300_steps(name):
    ours, theirs = (make() for make in _PAIRS[name])
    start = {k: x / 8 for k, x in arrays(_SHAPES, jnp.float32, 0).items()}

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
    found = fq.master_weights(*run(step, fq.prepare(start, ours)))
    with jax.numpy_dtype_promotion("standard"):
        expected, _ = run(of_optax, (start, theirs.init(start)))
    for key, before in start.items():
        way = np.linalg.norm(float64(expected[key]) - float64(before))
        distance = np.linalg.norm(float64(found[key]) - float64(expected[key]))
        assert distance <= 0.03 * way, (key, distance / way)
