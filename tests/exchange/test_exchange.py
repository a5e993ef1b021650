"""Models and states from elsewhere, and for it."""

import functools as ft
import os
import sys

import equinox as eqx
import hypothesis as hp
import hypothesis.strategies as st
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import ml_dtypes
import numpy as np
import optax
import pytest
import safetensors.numpy
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import flashquinox as fq
from flashquinox import exchange
from flashquinox.checkpoint import Checkpoints

from ..helpers import (
    assert_code_of,
    assert_raises,
    bits_of,
    float64,
    slow,
    tree_identical,
)


def _mlp(dtype=jnp.float32, seed=0):
    mlp = eqx.nn.MLP(8, 4, 64, 1, key=jax.random.key(seed))
    return fq.cast(mlp, dtype)


def _random(like, seed=0, scale=1.0):
    """Numbers in float32, in place of a model's."""
    rng = np.random.default_rng(seed)
    one = lambda x: jnp.asarray(scale * rng.standard_normal(x.shape), jnp.float32)
    return jtu.tree_map(lambda x: one(x) if eqx.is_inexact_array(x) else x, like)


def _arrays(tree):
    return eqx.filter(tree, eqx.is_array)


# One program in place of one for each of their operations.
_from_optax = eqx.filter_jit(exchange.from_optax)
_decode_of = eqx.filter_jit(lambda stored, base: stored.decode(base=base))


def _decode(stored):
    # Inside `jit`, a moment alone does not know what it is relative to.
    return _decode_of(stored, getattr(stored, "base", None))


#
# Master weights
#


@pytest.mark.product
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("bits", [24, 32])
@hp.settings(max_examples=15)
@hp.given(st.lists(st.integers(0, 2**32 - 1), min_size=32, max_size=32))
def test_every_number_becomes_weight_and_correction(dtype, bits, patterns):
    master = lax.bitcast_convert_type(jnp.asarray(patterns, jnp.uint32), jnp.float32)
    model = {"w": jnp.zeros(32, dtype)}
    state = fq.sgd(1e-3, storage=fq.Storage(master_weight_bits=bits)).init(model)
    new, new_state = fq.from_master_weights({"w": master}, model, state)
    split = fq.ECCWeight.encode(master, dtype, bits)
    assert tree_identical(new["w"], split.weight)
    assert tree_identical(new_state.corrections["w"], split.correction)
    found = fq.master_weights(new, new_state)["w"]
    assert tree_identical(found, split.decode())
    if dtype == jnp.bfloat16 and bits == 32:
        finite = np.isfinite(np.asarray(master))
        assert np.array_equal(bits_of(found)[finite], bits_of(master)[finite])


@pytest.mark.parametrize("jit", [False, True])
def test_a_model_from_master_weights(jit):
    """Whose leaves are of every kind."""
    other = {"steps": jnp.arange(3), "f": jax.nn.relu, "none": None}
    model = {"mlp": fq.cast(_mlp(), jnp.bfloat16, keep="layers.1"), **other}
    optim = fq.adamw(1e-2, storage=fq.Storage(master_weight_bits=32))
    state = optim.init(model)
    float32_model = _random(fq.master_weights(model, state), 2) | {"steps": None}
    call = fq.from_master_weights
    new, new_state = (eqx.filter_jit(call) if jit else call)(
        float32_model, model, state
    )
    found = fq.master_weights(new, new_state)["mlp"]
    assert tree_identical(_arrays(found), _arrays(float32_model["mlp"]))
    assert jtu.tree_structure(new) == jtu.tree_structure(model)
    for x, y in zip(jtu.tree_leaves(new), jtu.tree_leaves(model), strict=True):
        assert getattr(x, "dtype", None) == getattr(y, "dtype", None)
    assert new["f"] is jax.nn.relu and tree_identical(new["steps"], model["steps"])
    assert tree_identical(new_state.moments, state.moments)
    assert tree_identical(new_state.count, state.count)


@pytest.mark.parametrize("wrapped", [False, True])
def test_models_with_and_without_wraps(wrapped):
    """A float32 model has none, where a cast one has them; or the other way round."""
    mlp = _mlp()
    with_wraps = fq.cast(mlp, jnp.bfloat16, keep="layers.1")
    without = fq.cast(mlp, jnp.bfloat16, keep="layers.1", wrap=False)
    assert isinstance(with_wraps.layers[1], fq.Float32Layer)
    model = with_wraps if wrapped else without
    optim = fq.adamw(1e-2, storage=fq.Storage(moments="float32", master_weight_bits=32))
    state = optim.init(model)
    given = _random(mlp if wrapped else with_wraps, 2)
    leaves = jtu.tree_leaves(_arrays(given))
    new, new_state = fq.from_master_weights(given, model, state)
    assert jtu.tree_structure((new, new_state)) == jtu.tree_structure((model, state))
    found = fq.master_weights(new, new_state)
    assert tree_identical(jtu.tree_leaves(_arrays(found)), leaves)
    # Frozen, in place of the layer or of its wrap.
    partial = eqx.tree_at(lambda m: m.layers[1], given, None)
    same, _ = fq.from_master_weights(partial, model, state)
    assert tree_identical(_arrays(same.layers[1]), _arrays(model.layers[1]))
    # Moments.
    theirs = optax.adamw(1e-2)
    _, optax_state = _run(theirs, _arrays(given))
    filled = exchange.from_optax(optax_state, state)
    assert jtu.tree_structure(filled) == jtu.tree_structure(state)
    for name, moment in filled.moments.items():
        expected = optax.tree.get(optax_state, name)
        assert tree_identical(jtu.tree_leaves(moment), jtu.tree_leaves(expected))
    back = exchange.to_optax(filled, theirs.init(_arrays(given)))
    assert tree_identical(back, optax_state)


def test_layers_of_batch_statistics_from_master_weights():
    norm, _ = eqx.nn.make_with_state(eqx.nn.BatchNorm)(64, "batch", mode="batch")
    float32_model = {"norm": _random(norm, 1), "linear": _mlp().layers[0]}
    model = fq.cast(float32_model, jnp.bfloat16)
    optim = fq.adamw(1e-2, storage=fq.Storage(master_weight_bits=32))
    new, state = fq.from_master_weights(float32_model, model, optim.init(model))
    found = fq.cast(fq.master_weights(new, state), jnp.float32)
    assert tree_identical(_arrays(found), _arrays(float32_model))


