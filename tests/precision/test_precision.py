"""Casting a model; whether steps arrive; corrections of other widths; dithered
weights."""

import functools as ft
import io
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import flashquinox as fq
from flashquinox._storage.split import encode_weight
from flashquinox._storage.thresholds import rounding_threshold

from ..helpers import array_of, assert_raises, float64, slow, tree_identical, weights
from ..kernels import arrays, run


#
# cast
#


class _Model(eqx.Module):
    convolution: eqx.nn.Conv1d
    norms: list
    head: eqx.nn.Linear

    def __init__(self, mode: str, affine: bool = True):
        keys = jax.random.split(jax.random.key(0))
        self.convolution = eqx.nn.Conv1d(3, 8, 3, key=keys[0])
        self.norms = [
            eqx.nn.BatchNorm(8, "batch", mode=mode, channelwise_affine=affine),
            eqx.nn.LayerNorm(8),
        ]
        self.head = eqx.nn.Linear(8, 2, key=keys[1])

    def __call__(self, x, state):
        x, state = self.norms[0](self.convolution(x), state)
        x = self.norms[1](jnp.mean(x, axis=-1))
        return self.head(x), state


def _dtypes(model) -> dict[str, str]:
    return {
        jtu.keystr(path, simple=True, separator="."): str(x.dtype)
        for path, x in jtu.tree_leaves_with_path(
            eqx.filter(model, eqx.is_inexact_array)
        )
    }


def _float32(model, **kwargs) -> set[str]:
    dtypes = _dtypes(fq.cast(model, jnp.bfloat16, **kwargs))
    assert set(dtypes.values()) <= {"float32", "bfloat16"}
    return {name for name, dtype in dtypes.items() if dtype == "float32"}


_mlp = eqx.nn.MLP(3, 2, 4, 2, key=jax.random.key(0))
_last = {"layers.2.weight", "layers.2.bias"}


@pytest.mark.parametrize(
    "keep, kept",
    [
        (None, set()),
        ("layers.2", _last),
        ("layers.2.*", _last),
        ("*.bias", {f"layers.{i}.bias" for i in range(3)}),
        (["layers.2", "layers.0.bias"], _last | {"layers.0.bias"}),
        (_mlp.layers[2], _last),
        (eqx.nn.Linear, set(_dtypes(_mlp))),
        (lambda x: eqx.is_array(x) and x.shape == (2,), {"layers.2.bias"}),
        # Not asked about activation functions.
        (lambda x: x.ndim < 2, {f"layers.{i}.bias" for i in range(3)}),
    ],
)
def test_keep(keep, kept):
    assert _float32(_mlp, keep=keep, wrap=False) == kept


@jtu.register_pytree_node_class
class _Childless:
    def tree_flatten(self):
        return (), None

    @classmethod
    def tree_unflatten(cls, aux, children):
        del aux, children
        return cls()


class _Static(eqx.Module):
    size: int = eqx.field(static=True, default=3)

    def __call__(self, x):
        return x


@pytest.mark.parametrize(
    "part",
    [eqx.nn.Identity(), _Static(), _Childless(), (), [], {}, None],
    ids=lambda part: type(part).__name__,
)
def test_parts_without_children(part):
    """Are nothing to cast, wherever they are."""
    linear = eqx.nn.Linear(3, 3, key=jax.random.key(0))
    for model, kept in (
        (part, set()),
        ({"a": [part, linear], "b": part}, {"a.1.weight", "a.1.bias"}),
    ):
        same = jtu.tree_structure(model)
        assert jtu.tree_structure(fq.cast(model, jnp.bfloat16)) == same
        assert jtu.tree_structure(fq.cast(model, jnp.float32, keep="*")) == same
        assert _float32(model) == set()
        keep = eqx.nn.Linear if kept else "*"
        assert _float32(model, keep=keep, wrap=False) == kept
    optim = fq.adamw(1e-2)
    narrow = fq.cast(model, jnp.bfloat16)
    state = fq.widen_corrections(narrow, optim.init(narrow), ["a.*", "b*"])
    assert {str(x.dtype) for x in jtu.tree_leaves(state.corrections)} == {"int16"}


