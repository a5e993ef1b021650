"""Numbers too large for a moment or a weight, and counts at their end."""

from functools import partial

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest

import flashquinox as fq

from ..helpers import float64, OPTIMIZERS, slow, tree_identical
from ..kernels import arrays, run


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


@pytest.mark.parametrize("backend", ["gpu", slow("tpu")])
def test_kernels_store_what_plain_xla_does(backend):
    """Beside huge elements, from both sides."""
    shapes = {"leaf": (32, 128)}
    params, *grads = (arrays(shapes, jnp.bfloat16, seed) for seed in range(4))
    for i, huge in enumerate([3e19, -1e30, 3e38]):
        at = (2 * i, i) if backend == "gpu" else (i, 2 * i)
        grads[1]["leaf"] = grads[1]["leaf"].at[at].set(huge)
    run(backend, partial(fq.adamw, 1e-2), params, grads)


@pytest.mark.parametrize("backend", [slow("gpu"), "tpu"])
def test_kernels_keep_weights_in_range(backend):
    """With `skip_nonfinite`, as plain XLA does."""
    w = jnp.asarray(np.linspace(-3.3e38, 3.3e38, 32 * 128), jnp.bfloat16)
    w = w.reshape(32, 128)
    new = {}
    for name in (backend, "xla"):
        optim = fq.sgd(1e20, skip_nonfinite=True, backend=name)
        new[name] = jax.jit(optim.step)(w, optim.init(w), jnp.full_like(w, 1e18))
    (weights, ours), (expected, state) = new.values()
    assert tree_identical(weights, expected)
    # C++ may contract a product and a sum.
    apart = float64(ours.corrections) - float64(state.corrections)
    assert np.max(np.abs(apart)) <= 1
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


#
# One huge gradient
#


_HUGE = [3e19, 1e30, float(jnp.finfo(jnp.bfloat16).max), -3e38, np.inf]
# Of which moments forget it soon.
_RATES = {
    "adamw": {"b2": 0.9},
    "adamw-nesterov": {"b2": 0.9},
    "adan": {"b1": 0.9, "b3": 0.9},
    "lion": {"b2": 0.9},
}


def _paths(step, w, state, grads):
    def body(carry, grad):
        w, state = step(*carry, grad)
        return (w, state), w

    return float64(jax.jit(partial(lax.scan, body))((w, state), grads)[1])


def _huge_gradients() -> jax.Array:
    """For 1500 steps; in the sixth, one element of each row gets a huge one."""
    noise = np.random.default_rng(0).standard_normal((1500, len(_HUGE), 64))
    grads = (0.1 + 0.02 * noise).astype(np.float32)
    grads[5, np.arange(len(_HUGE)), 3] = _HUGE
    return jnp.asarray(grads)


@pytest.mark.parametrize(
    "name, moments",
    [
        ("adamw", "flashquinox"),
        ("lion", "flashquinox"),
        *(
            slow(name, moments)
            for name in (*_RATES, "sgd-nesterov", "sgdw")
            for moments in (
                *fq.MomentCodecs.names(),
                ("flashquinox", "float32"),
                ("float32", "flashquinox"),
                ("sqrt", "flashquinox"),
            )
            # Beside a huge element, the least codes of roots are large numbers.
            if not {"sqrt", "fourth_root"} & {moments, moments[0]}
            or name not in ("adan", "sgd-nesterov", "sgdw")
        ),
    ],
)
def test_one_huge_gradient_harms_its_element(name, moments):
    """Those beside it in its group are updated as by Optax once moments have forgotten
    it; and by Adam with `flashquinox` at all times."""
    case, rates, grads = OPTIMIZERS[name], _RATES.get(name, {}), _huge_gradients()
    w = jnp.zeros(grads.shape[1:])
    optim = case.make(1e-3, storage=fq.Storage(moments=moments), **rates)
    found = _paths(optim.step, w, optim.init(w), grads)
    reference = case.reference(1e-3, **rates)

    def step(w, state, grad):
        updates, state = reference.update(grad, state, w)
        return optax.apply_updates(w, updates), state

    with jax.numpy_dtype_promotion("standard"):
        expected = _paths(step, w, reference.init(w), grads)
    hit = np.zeros(w.shape, bool)
    hit[:, 3] = True
    assert np.isfinite(found[-1][~hit]).all()
    assert np.all(np.isfinite(found[-1]) | ~np.isfinite(expected[-1]))
    first = 10 if (name, moments) == ("adamw", "flashquinox") else 1200
    for start in range(first, 1400, 100):
        moved, wanted = (x[start + 100] - x[start] for x in (found, expected))
        share = np.sum(moved[:, :32], where=~hit[:, :32], axis=1)
        share /= np.sum(wanted[:, :32], where=~hit[:, :32], axis=1)
        np.testing.assert_allclose(share, 1, atol=0.1)


@pytest.mark.parametrize("huge", [1e25, -3e38])
@pytest.mark.parametrize(
    "name",
    [
        "ademamix",
        "adafactor",
        "adafactor-whole",
        slow("adan"),
        slow("lamb"),
        slow("rmsprop"),
        slow("schedule-free"),
    ],
)
def test_one_huge_gradient_leaves_a_model_that_trains(name, huge):
    """Whatever the optimizer averages: all weights move, by steps of ordinary size."""
    rng = np.random.default_rng(0)
    grads = (1 + 0.1 * rng.standard_normal((40, 8, 64))).astype(np.float32)
    grads[5, 2, 3] = huge
    w = jnp.ones(grads.shape[1:])
    optim = OPTIMIZERS[name].make(1e-3)
    found = _paths(optim.step, w, optim.init(w), jnp.asarray(grads))
    assert np.isfinite(found).all()
    # A few learning rates, and Adafactor's decay by 0.01.
    assert np.max(np.abs(np.diff(found, axis=0))) <= 0.03
    hit = np.zeros(w.shape, bool)
    hit[2], hit[:, 3] = True, True
    assert np.all(found[-1][~hit] < found[10][~hit])