def test_none_leaves_weights_as_they_are():
    model, optim = _mlp(jnp.bfloat16), fq.adamw(1e-2)
    state = optim.init(model)
    model, state = fq.from_master_weights(_random(_mlp()), model, state)
    unchanged = fq.from_master_weights(None, model, state)
    assert tree_identical(unchanged, (model, state))
    where = lambda m: m.layers[0]
    given = eqx.tree_at(where, _random(_mlp(), 3), None)
    new, new_state = fq.from_master_weights(given, model, state)
    assert tree_identical(where(new), where(model))
    assert tree_identical(where(new_state.corrections), where(state.corrections))
    assert not tree_identical(new.layers[1].weight, model.layers[1].weight)
    # What `master_weights` gave is a fixed point.
    again = fq.from_master_weights(fq.master_weights(model, state), model, state)
    assert tree_identical(again, (model, state))


def test_numpy_and_plain_rounding():
    model = {"w": jnp.zeros(3, jnp.bfloat16), "v": np.zeros(2, np.float32)}
    state = fq.sgd(1e-2, storage=fq.Storage(master_weight_bits=None)).init(model)
    given = {"w": np.float32([1, 1 / 3, -2]), "v": jnp.float32([0.1, 3])}
    new, _ = fq.from_master_weights(given, model, state)
    assert isinstance(new["v"], np.ndarray)
    assert tree_identical(new["w"], given["w"].astype(jnp.bfloat16))
    assert tree_identical(new["v"], np.asarray(given["v"]))


_types = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])


def _mesh(kind):
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))


_SHAPES = {"a": (128, 64), "b": (64,), "c": (8, 5)}
# The parts of `a` are none of the flattened leaf.
_SPECS = {"a": P(None, "x"), "b": P(("y", "x")), "c": P()}
_DIVIDED = {"a": P("x", "y"), "b": P("y"), "c": P("x")}


def _tree(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.standard_normal(shape), jnp.float32).astype(dtype)
        for name, shape in _SHAPES.items()
    }


def _put(tree, mesh, specs):
    return {
        name: jax.device_put(x, NamedSharding(mesh, specs[name]))
        for name, x in tree.items()
    }


def _assert_like(found, like):
    """Each array on the devices of the other one, and divided as it is."""
    pairs = zip(jtu.tree_leaves(found), jtu.tree_leaves(like), strict=True)
    for x, y in pairs:
        assert x.dtype == y.dtype and x.shape == y.shape
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
        assert jax.typeof(x) == jax.typeof(y)
        assert x.committed == y.committed


def _assert_same_values(found, expected):
    pairs = zip(jtu.tree_leaves(found), jtu.tree_leaves(expected), strict=True)
    for x, y in pairs:
        assert tree_identical(np.asarray(x), np.asarray(y))


@pytest.mark.product
@_types
def test_master_weights_on_many_devices(kind):
    mesh, optim = _mesh(kind), fq.sgd(1e-2, storage=fq.Storage(master_weight_bits=32))
    model = _put(_tree(0, jnp.bfloat16), mesh, _SPECS)
    state = optim.init(model)
    masters = _tree(1)
    elsewhere = _put(masters, mesh, _DIVIDED)
    expected = fq.from_master_weights(
        masters, _tree(0, jnp.bfloat16), optim.init(_tree(0, jnp.bfloat16))
    )
    for given in (masters, elsewhere, jtu.tree_map(np.asarray, masters)):
        found = fq.from_master_weights(given, model, state)
        _assert_like(found, (model, state))
        _assert_same_values(found, expected)
    new, new_state = found
    back = fq.master_weights(new, new_state)
    _assert_same_values(back, masters)
    for name, x in back.items():
        assert x.sharding.is_equivalent_to(model[name].sharding, x.ndim)
    # In a program.
    new, new_state = jax.jit(fq.from_master_weights)(elsewhere, model, state)
    _assert_same_values((new, new_state), expected)
    if kind == AxisType.Explicit:
        _assert_like((new, new_state), (model, state))
    # And back to one device.
    single = _tree(2, jnp.bfloat16)
    found = fq.from_master_weights(elsewhere, single, optim.init(single))
    _assert_like(found, (single, optim.init(single)))
    _assert_same_values(found, expected)


#
# Files
#


def test_names_in_files(tmp_path):
    """Are those that `cast(keep=...)` takes."""
    path, model = tmp_path / "model.safetensors", _mlp(jnp.bfloat16)
    exchange.save_safetensors(path, model)
    arrays = safetensors.numpy.load_file(path)
    assert sorted(arrays) == [
        f"layers.{i}.{name}" for i in (0, 1) for name in ("bias", "weight")
    ]
    for name, x in arrays.items():
        kept = fq.cast(model, jnp.bfloat16, keep=name, wrap=False)
        (wide,) = (x for x in jtu.tree_leaves(_arrays(kept)) if x.dtype == jnp.float32)
        assert np.array_equal(wide, x.astype(np.float32))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_models_in_files(dtype, tmp_path):
    path, model = tmp_path / "model.safetensors", _mlp(dtype)
    exchange.save_safetensors(str(path), model)
    read = exchange.load_safetensors(str(path), _mlp(dtype, seed=1))
    assert tree_identical(_arrays(read), _arrays(model))
    assert not any(x.committed for x in jtu.tree_leaves(_arrays(read)))
    # To shapes, for which no memory is needed; and to NumPy.
    shapes = eqx.filter_eval_shape(_mlp, dtype)
    read = exchange.load_safetensors(path, shapes)
    assert tree_identical(_arrays(read), _arrays(model))
    as_numpy = jtu.tree_map(np.asarray, _arrays(model))
    read = exchange.load_safetensors(path, as_numpy)
    assert tree_identical(read, as_numpy)
    assert all(isinstance(x, np.ndarray) for x in jtu.tree_leaves(read))


def test_master_weights_in_files(tmp_path):
    path, optim = (
        tmp_path / "model.safetensors",
        fq.adamw(1e-2, storage=fq.Storage(master_weight_bits=32)),
    )
    model = _mlp(jnp.bfloat16)
    float32_model = _random(model, 1)
    model, state = fq.from_master_weights(float32_model, model, optim.init(model))
    exchange.save_safetensors(path, model, state)
    shapes = eqx.filter_eval_shape(fq.cast, model, jnp.float32)
    read = exchange.load_safetensors(path, shapes)
    assert tree_identical(_arrays(read), _arrays(float32_model))
    assert tree_identical(
        fq.from_master_weights(read, model, optim.init(model)), (model, state)
    )
    # Or rounded once.
    exchange.save_safetensors(path, model, state, dtype=jnp.bfloat16)
    read = exchange.load_safetensors(path, model)
    assert tree_identical(
        _arrays(read),
        jtu.tree_map(lambda x: x.astype(jnp.bfloat16), _arrays(float32_model)),
    )