def test_parts_without_children_can_be_kept():
    """They are layers, if they can be called: a function in float32."""
    model = {"f": _Static(), "g": _Static()}
    narrow = fq.cast(model, jnp.bfloat16, keep="f")
    assert isinstance(narrow["f"], fq.Float32Layer) and narrow["g"] == _Static()
    assert narrow["f"](jnp.ones(2, jnp.bfloat16)).dtype == jnp.bfloat16
    assert fq.cast(narrow, jnp.float32) == model


def test_statistics_beside_parts_without_arrays():
    """Such a layer has nothing but statistics all the same."""

    class Norm(eqx.Module):
        scale: jax.Array
        activation: eqx.Module
        empty: tuple
        mean: eqx.nn.StateIndex

        def __init__(self):
            self.scale = jnp.ones(3)
            self.activation = eqx.nn.Lambda(jax.nn.relu)
            self.empty = ()
            self.mean = eqx.nn.StateIndex(jnp.zeros(3))

        def __call__(self, x, state):
            return self.activation(x * self.scale - state.get(self.mean)), state

    norm, _ = eqx.nn.make_with_state(Norm)()
    assert _float32([norm], wrap=False) == {"0.scale"}
    assert isinstance(fq.cast([norm], jnp.bfloat16)[0], fq.Float32Layer)


