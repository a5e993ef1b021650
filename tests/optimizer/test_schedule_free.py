"""What is special of schedule-free AdamW: its warm-up, and the average."""

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest

import flashquinox as fq

from ..helpers import assert_raises, float64, weights


_EXACT = fq.Storage(moments="float32")


@pytest.mark.parametrize("warmup_steps", [0, 3])
def test_average_is_that_of_optax(warmup_steps):
    """In float32, with the weights of steps in the warm-up. Sums are in another order:
    eight roundings in a step, of numbers below 4."""
    optim = fq.schedule_free_adamw(0.1, warmup_steps, weight_decay=0.1, storage=_EXACT)
    theirs = optax.contrib.schedule_free_adamw(
        0.1, warmup_steps=warmup_steps or None, weight_decay=0.1
    )
    params = ours = weights("matrix", "bias", dtype=jnp.float32)
    state, expected = optim.init(ours), theirs.init(params)
    update = jax.jit(theirs.update)
    for seed in range(1, 7):
        grads = weights("matrix", "bias", dtype=jnp.float32, seed=seed)
        ours, state = jax.jit(optim.step)(ours, state, grads)
        with jax.numpy_dtype_promotion("standard"):
            updates, expected = update(grads, expected, params)
            params = optax.apply_updates(params, updates)
        average = fq.schedule_free_weights(ours, state)
        mean = optax.contrib.schedule_free_eval_params(expected, params)
        for found, wanted in ((ours, params), (average, mean)):
            for name in found:
                atol = 6 * 8 * 2.0**-23
                np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=atol)


@pytest.mark.parametrize("bits", [24, 32])
def test_bfloat16_weights_do_not_stand_still(bits):
    """With steps of z that are a 64th of the precision of bfloat16 below 1: there,
    where weights are bfloat16 alone, none of them moves."""
    ones = {"w": jnp.ones((8, 64), jnp.bfloat16)}
    storage = fq.Storage(master_weight_bits=bits)
    optim = fq.schedule_free_adamw(2.0**-14, storage=storage)
    step = lambda carry, _: (optim.step(*carry, ones), None)
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=1000)[0])
    found = fq.schedule_free_weights(*run((ones, optim.init(ones))))
    # z went 1000 steps, and x is the mean of all. Each step rounds y once, to half of
    # the last of 16 significant bits on average, or of 24.
    wanted = 1 - 2.0**-14 * 1001 / 2
    bound = 1000 * {24: 2.0**-17, 32: 2.0**-25}[bits]
    assert bound < (1 - wanted) / 3
    np.testing.assert_allclose(float64(found["w"]), wanted, rtol=0, atol=bound)


def test_in_a_wrapper_and_with_frozen_parts():
    model = weights("matrix", "bias")
    optim = fq.schedule_free_adamw(0.1)
    part = model | {"bias": None}
    chain = optax.chain(optax.identity(), optim)
    step = jax.jit(optim.step)
    # The first z is the average of one.
    model, state = step(*step(model, optim.init(part), part), part)
    found = fq.schedule_free_weights(model, state)
    assert jnp.all(found["bias"] == model["bias"].astype(jnp.float32))
    offset = found["matrix"] - fq.master_weights(model, state)["matrix"]
    assert jnp.any(offset != 0)
    same = fq.schedule_free_weights(model, chain.init(model))
    for x, y in zip(jtu.tree_leaves(same), jtu.tree_leaves(model), strict=True):
        assert jnp.all(x == y.astype(jnp.float32))


@pytest.mark.usefixtures("without_typechecker")
def test_errors():
    model = weights("matrix")
    state = fq.adamw(1e-3).init(model)
    assert_raises(
        ValueError,
        lambda: fq.schedule_free_weights(model, state),
        "no moment 'offset' but mu, nu",
    )
    for steps in (-1, 1.5, True):
        assert_raises(
            ValueError,
            lambda steps=steps: fq.schedule_free_adamw(1e-3, steps),
            "a whole number from 0",
        )
