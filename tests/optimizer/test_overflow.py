"""Numbers too large for a moment or a weight, and counts at their end."""

from functools import partial

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest

import flashquinox as fq

from ..helpers import float64, slow, tree_identical


#
# Weights and moments
#


@pytest.mark.parametrize("make", [fq.sgd, slow(fq.adamw)])
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


@pytest.mark.parametrize("backend", [slow("gpu"), "tpu"])
def test_kernels_keep_weights_in_range(backend):
    """As plain XLA does."""
    w = jnp.asarray(np.linspace(-3.3e38, 3.3e38, 32 * 128), jnp.bfloat16)
    w = w.reshape(32, 128)
    new = {}
    for name in (backend, "xla"):
        optim = fq.sgd(1e20, skip_nonfinite=True, backend=name)
        new[name] = jax.jit(optim.step)(w, optim.init(w), jnp.full_like(w, 1e18))
    assert tree_identical(*new.values())
    moved = new["xla"][0] != w
    assert np.isfinite(float64(new["xla"][0])).all() and 100 < moved.sum() < 4000


#
# Counts
#


_last = jnp.iinfo(jnp.int32).max


@pytest.mark.parametrize(
    "make",
    [
        slow(partial(fq.adam, nesterov=True, storage=fq.Storage(moments="learned"))),
        partial(
            fq.sgd,
            momentum=0.9,
            dampening=0.5,
            storage=fq.Storage(master_weight_bits=None, dither_weights=True),
        ),
        optax.inject_hyperparams(partial(fq.lion, weight_decay=0.1)),
    ],
    ids=["learned", "dithered", "injected"],
)
def test_counts_end_at_the_largest(make):
    """The last step is taken again and again, as by Optax."""
    w, grads = jnp.ones((2, 32), jnp.bfloat16), jnp.full((2, 32), 0.1, jnp.bfloat16)
    schedule = lambda count: 0.1 * jnp.where(count >= 0, 1, jnp.nan)
    optim = make(schedule)
    update = jax.jit(optim.update)
    state = jtu.tree_map(
        lambda x: jnp.full_like(x, _last - 1) if x.dtype == jnp.int32 else x,
        optim.init(w),
    )
    for _ in range(3):
        updates, state = update(grads, state, w)
        w = optax.apply_updates(before := w, updates)
        counts = [x for x in jtu.tree_leaves(state) if x.dtype == jnp.int32]
        assert counts and all(int(x) == _last for x in counts)
        assert np.all((float64(w) < float64(before)) & np.isfinite(float64(w)))