def test_every_kind_of_leaf_in_files(tmp_path):
    path = tmp_path / "model.safetensors"
    names = (
        "bool int8 uint8 int16 uint16 int32 uint32 float16 float32 complex64".split()
    )
    model = {name: jnp.asarray([[0, 1], [3, 2]], name) for name in names}
    model |= {
        "bfloat16": jnp.asarray([1.5, jnp.nan], jnp.bfloat16),
        "float64": np.asarray([1 / 3]),
        "int64": np.asarray(2**40),
        "columns first": np.arange(6.0).reshape(2, 3).T,
        "generic": np.float32(3),
        "scalar": jnp.asarray(2.0),
        "empty": jnp.zeros((0, 3)),
        "key": jax.random.key(0),
        "rate": 0.5,
        "f": jax.nn.relu,
    }
    exchange.save_safetensors(path, model)
    is_read = lambda name: name not in ("key", "rate", "f", "generic")
    like = {
        name: (np if isinstance(x, np.ndarray) else jnp).zeros_like(x)
        if is_read(name)
        else x
        for name, x in model.items()
    }
    read = exchange.load_safetensors(path, like)
    assert read["key"] is like["key"] and read["f"] is model["f"]
    for x in (read, model):
        del x["key"]
    assert tree_identical(read, model)
    for name, x in read.items():
        assert type(x) is type(model[name]), name


@_types
def test_files_of_many_devices(kind, tmp_path):
    path, mesh, optim = tmp_path / "model.safetensors", _mesh(kind), fq.adamw(1e-2)
    model = _put(_tree(0, jnp.bfloat16), mesh, _SPECS)
    state = optim.init(model)
    for with_state in ((), (state,)):
        exchange.save_safetensors(path, model, *with_state)
        dtype = jnp.float32 if with_state else jnp.bfloat16
        expected = fq.cast(_tree(0, jnp.bfloat16), dtype)
        like = _put(_tree(1, dtype), mesh, _DIVIDED)
        read = exchange.load_safetensors(path, like)
        _assert_like(read, like)
        _assert_same_values(read, expected)
        _assert_same_values(exchange.load_safetensors(path, expected), expected)


def test_files_are_complete_or_as_they_were(tmp_path, monkeypatch):
    path, model = tmp_path / "model.safetensors", _mlp()
    exchange.save_safetensors(path, model)
    before = path.read_bytes()

    def fail(arrays, path):
        del arrays
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(OSError, match="disk is full"):
        exchange.save_safetensors(path, _random(model))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


#
# Optax
#


_exact = fq.Storage(moments="float32", master_weight_bits=32)
# The same in both.
_OPTAX = {
    "adamw": (optax.adamw, ft.partial(fq.adamw, weight_decay=1e-4, storage=_exact)),
    "adam": (optax.adam, ft.partial(fq.adam, storage=_exact)),
    "nadam": (optax.nadam, ft.partial(fq.adam, nesterov=True, storage=_exact)),
    # With this b2, Optax's formula is that of the paper.
    "adan": (
        ft.partial(optax.adan, b2=0.5),
        ft.partial(fq.adan, b2=0.5, storage=_exact),
    ),
    "lion": (optax.lion, ft.partial(fq.lion, weight_decay=1e-3, storage=_exact)),
    "sgd": (optax.sgd, ft.partial(fq.sgd, storage=_exact)),
    "sgd with momentum": (
        ft.partial(optax.sgd, momentum=0.9),
        ft.partial(fq.sgd, momentum=0.9, storage=_exact),
    ),
}
_each = pytest.mark.parametrize("name", _OPTAX)


def _filled(state):
    """A state of Optax's AdamW with any numbers in it, of step 3."""
    mu, nu = (_random(optax.tree.get(state, "mu"), seed, 0.1) for seed in (1, 2))
    nu = jtu.tree_map(lambda x: jnp.asarray(np.square(x)), nu)
    return optax.tree.set(state, mu=mu, nu=nu, count=jnp.int32(3))


def _run(optim, params, steps=3):
    """Parameters and state of an Optax optimizer after some steps."""
    state = optim.init(params)
    for seed in range(1, 1 + steps):
        params, state = _advance(optim, params, state, seed)
    return params, state


def _advance(optim, params, state, seed):
    # Optax leans on promotion.
    with jax.numpy_dtype_promotion("standard"):
        updates, state = optim.update(_random(params, seed, 0.1), state, params)
    return optax.apply_updates(params, updates), state


def _numbers(tree):
    """Of every moment, the arrays: decoded."""
    is_moment = lambda x: isinstance(x, fq.QuantMoment)
    decode = lambda x: _decode(x) if is_moment(x) else x
    return jtu.tree_map(decode, tree, is_leaf=is_moment)


def _assert_close(found, expected):
    """To a few roundings of the arithmetic that decodes."""
    pairs = zip(jtu.tree_leaves(found), jtu.tree_leaves(expected), strict=True)
    for x, y in pairs:
        assert np.allclose(x, y, rtol=2**-19, atol=0)


@pytest.mark.product
@_each
def test_training_goes_on_from_optax_and_back(name):
    """Without compression, as if nothing had been: to the roundings of a step."""
    theirs, ours = (make(1e-2) for make in _OPTAX[name])
    params, optax_state = _run(theirs, _arrays(_mlp()))
    model = fq.cast(params, jnp.bfloat16)
    state = exchange.from_optax(optax_state, ours.init(model))
    model, state = fq.from_master_weights(params, model, state)
    for moment, stored in state.moments.items():
        assert tree_identical(stored, optax.tree.get(optax_state, moment))
    assert int(state.count) == (0 if "sgd" in name else 3)
    # There and back.
    like = theirs.init(params)
    assert tree_identical(exchange.to_optax(state, like), optax_state)
    # A step of each.
    expected, _ = _advance(theirs, params, optax_state, seed=7)
    new, new_state = ours.step(model, state, _random(params, 7, 0.1))
    found = fq.master_weights(new, new_state)
    for x, y in zip(jtu.tree_leaves(found), jtu.tree_leaves(expected), strict=True):
        assert np.max(np.abs(float64(x) - float64(y))) <= 1e-6


