"""Adan: a rule of three moments, and of a fourth that is never compressed. A rule and a
factory are all there is of it; so all else takes it as it takes other rules."""

import functools as ft

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import flashquinox as fq
from flashquinox.checkpoint import Checkpoints

from ..helpers import float64, slow, tree_identical, weights
from ..kernels import arrays


_optimizer = ft.partial(fq.adan, 1e-2, weight_decay=0.1)


def test_adan_is_that_of_the_paper():
    """With its b2, for which Optax's formula is another one."""
    b1, b2, b3, eps, eps_root = 0.98, 0.92, 0.99, 1e-8, 1e-8
    storage = fq.Storage(master_weight_bits=None, moments="float32")
    optim = fq.adan(0.1, weight_decay=0.2, storage=storage)
    w = weights("matrix", dtype=jnp.float32)
    state, expected = optim.init(w), float64(w["matrix"])
    m = v = n = np.zeros_like(expected)
    previous = None
    for t in range(1, 6):
        grads = weights("matrix", dtype=jnp.float32, seed=t)
        w, state = optim.step(w, state, grads)
        g = float64(grads["matrix"])
        difference = 0 * g if previous is None else g - previous
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * difference
        n = b3 * n + (1 - b3) * (g + b2 * difference) ** 2
        numerator = m / (1 - b1**t) + b2 * v / (1 - b2**t)
        denominator = np.sqrt(n / (1 - b3**t) + eps_root) + eps
        expected = (1 - 0.1 * 0.2) * expected - 0.1 * numerator / denominator
        previous = g
        assert np.array_equal(state.moments["g"]["matrix"], grads["matrix"])
    np.testing.assert_allclose(float64(w["matrix"]), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("storage", ["flashquinox", "flashoptim", slow("learned")])
def test_exact_moments_are_never_compressed(storage):
    """A previous gradient is kept bit for bit, whatever compresses the others."""
    w, grads = (weights("matrix", "kernel", seed=seed) for seed in (0, 1))
    optim = fq.adan(1e-2, storage=fq.Storage(moments=storage))
    _, state = jax.jit(optim.step)(w, optim.init(w), grads)
    for name, grad in grads.items():
        kept = state.moments["g"][name]
        assert kept.dtype == jnp.float32
        assert np.array_equal(float64(kept), float64(grad))
        for moment in ("m", "v", "n"):
            assert isinstance(state.moments[moment][name], fq.QuantMoment)


@pytest.mark.once
def test_divided_among_devices():
    mesh = jax.make_mesh((8,), ("data",))
    there = {"w": NamedSharding(mesh, P("data")), "b": NamedSharding(mesh, P("data"))}
    optim = _optimizer()
    model, *grads = (
        arrays({"w": (256, 64), "b": (64,)}, jnp.bfloat16, seed) for seed in range(3)
    )
    results = []
    for place in (lambda tree: tree, lambda tree: jax.device_put(tree, there)):
        here, state, step = place(model), optim.init(place(model)), jax.jit(optim.step)
        for grad in grads:
            here, state = step(here, state, place(grad))
        results.append((here, state))
    kept = results[1][1].moments["g"]["w"]
    assert kept.sharding.is_equivalent_to(there["w"], kept.ndim)
    pairs = zip(*map(jtu.tree_leaves, results), strict=True)
    assert all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)


@pytest.mark.once
def test_resumes_bit_for_bit(tmp_path):
    optim, model = _optimizer(), arrays({"w": (64, 64), "b": (64,)}, jnp.bfloat16, 0)
    step, state = jax.jit(optim.step), optim.init(model)
    grads = [arrays({"w": (64, 64), "b": (64,)}, jnp.bfloat16, i) for i in (1, 2)]
    model, state = step(model, state, grads[0])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, model, state)
        found = checkpoints.restore(model, optim.init(model))
    assert tree_identical(found, (model, state))
    assert tree_identical(step(*found, grads[1]), step(model, state, grads[1]))


def test_leaves_that_are_masked_or_frozen():
    model = arrays({"w": (64, 64), "b": (64,), "frozen": (32, 32)}, jnp.bfloat16, 0)
    zero = jtu.tree_map(jnp.zeros_like, model) | {"frozen": None}
    optim = _optimizer(mask={"w": True, "b": False, "frozen": True})
    state = optim.init(model)
    new, new_state = jax.jit(optim.step)(model, state, zero)
    # Nothing but decay moves a weight without a gradient.
    masters = fq.master_weights(new, new_state)
    error = float64(masters["w"]) - (1 - 1e-3) * float64(model["w"])
    assert np.all(np.abs(error) <= 2.0**-16 * np.abs(float64(model["w"])))
    assert tree_identical(new["b"], model["b"])
    for name in ("m", "v", "n", "g"):
        of = lambda state, name=name: state.moments[name]["frozen"]
        assert tree_identical(of(new_state), of(state))
    assert tree_identical(new["frozen"], model["frozen"])
