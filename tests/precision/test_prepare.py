"""The start of training: casting, `init`, and the lower bits of the weights."""

import dataclasses
import warnings
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import flashquinox as fq

from ..helpers import assert_raises, bits_of, float64, float_of, tree_identical


_BF16, _F16 = jnp.bfloat16, jnp.float16


def _storage(bits):
    return fq.Storage(moments="float32", master_weight_bits=bits)


def _sgd(bits, **options):
    return fq.sgd(0.1, storage=_storage(bits), **options)


def _arrays(tree):
    return eqx.filter(tree, eqx.is_array)


def _uneven(mlp):
    """No weight is 0, and each has all of its bits."""
    return jtu.tree_map(lambda x: x * 1.1 if eqx.is_inexact_array(x) else x, mlp)


_mlp = _uneven(eqx.nn.MLP(6, 4, 8, 2, key=jax.random.key(0)))


#
# Lower bits that a model has
#


def _patterns():
    """Random ones, and those where the split rounds, ends or has no numbers."""
    random = np.random.default_rng(0).integers(0, 2**32, 4096, np.uint32)
    ends = [0, 1, 0x7F, 0x80, 0x8000, 0x7F80, 0x7FFF, 0x0080_0000, 0x007F_FFFF]
    ends += [0x3F80_7F7F, 0x3F80_7F80, 0x3F80_8000, 0x3F81_8000, 0x3FFF_FFFF]
    ends += [0x7F7F_FFFF, 0x7F7F_7F7F, 0x7F80_0000, 0x7FC0_0000, 0x7FFF_FFFF]
    ends = np.array(ends, np.uint32)
    return np.concatenate([random, ends, ends | np.uint32(0x8000_0000)])


@pytest.mark.parametrize("dtype", [_BF16, _F16])
@pytest.mark.parametrize("bits", [24, 32])
def test_master_weights_are_those_of_the_model(dtype, bits):
    master = {"w": float_of(jnp.asarray(_patterns()))}
    model, state = fq.prepare(master, _sgd(bits), dtype)
    found = fq.master_weights(model, state)["w"]
    split = fq.ECCWeight.encode(master["w"], dtype, bits)
    assert tree_identical(model["w"], split.weight)
    assert tree_identical(found, split.decode())
    if dtype == _F16:
        return
    pattern = _patterns()
    finite = pattern & 0x7FFF_FFFF < (0x7F7F_FF80 if bits == 24 else 0x7F80_0000)
    rounded = (pattern + 128) >> 8 << 8 if bits == 24 else pattern
    assert np.array_equal(bits_of(found)[finite], rounded[finite])


@pytest.mark.parametrize("dtype", [_BF16, _F16])
def test_without_a_correction_it_is_cast_and_init(dtype):
    master, optim = {"w": float_of(jnp.asarray(_patterns()))}, _sgd(None)
    model = fq.cast(master, dtype)
    expected = model, optim.init(model)
    assert tree_identical(fq.prepare(master, optim, dtype), expected)


# Every kind of leaf.
_MODEL = {
    "mlp": _mlp,
    "half": jnp.full(3, 0.3, _F16),
    "steps": jnp.arange(3),
    "complex": jnp.ones(2, jnp.complex64),
    "f": jax.nn.relu,
    "none": None,
}


@pytest.mark.parametrize("wrap, jit", [(True, False), (False, True)])
def test_whole_models(wrap, jit):
    optim = fq.sgd(0.1, momentum=0.9, storage=_storage(32), verify_weights="error")
    keep = ["mlp.layers.1", lambda x: x.shape == (4,)]
    prepare = partial(fq.prepare, keep=keep, wrap=wrap)
    model, state = (eqx.filter_jit(prepare) if jit else prepare)(_MODEL, optim)
    narrow = fq.cast(_MODEL, _BF16, keep, wrap=wrap)
    masters = _MODEL | {"half": _MODEL["half"].astype(jnp.float32), "steps": None}
    expected = fq.from_master_weights(masters, narrow, optim.init(narrow))
    assert tree_identical(_arrays((model, state)), _arrays(expected))
    assert jtu.tree_structure((model, state)) == jtu.tree_structure(expected)
    assert model["f"] is jax.nn.relu
    whole = fq.cast(fq.master_weights(model, state), jnp.float32)["mlp"]
    assert tree_identical(_arrays(whole), _arrays(_mlp))
    # The checksums are those of the weights.
    grads = jtu.tree_map(jnp.zeros_like, eqx.filter(model, eqx.is_inexact_array))
    optim.step(model, state, grads | {"complex": None})