@pytest.mark.product
@pytest.mark.parametrize(
    "mode, affine",
    [("ema", True), ("batch", False), slow("ema", False), slow("batch", True)],
)
def test_running_statistics_stay_float32(mode, affine):
    """And the model runs, in training and after."""
    make = eqx.filter_jit(eqx.nn.make_with_state(_Model))
    model, state = make(mode, affine)
    narrow, same_state = fq.cast((model, state), jnp.bfloat16)
    assert tree_identical(same_state, state)
    assert isinstance(narrow.norms[0], fq.Float32Layer)
    found = {name for name, dtype in _dtypes(narrow).items() if dtype == "float32"}
    names = {"norms.0.layer.weight", "norms.0.layer.bias"}
    assert found == (names if affine else set())
    x = jax.random.normal(jax.random.key(1), (5, 3, 9), jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        forward = lambda model, x, state: jax.vmap(
            model, axis_name="batch", in_axes=(0, None), out_axes=(0, None)
        )(x, state)
        y, new_state = eqx.filter_jit(forward)(narrow, x, state)
        expected, _ = eqx.filter_jit(forward)(model, x.astype(jnp.float32), state)
        inference = eqx.nn.inference_mode(narrow)
        assert eqx.filter_jit(forward)(inference, x, new_state)[0].dtype == jnp.bfloat16
    assert y.dtype == jnp.bfloat16
    assert _dtypes(new_state) == _dtypes(state)
    # A few roundings to 8 bits of numbers of size 1.
    assert np.max(np.abs(float64(y) - float64(expected))) <= 8 * 2**-8


def test_spectral_norm_stays_float32():
    """With the layer in it, whose weights are divided by a float32 number."""

    def make():
        keys = jax.random.split(jax.random.key(0))
        linear = eqx.nn.Linear(4, 3, key=keys[0])
        return eqx.nn.SpectralNorm(linear, "weight", key=keys[1])

    layer, state = eqx.nn.make_with_state(make)()
    for layer_, wrap in ((layer, True), (make(), True), (layer, False)):
        narrow = fq.cast({"a": layer_}, jnp.bfloat16, wrap=wrap)["a"]
        assert isinstance(narrow, fq.Float32Layer) == wrap
        assert set(_dtypes(narrow).values()) == {"float32"}
    narrow = fq.cast(layer, jnp.bfloat16)
    x = jax.random.normal(jax.random.key(1), (4,), jnp.bfloat16)
    # A state can be used once.
    again = jtu.tree_map(jnp.copy, state)
    y, new_state = narrow(x, again)
    expected, expected_state = layer(x.astype(jnp.float32), state)
    assert tree_identical(y, expected.astype(jnp.bfloat16))
    assert tree_identical(new_state, expected_state)


def test_wrapped_layers_in_a_sequence():
    """Are called with a state if they have one, and without if they have none."""

    def make():
        norm = eqx.nn.BatchNorm(4, "batch", mode="batch")
        linear = eqx.nn.Linear(4, 4, key=jax.random.key(0))
        return eqx.nn.Sequential([norm, eqx.nn.LayerNorm(4), linear])

    model, state = eqx.nn.make_with_state(make)()
    start = jtu.tree_map(jnp.copy, state)
    narrow = fq.cast(model, jnp.bfloat16, keep=eqx.nn.LayerNorm)
    assert [isinstance(x, fq.Float32Layer) for x in narrow.layers] == [
        True,
        True,
        False,
    ]
    x = jax.random.normal(jax.random.key(1), (8, 4), jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        y, new_state = jax.vmap(
            narrow, axis_name="batch", in_axes=(0, None), out_axes=(0, None)
        )(x, state)
    assert y.dtype == jnp.bfloat16
    assert _dtypes(new_state) == _dtypes(start)
    assert not tree_identical(new_state, start)


def test_a_model_with_a_state_of_its_own_is_cast():
    class Counting(eqx.Module):
        layer: eqx.nn.Linear
        calls: eqx.nn.StateIndex

        def __init__(self):
            self.layer = eqx.nn.Linear(3, 3, key=jax.random.key(0))
            self.calls = eqx.nn.StateIndex(jnp.array(0.0))

        def __call__(self, x):
            return self.layer(x)

    assert _float32(Counting()) == {"calls.init"}


def test_wrapping():
    narrow = fq.cast(_mlp, jnp.bfloat16, keep="layers.2")
    assert isinstance(narrow.layers[2], fq.Float32Layer)
    # Of attributes as of the layer, also to be replaced.
    assert narrow.layers[2].in_features == 4
    zeroed = eqx.tree_at(lambda m: m.layers[2].bias, narrow, jnp.zeros(2))
    assert not zeroed.layers[2].layer.bias.any()
    with jax.numpy_dtype_promotion("standard"):
        x = jnp.ones(3, jnp.bfloat16)
        assert narrow(x).dtype == jnp.bfloat16
        plain = fq.cast(_mlp, jnp.bfloat16, keep="layers.2", wrap=False)
        assert tree_identical(narrow(x), plain(x).astype(jnp.bfloat16))
        assert plain(x).dtype == jnp.float32
    # Leaves are no layers.
    assert fq.cast(_mlp, jnp.bfloat16, keep="layers.2.*").layers[2].weight.dtype == (
        jnp.float32
    )
    # Twice is once; and back.
    assert tree_identical(fq.cast(narrow, jnp.bfloat16), narrow)
    assert jtu.tree_structure(fq.cast(narrow, jnp.float32)) == jtu.tree_structure(_mlp)
    half = fq.cast(narrow, jnp.float16)
    assert half.layers[2].dtype == jnp.float16
    assert half.layers[2].weight.dtype == jnp.float32


def test_kept_is_at_least_float32():
    narrow = fq.cast(_mlp, jnp.bfloat16)
    assert fq.cast(narrow, jnp.bfloat16, keep="*.bias").layers[0].bias.dtype == (
        jnp.float32
    )


def test_shapes_are_cast():
    """As arrays are; and where they are stays known."""
    model = {"mlp": _mlp, "key": jax.random.key(0), "counts": jnp.arange(3)}
    shapes = eqx.filter_eval_shape(lambda: model)
    for dtype in (jnp.bfloat16, jnp.float32, "float16"):
        for keep in (None, lambda x: x.ndim < 2, "mlp.layers.2"):
            expected = eqx.filter_eval_shape(fq.cast, model, dtype, keep)
            assert eqx.tree_equal(fq.cast(shapes, dtype, keep), expected)
    narrow = fq.cast(shapes, jnp.bfloat16)
    plan = fq.memory_plan(narrow, fq.adamw(1e-3))
    assert plan == fq.memory_plan(fq.cast(model, jnp.bfloat16), fq.adamw(1e-3))
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    struct = jax.ShapeDtypeStruct((4, 3), jnp.float32, sharding=sharding)
    assert fq.cast(struct, jnp.bfloat16).sharding == sharding
    assert fq.cast(struct, jnp.bfloat16, keep=lambda x: True) == struct


def test_a_model_with_kept_layers_trains():
    model = fq.cast(_mlp, jnp.bfloat16, keep="layers.2")
    optim = fq.lion(1e-2)
    state = optim.init(model)
    grad = eqx.filter_grad(lambda m: jnp.sum(m(jnp.ones(3, jnp.bfloat16))))
    with jax.numpy_dtype_promotion("standard"):
        grads = eqx.filter_jit(grad)(model)
    new, _ = eqx.filter_jit(optim.step)(model, state, grads)
    assert _dtypes(new) == _dtypes(model)
    assert not tree_identical(new.layers[2].weight, model.layers[2].weight)


#
# check_numerics
#

_WIDTHS = [
    (jnp.bfloat16, None, 8),
    (jnp.bfloat16, 24, 16),
    (jnp.bfloat16, 32, 24),
    (jnp.float16, None, 11),
    (jnp.float16, 24, 19),
    (jnp.float16, 32, 24),
    (jnp.float32, None, 24),
]


@pytest.mark.product
@pytest.mark.parametrize("dtype, bits, digits", _WIDTHS)
@pytest.mark.parametrize("largest", [1.0, 1.5, 0.0078125, 3.0])
def test_what_is_lost_does_not_move(dtype, bits, digits, largest):
    """And what is not, does: away from zero, where numbers are not denser."""
    storage = fq.Storage(master_weight_bits=bits, dither_weights=False)
    weight = {"w": jnp.asarray([0.01, largest, -0.003], dtype)}
    half_unit = 2.0 ** (np.floor(np.log2(largest)) - digits)
    for factor, lost in [(0.9, True), (1.1, False)]:
        learning_rate = factor * half_unit
        optim = fq.sgd(learning_rate, storage=storage)
        state = optim.init(weight)
        report = fq.check_numerics(weight, state, learning_rate)
        (leaf,) = report.leaves
        assert leaf.half_unit == half_unit and leaf.lost is lost
        assert report.ok is not lost and report.lost == (("w",) if lost else ())
        new, new_state = optim.step(weight, state, {"w": -jnp.ones(3, jnp.float32)})
        before, after = (
            fq.master_weights(*x)["w"] for x in ((weight, state), (new, new_state))
        )
        # The sum of float32 rounds first; of 24 digits, that is this very rounding.
        assert (before[1] == after[1]) == lost


def test_numerics_of_a_model():
    model = fq.cast({"a": jnp.ones((2, 3)), "b": jnp.full(3, 2.0**-10)}, jnp.bfloat16)
    state = fq.adamw(1e-3).init(model)
    schedule = lambda count: jnp.where(count < 5, 1e-3, 1e-6)
    assert fq.check_numerics(model, state, schedule).ok
    late = eqx.tree_at(lambda s: s.steps.count, state, jnp.int32(7))
    report = fq.check_numerics(model, late, schedule)
    assert report.lost == ("a",)
    assert fq.check_numerics(model, late, schedule, update_size=100.0).ok
    table = str(report).splitlines()
    assert len(table) == 3 and table[1].endswith("lost") and not table[2].endswith("t")
    assert "bfloat16" in table[1] and "24" in table[1]


def test_a_weight_that_is_not_finite_is_lost():
    model = {"a": jnp.asarray([1, jnp.nan], jnp.bfloat16), "empty": jnp.zeros((0,))}
    state = fq.adamw(1e-3).init(model)
    assert fq.check_numerics(model, state, 1e-3).lost == ("a",)


#
# widen and narrow
#


def _split(dtype, bits: int):
    """A model whose master weights are any float32 numbers."""
    model = weights("matrix", "bias", "ragged", dtype=dtype)
    rng = np.random.default_rng(0)
    masters = {
        name: array_of(float64(x) * rng.uniform(0.5, 2, x.shape), jnp.float32)
        for name, x in model.items()
    }
    optim = fq.lion(1e-2, storage=fq.Storage(master_weight_bits=bits))
    return eqx.filter_jit(fq.from_master_weights)(masters, model, optim.init(model))


_narrow_dtypes = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])


