"""States that something else has changed: dtypes, and counts at their end."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest

import flashquinox as fq

from ..helpers import assert_raises, tree_identical, weights


_optim = fq.adamw(1e-2)


def _trained():
    model = weights("matrix", "bias")
    return _optim.step(model, _optim.init(model), model)


def _floats(part):
    return jtu.tree_map(lambda x: x.astype(jnp.float32), part)


_changes = {
    "count": (lambda s: s.steps.count, "count"),
    "codes": (lambda s: s.moments["mu"]["matrix"].codes, "`['matrix']`"),
    "scales": (lambda s: s.moments["nu"]["matrix"].scales, "`['matrix']`"),
    "correction": (lambda s: s.corrections["matrix"], "`['matrix']`"),
    "moment": (lambda s: s.moments["mu"]["bias"], "`['bias']`"),
}


@pytest.mark.parametrize("part", _changes)
def test_other_dtypes_are_refused(part, without_typechecker):
    model, state = _trained()
    where, name = _changes[part]
    dtype = jnp.bfloat16 if part == "moment" else jnp.float32
    bad = eqx.tree_at(where, state, replace_fn=lambda x: x.astype(dtype))
    called = {
        "step": lambda: _optim.step(model, bad, model),
        "update": lambda: jax.jit(_optim.update)(model, bad, model),
    }
    if part in ("count", "correction"):
        called |= {
            "master_weights": lambda: fq.master_weights(model, bad),
            "widen_corrections": lambda: fq.widen_corrections(model, bad),
            "check_numerics": lambda: fq.check_numerics(model, bad, 1e-2),
        }
    for call, take in called.items():
        assert_raises(TypeError, take, call, name, jnp.dtype(dtype).name, "cast")
    if part in ("codes", "scales"):
        moment = bad.moments["mu" if part == "codes" else "nu"]["matrix"]
        assert_raises(TypeError, moment.decode, part, "float32", "cast")


@pytest.mark.parametrize("moments", ["flashquinox", "learned", "float32"])
def test_counts_end(moments):
    schedule = lambda count: 1e-3 / (1 + count.astype(jnp.float32) * 1e-9)
    optim, reference = (
        fq.adamw(schedule, storage=fq.Storage(moments=moments)),
        optax.adamw(schedule),
    )
    last = np.iinfo(np.int32).max
    set_count = lambda state: optax.tree.set(state, count=jnp.int32(last - 1))
    grads = new = exact = {"w": jnp.ones((4, 64))}
    state, expected = set_count(optim.init(new)), set_count(reference.init(exact))
    step = jax.jit(optim.step)
    for _ in range(3):
        new, state = step(new, state, grads)
        with jax.numpy_dtype_promotion("standard"):
            updates, expected = reference.update(grads, expected, exact)
            exact = optax.apply_updates(exact, updates)
    assert int(state.count) == int(expected[0].count) == last
    # Three steps of at most the rate, each off by the last code of a moment.
    moved = np.abs(np.asarray(exact["w"]) - 1)
    assert np.allclose(new["w"], exact["w"], rtol=0, atol=0.02 * moved.max())


def test_count_as_a_python_integer(without_typechecker):
    model, state = _trained()
    counted = optax.tree.set(state, count=1)
    expected = _optim.step(model, state, model)
    assert tree_identical(_optim.step(model, counted, model), expected)