def test_numpy_arrays_and_leaves_that_are_bfloat16():
    master = np.float32([0.1, 0.2])
    given = {"a": master, "b": jnp.asarray([0.3, 0.4], _BF16)}
    model, state = fq.prepare(given, _sgd(24))
    assert isinstance(model["a"], jax.Array)
    assert tree_identical(model["b"], given["b"]) and not np.any(state.corrections["b"])
    assert np.allclose(fq.master_weights(model, state)["a"], master, rtol=2**-17)


def _partition(params):
    labels = jtu.tree_map_with_path(
        lambda path, _: {0: "wide", 1: "narrow", 2: "frozen"}[path[1].idx], params
    )
    return optax.partition(
        {"wide": _sgd(32), "narrow": _sgd(None), "frozen": optax.set_to_zero()}, labels
    )


_WRAPPERS = {
    "chain": lambda _: optax.chain(optax.clip_by_global_norm(1.0), _sgd(24)),
    "chain, 32 bits": lambda _: optax.chain(_sgd(32)),
    "inject_hyperparams": lambda _: optax.inject_hyperparams(fq.sgd)(
        0.1, storage=_storage(24)
    ),
    "MultiSteps": lambda _: optax.MultiSteps(_sgd(24), every_k_schedule=2),
    "partition": _partition,
    # Its state holds the weights too.
    "schedule_free": lambda _: optax.chain(
        optax.contrib.schedule_free(_sgd(24), learning_rate=0.1)
    ),
}


@pytest.mark.parametrize("name", _WRAPPERS)
def test_wrappers(name):
    params = {"layers": [_arrays(layer) for layer in _mlp.layers]}
    wrapped = _WRAPPERS[name](params)
    model, state = fq.prepare(params, wrapped)
    narrow = fq.cast(params, _BF16)
    expected = fq.from_master_weights(params, narrow, wrapped.init(narrow))
    assert tree_identical(model, expected[0])
    if name != "schedule_free":
        assert tree_identical(state, expected[1])
    else:
        assert tree_identical(state[0].z, model)


@pytest.mark.parametrize(
    "name", ["chain", "inject_hyperparams", "MultiSteps", "schedule_free"]
)
def test_wrappers_of_a_whole_model(name):
    """Its functions, numbers and integers are nothing for Optax."""
    wrapped = _WRAPPERS[name](None)
    whole = (_mlp, 0.5, jnp.arange(3), jax.random.key(0))
    model, state = fq.prepare(whole, wrapped)
    params, expected = fq.prepare(eqx.filter(whole, eqx.is_inexact_array), wrapped)
    assert tree_identical(state, expected)
    assert model[0].activation is _mlp.activation and model[1] == 0.5
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = wrapped.update(params, state, params)
        assert tree_identical(model[2], eqx.apply_updates(model, updates)[2])