@_narrow_dtypes
def test_widening_is_exact(dtype):
    model, state = _split(dtype, 24)
    wide = fq.widen_corrections(model, state, "matrix")
    assert {k: str(x.dtype) for k, x in wide.corrections.items()} == {
        "matrix": "int16",
        "bias": "int8",
        "ragged": "int8",
    }
    masters = fq.master_weights(model, state)
    assert tree_identical(fq.master_weights(model, wide), masters)
    assert tree_identical(fq.narrow_corrections(model, wide), state)
    assert tree_identical(
        fq.widen_corrections(model, wide), fq.widen_corrections(model, state)
    )


@pytest.mark.product
@_narrow_dtypes
def test_narrowing_is_within_a_unit(dtype):
    model, state = _split(dtype, 32)
    before = fq.master_weights(model, state)
    narrow = fq.narrow_corrections(model, state)
    after = fq.master_weights(model, narrow)
    nmant = jnp.finfo(dtype).nmant
    for name, old in before.items():
        assert narrow.corrections[name].dtype == jnp.int8
        weight = float64(model[name])
        # Units of float16 do not shrink below 2^-14.
        least = -14 if dtype == jnp.float16 else -126
        exponent = np.maximum(np.frexp(weight)[1] - 1, least)
        unit = np.exp2(exponent - nmant - 8.0)
        error = np.abs(float64(after[name]) - float64(old))
        # Half a unit, but where 127.5 or more are between: 128 is no int8.
        at_the_end = narrow.corrections[name] == 127
        assert np.all(error <= np.where(at_the_end, 1, 0.5) * unit)
        assert np.mean(at_the_end) < 0.1


