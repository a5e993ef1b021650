"""Any Optax transformation, with compressed state."""

import functools as ft
import re

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import flashquinox as fq
from flashquinox.checkpoint import Checkpoints

from ..helpers import assert_raises, float64, slow, tree_identical
from ..kernels import arrays


_SHAPES = {"w": (64, 64), "v": (64,)}


@pytest.fixture(autouse=True)
def promotion_of_optax():
    """Its transformations promote dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


_arrays = ft.partial(arrays, _SHAPES, jnp.float32)


def _steps(optim, weights, grads):
    state, update = optim.init(weights), jax.jit(optim.update)
    for grad in grads:
        updates, state = update(grad, state, weights)
        weights = optax.apply_updates(weights, updates)
    return weights, state


@pytest.mark.parametrize(
    "make",
    [
        optax.adam,
        optax.contrib.ademamix,
        slow(optax.adan),
        slow(optax.yogi),
        slow(optax.contrib.schedule_free_adamw),
    ],
)
def test_way_is_that_of_optax(make):
    """Codes are rounded by the dither: 2^-7 of the largest of a group, each way."""
    weights, grads = _arrays(0), [_arrays(1 + i) for i in range(8)]
    found, state = _steps(fq.compress(make(1e-2)), weights, grads)
    expected, full = _steps(make(1e-2), weights, grads)
    for name, start in weights.items():
        x, y = float64(found[name]), float64(expected[name])
        way = np.linalg.norm(y - float64(start))
        assert np.linalg.norm(x - y) <= 0.06 * way
    held = [sum(x.nbytes for x in jtu.tree_leaves(tree)) for tree in (state, full)]
    assert held[0] < held[1]


def test_small_arrays_counts_and_what_must_be_exact_stay():
    state = fq.compress(optax.adan(1e-2)).init(_arrays(0))
    assert int(optax.tree.get(state, "t")) == 0
    assert isinstance(optax.tree.get(state, "n")["w"], fq.QuantMoment)
    assert optax.tree.get(state, "n")["v"].dtype == jnp.float32
    assert optax.tree.get(state, "g")["w"].dtype == jnp.float32


def test_sums_between_updates_are_exact():
    optim = optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation()
    state = fq.compress(optim).init(_arrays(0))
    assert optax.tree.get(state, "acc_grads")["w"].dtype == jnp.float32
    assert isinstance(optax.tree.get(state, "mu")["w"], fq.QuantMoment)


def test_weights_have_24_bits():
    optim = optax.chain(fq.compress(optax.adam(1e-4)), fq.add_updates())
    start, grads = _arrays(0), [_arrays(1)] * 8
    weights, state = fq.prepare(start, optim)
    step = jax.jit(optim.update)
    for grad in grads:
        updates, state = step(grad, state, weights)
        weights = optax.apply_updates(weights, updates)
    assert weights["w"].dtype == jnp.bfloat16
    # Equal gradients: eight steps of the learning rate, which bfloat16 cannot take.
    moved = float64(fq.master_weights(weights, state)["w"]) - float64(start["w"])
    expected = -8e-4 * np.sign(float64(grads[0]["w"]))
    assert np.median(np.abs(moved - expected)) <= 0.05 * 8e-4


def test_resumes_bit_for_bit(tmp_path):
    optim = optax.chain(fq.compress(optax.adam(1e-2)), fq.add_updates())
    weights, state = fq.prepare(_arrays(0), optim)
    step = jax.jit(optim.update)
    _, state = step(_arrays(1), state, weights)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, weights, state)
        found = checkpoints.restore(weights, optim.init(weights))
    assert tree_identical(found, (weights, state))
    assert tree_identical(
        step(_arrays(2), found[1], found[0]), step(_arrays(2), state, weights)
    )


@pytest.mark.once
def test_divided_like_the_weights():
    """Also where parts hold no whole groups, of 32 elements."""
    mesh = jax.make_mesh((4,), ("data",))
    there = NamedSharding(mesh, P("data"))
    optim = fq.compress(optax.adam(1e-2))
    make = ft.partial(arrays, _SHAPES | {"long": (4100,)}, jnp.float32)
    weights, grads = (jax.device_put(make(i), there) for i in (0, 1))
    found, state = _steps(optim, weights, [grads])
    expected, _ = _steps(optim, make(0), [make(1)])
    for name in ("w", "long"):
        mu = optax.tree.get(state, "mu")[name]
        for x in (mu.codes, mu.decode(), found[name]):
            assert x.sharding.is_equivalent_to(there, x.ndim)
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-6, atol=1e-6)
    text = jax.jit(optim.update).lower(grads, state, weights).compile().as_text()
    # Of "long" alone: gradients and states of others stay where they are.
    gathered = re.findall(r"\[(\S+)\]\S* all-gather", text)
    assert set(gathered) == {"4100"}


def test_every_array_of_the_state_is_mapped():
    optim = fq.compress(optax.adam(1e-2))
    state = optim.init(_arrays(0))
    doubled = fq.map_params(optim, lambda x: x * x.dtype.type(2), state)
    assert jtu.tree_structure(doubled) == jtu.tree_structure(state)


@pytest.mark.once
def test_errors(without_typechecker):
    del without_typechecker
    assert_raises(TypeError, lambda: fq.compress(1e-2), "GradientTransformation")  # pyright: ignore
    wrong = lambda: fq.compress(optax.adam(1e-2), kinds={"mu": "positive"})  # pyright: ignore
    assert_raises(ValueError, wrong, "'positive'")
    wrong = lambda: fq.compress(optax.adam(1e-2), kinds=["mu"])  # pyright: ignore
    assert_raises(TypeError, wrong, "takes a dictionary", "got ['mu']")
    for ours, kind in (
        (fq.adamw(1e-2), "OptimizerState"),
        (
            optax.MultiSteps(fq.sgd(1e-2), 2).gradient_transformation(),
            "inner_opt_state",
        ),
        (fq.compress(optax.adam(1e-2)), "QuantMoment"),
    ):
        wrong = lambda ours=ours: fq.compress(ours).init(_arrays(0))
        assert_raises(TypeError, wrong, "`compress`: ", kind, "compressed already")
    mine = optax.GradientTransformation(
        lambda p: {"mine": p}, lambda u, s, p=None: (u, s)
    )
    assert_raises(
        ValueError, lambda: fq.compress(mine).init(_arrays(0)), "'mine'", "kinds="
    )
    # Which could be broadcast.
    optim = fq.compress(optax.adam(1e-2))
    low, high = ({"x": jnp.ones((n, 64))} for n in (1, 3))
    for grads, state, part in ((low, high, "['x']"), (high, low, ".mu['x']")):
        wrong = lambda g=grads, s=state: optim.update(g, optim.init(s), g)
        assert_raises(ValueError, wrong, "`compress`: ", part, "of the same model")
    optim = fq.compress(optax.adam(1e-2), kinds={"ScaleByAdamState.mu": "nonnegative"})
    state = optim.init(_arrays(0))
    with pytest.raises(Exception, match="has negative elements"):
        jax.block_until_ready(optim.update(_arrays(1), state, _arrays(0)))


def _stored(state):
    """The paths of what is compressed, in full."""
    is_moment = lambda x: isinstance(x, fq.QuantMoment)
    leaves = jtu.tree_leaves_with_path(state.inner_state, is_leaf=is_moment)
    return {jtu.keystr(path) for path, x in leaves if is_moment(x)}


@pytest.mark.parametrize(
    ("kinds", "stored"),
    [
        ({}, {"[0].mu['w']", "[0].nu['w']"}),
        # Before what is known of Optax.
        ({"nu": "exact"}, {"[0].mu['w']"}),
        ({"ScaleByAdamState.mu": "exact"}, {"[0].nu['w']"}),
        ({"ScaleByAdamState": "exact"}, set()),
        ({"[0].nu['w']": "exact"}, {"[0].mu['w']"}),
        ({"": "exact"}, set()),
    ],
)
def test_kinds_of_the_caller_come_first(kinds, stored):
    optim = fq.compress(optax.adam(1e-2), kinds=kinds)
    assert _stored(optim.init(_arrays(0))) == stored


def test_kinds_of_any_container():
    """Dictionaries by their keys, sequences by paths. Weights that have the name of a
    field are none."""
    weights = {"average": jnp.ones((64, 64)), "squares": jnp.ones((64, 64))}
    make = lambda p: {"average": p, "rest": [p, (None, jax.random.key(0), 3)]}
    mine = optax.GradientTransformation(make, lambda u, s, p=None: (u, s))
    kinds = {"average": "signed", "['rest'][0]": "nonnegative"}
    optim = fq.compress(mine, kinds=kinds)  # pyright: ignore
    assert len(_stored(optim.init(weights))) == 4


def test_a_kind_without_effect_is_an_error():
    for kinds in ({"muu": "exact"}, {"": "exact", "mu": "signed"}):
        wrong = lambda kinds=kinds: fq.compress(optax.adam(1e-2), kinds=kinds)
        call = lambda wrong=wrong: wrong().init(_arrays(0))
        assert_raises(ValueError, call, "has no effect", repr([*kinds][-1]))


def test_values_that_become_negative_late_are_an_error():
    """A wrong kind need not show at first."""
    mine = optax.GradientTransformation(
        lambda p: {"mine": p},
        lambda u, s, p=None: (u, jtu.tree_map(jnp.subtract, s, {"mine": u})),
    )
    optim = fq.compress(mine, kinds={"mine": "nonnegative"})
    grads = {"w": jnp.full((64, 64), 0.09)}
    state, update = optim.init({"w": jnp.ones((64, 64))}), jax.jit(optim.update)
    for _ in range(10):
        _, state = update(grads, state)
    with pytest.raises(Exception, match="has negative elements"):
        for _ in range(3):
            _, state = update(grads, state)
        jax.block_until_ready(state)