def test_scales_in_a_wrapper():
    base = {"codes": jnp.ones((4, 4), jnp.int8), "scale": jnp.ones((4, 1))}
    model = {"base": base, "head": jnp.ones((2, 4))}
    for optim in (_sgd(24), optax.chain(_sgd(24))):
        with pytest.raises(ValueError, match="codes"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fq.prepare(model, optim)


def test_a_function_that_makes_the_state():
    is_trained = eqx.tree_at(
        lambda mlp: mlp.layers[0], jtu.tree_map(eqx.is_inexact_array, _mlp), False
    )
    optim = _sgd(32)
    init = lambda model: optim.init(eqx.filter(model, is_trained))
    model, state = fq.prepare(_mlp, init)
    assert state.corrections.layers[0].weight is None
    whole = fq.master_weights(model, state)
    assert tree_identical(_arrays(whole.layers[1:]), _arrays(_mlp.layers[1:]))
    # Frozen, and so without a correction: rounded to nearest.
    frozen = fq.cast(_mlp, _BF16).layers[0]
    assert tree_identical(_arrays(model.layers[0]), _arrays(frozen))


#
# Lower bits for a model that has none
#


def _narrow(dtype):
    """All numbers of this dtype."""
    patterns = jnp.arange(2**16, dtype=jnp.uint32).astype(jnp.uint16)
    return jax.lax.bitcast_convert_type(patterns, dtype).reshape(256, 256)


_spread = partial(fq.prepare, spread_lower_bits=True)


@pytest.mark.parametrize("dtype", [_BF16, _F16])
@pytest.mark.parametrize("bits", [24, 32])
def test_spread_lower_bits(dtype, bits):
    given = {"a": _narrow(dtype), "b": _narrow(dtype)}
    model, state = _spread(given, _sgd(bits), dtype)
    assert tree_identical(model, given)
    # Each is one that the weight's own rounding gives.
    for weight, correction in zip(
        model.values(), state.corrections.values(), strict=True
    ):
        master = fq.ECCWeight(weight, correction).decode()
        again = fq.ECCWeight.encode(master, dtype, bits)
        number = np.isfinite(float64(weight))
        for x, y in ((again.weight, weight), (again.correction, correction)):
            assert np.array_equal(np.asarray(x)[number], np.asarray(y)[number])
        zero = ~number | (float64(weight) == 0)
        assert not np.any(np.asarray(correction)[zero])
    # Evenly: of 16 equal parts, each has its share.
    drawn, other = (float64(x.astype(jnp.float32)) for x in state.corrections.values())
    digits = {(_BF16, 24): 8, (_BF16, 32): 16, (_F16, 24): 8, (_F16, 32): 13}
    half = 2.0 ** (digits[dtype, bits] - 1)
    usual = np.isfinite(float64(model["a"])) & _is_no_power_of_two(dtype)
    share = np.histogram(drawn[usual], 16, (-half, half))[0] / usual.sum()
    assert np.all(abs(share - 1 / 16) < 0.005)
    assert abs(drawn[usual].mean() / half) < 0.01
    # Independent in the other leaf and in the next element.
    for x, y in (
        (drawn, other),
        (drawn[:, 1:], drawn[:, :-1]),
        (drawn[1:], drawn[:-1]),
    ):
        assert abs(np.corrcoef(x.ravel(), y.ravel())[0, 1]) < 0.02


def _is_no_power_of_two(dtype):
    return np.arange(2**16).reshape(256, 256) % 2 ** jnp.finfo(dtype).nmant != 0


@pytest.mark.parametrize("dtype", [_BF16, _F16])
def test_the_mean_is_that_of_the_weights(dtype):
    """Also of powers of two, below which numbers are denser."""
    for value in (1.0, -4.0, 1.5):
        given = jnp.full((128, 128), value, dtype)
        found = fq.master_weights(*_spread(given, _sgd(24), dtype))
        # In units of the larger distance between weights.
        error = float64(found - value) / 2.0 ** -jnp.finfo(dtype).nmant / abs(value)
        assert abs(error.mean()) < 0.005
        assert error.std() > 0.12
        assert tree_identical(found.astype(dtype), given)


def test_spread_lower_bits_leaves_others_alone():
    """Float32 leaves keep their own; a part of a model is not spread by itself."""
    given = {"own": _mlp.layers[0].weight, "none": jnp.full((8, 8), 0.3, _BF16)}
    model, state = _spread(given, _sgd(32))
    found = fq.master_weights(model, state)
    assert tree_identical(found["own"], given["own"])
    assert len(np.unique(np.asarray(state.corrections["none"]))) > 50
    _, plain = fq.prepare(given, _sgd(32))
    assert not np.any(np.asarray(plain.corrections["none"]))


#
# Many devices
#


@pytest.mark.filterwarnings("ignore:.*it is not known how it is divided")
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_many_devices(kind):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    specs = {"w": P("data", "model"), "b": P(), "half": P(None, "data")}
    values = {"w": _patterns()[:4096].reshape(64, 64), "b": _patterns()[:64]}
    values = {name: float_of(jnp.asarray(x)) for name, x in values.items()}
    values |= {"half": _narrow(_BF16)[:64]}
    given = {
        name: jax.device_put(x, NamedSharding(mesh, specs[name]))
        for name, x in values.items()
    }
    optim = fq.sgd(0.1, momentum=0.9, verify_weights="error")
    model, state = _spread(given, optim)
    expected, expected_state = _spread(values, optim)
    found = jtu.tree_leaves((model, state))
    for x, y in zip(found, jtu.tree_leaves((expected, expected_state)), strict=True):
        assert tree_identical(np.asarray(x), np.asarray(y))
    for name, x in given.items():
        for y in (model[name], state.corrections[name]):
            assert y.sharding.is_equivalent_to(x.sharding, x.ndim)
    jitted = jax.jit(partial(_spread, optim=optim))(given)
    state = dataclasses.replace(state, shardings=())
    assert tree_identical(
        jtu.tree_map(np.asarray, jtu.tree_leaves(jitted)),
        jtu.tree_map(np.asarray, jtu.tree_leaves((model, state))),
    )


#
# Errors
#


@pytest.mark.parametrize(
    "call, error, parts",
    [
        (lambda: fq.prepare(_sgd(24), _mlp), TypeError, ["the model comes first"]),  # pyright: ignore
        (lambda: fq.prepare(_mlp, 3), TypeError, ["`flashquinox.adamw(1e-3)`", "3"]),  # pyright: ignore
        (
            lambda: fq.prepare({"w": jnp.ones(3)}, optax.adamw(1e-3)),
            TypeError,
            ["no `flashquinox.OptimizerState`", "`flashquinox.cast` and `init`"],
        ),
        (lambda: fq.prepare(None, _sgd(24)), TypeError, ["the model is None"]),
        (
            lambda: fq.prepare(jax.eval_shape(lambda: jnp.ones(3)), _sgd(24)),
            TypeError,
            ["`jax.eval_shape`"],
        ),
        (
            lambda: fq.prepare(_mlp, _sgd(24), keep="lyers.0"),
            ValueError,
            ["`prepare(keep=...)`", "'lyers.0'"],
        ),
        (
            lambda: fq.prepare(_mlp, _sgd(24), jnp.int8),
            TypeError,
            ["`prepare(model, dtype)`", "int8"],
        ),
        (
            lambda: fq.prepare(_mlp, _sgd(24), spread_lower_bits="no"),  # pyright: ignore
            TypeError,
            ["`prepare(spread_lower_bits=...)`", "'no'"],
        ),
        (
            lambda: _spread(_mlp, _sgd(24)),
            ValueError,
            ["no weight of the model comes in bfloat16", "leave the argument out"],
        ),
        (
            lambda: _spread(fq.cast(_mlp, _BF16), _sgd(None)),
            ValueError,
            ["no weight has a correction", "master_weight_bits=24"],
        ),
    ],
)
@pytest.mark.usefixtures("without_typechecker")
def test_errors(call, error, parts):
    assert_raises(error, call, "`prepare", *parts)


#
# In functions that JAX transforms
#


def test_leaves_that_are_the_same_for_all_members():
    """Under `vmap`, they are no tracers."""
    optim, start = _sgd(24), {"shared": jnp.linspace(0.1, 2.3, 7)}
    inputs = jnp.linspace(1.7, 3.1, 6).reshape(2, 3)
    make = lambda x: fq.prepare(start | {"own": x}, optim)
    model, state = jax.vmap(make)(inputs)
    masters = jax.vmap(fq.master_weights)(model, state)
    for member in range(2):
        expected = fq.master_weights(*make(inputs[member]))
        found = jtu.tree_map(lambda x, member=member: x[member], masters)
        assert tree_identical(found, expected)


def test_arrays_from_outside_of_jit():
    optim, start = _sgd(24), {"w": jnp.linspace(0.1, 2.3, 7)}
    model, state = fq.prepare(start, optim)
    found = jax.jit(lambda: fq.from_master_weights(start, model, state))()
    assert tree_identical(found, (model, state))
    average = jax.jit(lambda: fq.ema(0.9).init(model, state))()
    assert tree_identical(average, fq.ema(0.9).init(model, state))