def test_widths_may_differ_in_a_model():
    """Each leaf goes on as in an optimizer of its own width, in one step of all."""
    shapes = {"a": (32, 64), "b": (32, 64), "c": (32, 64)}
    model, grads = (arrays(shapes, jnp.bfloat16, seed) for seed in (0, 1))
    narrow = fq.lion(1e-2)
    wide = fq.lion(1e-2, storage=fq.Storage(master_weight_bits=32))
    mixed = fq.widen_corrections(model, narrow.init(model), ["b"])
    results = [
        jax.jit(optim.step)(model, state, grads)
        for optim, state in [
            (narrow, mixed),
            (narrow, narrow.init(model)),
            (wide, wide.init(model)),
        ]
    ]
    (model_mixed, state_mixed), *others = results
    for name, other in zip("abc", (0, 1, 0), strict=True):
        expected_model, expected_state = others[other]
        assert tree_identical(model_mixed[name], expected_model[name])
        expected = expected_state.corrections[name]
        assert tree_identical(state_mixed.corrections[name], expected)
    # And in `update`.
    _, state = jax.eval_shape(narrow.update, grads, mixed, model)
    assert state.corrections["b"].dtype == jnp.int16


@pytest.mark.parametrize("backend", ["tpu", "gpu"])
def test_kernels_of_mixed_widths_are_plain_xla(backend):
    shapes = {"a": (32, 128), "b": (64, 128)}
    params = arrays(shapes, jnp.bfloat16, 0)
    grads = [arrays(shapes, jnp.bfloat16, seed) for seed in (1, 2)]

    def make(**kwargs):
        optim = fq.lion(1e-2, **kwargs)
        init = lambda model: fq.widen_corrections(model, optim.init(model), "b")
        return _WithInit(init, optim.step)

    run(backend, make, params, grads)


class _WithInit(NamedTuple):
    init: Any
    step: Any


def test_widening_a_sharded_state():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    model = jax.device_put({"w": jnp.ones((128, 64), jnp.bfloat16)}, sharding)
    optim = fq.sgd(1e-2)
    state = fq.widen_corrections(model, optim.init(model))
    assert state.corrections["w"].sharding.is_equivalent_to(sharding, 2)
    new, state = eqx.filter_jit(optim.step)(model, state, model)
    assert state.corrections["w"].sharding.is_equivalent_to(sharding, 2)
    assert state.corrections["w"].dtype == jnp.int16
    assert fq.check_numerics(new, state, 1e-3).ok


