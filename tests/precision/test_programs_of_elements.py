"""What is computed of elements and groups outside of programs: arrays of all shapes
share a few of them."""

import itertools

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import flashquinox as fq
from flashquinox._common import eager
from flashquinox.exchange import from_optax, to_optax

from ..helpers import array_of, COMPILED, tree_identical


_OTHERS = itertools.count(1013)

_optim = fq.adamw(1e-3)
_average = fq.ema(0.9)


def _prepared(model):
    return fq.prepare(model, _optim)


def _changed(model):
    """All that is computed of weights and corrections alone."""
    narrow, state = _prepared(model)
    masters = fq.master_weights(narrow, state)
    wide = fq.widen_corrections(narrow, state)
    return {
        "prepare": (narrow, state.corrections),
        "master_weights": masters,
        "from_master_weights": fq.from_master_weights(masters, narrow, state)[0],
        "widen_corrections": wide.corrections,
        "narrow_corrections": fq.narrow_corrections(narrow, wide).corrections,
        "cast": fq.cast(model, jnp.float16),
        "ema": _average.init(narrow, state).weights,
    }


def _model(count, first=1, sharding=None):
    """Weights of shapes that no other test has."""
    rng = np.random.default_rng(first)
    put = lambda x: x if sharding is None else jax.device_put(x, sharding)
    sizes = [next(_OTHERS) for _ in range(count)]
    return {
        f"matrix{i}": put(array_of(rng.normal(size=(first + i, size)), jnp.float32))
        for i, size in enumerate(sizes)
    }


def test_shapes_share_programs():
    first, second = _model(3), _model(3)
    for model in (first, second):
        COMPILED.clear()
        jax.block_until_ready(jtu.tree_leaves(_changed(model)))
        fq.check_numerics(model, _optim.init(model), learning_rate=1e-3)
    assert not COMPILED


@pytest.mark.product
@pytest.mark.parametrize("kind", [None, AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("divided", [False, True])
def test_larger_arrays_have_their_own(kind, divided, monkeypatch):
    """With the same results, in the same places."""
    sharding = None
    if kind is not None:
        mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
        spec = PartitionSpec("data") if divided else PartitionSpec()
        sharding = NamedSharding(mesh, spec)
    model = {
        "a": np.linspace(-3, 3, 4 * 37, dtype=np.float32).reshape(4, 37),
        "b": np.float32([1e-40, np.nan, np.inf, -0.0]),
    }
    model = {k: jax.device_put(x, sharding) for k, x in model.items()}
    found = _changed(model)
    monkeypatch.setattr("flashquinox._common.eager._MOST_BYTES_BOTH_WAYS", 0)
    expected = _changed(model)
    assert tree_identical(found, expected)
    for x, y in zip(*map(jtu.tree_leaves, (found, expected)), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
        assert x.committed == y.committed
        assert jax.typeof(x) == jax.typeof(y)


@pytest.mark.parametrize(
    "shape, spec",
    [((1,), PartitionSpec("a", None)), ((8, 1), PartitionSpec(None, "b"))],
)
def test_axes_of_size_one_have_names(shape, spec):
    """They are in the types of arrays."""
    mesh = jax.make_mesh(shape, ("a", "b")[: len(shape)])
    weight = jax.device_put(np.ones((4, 37), np.float32), NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        _, state = _prepared({"w": weight})
        halved = fq.map_moments(lambda x: x * np.float32(0.5), state)
        arrays = jtu.tree_leaves((_changed({"w": weight}), halved.moments))
    assert {jax.typeof(x).sharding.spec for x in arrays if x.ndim == 2} == {spec}


def test_nan_is_the_largest():
    """On CPUs, XLA leaves it out of the maximum of an array."""
    x = jnp.ones((1024, 1024)).at[5, 7].set(jnp.nan)
    assert x.nbytes > eager._MOST_BYTES_BOTH_WAYS and jnp.isnan(eager.largest(x))
    small = x[:8, :9]
    assert jnp.isnan(eager.largest(small)) and eager.largest(small[:5]) == 1


def test_results_are_no_parts_of_longer_arrays():
    """They would keep these."""
    assert eager.shortened(eager.lengthened(np.ones(10)), 10).base is None


def test_arrays_of_numpy():
    model = {"a": np.linspace(-3, 3, 4 * 37, dtype=np.float32).reshape(4, 37)}
    expected = _changed(jtu.tree_map(jnp.asarray, model))
    assert tree_identical(_changed(model), expected)


def test_within_programs():
    model = {"a": jnp.linspace(-3, 3, 4 * 37).reshape(4, 37)}
    assert tree_identical(jax.jit(_changed)(model), _changed(model))


_MOMENT_SHAPES = [
    (4, 37),
    (3, 5, 64),
    (70, 3, 3),
    (7,),
    (),
    (64, 2, 96),
    (0, 3),
    (2, 0, 64),
]


def _moments(optim, shapes):
    """Moments that were stored, read, and stored again."""
    rng = np.random.default_rng(3)
    model = {
        str(i): array_of(rng.normal(size=shape), jnp.bfloat16)
        for i, shape in enumerate(shapes)
    }
    state = optim.init(model)
    others = optax.adamw(1e-3)
    drawn = jtu.tree_map(
        lambda x: array_of(rng.normal(size=x.shape) ** 2, x.dtype),
        others.init(fq.cast(model, jnp.float32)),
    )
    drawn = optax.tree.set(drawn, count=jnp.int32(3))
    state = from_optax(drawn, state)
    halved = fq.map_moments(lambda x: x * np.float32(0.5), state)
    return state, halved, to_optax(halved, drawn)


@pytest.mark.product
@pytest.mark.parametrize(
    "storage",
    [
        fq.Storage(),
        fq.Storage(moments="learned"),
        fq.Storage(moments="flashoptim"),
        fq.Storage(moments="linear"),
        fq.Storage(group_size=128),
    ],
    ids=str,
)
def test_moments(storage, monkeypatch):
    optim = fq.adamw(1e-3, storage=storage)
    found = _moments(optim, _MOMENT_SHAPES)
    monkeypatch.setattr("flashquinox._common.eager._MOST_BYTES_BOTH_WAYS", 0)
    assert tree_identical(found, _moments(optim, _MOMENT_SHAPES))


def test_moments_share_programs():
    shapes = lambda n: [(n, 40), (n, 64), (4 * n,), (16, 3, n)]
    _moments(_optim, shapes(41))
    COMPILED.clear()
    jax.block_until_ready(jtu.tree_leaves(_moments(_optim, shapes(43))))
    ours = [x for x in COMPILED if "code" in x or "root" in x]
    assert COMPILED and not ours
