"""Averages of weights."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import flashquinox as fq
from flashquinox.checkpoint import Checkpoints

from ..helpers import assert_raises, float64, slow, tree_identical
from ..kernels import arrays


_SHAPES = {"w": (64, 96), "v": (40,)}


def _arrays(seed, dtype=jnp.bfloat16):
    return arrays(_SHAPES, dtype, seed)


def _train(optim, ema, grads, start=None):
    """Steps, each followed by an update of the average."""
    model = _arrays(0) if start is None else start[0]
    state = optim.init(model) if start is None else start[1]
    average = ema.init(model, state) if start is None else start[2]

    @jax.jit
    def step(model, state, average, grads):
        model, state = optim.step(model, state, grads)
        return model, state, ema.update(average, model, state)

    for grad in grads:
        model, state, average = step(model, state, average, grad)
    return model, state, average


@pytest.mark.once
@pytest.mark.parametrize(
    "decay, steps, size", [(0.999, 200, 1e-4), slow(0.9999, 20_000, 1e-5, unless=True)]
)
def test_follows_float32(decay, steps, size):
    """A rounding is wrong by a unit or less, in the share of steps that makes its mean
    0; so its variance is p (1 - p) units, with p the fraction of a unit that the
    average was to move by. Errors fade as the average does. Independent ones would have
    the sum of these variances; thresholds that are evenly spaced have less."""
    keys = jax.random.split(jax.random.key(0))
    start = {"w": jax.random.normal(keys[0], (512,), jnp.bfloat16)}
    optim, ema = fq.add_updates(), fq.ema(decay)
    state = optim.init(start)
    drift = jax.random.normal(keys[1], (512,)) * size

    def step(carry, key):
        model, state, average, reference, narrow, variance = carry
        way = drift + 3 * size * jax.random.normal(key, (512,))
        model, state = optim.step(model, state, {"w": way})
        average = ema.update(average, model, state)
        master = fq.master_weights(model, state)["w"]
        share = (1 - decay) / (1 - jnp.exp(average.count * np.log(decay)))
        move = share * (master - reference)
        reference = reference + move
        exponent = jnp.floor(jnp.log2(jnp.abs(reference)))
        unit = jnp.exp2(exponent - 15)
        part = jnp.abs(move) / unit % 1
        variance = variance * (1 - share) ** 2 + unit**2 * part * (1 - part)
        narrow = narrow + ((1 - decay) * (model["w"] - narrow)).astype(jnp.bfloat16)
        return (model, state, average, reference, narrow, variance), None

    def train(start, state, keys):
        average = ema.init(start, state)
        zeros = jnp.zeros(512)
        carry = start, state, average, zeros, start["w"], zeros
        return jax.lax.scan(step, carry, keys)[0]

    with jax.numpy_dtype_promotion("standard"):
        found = jax.jit(train)(start, state, jax.random.split(keys[0], steps))
    model, state, average, reference, narrow, variance = found
    averaged = float64(ema.master_weights(average, model)["w"])
    error = averaged - float64(reference)
    deviation = np.sqrt(float64(variance))
    assert np.all(np.abs(error) <= 6 * deviation)
    assert np.sqrt(np.mean(error**2)) <= np.sqrt(np.mean(deviation**2))
    # The errors are small beside the way, and a bfloat16 average goes none of it.
    way = np.linalg.norm(float64(reference) - float64(start["w"]))
    assert np.linalg.norm(error) <= 0.05 * way
    if steps == 200:
        assert np.mean(float64(narrow) != float64(start["w"])) <= 0.01


def test_is_debiased():
    """As Optax's, of the master weights. Rounded to 16 bits in each step, by less than
    a unit: of few steps, these add up."""
    optim, ema = fq.adamw(1e-1), fq.ema(0.9)
    reference = optax.ema(0.9, debias=True)
    carry, masters, found = None, [], {}
    for i in range(4):
        carry = _train(optim, ema, [_arrays(1 + i)], carry)
        masters.append(fq.master_weights(*carry[:2]))
        found = ema.master_weights(carry[2], carry[0])
        if i == 0:
            assert tree_identical(found, masters[0])
    state, expected = reference.init(masters[0]), None
    with jax.numpy_dtype_promotion("standard"):
        for master in masters:
            expected, state = reference.update(master, state)
    for name in _SHAPES:
        x, y = float64(found[name]), float64(expected[name])
        size = np.max([np.abs(float64(master[name])) for master in masters], 0)
        assert np.all(np.abs(x - y) <= 4 * 2.0**-15 * size)
    assert int(carry[2].count) == 4


@pytest.mark.parametrize("kind", ["accumulate", "skip"])
def test_only_steps_count(kind):
    optim = fq.adamw(1e-1, skip_nonfinite=True)
    ema, grads = fq.ema(0.9), [_arrays(1 + i) for i in range(4)]
    bad = jtu.tree_map(lambda x: x * jnp.nan, grads[0])
    if kind == "accumulate":
        optim, bad = fq.accumulate(optim, 2), grads[0]
        first, second = [bad, grads[0], bad], [grads[1], bad]
        alone = [bad, grads[0]], [bad, grads[1]]
    else:
        first, second = [grads[0], bad], [grads[1], bad]
        alone = [grads[0]], [grads[1]]
    found = _train(optim, ema, second, _train(optim, ema, first))
    expected = _train(optim, ema, alone[1], _train(optim, ema, alone[0]))
    assert int(found[2].count) == 2
    assert tree_identical(found[2], expected[2])


@pytest.mark.once
def test_model_for_evaluation():
    """What is not trained is that of the model."""
    mlp = eqx.nn.MLP(8, 4, 16, 2, key=jax.random.key(0))
    optim, ema = fq.lion(1e-2), fq.ema(0.5)
    model, state = fq.prepare(mlp, optim, keep="layers.2")
    trained = eqx.tree_at(lambda x: x.layers[0].bias, model, None)
    state = optim.init(trained)
    average = ema.init(model, state)
    assert average.weights.layers[0].bias is None
    ones = jtu.tree_map(
        lambda x: jnp.ones(x.shape) if eqx.is_array(x) else None, trained
    )

    @eqx.filter_jit(donate="all-except-first")
    def step(grads, model, state, average):
        model, state = optim.step(model, state, grads)
        return model, state, ema.update(average, model, state)

    for _ in range(3):
        model, state, average = step(ones, model, state, average)
    found = ema.model(average, model)
    wide = ema.master_weights(average, model)
    assert found.activation is model.activation
    assert found.layers[0].bias is model.layers[0].bias
    assert found.layers[0].weight is average.weights.layers[0].weight
    for path, x in jtu.tree_leaves_with_path(eqx.filter(model, eqx.is_array)):
        of = lambda tree, path=path: dict(
            jtu.tree_leaves_with_path(eqx.filter(tree, eqx.is_array))
        )[path]
        assert of(found).dtype == x.dtype and of(wide).dtype == jnp.float32
        # Lion's steps are alike: the average lags by (0.01 + 2 * 0.02) / 3.5 / 2.
        assert np.allclose(float64(of(found)), float64(of(wide)), rtol=2.0**-8)
    # To go on from it.
    new, new_state = fq.from_master_weights(wide, model, state)
    again = fq.master_weights(new, new_state)
    assert tree_identical(again.layers[1], wide.layers[1])


def test_states_of_wrappers():
    """Of two optimizers, each for some of the weights."""
    labels = {"w": "a", "v": "b"}
    optim = optax.partition({"a": fq.adamw(1e-1), "b": fq.lion(1e-1)}, labels)
    ema, model = fq.ema(0.5), _arrays(0)
    state = optim.init(model)
    average = ema.init(model, state)
    with jax.numpy_dtype_promotion("standard"):
        updates, state = jax.jit(optim.update)(_arrays(1), state, model)
        model = optax.apply_updates(model, updates)
    average = jax.jit(ema.update)(average, model, state)
    expected = fq.master_weights(model, state)
    assert tree_identical(ema.master_weights(average, model), expected)


@pytest.mark.once
@pytest.mark.parametrize("kind", [AxisType.Auto, slow(AxisType.Explicit)])
def test_meshes(kind):
    optim, ema = fq.adamw(1e-2), fq.ema(0.99)
    grads = [_arrays(1 + i) for i in range(2)]
    expected = _train(optim, ema, grads)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,), devices=jax.devices()[:4])
    where = {
        "w": NamedSharding(mesh, P("data", None)),
        "v": NamedSharding(mesh, P(None)),
    }
    put = lambda tree: jax.device_put(tree, where)
    with jax.set_mesh(mesh):
        model = put(_arrays(0))
        state = optim.init(model)
        average = ema.init(model, state)
        text = (
            jax.jit(ema.update).lower(average, model, state).compile().as_text() or ""
        )
        found = _train(optim, ema, map(put, grads), (model, state, average))
        evaluated = ema.model(found[2], found[0])
    assert "all-gather" not in text and "all-reduce" not in text
    for x in (average.weights, found[2].weights, found[2].corrections, evaluated):
        assert x["w"].sharding.is_equivalent_to(where["w"], 2)
    same = lambda x, y: np.array_equal(np.asarray(x), np.asarray(y))
    assert all(map(same, jtu.tree_leaves(found), jtu.tree_leaves(expected)))


@pytest.mark.once
def test_state_in_host_memory():
    """The average is where the state is."""
    start = arrays({"w": (128, 256), "v": (40,)}, jnp.bfloat16, 0)
    ema, found = fq.ema(0.9), {}
    for where in ("pinned_host", "device"):
        optim = fq.lion(1e-2, state_memory=where)
        state = optim.init(start)
        carry = start, state, ema.init(start, state)
        model, _, average = _train(optim, ema, [start, start], carry)
        found[where] = average, ema.model(average, model)
    leaves = map(jtu.tree_leaves, found.values())
    assert all(map(np.array_equal, *leaves))
    average, evaluated = found["pinned_host"]
    assert average.weights["w"].sharding.memory_kind == "pinned_host"
    assert average.corrections["w"].sharding.memory_kind == "pinned_host"
    # To be computed with.
    assert evaluated["w"].sharding == start["w"].sharding


def test_goes_on_from_a_checkpoint(tmp_path):
    optim, ema = fq.adamw(1e-2), fq.ema(0.99)
    grads = [_arrays(1 + i) for i in range(4)]
    model, state, average = _train(optim, ema, grads[:2])
    like = _arrays(9), optim.init(_arrays(9))
    like = *like, ema.init(*like)
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(2, model, (state, average))
    with Checkpoints(tmp_path / "run") as checkpoints:
        model, (state, average) = checkpoints.restore(like[0], like[1:])
    found = _train(optim, ema, grads[2:], (model, state, average))
    assert tree_identical(found, _train(optim, ema, grads))


@pytest.mark.once
def test_models_of_an_ensemble():
    optim, ema = fq.adamw(1e-2), fq.ema(0.9)
    models = arrays({"w": (3, 32, 64)}, jnp.bfloat16, 0)
    start = models, jax.vmap(optim.init)(models)
    start = *start, jax.vmap(ema.init)(*start)

    def step(model, state, average):
        model, state = optim.step(model, state, model)
        return model, state, ema.update(average, model, state)

    found = jax.jit(jax.vmap(step))(*start)
    for i in range(3):
        own = lambda tree, i=i: jtu.tree_map(lambda x: x[i], tree)
        assert tree_identical(own(found), jax.jit(step)(*own(start)))


def test_is_in_place():
    """One leaf after the other: the temporaries are those of the largest. (XLA for CPUs
    computes an average and its correction one after the other, by copies.)"""
    params = {f"w{i}": jnp.ones((512, 512), jnp.bfloat16) for i in range(8)}
    optim, ema = fq.adamw(1e-2), fq.ema(0.99)
    state = optim.init(params)
    average = ema.init(params, state)
    update = jax.jit(ema.update, donate_argnums=0)
    memory = update.lower(average, params, state).compile().memory_analysis()
    kept = jtu.tree_leaves((average.weights, average.corrections))
    assert sum(x.nbytes for x in kept) == 3 * 8 * 512 * 512
    assert memory.alias_size_in_bytes >= 3 * 8 * 512 * 512
    # XLA of JAX 0.10 has larger ones.
    most = 8 if jax.__version_info__ >= (0, 11) else 12
    assert memory.temp_size_in_bytes <= most * 512 * 512


_model = {"w": jnp.zeros(3, jnp.bfloat16)}
_state = fq.sgd(0.5).init(_model)
_ema = fq.ema(0.9)
_average = _ema.init(_model, _state)


@pytest.mark.parametrize(
    "call, expected",
    {
        "decay": (
            lambda: fq.ema(1.0),
            (ValueError, ("`ema(decay=...)`", "less than 1")),
        ),
        "text": (lambda: fq.ema("0.9"), (TypeError, ("`ema(decay=...)`", "'0.9'"))),
        "order": (
            lambda: _ema.update(_model, _state, _average),
            (TypeError, ("`ema(...).update`", "flashquinox.EMAState", "dict")),
        ),
        "other model": (
            lambda: _ema.model(_average, {"x": jnp.zeros(3)}),
            (ValueError, ("`ema(...).model`", "['x']")),
        ),
        # Which could be broadcast.
        "other shape": (
            lambda: _ema.model(_average, {"w": jnp.zeros((2, 3))}),
            (ValueError, ("`ema(...).model`", "['w']", "shape (3,)", "shape (2, 3)")),
        ),
        "other shape of the average": (
            lambda: _ema.update(
                _ema.init({"w": jnp.zeros(1)}, fq.sgd(0.5).init({"w": jnp.zeros(1)})),
                _model,
                _state,
            ),
            (ValueError, ("`ema(...).update`", "['w']", "shape (1,)", "shape (3,)")),
        ),
        "no weight": (
            lambda: _ema.model(_average, {"w": jnp.arange(3)}),
            (ValueError, ("`ema(...).model`", "['w']", "no weight")),
        ),
        "other state": (
            lambda: _ema.update(_average, *_more(_model)),
            (ValueError, ("`ema(...).update`", "['v']")),
        ),
        "frozen": (
            lambda: _ema.update(
                _ema.init(*_more(_model)), *_more(_model)[:1], _frozen(_model)
            ),
            (ValueError, ("`ema(...).update`", "['v']", "not trained")),
        ),
        "no state": (
            lambda: _ema.init(_model, {}),
            (TypeError, ("`ema(...).init`", "OptimizerState")),
        ),
    }.values(),
)
@pytest.mark.usefixtures("without_typechecker")
def test_errors(call, expected):
    error, parts = expected
    assert_raises(error, call, *parts)


def _more(model):
    more = model | {"v": jnp.zeros(2, jnp.bfloat16)}
    return more, fq.sgd(0.5).init(more)


def _frozen(model):
    return fq.sgd(0.5).init(model | {"v": None})