def test_checkpoint_of_a_widened_state():
    model, state = _split(jnp.bfloat16, 24)
    state = fq.widen_corrections(model, state, "matrix")
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, state)
    like = fq.widen_corrections(model, fq.lion(1e-2).init(model), "matrix")
    file.seek(0)
    assert tree_identical(eqx.tree_deserialise_leaves(file, like), state)


def test_ensure_precision():
    model = fq.cast({"a": jnp.ones((2, 3)), "b": jnp.full(3, 2.0**-10)}, jnp.bfloat16)
    optim = fq.sgd(1e-6, storage=fq.Storage(dither_weights=False))
    state = optim.init(model)
    assert fq.ensure_precision(model, state, 1e-3) is state
    wide = fq.ensure_precision(model, state, 1e-6)
    assert wide.corrections["a"].dtype == jnp.int16
    assert wide.corrections["b"].dtype == jnp.int8
    assert fq.check_numerics(model, wide, 1e-6).ok
    # Training goes on where it stood still.
    grads = jtu.tree_map(jnp.ones_like, model)
    for start, moves in ((state, False), (wide, True)):
        before = fq.master_weights(model, start)["a"]
        after = fq.master_weights(*optim.step(model, start, grads))["a"]
        assert (not np.any(after == before)) == moves


#
# Dithered weights
#


def test_thresholds_are_equidistributed():
    at = jax.vmap(ft.partial(rounding_threshold, leaf=3))
    found = np.sort(np.asarray(at(jnp.arange(2000, dtype=jnp.int32)))) / 2**16
    assert np.max(np.abs(found - np.arange(2000) / 2000)) <= 12 / 2000


@pytest.mark.parametrize("leaf", [0, 3])
@pytest.mark.parametrize("start", [0, 2**31 - 20_001])
@pytest.mark.parametrize("period", [2, 7, 70, 169, 256, 408])
def test_thresholds_do_not_follow_a_gradient(leaf, start, period):
    """Steps that return and add up to nothing leave no more than independent
    thresholds would; those that are all equal arrive."""
    n = 20_000
    at = jax.vmap(ft.partial(rounding_threshold, leaf=leaf))
    threshold = np.asarray(at(start + jnp.arange(n, dtype=jnp.int32)))[:, None] / 2**16
    rng = np.random.default_rng(0)
    # In units of what a master weight is rounded to.
    size, phase = np.exp(rng.uniform(-3, 3, 50)), rng.uniform(0, 2 * np.pi, 50)
    wave = size * np.cos(2 * np.pi * (np.arange(n) % period)[:, None] / period + phase)
    left = np.sum(np.floor(wave + threshold) - wave, axis=0)
    # Of one rounding, a standard deviation of at most 1/2.
    assert np.all(np.abs(left) <= 3 * 0.5 * np.sqrt(n))
    share = rng.uniform(size=50)
    left = np.cumsum(np.floor(share + threshold) - share, axis=0)
    # Ten times 2048 thresholds, at distances of 2^-11; and five in each of these.
    assert np.all(np.abs(left) <= 3 * 0.5 * np.sqrt(n / 2048) + 5)


@pytest.mark.parametrize("leaf", [0, 5])
@pytest.mark.parametrize("lag", [0, 1])
def test_thresholds_of_weights_and_moments_are_independent(leaf, lag):
    at = jax.vmap(
        lambda count: (
            rounding_threshold(count + lag, leaf).astype(jnp.float32) / 2**16,
            fq.Dither.at(count, leaf).code,
        )
    )
    found = np.asarray(at(jnp.arange(2**14, dtype=jnp.int32)))
    counts, *_ = np.histogram2d(*found, bins=8, range=[[0, 1], [0, 1]])
    # Even, as of a lattice: each cell would hold 256 +- 16 by chance.
    assert np.all(np.abs(counts - 256) <= 64)


