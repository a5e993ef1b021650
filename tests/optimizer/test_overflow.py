"""Numbers too large for a moment or a weight, and counts at their end."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flashquinox as fq

from ..helpers import float64, tree_identical


_RULES = ["adamw", "adamw-nesterov", "adan", "lion", "sgd-momentum", "sgd-nesterov"]


#
# Weights and moments
#


@pytest.mark.parametrize("make", [fq.adamw, partial(fq.sgd, momentum=0.9)])
def test_steps_of_too_large_gradients_are_skipped(make):
    """Also where they are clipped to something too large, not to an ordinary norm."""
    w = jnp.zeros((2, 32), jnp.bfloat16)
    good = jnp.full_like(w, 0.1)
    optim = make(1e-2, skip_nonfinite=True)
    step = jax.jit(optim.step)
    new, state = step(w, optim.init(w), good)
    largest = float(jnp.finfo(w.dtype).max)
    for large, is_taken in ((2.0**62, True), (2.0**63, False), (-largest, False)):
        bad = good.at[1, 3].set(large)
        assert int(step(new, state, bad)[1].count) == 1 + is_taken
        clipped = lambda norm, bad=bad: step(
            new, state, bad, max_norm=jnp.float32(norm)
        )
        assert int(clipped(abs(large))[1].count) == 1 + is_taken
        assert int(clipped(1.0)[1].count) == 2
        if not is_taken:
            assert tree_identical(step(new, state, bad), (new, state))


def test_a_weight_stays_in_the_range_of_its_dtype():
    """With `skip_nonfinite`; and so does not stop all others, whose momentum would be
    as large in the next step."""
    w = jnp.asarray(np.linspace(-6e4, 6e4, 64), jnp.float16).reshape(2, 32)
    optim = fq.sgd(1.0, momentum=0.9, skip_nonfinite=True)
    step, update = jax.jit(optim.step), jax.jit(optim.update)
    new, state = w, optim.init(w)
    grads = jnp.full_like(w, -1e4)
    for _ in range(3):
        updates, _ = update(grads, state, new)
        new, state = step(before := new, state, grads)
        moved = float64(new) > float64(before)
        assert np.isfinite(float64(new)).all()
        assert np.all((float64(updates) > 0) == moved)
        assert moved[0].all() and not moved[-1, -1]
        assert np.all(float64(new)[~moved] == float64(before)[~moved])
    assert int(state.count) == 3
