"""Clipping by the norm of all gradients, where they are read."""

import functools as ft
import re

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import flashquinox as fq
from flashquinox._sharding.reductions import all_within, clip

from ..helpers import array_of, float64, tree_identical
from ..kernels import arrays, assert_same


# Of which the new weights are the old ones less the gradients.
_sgd = ft.partial(
    fq.sgd, 1.0, storage=fq.Storage(master_weight_bits=None, moments="float32")
)

_SHAPES = {"matrix": (8, 32), "bias": (32,), "scalar": ()}
_SIZE = 8 * 32 + 32 + 1
# A sum of that many squares, in any order, and half of its error for the root; then the
# root, the quotient and two products. Of two computations.
_ERROR = 2 * (_SIZE / 2 + 5) * 2.0**-24


def _grads(seed=1, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {
        name: array_of(rng.standard_normal(shape), dtype)
        for name, shape in _SHAPES.items()
    }


def _like(grads, value=0.0):
    return jtu.tree_map(lambda x: array_of(np.full(x.shape, value), "float32"), grads)


@jax.jit
def _clipped(grads, max_norm):
    """By a step."""
    optim, params = _sgd(), _like(grads)
    new, _ = optim.step(params, optim.init(params), grads, max_norm=max_norm)
    return jtu.tree_map(lambda x: -x, new)


@jax.jit
def _optax_clipped(grads, max_norm):
    optim = optax.clip_by_global_norm(max_norm)
    return optim.update(grads, optim.init(grads))[0]


def _norm(tree):
    return np.sqrt(sum(np.sum(np.square(float64(x))) for x in jtu.tree_leaves(tree)))


def _assert_close(found, expected, error=_ERROR):
    for x, y in zip(*map(jtu.tree_leaves, (found, expected)), strict=True):
        x, y = float64(x), float64(y)
        assert np.all(np.abs(x - y) <= error * np.abs(y))


#
# The norm and its factors
#


@pytest.mark.parametrize("max_norm", [1.0, 1e3])
def test_is_what_optax_computes(max_norm):
    grads = _grads()
    expected = _optax_clipped(grads, max_norm)
    found = _clipped(grads, max_norm)
    if max_norm == 1e3:
        assert tree_identical(found, grads)
    _assert_close(found, expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("exponent", [-110, -10, 14, 100, 127])
def test_gradients_of_any_size(dtype, exponent):
    """Also if the norm is infinite in float32, or its square is 0."""
    if dtype == jnp.float16 and not -10 <= exponent <= 14:
        pytest.skip("no such numbers")
    size = 2.0**exponent
    values = np.random.default_rng(0).choice([1.0, -1.0, 1.5], 2**12) * size
    grads = {"a": jnp.asarray(values, dtype), "b": jnp.asarray(size, dtype)}
    max_norm = min(1.0, size)
    found = _clipped(grads, max_norm)
    factor = min(1, max_norm / _norm(grads))
    assert factor < 1
    _assert_close(found, jtu.tree_map(lambda x: factor * float64(x), grads), 2**-11)


@pytest.mark.parametrize("size", [1e-15, 1.0, 1e37])
def test_tiny_norms(size):
    """Each factor alone is a number that is not flushed to zero."""
    grads = {"w": jnp.full((8, 8), size, jnp.float32)}
    _assert_close(_clipped(grads, 1e-30), {"w": np.full((8, 8), 1e-30 / 8)}, 2**-20)


@jax.jit
def _factors(grads, max_norm):
    return clip(grads, [None] * len(grads), max_norm)


def test_gradients_of_mixed_sizes():
    """Each size of number has its own sum, and all of them count."""
    for exponents in ([44, 46], [-44, -46], [44, -46, 46], [120, -120], [0, -120]):
        grads = [np.full(7, 2.0**x, np.float32) for x in exponents]
        largest = np.float32(2.0 ** max(exponents))
        found = _factors(grads, largest)
        product = np.prod([float64(x) for x in found.factors])
        assert product == pytest.approx(largest / _norm(grads), rel=2**-20)
        assert bool(found.norm.is_finite)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_large_gradients_are_read_in_pieces(dtype):
    """On a CPU, so that nothing of their size is in memory. The last piece is partial:
    its numbers, the largest ones, count once."""
    values = np.random.default_rng(0).standard_normal((5, 8190))
    values[-1, -10:] = 2.0**46
    values[0, :4] = 2.0**-46
    grads = [array_of(values, dtype)]
    found = _factors(grads, 1.0)
    product = np.prod([float64(x) for x in found.factors])
    assert product == pytest.approx(1 / _norm(grads), rel=2**-20)
    for wrong in (np.nan, np.inf):
        values[3, 7] = wrong
        assert not bool(_factors([array_of(values, dtype)], 1.0).norm.is_finite)


def test_no_array_of_what_is_reduced():
    # Of bfloat16, JAX 0.10 has all in float32 before it takes a part.
    gradient = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    for function in (
        lambda x: clip([x], [None], 1.0).factors,
        lambda x: all_within([x], [1e4], [None]),
    ):
        compiled = jax.jit(function).lower(gradient).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < gradient.size / 4


_skipping = fq.adamw(
    1e-2,
    skip_nonfinite=True,
    storage=fq.Storage(master_weight_bits=None, moments="float32"),
)
_skipping_step = jax.jit(ft.partial(_skipping.step, max_norm=1.0))


def _skipping_state():
    params = _like(_grads(), 1.0)
    return params, _skipping.init(params)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_gradients_that_are_not_finite(value):
    grads = _grads()
    matrix = np.array(grads["matrix"])
    matrix[3, 5] = value
    grads = grads | {"matrix": matrix}
    found, expected = _clipped(grads, 1.0), _optax_clipped(grads, 1.0)
    for x, y in zip(*map(jtu.tree_leaves, (found, expected)), strict=True):
        np.testing.assert_array_equal(np.isnan(x), np.isnan(y))
    params, state = _skipping_state()
    assert tree_identical(_skipping_step(params, state, grads), (params, state))
    new, new_state = _skipping_step(params, state, _grads())
    assert int(new_state.count) == 1 and not jnp.any(new["matrix"] == 1.0)


def test_a_norm_beyond_float32_is_finite():
    params, state = _skipping_state()
    _, state = _skipping_step(params, state, _like(params, 3e38))
    assert int(state.count) == 1


def test_zero_gradients():
    grads = _like(_grads())
    assert tree_identical(jtu.tree_map(jnp.abs, _clipped(grads, 1.0)), grads)

    def loss(scale):
        scaled = jtu.tree_map(lambda x: scale * x, grads)
        return sum(jnp.sum(x) for x in jtu.tree_leaves(_clipped(scaled, 1.0)))

    assert jax.jit(jax.grad(loss))(1.0) == 0


def test_only_of_leaves_that_are_trained():
    """What is frozen has no part in the norm, and is not looked at."""
    grads = _grads()
    params = _like(grads, 1.0) | {"count": np.arange(3), "name": "model"}
    optim = _sgd()
    grads = grads | {"bias": None, "count": None, "name": None}
    new, _ = optim.step(params, optim.init(params), grads, max_norm=0.5)
    moved = [float64(new[x]) - float64(params[x]) for x in ("matrix", "scalar")]
    # 1 - x rounds x to a unit of 1.
    assert _norm(moved) == pytest.approx(0.5, abs=2.0**-23 * _SIZE)
    assert tree_identical(new["bias"], params["bias"])
    nothing = jtu.tree_map(lambda _: None, params)
    new, _ = optim.step(params, optim.init(params), nothing, max_norm=0.5)
    assert tree_identical(new, params)


def test_before_l2_regularization():
    grads, params = _grads(), _like(_grads(), 1.0)
    optim, error = _sgd(weight_decay=0.25), 4 * _ERROR
    chain = optax.chain(optax.clip_by_global_norm(1.0), optim)
    updates, _ = chain.update(grads, chain.init(params), params)
    found, _ = optim.step(params, optim.init(params), grads, max_norm=1.0)
    _assert_close(found, optax.apply_updates(params, updates), error)


#
# Where a step is taken
#


@pytest.mark.once
@pytest.mark.parametrize("backend", ["tpu", "gpu"])
def test_kernels(backend):
    """And leaves that no kernel takes."""
    shapes = {"matrix": (32, 128), "scalar": ()}
    params, grads = (arrays(shapes, jnp.bfloat16, seed) for seed in (0, 1))
    kernel, plain = (
        jax.jit(fq.adamw(1e-2, backend=name).step) for name in (backend, "xla")
    )
    state = fq.adamw(1e-2, backend=backend).init(params)
    most = np.float32(_norm(grads) / 8)
    found, plain = (
        step(params, state, grads, max_norm=most) for step in (kernel, plain)
    )
    assert_same(found, plain, params, state, grads)
    # The clipped gradients have bfloat16's exponents, and so keep their bits.
    eighth = jtu.tree_map(lambda x: array_of(float64(x) / 8, jnp.bfloat16), grads)
    unclipped = kernel(params, state, eighth, max_norm=np.float32(np.inf))
    assert_same(found, unclipped, params, state, grads)


@pytest.mark.parametrize("types", [AxisType.Auto, AxisType.Explicit])
def test_devices(types):
    """One collective, and what each of several devices has counts once."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(types,) * 2)
    specs = {"matrix": P("data", "model"), "bias": P("model"), "scalar": P()}
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    grads = _grads()
    optim, params = _sgd(skip_nonfinite=True), _like(grads, 1.0)
    expected, _ = optim.step(params, optim.init(params), grads, max_norm=0.5)
    params, grads = jax.device_put((params, grads), (shardings, shardings))
    state = optim.init(params)
    step = jax.jit(optim.step).lower(params, state, grads, max_norm=0.5).compile()
    (found, _) = step(params, state, grads, max_norm=0.5)
    _assert_close(found, expected, 4 * _ERROR)
    collectives = r"[ )](all-\w+|reduce-scatter|collective-\w+)(?:-start)?\("
    assert re.findall(collectives, step.as_text()) == ["all-reduce"]


def test_members_of_an_ensemble_have_their_own_norms():
    members = [
        _grads(1),
        jtu.tree_map(lambda x: np.asarray(x) / np.float32(2**10), _grads(2)),
    ]
    stacked = jtu.tree_map(lambda *x: np.stack(x), *members)
    found = jax.vmap(_clipped, in_axes=(0, None))(stacked, 1.0)
    for i, grads in enumerate(members):
        member = jtu.tree_map(lambda x: np.asarray(x)[i], found)  # noqa: B023
        _assert_close(member, _optax_clipped(grads, 1.0))


def test_schedule_in_a_loop():
    """Of one program, whose arguments are donated."""
    optim, params = _sgd(), _like(_grads())
    bounds = jnp.asarray([0.5, 0.0, jnp.inf])

    @ft.partial(jax.jit, donate_argnums=(0, 1))
    def train(params, state, grads):
        def step(carry, bound):
            new, state = optim.step(*carry, grads, max_norm=bound)
            return (new, state), new

        return jax.lax.scan(step, (params, state), bounds)

    grads = _grads()
    _, path = train(params, optim.init(params), grads)
    path = jax.device_get(path)
    before = jtu.tree_map(lambda x: x[0], path)
    assert _norm(before) == pytest.approx(0.5, rel=_ERROR)
    assert tree_identical(jtu.tree_map(lambda x: x[1], path), before)
    expected = jtu.tree_map(lambda x, g: x - np.asarray(g), before, grads)
    assert tree_identical(jtu.tree_map(lambda x: x[2], path), expected)


def test_no_clipping_is_another_program():
    """None leaves nothing behind in it."""
    optim, grads = fq.adamw(1e-2), _grads()
    state = optim.init(grads)
    plain, none, clipping = (
        str(jax.make_jaxpr(ft.partial(optim.step, **options))(grads, state, grads))
        for options in ({}, {"max_norm": None}, {"max_norm": 1.0})
    )
    assert plain == none
    assert "is_finite" not in plain and "is_finite" in clipping


@pytest.mark.parametrize(
    "value, error",
    [
        (np.nan, ValueError),
        (-1.0, ValueError),
        (0, ValueError),
        (np.inf, ValueError),
        ("1.0", TypeError),
        (True, TypeError),
        (jnp.asarray(True), TypeError),
        (jnp.ones(2), TypeError),
        (lambda count: 1.0, TypeError),
    ],
)
@pytest.mark.usefixtures("without_typechecker")
def test_largest_norms_that_are_none(value, error):
    optim, grads = _sgd(), _grads()
    state = optim.init(grads)
    with pytest.raises(error, match=r"`sgd\(\.\.\.\)\.step\(max_norm=\.\.\.\)`"):
        optim.step(grads, state, grads, max_norm=value)


def test_updates_are_not_clipped():
    optim, grads = _sgd(), _grads()
    state = optim.init(grads)
    optim.update(grads, state, grads, value=1.0, max_norm=None)
    with pytest.raises(TypeError, match=r"update` does not clip.*clip_by_global_norm"):
        optim.update(grads, state, grads, max_norm=1.0)