@_narrow_dtypes
def test_dithered_weights_are_unbiased(dtype):
    """Over all thresholds, the mean is the number, to float32's last bit."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(64) * np.exp2(rng.uniform(-13, 10, 64))
    x = jnp.asarray(x, jnp.float32)
    encode = lambda t: encode_weight(x, jnp.dtype(dtype), None, t)[0]
    found = jax.lax.map(encode, jnp.arange(2**16, dtype=jnp.uint32), batch_size=2**10)
    error = np.mean(float64(found), axis=0) - float64(x)
    assert np.all(np.abs(error) <= 2.0**-24 * np.abs(float64(x)))


@_narrow_dtypes
def test_special_weights_are_dithered(dtype):
    largest = float(jnp.finfo(dtype).max)
    special = jnp.asarray([0.0, -0.0, np.inf, -np.inf, np.nan, 1.5, -largest])
    for threshold in (0, 2**15, 2**16 - 1):
        found, _ = encode_weight(special, jnp.dtype(dtype), None, jnp.uint32(threshold))
        expected = special.astype(dtype)
        assert np.array_equal(np.signbit(found), np.signbit(expected))
        assert np.array_equal(float64(found), float64(expected), equal_nan=True)


@_narrow_dtypes
@pytest.mark.parametrize("bits, method", [(None, "step"), (24, "step"), (24, "update")])
def test_small_steps_arrive(dtype, bits, method):
    """Of a hundredth of a unit, or a sixteenth where float32 has no more bits: rounded
    to nearest, none does."""
    unit = 2.0 ** -(float(jnp.finfo(dtype).nmant) + (0 if bits is None else 8))
    weight = jnp.asarray([1.5, -1.5, 1.25, -1.75], dtype)
    # That stay in their power of two.
    grad, share = jnp.ones(4, jnp.float32), 100 if bits is None else 16
    steps = 10 * share

    def train(dithered):
        storage = fq.Storage(master_weight_bits=bits, dither_weights=dithered)
        optim = fq.sgd(unit / share, storage=storage)

        def step(_, carry):
            model, state = carry
            if method == "step":
                return optim.step(model, state, grad)
            updates, state = optim.update(grad, state, model)
            return model + updates, state

        carry = weight, optim.init(weight)
        found = fq.master_weights(*jax.lax.fori_loop(0, steps, step, carry))
        return float64(found) - float64(weight)

    assert not train(False).any()
    # What is due, give or take the discrepancy of thresholds.
    assert np.all(np.abs(train(True) + unit * steps / share) <= 2 * unit)


@pytest.mark.parametrize("backend, method", [("tpu", "step"), ("gpu", "update")])
def test_kernels_dither_weights(backend, method):
    shapes = {"a": (32, 128), "b": (64, 128)}
    params = arrays(shapes, jnp.bfloat16, 0)
    grads = [arrays(shapes, jnp.bfloat16, seed) for seed in (1, 2)]
    make = ft.partial(fq.lion, 1e-2, storage=fq.Storage(master_weight_bits=None))
    run(backend, make, params, grads, method=method)
    storage = fq.Storage(master_weight_bits=None, dither_weights=False)
    plain = fq.lion(1e-2, storage=storage)
    dithered, nearest = (
        optim.step(params, optim.init(params), grads[0])[0]["a"]
        for optim in (make(), plain)
    )
    assert np.mean(np.asarray(dithered != nearest)) > 0.05


#
# Errors
#


@pytest.mark.usefixtures("without_typechecker")
def test_errors():
    assert_raises(
        ValueError,
        lambda: fq.cast(_mlp, jnp.bfloat16, keep=["layers.1", "laers.2"]),
        "`cast(keep=...)`",
        "'laers.2'",
        "layers.0.weight",
    )
    other = eqx.nn.Linear(3, 3, key=jax.random.key(1))
    assert_raises(
        ValueError, lambda: fq.cast(_mlp, jnp.bfloat16, keep=other), "This Linear"
    )
    assert_raises(
        TypeError, lambda: fq.cast(_mlp, jnp.bfloat16, keep=3), "`cast(keep=...)`", "3"
    )
    for dtype, text in (("bf16", "'bf16'"), (None, "None"), (jnp.int8, "'int8'")):
        assert_raises(
            TypeError,
            lambda dtype=dtype: fq.cast(_mlp, dtype),
            "`cast(model, dtype)`",
            "`jnp.bfloat16`",
            text,
        )
    model = weights("matrix", "bias")
    plain = fq.adamw(1e-3, storage=fq.Storage(master_weight_bits=None))
    bare = plain.init(model)
    for change in (fq.widen_corrections, fq.narrow_corrections):
        assert_raises(
            ValueError,
            lambda change=change: change(model, bare),
            f"`{change.__name__}`",
            "['bias']",
            "no correction",
            "master_weight_bits=24",
        )
    state = fq.adamw(1e-3).init(model)
    assert_raises(
        ValueError, lambda: fq.widen_corrections(model, state, "b"), "'b'", "bias"
    )
    assert_raises(
        TypeError, lambda: fq.widen_corrections(state, model), "`widen_corrections`"
    )
    wide = fq.adamw(1e-3, storage=fq.Storage(master_weight_bits=32))
    narrow = fq.narrow_corrections(model, state)
    assert_raises(
        ValueError,
        lambda: wide.step(model, narrow, model),
        "`Storage(master_weight_bits=24)`",
        "flashquinox.widen_corrections",
    )
    assert_raises(
        ValueError,
        lambda: plain.step(model, fq.widen_corrections(model, state), model),
        "`Storage(master_weight_bits=32)`",
        "`Storage(master_weight_bits=None)`",
    )


@pytest.mark.usefixtures("without_typechecker")
def test_errors_of_numerics():
    model = {"layer": jnp.ones((2, 3), jnp.bfloat16)}
    state = fq.adamw(1e-3).init(model)
    check = ft.partial(fq.check_numerics, model, state)
    for rate in (0.0, -1.0, float("nan"), lambda count: 0.0):
        assert_raises(
            ValueError, lambda rate=rate: check(rate), "`check_numerics(learning_rate"
        )
    for rate in (None, jnp.ones(3), "1e-3", True):
        assert_raises(
            TypeError,
            lambda rate=rate: check(rate),
            "`check_numerics(learning_rate",
            "takes a number",
        )
    assert_raises(
        ValueError, lambda: check(1.0, update_size=0.0), "`check_numerics(update_size"
    )
    assert_raises(
        TypeError,
        lambda: jax.jit(lambda m: fq.check_numerics(m, state, 1.0).ok)(model),
        "['layer']",
        "outside of `jit`",
    )
    with pytest.raises(fq.NumericsError) as info:
        check(1e-7, raise_on_error=True)
    assert info.value.report.lost == ("layer",)
    assert "1 of 1" in str(info.value) and "flashquinox.widen_corrections" in str(
        info.value
    )
    assert check(1e-7, raise_on_error=False).lost == ("layer",)
    # Not even 32 bits.
    with pytest.raises(fq.NumericsError, match="float64") as info:
        fq.ensure_precision(model, state, 1e-9)
    assert info.value.report.leaves[0].bits == 32
    assert state.corrections["layer"].dtype == jnp.int8


def test_errors_of_weights_that_are_not_finite():
    """Their remedy is not more bits."""
    model = {"good": jnp.ones(3, jnp.bfloat16)}
    model["bad"] = model["good"].at[1].set(jnp.nan)
    state = fq.adamw(1e-3).init(model)
    for call, name in (
        (lambda: fq.ensure_precision(model, state, 1e-3), "`ensure_precision`"),
        (
            lambda: fq.check_numerics(model, state, 1e-3, raise_on_error=True),
            "`check_numerics`",
        ),
    ):
        with pytest.raises(fq.NumericsError) as info:
            call()
        message = str(info.value)
        assert f"{name}: the weights at `bad` are not all finite" in message
        assert "learning rate" not in message and "widen" not in message
        assert info.value.report.lost == ("bad",)


@pytest.mark.usefixtures("without_typechecker")
def test_errors_of_dithered_weights():
    assert_raises(
        TypeError,
        lambda: fq.sgd(
            1e-3, storage=fq.Storage(dither_weights="yes", master_weight_bits=None)
        ),
        "`Storage(dither_weights=...)`",
        "'yes'",
    )