@pytest.mark.product
@pytest.mark.parametrize("moments", ["flashquinox", "flashoptim", "learned", "log"])
def test_moments_are_rounded_once(moments):
    theirs = optax.adamw(1e-2)
    params = {
        "matrix": jnp.ones((40, 64)),
        "ragged": jnp.ones((3, 2, 5)),
        "b": jnp.ones(7),
    }
    optax_state = _filled(theirs.init(params))
    optim = fq.adamw(1e-2, storage=fq.Storage(moments=moments, master_weight_bits=None))
    like = optim.init(params)
    if moments == "learned":
        # Not what it begins with.
        where = lambda s: [s.moments[k]["matrix"].parameter for k in ("mu", "nu")]
        like = eqx.tree_at(where, like, [jnp.float32(3.0), jnp.float32(0.25)])
    state = _from_optax(optax_state, like)
    assert int(state.count) == 3
    assert jtu.tree_structure(state) == jtu.tree_structure(like)
    for kind in ("mu", "nu"):
        for name, stored in state.moments[kind].items():
            exact = float64(optax.tree.get(optax_state, kind)[name])
            if isinstance(stored, fq.QuantMoment):
                assert_code_of(stored, exact)
                # To nearest: not more often down than up.
                large = np.abs(exact) > np.median(np.abs(exact))
                found = float64(_decode(stored))
                if stored.relative_to is not None:
                    # As it is stored: half a code is more of a smaller quotient.
                    root = np.sqrt(float64(_decode(stored.base)))
                    found, exact = found / root, exact / root
                    large = np.abs(exact) > np.median(np.abs(exact))
                bias = np.sum((np.abs(found) - np.abs(exact))[large])
                bias /= np.sum(np.abs(exact[large]))
                assert name == "ragged" or abs(bias) < 0.003
                assert tree_identical(
                    stored.parameter, like.moments[kind][name].parameter
                )
            else:
                assert name == "b" and np.array_equal(float64(stored), exact)
    # What is decoded and stored again does not move by more than that.
    back = exchange.to_optax(state, theirs.init(params))
    _assert_close(optax.tree.get(back, "mu"), _numbers(state.moments["mu"]))
    again = _from_optax(back, like)
    for name, stored in again.moments["mu"].items():
        if isinstance(stored, fq.QuantMoment):
            assert_code_of(stored, float64(optax.tree.get(back, "mu")[name]))


def _matrices(params):
    return jtu.tree_map(lambda x: x.ndim == 2, params)


_WRAPPERS = {
    "schedule": lambda make: make(optax.linear_schedule(1e-2, 0.0, 10)),
    "MultiSteps": lambda make: optax.MultiSteps(make(1e-2), 2),
    "inject": lambda make: optax.inject_hyperparams(make, hyperparam_dtype=jnp.float32)(
        learning_rate=1e-2
    ),
    "masked": lambda make: optax.masked(make(1e-2), _matrices),
    "all": lambda make: optax.MultiSteps(
        optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.inject_hyperparams(make, hyperparam_dtype=jnp.float32)(
                learning_rate=optax.linear_schedule(1e-2, 0.0, 10)
            ),
        ),
        2,
    ),
}


@pytest.mark.parametrize(
    "wrapper",
    [
        # It is a part of the last.
        slow(x) if x == "MultiSteps" else x
        for x in _WRAPPERS
    ],
)
def test_states_within_states(wrapper):
    """On both sides, and with every count of steps."""
    wrap, params = _WRAPPERS[wrapper], _arrays(_mlp())
    theirs = wrap(optax.adamw)
    ours = wrap(
        lambda learning_rate: fq.adamw(
            learning_rate,
            storage=fq.Storage(moments="float32", master_weight_bits=None),
        )
    )
    run = theirs
    if wrapper in ("MultiSteps", "all"):
        # Eagerly, the branches of each step are compiled again.
        run = optax.GradientTransformation(theirs.init, jax.jit(theirs.update))
    _, optax_state = _run(run, params, steps=4)
    state = exchange.from_optax(optax_state, ours.init(params))
    steps = 2 if wrapper in ("MultiSteps", "all") else 4
    (inner,) = (
        x
        for x in jtu.tree_leaves(
            state, is_leaf=lambda x: isinstance(x, fq.OptimizerState)
        )
        if isinstance(x, fq.OptimizerState)
    )
    assert int(inner.count) == steps
    for kind in ("mu", "nu"):
        expected = optax.tree.get(optax_state, kind)
        assert tree_identical(
            jtu.tree_leaves(inner.moments[kind]), jtu.tree_leaves(expected)
        )
    counts = lambda tree: [
        int(x)
        for key in ("count", "gradient_step")
        for path, x in optax.tree.get_all_with_path(tree, key)
        if jnp.ndim(x) == 0
    ]
    assert set(counts(state)) == {steps}
    back = exchange.to_optax(state, theirs.init(params))
    assert set(counts(back)) == {steps}
    for kind in ("mu", "nu"):
        assert tree_identical(
            optax.tree.get(back, kind), optax.tree.get(optax_state, kind)
        )
    # Programs that took the one will take the other.
    for found, like in ((back, theirs.init(params)), (state, ours.init(params))):
        assert jtu.tree_map(jax.typeof, found) == jtu.tree_map(jax.typeof, like)


def test_count_of_sgd():
    params = _arrays(_mlp())
    target = fq.sgd(
        1e-2, momentum=0.9, storage=fq.Storage(master_weight_bits=None)
    ).init(params)
    target = optax.tree.set(target, count=jnp.int32(5))
    make = ft.partial(optax.sgd, momentum=0.9)
    for theirs, count in (
        (make(1e-2), 5),
        (make(lambda count: 1e-2), 3),
        (optax.inject_hyperparams(make)(learning_rate=1e-2), 3),
    ):
        _, optax_state = _run(theirs, params)
        assert int(exchange.from_optax(optax_state, target).count) == count


@pytest.mark.product
@pytest.mark.parametrize(
    "kind, moments",
    [
        (AxisType.Auto, "flashquinox"),
        (AxisType.Explicit, "learned"),
        (AxisType.Auto, "flashoptim"),
        slow(AxisType.Explicit, "flashquinox"),
    ],
)
def test_optax_on_many_devices(kind, moments):
    mesh, theirs = _mesh(kind), optax.adamw(1e-2)
    on_one = _filled(theirs.init(_tree(0)))
    optim = fq.adamw(1e-2, storage=fq.Storage(moments=moments))
    with pytest.warns(UserWarning) if moments == "flashoptim" else _nothing():
        like = optim.init(_put(_tree(0, jnp.bfloat16), mesh, _SPECS))
    expected = _from_optax(on_one, optim.init(_tree(0, jnp.bfloat16)))
    params = _put(_tree(0), mesh, _DIVIDED)
    optax_like = theirs.init(params)
    optax_state = jtu.tree_map(
        lambda x, y: jax.device_put(x, y.sharding), on_one, optax_like
    )
    for given, context in ((on_one, _nothing()), (optax_state, jax.set_mesh(mesh))):
        with context:
            found = exchange.from_optax(given, like)
        _assert_like(found, like)
        for name in ("mu", "nu"):
            # On several devices, groups may lie along other axes.
            same = [
                (x, y)
                for x, y in zip(
                    found.moments[name].values(),
                    expected.moments[name].values(),
                    strict=True,
                )
                if getattr(x, "axes", 0) == getattr(y, "axes", 0)
            ]
            assert len(same) >= 2
            _assert_same_values(*zip(*same, strict=True))
    back = exchange.to_optax(found, optax_like)
    _assert_like(back, optax_like)
    for name, x in optax.tree.get(back, "nu").items():
        stored = jax.device_get(found.moments["nu"][name])
        if isinstance(stored, fq.QuantMoment):
            stored = _decode(jtu.tree_map(jnp.asarray, stored))
        _assert_close(x, stored)


class _nothing:
    def __enter__(self):
        pass

    def __exit__(self, *exception):
        pass


def test_ensembles_are_exchanged_under_vmap():
    theirs, ours = (
        optax.adamw(1e-2),
        fq.adamw(1e-2, storage=fq.Storage(moments="flashoptim")),
    )
    rng = np.random.default_rng(0)
    params = jnp.asarray(rng.standard_normal((3, 10, 64)), jnp.float32)
    optax_state = _filled(jax.jit(jax.vmap(theirs.init))(params))
    optax_state = optax.tree.set(optax_state, count=jnp.asarray([3, 3, 3], jnp.int32))
    model = params.astype(jnp.bfloat16)
    like = jax.jit(jax.vmap(ours.init))(model)
    found = jax.jit(jax.vmap(exchange.from_optax))(optax_state, like)
    model, found = jax.jit(jax.vmap(fq.from_master_weights))(params, model, found)
    for i in range(3):
        member = lambda tree, i=i: jtu.tree_map(
            lambda x: jnp.asarray(np.asarray(x)[i]), tree
        )
        expected = _from_optax(member(optax_state), member(like))
        assert tree_identical(
            jax.device_get(member(found).moments), jax.device_get(expected.moments)
        )
    with pytest.raises(ValueError, match=r"under `jax\.vmap`"):
        exchange.from_optax(optax_state, like)


#
# FlashOptim
#

# What its library computes, in NumPy, from its formulas.


def _torch_groups(x):
    flat = x.astype(np.float32).ravel()
    padded = np.zeros(-(-flat.size // 32) * 32, np.float32)
    padded[: flat.size] = flat
    return padded.reshape(-1, 32)


def _torch_quantize(x, signed):
    """Codes and scales of a moment; and what they stand for."""
    groups = _torch_groups(x if signed else np.sqrt(x.astype(np.float32)))
    largest = np.maximum(np.abs(groups).max(axis=1, keepdims=True), np.float32(1e-12))
    n = groups / largest
    codes = np.floor(127 * (2 * n / (1 + np.abs(n))) + 0.5 if signed else 255 * n + 0.5)
    scales = largest.astype(np.float16)
    wide = codes / (127 if signed else 255)
    wide = (wide / (2 - np.abs(wide)) if signed else wide) * scales.astype(np.float64)
    decoded = (wide if signed else wide**2).ravel()[: x.size].reshape(x.shape)
    codes = codes.ravel()[: x.size].reshape(x.shape)
    return codes.astype(np.int8 if signed else np.uint8), scales.ravel(), decoded


def _torch_split(master, dtype, error_dtype):
    """Weight and error bits."""
    weight = master.astype(dtype)
    info = ml_dtypes.finfo(dtype)
    size = np.maximum(np.abs(weight.astype(np.float64)), float(info.smallest_normal))
    half = 2.0 ** (np.floor(np.log2(size)) - info.nmant - 1)
    error = (master.astype(np.float64) - weight.astype(np.float64)) / half
    scaled = np.clip(error, -1, 1) * np.iinfo(error_dtype).max
    rounded = np.copysign(np.floor(np.abs(scaled) + 0.5), scaled)
    decoded = weight.astype(np.float64) + rounded / np.iinfo(error_dtype).max * half
    return weight, rounded.astype(error_dtype), decoded


_TORCH_SHAPES = {"fc.weight": (12, 20), "fc.bias": (12,), "out.weight": (40, 7)}
_PATHS = {"fc.weight": "fc.weight", "fc.bias": "fc.bias", "out.weight": "out"}
_TORCH_MOMENTS = {
    "adamw": {"exp_avg": "mu", "exp_avg_sq": "nu"},
    "lion": {"exp_avg": "mu"},
    "sgd": {"momentum_buffer": "trace"},
}


class _Torch:
    """A checkpoint, and what is in it, exactly."""

    def __init__(
        self, optimizer="adamw", dtype=ml_dtypes.bfloat16, bits=24, compressed=True
    ):
        rng = np.random.default_rng(0)
        self.parameters, entries = {}, {}
        self.masters, self.moments, self.bits = {}, {}, {}
        error_dtype = {24: np.int8, 32: np.int16, None: None}[bits]
        for number, (name, shape) in enumerate(_TORCH_SHAPES.items()):
            master = rng.standard_normal(shape).astype(np.float32)
            master.flat[:3] = 0, 1e-40, -2
            entry = {}
            if error_dtype is None:
                weight = master.astype(dtype)
                self.masters[name] = weight.astype(np.float64)
            else:
                weight, errors, self.masters[name] = _torch_split(
                    master, dtype, error_dtype
                )
                # As PyTorch keeps them: in the dtype of the weight.
                entry["error_bits"] = (
                    errors.astype(dtype) if bits == 24 else errors.view(dtype)
                )
            self.parameters[name] = weight
            for key, ours in _TORCH_MOMENTS[optimizer].items():
                moment = rng.standard_normal(shape) * 1e-2
                moment = moment**2 if key == "exp_avg_sq" else moment
                codes, scales, decoded = _torch_quantize(moment, key != "exp_avg_sq")
                self.bits[name, ours] = codes, scales
                if compressed:
                    entry |= {f"{key}::quantized": codes, f"{key}::scales": scales}
                else:
                    entry[key] = decoded.astype(dtype)
                    decoded = entry[key].astype(np.float64)
                self.moments[name, ours] = decoded
            if optimizer == "adamw":
                entry["step"] = np.asarray(17, np.float32)
            entries[number] = entry
        group = {
            "lr": 1e-3,
            "params": list(entries),
            "master_bytewidth": {24: 3, 32: 4, None: 0}[bits],
            "quantize": True,
        }
        self.state_dict = {"state": entries, "param_groups": [group]}

    def through_a_file(self, path):
        """Written and read, in an `.npz`, which has no bfloat16."""

        def plain(x):
            return x.view(np.uint16) if x.dtype == ml_dtypes.bfloat16 else x

        flat = {f"parameters/{k}": plain(x) for k, x in self.parameters.items()}
        for number, entry in self.state_dict["state"].items():
            flat |= {f"state/{number}/{k}": plain(x) for k, x in entry.items()}
        np.savez(path, **flat)
        entries, parameters = {}, {}
        with np.load(path) as file:
            for key in file.files:
                kind, _, rest = key.partition("/")
                if kind == "parameters":
                    parameters[rest] = file[key]
                else:
                    number, _, name = rest.partition("/")
                    entries.setdefault(number, {})[name] = file[key]
        return self.state_dict | {"state": entries}, parameters


def _target(optimizer="adamw", dtype=jnp.bfloat16, **kwargs):
    shape = lambda name: jnp.zeros(_TORCH_SHAPES[name], dtype)
    model = {
        "fc": eqx.tree_at(
            lambda x: (x.weight, x.bias),
            eqx.nn.Linear(20, 12, key=jax.random.key(0)),
            (shape("fc.weight"), shape("fc.bias")),
        ),
        "out": shape("out.weight"),
    }
    make = {"adamw": fq.adamw, "lion": fq.lion, "sgd": ft.partial(fq.sgd, momentum=0.9)}
    optim = make[optimizer](1e-3, **kwargs)
    return model, optim.init(model)


def _at(tree, name):
    return tree["out"] if name == "out.weight" else getattr(tree["fc"], name[3:])


@pytest.mark.product
@pytest.mark.parametrize("optimizer", _TORCH_MOMENTS)
@pytest.mark.parametrize("by_name", [False, True])
def test_flashoptim_bit_by_bit(optimizer, by_name, tmp_path):
    torch = _Torch(optimizer)
    for key in _TORCH_MOMENTS[optimizer].values():
        # As no codec would write them: without the largest.
        codes, _ = torch.bits["out.weight", key]
        codes[...] = codes // 2
    model, like = _target(
        optimizer, storage=fq.Storage(moments="flashoptim", master_weight_bits=32)
    )
    state_dict, parameters = torch.through_a_file(tmp_path / "checkpoint.npz")
    paths = _PATHS if by_name else None
    model, state = exchange.from_flashoptim(
        state_dict, parameters, model, like, paths=paths
    )
    assert int(state.count) == (17 if optimizer == "adamw" else 0)
    assert jtu.tree_structure(state) == jtu.tree_structure(like)
    found = fq.master_weights(model, state)
    for name, master in torch.masters.items():
        assert tree_identical(_at(found, name), jnp.asarray(master.astype(np.float32)))
    for (name, key), (codes, scales) in torch.bits.items():
        stored = _at(state.moments[key], name)
        assert np.array_equal(stored.codes, codes) and stored.codes.dtype == codes.dtype
        assert tree_identical(np.asarray(stored.scales), scales)
        if name != "out.weight":
            decoded, exact = float64(_decode(stored)), torch.moments[name, key]
            assert np.allclose(decoded, exact, rtol=1e-6, atol=1e-30)


@pytest.mark.product
@pytest.mark.parametrize(
    "moments, compressed",
    [(name, True) for name in ("flashquinox", "learned", "float32")]
    + [("flashquinox", False)],
)
def test_flashoptim_to_other_codecs(moments, compressed):
    torch = _Torch(compressed=compressed)
    model, like = _target(storage=fq.Storage(moments=moments))
    model, state = exchange.from_flashoptim(
        torch.state_dict, torch.parameters, model, like
    )
    assert jtu.tree_structure(state) == jtu.tree_structure(like)
    for (name, key), exact in torch.moments.items():
        stored = _at(state.moments[key], name)
        if isinstance(stored, fq.QuantMoment):
            assert_code_of(stored, exact, atol=1e-6 * np.abs(exact))
        else:
            assert np.allclose(float64(stored), exact, rtol=1e-6, atol=1e-30)
    # To the nearest of 24 bits: half a unit of the last, and theirs is rounded once.
    found = fq.master_weights(model, state)
    for name, master in torch.masters.items():
        error = np.abs(float64(_at(found, name)) - master)
        assert np.all(error <= 2.0**-16 * np.abs(master) + 2.0**-140)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("bits", [24, 32, None])
@pytest.mark.parametrize("plain", [False, True])
def test_error_bits(dtype, bits, plain):
    """As PyTorch keeps them, or as the integers that they are."""
    if dtype == np.float32 and bits is not None:
        pytest.skip("no error bits")
    torch = _Torch("lion", dtype=dtype, bits=bits)
    if plain and bits is not None:
        for entry in torch.state_dict["state"].values():
            errors = entry["error_bits"]
            entry["error_bits"] = (
                errors.astype(np.int8) if bits == 24 else errors.view(np.int16)
            )
        del torch.state_dict["param_groups"][0]["master_bytewidth"]
    model, like = _target(
        "lion", dtype=jnp.float32, storage=fq.Storage(master_weight_bits=None)
    )
    model, _ = exchange.from_flashoptim(torch.state_dict, torch.parameters, model, like)
    for name, master in torch.masters.items():
        assert tree_identical(_at(model, name), jnp.asarray(master.astype(np.float32)))


def test_flashoptim_converted():
    """Matrices the other way round: numbers go along with their weights."""
    torch = _Torch()
    model, _ = _target()
    model = {"fc": model["fc"], "out": model["out"].T}
    optim = fq.adamw(
        1e-3, storage=fq.Storage(moments="flashoptim", master_weight_bits=32)
    )
    new, state = exchange.from_flashoptim(
        torch.state_dict,
        torch.parameters,
        model,
        optim.init(model),
        convert=lambda name, x: x.T if name == "out.weight" else x,
    )
    assert np.array_equal(
        float64(fq.master_weights(new, state)["out"]),
        torch.masters["out.weight"].T.astype(np.float32),
    )
    for key in ("mu", "nu"):
        assert_code_of(state.moments[key]["out"], torch.moments["out.weight", key].T)
        codes, _ = torch.bits["fc.weight", key]
        assert np.array_equal(state.moments[key]["fc"].weight.codes, codes)


def test_flashoptim_with_names_of_parameters():
    """Then buffers, and any order."""
    torch = _Torch()
    torch.state_dict["param_groups"][0]["param_names"] = list(_TORCH_SHAPES)
    parameters = {"buffer": np.zeros(3, np.float32), **torch.parameters}
    shuffled = dict(sorted(parameters.items(), reverse=True))
    expected = exchange.from_flashoptim(
        torch.state_dict,
        torch.parameters,
        *_target(storage=fq.Storage(moments="flashoptim")),
    )
    found = exchange.from_flashoptim(
        torch.state_dict, shuffled, *_target(storage=fq.Storage(moments="flashoptim"))
    )
    assert tree_identical(found, expected)


@_types
def test_flashoptim_on_many_devices(kind):
    mesh, torch = _mesh(kind), _Torch()
    optim = fq.adamw(1e-3)
    model, _ = _target()
    specs = {"fc": P(None, "y"), "out": P("x")}
    place = lambda path, x: jax.device_put(
        x, NamedSharding(mesh, specs[path[0].key] if x.ndim == 2 else P())
    )
    arrays, rest = eqx.partition(model, eqx.is_array)
    divided = eqx.combine(jtu.tree_map_with_path(place, arrays), rest)
    like = divided, optim.init(divided)
    found = exchange.from_flashoptim(torch.state_dict, torch.parameters, *like)
    _assert_like(_arrays(found), _arrays(like))
    expected = exchange.from_flashoptim(
        torch.state_dict, torch.parameters, model, optim.init(model)
    )
    _assert_same_values(_arrays(found[0]), _arrays(expected[0]))
    _assert_same_values(found[1].corrections, expected[1].corrections)


#
# Sizes
#


def _size(path):
    if path.is_file():
        return path.stat().st_size
    return sum(x.stat().st_size for x in path.rglob("*") if x.is_file())


@pytest.fixture(scope="module")
def plain_and_compressed():
    """Weights and a state of float32 AdamW, and what we keep in their place."""
    params = _random(
        {"a": np.zeros((512, 256)), "b": np.zeros((512, 512)), "c": np.zeros(512)}
    )
    theirs, ours = optax.adamw(1e-2), fq.adamw(1e-2)
    plain = params, _filled(theirs.init(params))
    model = fq.cast(params, jnp.bfloat16)
    state = _from_optax(plain[1], ours.init(model))
    return plain, eqx.filter_jit(fq.from_master_weights)(params, model, state)


@pytest.mark.product
@pytest.mark.parametrize("format", ["equinox", "orbax"])
def test_checkpoints_are_less_than_half(format, plain_and_compressed, tmp_path):
    """Of those of float32 AdamW, as files."""
    plain, compressed = plain_and_compressed
    sizes = []
    for name, tree in (("plain", plain), ("compressed", compressed)):
        path = tmp_path / name
        if format == "equinox":
            eqx.tree_serialise_leaves(str(path), tree)
            path = path.with_suffix(".eqx")
        else:
            with Checkpoints(path) as checkpoints:
                checkpoints.save(0, *tree)
        sizes.append(_size(path))
    assert 2 * sizes[1] < sizes[0]


#
# Errors
#


@pytest.mark.usefixtures("without_typechecker")
def test_errors_of_master_weights():
    model, optim = _mlp(jnp.bfloat16), fq.adamw(1e-3)
    state, masters = optim.init(model), _mlp()
    call = fq.from_master_weights
    bias = lambda m: m.layers[0].bias
    of_bias = lambda x: (eqx.tree_at(bias, masters, x), model, state)
    for error, arguments, *parts in (
        (TypeError, (model, model, state), "bfloat16", "an array of float32", "weight"),
        (TypeError, (masters, model, model), "OptimizerState"),
        (ValueError, ({"a": jnp.ones(3)}, model, state), "float32_model", "nothing"),
        (ValueError, of_bias(jnp.ones(3)), "`.layers[0].bias`", "(3,)"),
        (TypeError, of_bias(1.0), "`.layers[0].bias`", "is 1.0"),
    ):
        raising = ft.partial(call, *arguments)
        assert_raises(error, raising, "`from_master_weights`", *parts)


@pytest.mark.usefixtures("without_typechecker")
def test_errors_of_files(tmp_path, monkeypatch):
    path, model = tmp_path / "model.safetensors", _mlp(jnp.bfloat16)
    save, load = exchange.save_safetensors, exchange.load_safetensors
    save(path, model)
    before = jax.device_get(_arrays(model))
    where = lambda m: (m.layers[0].weight, m.layers[1].bias)
    like = eqx.tree_at(where, model, (jnp.zeros((4, 4), jnp.bfloat16), jnp.zeros(4)))
    like = {"layers": list(like.layers), "more": jnp.zeros(2)}
    del like["layers"][1:]
    assert_raises(
        ValueError,
        lambda: load(path, like),
        "`load_safetensors`",
        str(path),
        "layers.0.weight: bfloat16 of shape (64, 8) in the file, ",
        "bfloat16 of shape (4, 4) in the model",
        "layers.1.bias: bfloat16 of shape (4,) in the file, nothing in the model",
        "more: nothing in the file, float32 of shape (2,) in the model",
    )
    assert_raises(
        ValueError,
        lambda: load(path, fq.cast(model, jnp.float32)),
        "`flashquinox.cast`",
        "layers.1.bias: bfloat16",
    )
    many = {str(i): jnp.zeros(1) for i in range(50)}
    assert_raises(ValueError, lambda: load(path, many), "and 34 more")
    assert tree_identical(jax.device_get(_arrays(model)), before)

    (tmp_path / "damaged").write_bytes(path.read_bytes()[:-1])
    assert_raises(ValueError, lambda: load(tmp_path / "damaged", model), "damaged")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nothing", model)

    assert_raises(
        TypeError, lambda: save(path, model, dtype=jnp.int8), "dtype=...", "int8"
    )
    assert_raises(
        TypeError,
        lambda: save(path, {"x": np.ones(2, np.complex128)}),
        "['x']",
        "complex128",
    )
    for value in (jax.ShapeDtypeStruct((2,), jnp.float32), None):
        call = lambda x=value: save(path, {"x": x})
        if value is None:
            call = lambda: jax.jit(lambda x: save(path, {"x": x}))(jnp.ones(2))
        assert_raises(TypeError, call, "['x']", "outside of `jit`")
    for call, error in (
        (lambda: save(tmp_path / "new" / "model", model), FileNotFoundError),
        (lambda: save(tmp_path, model), IsADirectoryError),
    ):
        with pytest.raises(error, match=r"`save_safetensors`: .* folder") as info:
            call()
        assert str(tmp_path) in str(info.value) and ".tmp" not in str(info.value)
    twice = {"a": {"b": jnp.ones(2)}, "a.b": jnp.ones(3)}
    assert_raises(ValueError, lambda: save(path, twice), "['a']['b']", "['a.b']")
    assert_raises(TypeError, lambda: save(path, model, model), "OptimizerState")
    assert set(os.listdir(tmp_path)) == {path.name, "damaged"}

    for module in ("safetensors", "safetensors.numpy"):
        monkeypatch.setitem(sys.modules, module, None)
    for call in (lambda: save(path, model), lambda: load(path, model)):
        with pytest.raises(ImportError, match=r"flashquinox\[exchange\]"):
            call()


@pytest.mark.once
@pytest.mark.usefixtures("without_typechecker")
def test_errors_of_optax():
    params = _arrays(_mlp())
    model = fq.cast(params, jnp.bfloat16)
    adam, lion, sgd = (
        make(1e-2).init(params) for make in (optax.adam, optax.lion, optax.sgd)
    )
    state = fq.adam(1e-2).init(model)
    into, out_of = exchange.from_optax, exchange.to_optax
    schedule = optax.chain(optax.adam(1e-2), optax.scale_by_schedule(lambda count: 1.0))
    bare = fq.sgd(1e-2).init(model)
    momentum = optax.sgd(1e-2, momentum=0.9).init(params)
    late = optax.tree.set(
        schedule.init(params),
        lambda path, x: "ScheduleState" in str(path),
        count=jnp.int32(3),
    )
    accumulating = optax.MultiSteps(optax.adam(1e-2), 2)
    _, middle = _run(accumulating, params, steps=1)
    ours = fq.accumulate(fq.adam(1e-2), 2)
    _, ours_in_middle = eqx.filter_jit(ours.step)(model, ours.init(model), params)

    class Third(fq.AbstractRule):
        @property
        def moments(self):
            return {"mu": fq.Moment("signed"), "third": fq.Moment("signed")}

        def scalars(self, count, learning_rate):
            return {}

        def update(self, grad, weight, moments, scalars):
            return grad, moments

    where = lambda s: s[0].mu.layers[0].weight
    is_none = lambda x: x is None
    third = fq.optimizer(Third(), 1e-2).init(model)
    for call, error, parts in (
        (
            lambda: into(sgd, state),
            ValueError,
            ("no `ScaleByAdamState`", "optax_state"),
        ),
        (lambda: into(lion, state), ValueError, ("no `ScaleByAdamState`",)),
        (lambda: into(adam, bare), ValueError, ("`ScaleByAdamState`", "`state` has")),
        (lambda: into(momentum, bare), ValueError, ("`TraceState`", "has moments")),
        (lambda: into(None, bare), ValueError, ("is a NoneType", "`optax.sgd`")),
        (lambda: into(params, bare), ValueError, ("is a MLP", "`optax.sgd`")),
        (lambda: into(adam, adam), ValueError, ("no `OptimizerState`", "`state`")),
        (lambda: into((adam, adam), state), ValueError, ("2 `ScaleByAdamState`s",)),
        (lambda: into(late, state), ValueError, ("[0, 3]", "optax.tree.set")),
        (lambda: into(middle, state), ValueError, ("accumulated 1",)),
        (lambda: into(adam, third), ValueError, ("['mu', 'third']",)),
        (
            lambda: into(eqx.tree_at(where, adam, jnp.ones(3)), state),
            ValueError,
            ("'mu' at `.layers[0].weight`", "(3,)", "(64, 8)"),
        ),
        (
            lambda: into(eqx.tree_at(where, adam, jnp.arange(3)), state),
            TypeError,
            ("'mu' at `.layers[0].weight`", "int32"),
        ),
        (
            lambda: into(eqx.tree_at(where, adam, None, is_leaf=is_none), state),
            ValueError,
            ("`.layers[0].weight`", "has None"),
        ),
        (
            lambda: into(optax.adam(1e-2).init({"a": jnp.ones(2)}), state),
            ValueError,
            ("nothing at", ".layers[0].weight"),
        ),
    ):
        assert_raises(error, call, "`from_optax`", *parts)
    for call, parts in (
        (lambda: out_of(state, lion), ("no `ScaleByAdamState`",)),
        (lambda: out_of(state, middle), ("accumulated 1",)),
        (
            lambda: out_of(ours_in_middle, adam),
            ("`flashquinox.accumulate` has accumulated 1",),
        ),
        (lambda: out_of(bare, adam), ("`ScaleByAdamState`", "`state` has none")),
        (lambda: out_of(bare, None), ("is a NoneType", "`optax.sgd`")),
    ):
        assert_raises(ValueError, call, "`to_optax`", *parts)


@pytest.mark.usefixtures("without_typechecker")
def test_errors_of_flashoptim():
    model, state = _target(storage=fq.Storage(moments="flashoptim"))

    def raises(error, *parts, change=lambda torch: None, target=None, **kwargs):
        torch = _Torch()
        change(torch)
        call = lambda: exchange.from_flashoptim(
            torch.state_dict, torch.parameters, *(target or (model, state)), **kwargs
        )
        assert_raises(error, call, "`from_flashoptim", *parts)

    def entry(key, value):
        def change(torch):
            torch.state_dict["state"][2][key] = value
            if value is None:
                del torch.state_dict["state"][2][key]

        return change

    name = "'out.weight'"
    other = lambda *entry: lambda torch: torch.parameters.update([entry])
    transposed = model | {"out": model["out"].T}
    one = {"a": model["out"]}
    third = {"third": state.moments["mu"]}
    third = fq.OptimizerState(state.steps, third, state.corrections)
    float16, half = np.zeros(3, np.float16), np.full((40, 7), 300, np.int16)

    raises(TypeError, "OptimizerState", target=(model, model))
    raises(ValueError, "['third']", target=(model, third))
    raises(ValueError, "'exp_avg_sq'", target=(model, fq.lion(1e-3).init(model)))
    raises(TypeError, "'params'", change=lambda x: x.state_dict.pop("param_groups"))
    raises(ValueError, "3 param", "2.", change=lambda x: x.parameters.pop("fc.bias"))
    raises(ValueError, name, "number 2", change=lambda x: x.state_dict["state"].pop(2))
    raises(TypeError, name, "int32", change=other("out.weight", np.ones(2, np.int32)))
    raises(ValueError, name, "(40, 7)", "(7, 40)", target=(transposed, state))
    raises(ValueError, "1 w", "3 p", target=(one, fq.adamw(1e-3).init(one)))
    raises(ValueError, "every name", "'fc.wight'", paths=_PATHS | {"fc.wight": "out"})
    raises(ValueError, "every path", "'out'", paths=_PATHS | {"out.weight": "fc.bias"})
    raises(ValueError, name, "sq::scales'", change=entry("exp_avg_sq::scales", None))
    raises(ValueError, name, "(3,)", "(9,)", change=entry("exp_avg::scales", float16))
    raises(ValueError, name, "(3,)", change=entry("exp_avg::quantized", float16))
    raises(ValueError, name, "int8", change=entry("exp_avg::quantized", half))
    raises(ValueError, name, "'max_exp_avg'", change=entry("max_exp_avg", half))
    raises(ValueError, name, "error_bits", "(3,)", change=entry("error_bits", float16))
    raises(ValueError, "[17, 18]", change=entry("step", np.float32(18)))
    group = lambda torch: torch.state_dict["param_groups"][0]
    raises(ValueError, "bfloat16", change=lambda x: group(x).pop("master_bytewidth"))
