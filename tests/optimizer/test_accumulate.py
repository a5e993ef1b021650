"""Accumulation of gradients."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import flashquinox as fq
from flashquinox._optimizer import state_memory, together
from flashquinox._optimizer.accumulation_state import SUM_UNIT
from flashquinox.checkpoint import CheckpointError, Checkpoints

from ..helpers import assert_raises, float64, slow, tree_identical
from ..kernels import arrays, compiling_for, tpu_devices


_SHAPES = {"w": (64, 96), "v": (40,)}
_FLOAT32 = fq.Storage(master_weight_bits=None, moments="float32")


def _steps(optim, model, state, grads, **options):
    step = jax.jit(ft.partial(optim.step, **options))
    for grad in grads:
        model, state = step(model, state, grad)
    return model, state


def _arrays(seed, dtype=jnp.bfloat16):
    return arrays(_SHAPES, dtype, seed)


def _mean(grads):
    """In float32, as bfloat16."""
    mean = lambda *x: (sum(y.astype(jnp.float32) for y in x) / len(x)).astype(
        x[0].dtype
    )
    return jtu.tree_map(mean, *grads)


@pytest.mark.parametrize("mean", [False, True])
def test_is_multi_steps_in_float32(mean):
    """Sums are the same bit for bit. `optax.MultiSteps` takes the mean by steps that
    divide, so that it differs by roundings of float32: one each in four of these."""
    ours = fq.accumulate(fq.sgd(0.5, storage=_FLOAT32), 4, bits=32, mean=mean)
    theirs = optax.MultiSteps(optax.sgd(0.5), 4, use_grad_mean=mean)
    grads = [_arrays(1 + i, jnp.float32) for i in range(9)]
    start = _arrays(0, jnp.float32)
    found, state = _steps(ours, start, ours.init(start), grads)
    expected, reference = start, theirs.init(start)
    with jax.numpy_dtype_promotion("standard"):
        update = jax.jit(theirs.update)
        for grad in grads:
            updates, reference = update(grad, reference, expected)
            expected = optax.apply_updates(expected, updates)
    assert int(state.mini_step) == int(reference.mini_step) == 1
    assert int(state.count) == int(reference.gradient_step) == 2
    if not mean:
        assert tree_identical(found, expected)
    for name in _SHAPES:
        x, y = float64(found[name]), float64(expected[name])
        most = max(np.abs(float64(x[name])).max() for x in (start, *grads))
        assert np.abs(x - y).max() <= 8 * 2.0**-24 * 4 * most


@pytest.mark.parametrize("every", [1, 3])
def test_step_is_that_of_the_mean(every):
    """A bfloat16 mean is rounded to nearest."""
    plain = fq.adamw(1e-2)
    optim = fq.accumulate(plain, every)
    start = _arrays(0)
    grads = [_arrays(1 + i) for i in range(2 * every)]
    found, state = _steps(optim, start, optim.init(start), grads)
    halves = grads[:every], grads[every:]
    expected = _steps(plain, start, plain.init(start), map(_nearest_mean, halves))
    _assert_close(found, state, *expected)
    assert int(state.mini_step) == 0 and int(state.count) == 2
    assert not any(np.any(x) for x in jtu.tree_leaves((state.sums, state.corrections)))


def _assert_close(model, state, expected, expected_state):
    """A sum may be rounded to the other side, or a product and a sum be one operation
    in one of the programs: seldom, and by no more than a unit of the gradient, which is
    2^-7 of a step of 1e-2."""
    found = fq.master_weights(model, state)
    expected = fq.master_weights(expected, expected_state)
    for name in _SHAPES:
        assert float(jnp.mean(found[name] != expected[name])) <= 0.02
        assert np.allclose(found[name], expected[name], rtol=2.0**-14, atol=1e-4)


@pytest.mark.parametrize("bits", [16, 24, 32])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_large_gradients(bits, dtype):
    """Sums do not overflow where the mean does not, as in `optax.MultiSteps`, and not
    between gradients of both signs either, where its differences do."""
    largest = jnp.asarray(3e38, dtype)
    model = {"w": jnp.zeros((64, 64), dtype)}
    optim = fq.accumulate(fq.sgd(0.5, storage=_FLOAT32), 4, bits=bits)
    signs = jnp.where(jnp.arange(64) < 32, 1, -1).astype(dtype)
    grads = [{"w": jnp.full((64, 64), largest * sign)} for sign in (1, 1, signs, 1)]
    model, state = _steps(optim, model, optim.init(model), grads)
    mean = float(largest) * np.where(np.arange(64) < 32, 1, 0.5)
    # A bfloat16 has 8 bits, and sums of 16 bits have 12 or more.
    found = float64(model["w"])
    assert np.allclose(found, -0.5 * mean[None], rtol=2.0**-7)
    assert int(state.count) == 1


def _nearest_mean(grads):
    """The bfloat16 that stands for the sum, over the number of gradients."""

    def one(*grads):
        total = sum(x.astype(jnp.float32) for x in grads)
        narrow = fq.ECCWeight.encode(total, jnp.bfloat16, 24).weight
        return narrow.astype(jnp.float32) / len(grads)

    return jtu.tree_map(one, *grads)


def _decoded(state, name):
    """A sum in float32."""
    total = state.sums[name]
    if isinstance(total, fq.QuantMoment):
        return total.decode() / SUM_UNIT
    return fq.ECCWeight(total, state.corrections[name]).decode() / SUM_UNIT


def _sums(optim, grads):
    """The sum of gradients, `[steps, elements]`."""
    model = {"w": jnp.zeros(grads.shape[1])}
    step = lambda state, grad: (optim.step(model, state, {"w": grad})[1], None)
    state, _ = jax.jit(lambda x: jax.lax.scan(step, optim.init(model), x))(grads)
    return float64(_decoded(state, "w"))


def _units(sums, bits):
    """Of the last place of sums, `[steps, elements]`."""
    if bits > 16:
        return np.abs(sums) * 2.0 ** {24: -15, 32: -23}[bits]
    exponent = np.frexp(sums)[1]
    largest = np.abs(sums).reshape(-1, 32).max(1).repeat(32).reshape(sums.shape)
    below = np.frexp(largest)[1] - exponent
    # The table of `TaperedCodec`. What would be rounded to 2^e has e + 1.
    digits = np.select([below < 1, below < 5, below < 13, below < 28], [13, 12, 11, 10])
    return np.where(below < 28, 2.0 ** (exponent - digits), largest * 2.0**-36)


@pytest.mark.parametrize("kind", ["of either sign", "of one sign", "small"])
@pytest.mark.parametrize("bits", [16, 24, 32])
def test_precision_of_sums(bits, kind):
    """Of 64 gradients. A rounding loses less than a unit of the sum; by an even
    threshold, its square is at most a quarter of that of the unit, and its mean is 0.
    So the root of the mean square of all is at most half the root of the sum of the
    squares of units. Gradients that are a multiple of the unit lose nothing."""
    grads = jax.random.normal(jax.random.key(0), (64, 4096))
    if kind == "of one sign":
        grads = jnp.abs(grads)
    if kind == "small":
        # Than the others of their group, by up to 2^26.
        grads = grads * 2.0 ** -jnp.tile(jnp.linspace(0, 26, 32), 128)[None]
    grads = grads.astype(jnp.bfloat16)
    optim = fq.accumulate(fq.sgd(1.0, storage=_FLOAT32), 100, bits=bits)
    error = _sums(optim, grads) - float64(grads).sum(0)
    units = _units(np.cumsum(float64(grads), 0), bits)
    bound = 0.5 * np.sqrt(np.sum(units**2, 0))
    assert np.sqrt(np.mean(error**2)) <= np.sqrt(np.mean(bound**2))
    # So it is of each of the 32 sizes.
    by_size = lambda x: np.sqrt(np.mean(x.reshape(-1, 32) ** 2, 0))
    assert np.all(by_size(error) <= by_size(bound))
    # Of the mean, relative to the largest term.
    limit = {16: 2.0**-8, 24: 2.0**-15, 32: 2.0**-23}[bits]
    terms = np.abs(float64(grads)).reshape(-1, 32).max(0)
    assert np.all(np.abs(error).reshape(-1, 32).max(0) / 64 <= limit * terms)


@pytest.mark.parametrize("bits, unit", [(24, 2.0**-15), (16, 2.0**-12)])
def test_small_gradients_are_not_lost(bits, unit):
    """A sixth of a unit each: to nearest, all 63 would be. Of 32 sums together, by
    independent thresholds, the standard deviation would be half a unit."""
    small = unit / 6
    grads = jnp.full((64, 2, 16), small, jnp.float32).at[0].set(1.0)
    optim = fq.accumulate(fq.sgd(1.0, storage=_FLOAT32), 64, bits=bits, mean=False)
    model = {"w": jnp.zeros((2, 16))}
    step = lambda carry, grad: (optim.step(*carry, {"w": grad}), None)
    train = jax.jit(lambda x: jax.lax.scan(step, (model, optim.init(model)), x)[0])
    (found, state) = train(jnp.tile(grads, (32, 1, 1)))
    assert int(state.count) == 32
    lost = 32 * (1 + 63 * small) + float(found["w"][1, 3])
    assert abs(lost) / 32 <= 2.5 * unit < 63 * small


def test_schedules_count_steps():
    seen = []

    def schedule(count):
        seen.append(count)
        return jnp.where(count == 0, 1.0, 0.5)

    def every(count):
        return jnp.where(count == 0, 1, 3)

    optim = fq.accumulate(fq.sgd(schedule, storage=_FLOAT32), every)
    model = {"w": jnp.zeros(3)}
    state, grad = optim.init(model), {"w": jnp.ones(3)}
    step, way = jax.jit(optim.step), []
    for _ in range(5):
        model, state = step(model, state, grad)
        way.append((float(model["w"][0]), int(state.mini_step), int(state.count)))
    assert way == [(-1, 0, 1), (-1, 1, 1), (-1, 2, 1), (-1.5, 0, 2), (-1.5, 1, 2)]


@pytest.mark.once
@pytest.mark.parametrize("method", ["step", slow("update")])
def test_nonfinite_gradients_do_not_count(method):
    start = _arrays(0)
    good = [_arrays(1), _arrays(2)]
    bad = dict(_arrays(3), v=_arrays(3)["v"].at[7].set(jnp.inf))

    def step(optim, model, state, grads):
        if method == "step":
            return optim.step(model, state, grads)
        updates, state = optim.update(grads, state, model)
        return optax.apply_updates(model, updates), state

    def train(optim, grads):
        model, state = start, optim.init(start)
        for grad in grads:
            model, state = jax.jit(ft.partial(step, optim))(model, state, grad)
        return model, state

    optim = fq.accumulate(fq.adamw(1e-2, skip_nonfinite=True), 2)
    found = train(optim, [bad, good[0], bad, bad, good[1], bad])
    assert tree_identical(found, train(optim, good))
    assert int(found[1].count) == 1
    # Without the option, it damages the leaf it comes to.
    model, _ = train(fq.accumulate(fq.adamw(1e-2), 2), [bad, good[0]])
    assert jnp.isnan(model["v"][7]) and bool(jnp.all(jnp.isfinite(model["w"])))


def test_norm_is_that_of_the_mean():
    plain = fq.sgd(1.0, skip_nonfinite=True, storage=_FLOAT32)
    optim = fq.accumulate(plain, 2, bits=32)
    start, grads = _arrays(0, jnp.float32), [_arrays(i, jnp.float32) for i in (1, 2)]
    found, _ = _steps(optim, start, optim.init(start), grads, max_norm=0.5)
    mean = _mean(grads)
    expected, _ = _steps(plain, start, plain.init(start), [mean], max_norm=0.5)
    way = lambda x: jtu.tree_map(lambda a, b: float64(a) - float64(b), x, start)
    norm = np.sqrt(sum(np.sum(x**2) for x in jtu.tree_leaves(way(found))))
    assert norm == pytest.approx(0.5, rel=1e-5)
    for name in _SHAPES:
        # Two roundings of a float32 weight and its step.
        assert np.allclose(way(found)[name], way(expected)[name], rtol=0, atol=1e-6)


@pytest.mark.once
def test_update():
    """In `optax.chain`, on bfloat16 weights: what is added is nothing but in the last
    of `every`, and then what the optimizer alone gives for the mean."""
    plain = fq.adamw(1e-2)
    optim = optax.chain(optax.scale(1.0), fq.accumulate(plain, 2))
    model, grads = _arrays(0), [_arrays(1 + i) for i in range(4)]
    expected, of_plain = model, plain.init(model)
    state = optim.init(model)
    add = jax.jit(optax.apply_updates)
    for i, grad in enumerate(grads):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = jax.jit(optim.update)(grad, state, model)
            before, model = model, add(model, updates)
        assert tree_identical(model, before) == (i % 2 == 0)
        if i % 2 == 1:
            mean = _nearest_mean(grads[i - 1 : i + 1])
            updates, of_plain = jax.jit(plain.update)(mean, of_plain, expected)
            expected = add(expected, updates)
    assert int(state[1].count) == int(of_plain.count) == 2
    _assert_close(model, state, expected, of_plain)


@pytest.mark.once
def test_leaves_without_gradients():
    """What is no floating-point array, and what is frozen, has no sum. A leaf without a
    gradient keeps what it has."""
    mlp = eqx.nn.MLP(8, 4, 16, 1, key=jax.random.key(0))
    optim = fq.accumulate(fq.adamw(1e-2), 2)
    model, state = fq.prepare(mlp, optim)
    frozen = eqx.tree_at(lambda x: x.layers[0].weight, model, None)
    state = optim.init(frozen)
    assert state.sums.layers[0].weight is None and state.sums.activation is None
    ones = lambda x: jnp.ones(x.shape, x.dtype) if eqx.is_inexact_array(x) else None
    grads = jtu.tree_map(ones, frozen)
    grads = eqx.tree_at(lambda x: x.layers[1].bias, grads, None)
    step = eqx.filter_jit(optim.step)
    new, state = step(*step(model, state, grads), grads)
    assert int(state.count) == 1 and new.activation is model.activation
    kept = lambda x: (x.layers[0].weight, x.layers[1].bias)
    assert tree_identical(kept(new), kept(model))
    assert bool(jnp.all(new.layers[1].weight != model.layers[1].weight))
    with_it = eqx.tree_at(
        lambda x: x.layers[0].weight, grads, ones(model.layers[0].weight),
        is_leaf=lambda x: x is None,
    )  # fmt: skip
    assert_raises(
        ValueError,
        lambda: optim.step(model, state, with_it),
        "`accumulate(...).step`",
        ".layers[0].weight",
        "frozen",
    )


def test_outside_of_jit():
    optim = fq.accumulate(fq.lion(1e-2), 2)
    start, grads = {"w": _arrays(0)["w"]}, [{"w": _arrays(i)["w"]} for i in (1, 2, 3)]
    found = start, optim.init(start)
    for grad in grads:
        found = optim.step(*found, grad)
    assert tree_identical(found, _steps(optim, start, optim.init(start), grads))


@pytest.mark.once
def test_goes_on_from_a_checkpoint(tmp_path):
    optim = fq.accumulate(fq.adamw(1e-2), 4)
    start, grads = _arrays(0), [_arrays(1 + i) for i in range(8)]
    half = _steps(optim, start, optim.init(start), grads[:6])
    assert int(half[1].mini_step) == 2
    expected = _steps(optim, *half, grads[6:])
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(6, *half)
    like = start, optim.init(start)
    with Checkpoints(tmp_path / "run") as checkpoints:
        restored = checkpoints.restore(*like)
    eqx.tree_serialise_leaves(tmp_path / "x.eqx", half)
    read = eqx.tree_deserialise_leaves(tmp_path / "x.eqx", like)
    for found in (restored, read):
        assert tree_identical(_steps(optim, *found, grads[6:]), expected)


@pytest.mark.parametrize("kind", [AxisType.Auto, slow(AxisType.Explicit)])
def test_meshes(kind):
    """Each device adds its own part, and nothing is sent."""
    optim = fq.accumulate(fq.adamw(1e-2, skip_nonfinite=False), 2)
    start, grads = _arrays(0), [_arrays(1 + i) for i in range(3)]
    expected = _steps(optim, start, optim.init(start), grads)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,), devices=jax.devices()[:4])
    where = {
        "w": NamedSharding(mesh, P("data", None)),
        "v": NamedSharding(mesh, P(None)),
    }
    put = lambda tree: jax.device_put(tree, where)
    with jax.set_mesh(mesh):
        model = put(start)
        state = optim.init(model)
        compiled = jax.jit(optim.step).lower(model, state, put(grads[0])).compile()
        found = _steps(optim, model, state, map(put, grads))
    text = compiled.as_text() or ""
    assert "all-gather" not in text and "all-reduce" not in text
    for tree in (state.sums, state.corrections, found[1].sums, found[1].corrections):
        assert tree["w"].sharding.is_equivalent_to(where["w"], 2)
    same = lambda x, y: np.array_equal(np.asarray(x), np.asarray(y))
    assert all(map(same, jtu.tree_leaves(found), jtu.tree_leaves(expected)))


@pytest.mark.once
def test_models_of_an_ensemble():
    optim = fq.accumulate(fq.adamw(1e-2), 2)
    models = arrays({"w": (3, 32, 64)}, jnp.bfloat16, 0)
    grads = [arrays({"w": (3, 32, 64)}, jnp.bfloat16, 1 + i) for i in range(3)]
    found, state = models, jax.vmap(optim.init)(models)
    for grad in grads:
        found, state = jax.jit(jax.vmap(optim.step))(found, state, grad)
    for i in range(3):
        own = lambda tree, i=i: jtu.tree_map(lambda x: x[i], tree)
        expected = _steps(optim, own(models), optim.init(own(models)), map(own, grads))
        assert tree_identical(own((found, state)), expected)


@pytest.mark.parametrize("every", [1, slow(4)])
def test_is_in_place(every):
    """Neither an addition nor a step has a second copy of anything: the temporaries are
    those of a step alone, but for a chunk of the addition."""
    if jax.__version_info__ < (0, 11):
        pytest.skip("XLA of JAX 0.10 copies arrays of a step")
    params = {f"w{i}": jnp.ones((1024, 512), jnp.bfloat16) for i in range(4)}
    size = sum(x.size for x in params.values())

    def temporaries(optim):
        state = optim.init(params)
        program = jax.jit(optim.step, donate_argnums=(0, 1))
        memory = program.lower(params, state, params).compile().memory_analysis()
        kept = sum(x.nbytes for x in jtu.tree_leaves((params, state)))
        assert memory.alias_size_in_bytes >= kept
        return memory.temp_size_in_bytes

    plain = fq.adamw(1e-2, backend="xla")
    extra = temporaries(fq.accumulate(plain, every)) - temporaries(plain)
    assert extra <= 0.1 * size


@pytest.mark.slow
@pytest.mark.parametrize("bits", [16, 24])
def test_is_in_place_on_tpus(bits):
    """By the compiler, which needs no TPU: beside what it copies into its vector memory
    ahead of time."""
    (chip, *_) = tpu_devices("v5e:2x2")
    one = jax.sharding.SingleDeviceSharding(chip)
    struct = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one)
    params = {f"w{i}": jnp.ones((2048, 2048), jnp.bfloat16) for i in range(4)}
    optim = fq.accumulate(fq.adamw(1e-2, backend="tpu"), 4, bits=bits)
    shapes = jtu.tree_map(struct, (params, jax.eval_shape(optim.init, params), params))
    with compiling_for(chip.device_kind, "tpu", chip.num_cores):
        program = jax.jit(optim.step, donate_argnums=(0, 1)).lower(*shapes)
        memory = program.compile().memory_analysis()
    size = sum(x.size for x in params.values())
    # No array of any leaf, of which the smallest are corrections.
    assert memory.temp_size_in_bytes < params["w0"].size
    assert memory.alias_size_in_bytes >= (5.125 + bits / 8) * size


@pytest.mark.once
@pytest.mark.parametrize(
    "jit, bits, backend",
    [
        (True, 24, "auto"),
        slow(False, 24, "auto"),
        (True, 16, "gpu"),
        slow(True, 24, "gpu"),
    ],
)
def test_state_in_host_memory(jit, bits, backend):
    """Sums are where the state is, and what is computed is the same. Kernels for GPUs
    add there, of which XLA knows no result."""
    shapes = {"w": (128, 256), "v": (40,)}
    start = arrays(shapes, jnp.bfloat16, 0)
    grads = [arrays(shapes, jnp.bfloat16, 1 + i) for i in range(3)]

    def train(where):
        plain = fq.adamw(1e-2, state_memory=where, backend=backend)
        optim = fq.accumulate(plain, 2, bits=bits)
        step = jax.jit(optim.step) if jit else optim.step
        model, state = start, optim.init(start)
        for grad in grads:
            model, state = step(model, state, grad)
        return model, state

    found, expected = train("pinned_host"), train("device")
    assert all(map(np.array_equal, *map(jtu.tree_leaves, (found, expected))))
    for name, where in (
        ("w", "pinned_host"),
        # Small leaves stay.
        ("v", start["v"].sharding.memory_kind),
    ):
        stored = jtu.tree_leaves((found[1].sums[name], found[1].corrections[name]))
        assert {x.sharding.memory_kind for x in stored} == {where}


@pytest.mark.once
@pytest.mark.parametrize(
    "make, dtype, bits, shapes",
    [
        (fq.lion, jnp.bfloat16, 16, {"w": (64, 96)}),
        slow(fq.adamw, jnp.float16, 24, {"w": (96, 96), "odd": (3, 7, 65)}),
        slow(fq.muon, jnp.bfloat16, 24, {"w": (96, 96), "odd": (3, 7, 65)}),
        slow(fq.adafactor, jnp.float32, 16, {"w": (96, 96), "odd": (3, 7, 65)}),
        slow(fq.adamw, jnp.bfloat16, 24, {"w": (96, 96), "none": (0, 3)}),
    ],
)
def test_sums_arrive_slice_by_slice(make, dtype, bits, shapes, monkeypatch):
    """As gradients of a step whose leaves are several portions, whatever it asks of all
    of them. A sum that is not read is not lost."""
    monkeypatch.setattr(together, "PORTION", 2**12)
    monkeypatch.setattr(state_memory, "_SMALL", 2**8)
    start = arrays(shapes, dtype, 0)
    grads = [arrays(shapes, dtype, 1 + i) for i in range(4)]
    grads[1]["w"] = grads[1]["w"].at[3, 4].set(jnp.nan)
    grads[3] |= {name: None for name in shapes if name != "w"}

    def train(where):
        plain = make(1e-2, state_memory=where, skip_nonfinite=True)
        optim = fq.accumulate(plain, 2, bits=bits)
        state = optim.init(start)
        return _steps(optim, start, state, grads, max_norm=0.5)

    found, expected = train("pinned_host"), train("device")
    assert int(found[1].count) == 1 and int(found[1].mini_step) == 1
    assert tree_identical(found, expected)


@pytest.mark.once
@pytest.mark.parametrize("kind", [AxisType.Auto, slow(AxisType.Explicit)])
def test_host_memory_on_meshes(kind):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,), devices=jax.devices()[:2])
    where = NamedSharding(mesh, P("data", None))
    draw = lambda seed: {
        "w": jax.device_put(arrays({"w": (256, 128)}, jnp.bfloat16, seed)["w"], where)
    }
    found = []
    with jax.set_mesh(mesh):
        for kind_of_memory in ("device", "pinned_host"):
            # Sums are read before the step as well.
            plain = fq.lion(1e-2, state_memory=kind_of_memory, skip_nonfinite=True)
            optim = fq.accumulate(plain, 2, bits=16)
            start = draw(0)
            grads = [draw(1), draw(2)]
            found.append(_steps(optim, start, optim.init(start), grads, max_norm=1.0))
    assert all(map(np.array_equal, *map(jtu.tree_leaves, found)))
    codes = found[1][1].sums["w"].codes
    assert codes.sharding.is_equivalent_to(where.with_memory_kind("pinned_host"), 2)


def test_ensembles_in_host_memory_are_an_error():
    optim = fq.accumulate(fq.lion(1e-2, state_memory="pinned_host"), 2)
    models = arrays({"w": (3, 256, 128)}, jnp.bfloat16, 0)
    state = jax.vmap(optim.init)(models)
    step = lambda: jax.jit(jax.vmap(optim.step))(models, state, models)
    assert_raises(NotImplementedError, step, "`accumulate(...).step`", "vmap")


@pytest.mark.parametrize("bits, size", [(16, 2.0625), (24, 3), (32, 4)])
def test_bytes(bits, size):
    params = {"w": jnp.zeros((64, 64), jnp.bfloat16)}
    state = fq.accumulate(fq.adamw(1e-2), 2, bits=bits).init(params)
    sums = jtu.tree_leaves((state.sums, state.corrections))
    assert sum(x.nbytes for x in sums) == size * 64 * 64


@pytest.mark.parametrize("backend", [slow("gpu"), slow("tpu")])
@pytest.mark.parametrize("bits", [16, 24])
def test_kernels_add(backend, bits):
    """Those of steps, bit for bit."""
    grads = [_arrays(1 + i) for i in range(3)]
    make = lambda backend: fq.accumulate(fq.lion(1e-2, backend=backend), 4, bits=bits)
    start, state = _arrays(0), make(backend).init(_arrays(0))
    found = _steps(make(backend), start, state, grads)
    assert tree_identical(found, _steps(make("xla"), start, state, grads))


def test_text():
    optim = fq.accumulate(fq.sgd(0.5), 8)
    assert repr(optim) == f"accumulate({fq.sgd(0.5)}, every=8)"
    assert repr(optim.inner) == repr(fq.sgd(0.5))
    other = fq.accumulate(fq.sgd(0.5), optax.constant_schedule(2), bits=16, mean=False)
    assert repr(other).endswith(", bits=16, mean=False)")


_plain = fq.sgd(0.5)
_model = {"w": jnp.zeros(3, jnp.bfloat16)}
_two = fq.accumulate(_plain, 2)


@pytest.mark.parametrize(
    "call, expected",
    {
        "optax": (
            lambda: fq.accumulate(optax.sgd(0.5), 2),
            (TypeError, ("`accumulate(optim, every)`", "flashquinox.adamw")),
        ),
        "twice": (lambda: fq.accumulate(_two, 2), (TypeError, ("already",))),
        "every": (
            lambda: fq.accumulate(_plain, 0),
            (ValueError, ("`accumulate(every=...)`", "got 0")),
        ),
        "every float": (
            lambda: fq.accumulate(_plain, 2.0),
            (ValueError, ("`accumulate(every=...)`", "got 2.0")),
        ),
        "schedule": (
            lambda: fq.accumulate(_plain, lambda count: 0).step(
                _model, _two.init(_model), _model
            ),
            (ValueError, ("`accumulate(every=...)`", "returned 0")),
        ),
        "bits": (
            lambda: fq.accumulate(_plain, 2, bits=8),
            (ValueError, ("`accumulate(bits=...)`", "16, 24 or 32", "got 8")),
        ),
        "bits of no integer": (
            lambda: fq.accumulate(_plain, 2, bits="16"),
            (ValueError, ("`accumulate(bits=...)`", "got '16'")),
        ),
        "mean": (
            lambda: fq.accumulate(_plain, 2, mean="no"),
            (TypeError, ("`accumulate(mean=...)`",)),
        ),
        "state": (
            lambda: _two.step(_model, _plain.init(_model), _model),
            (TypeError, ("`accumulate(...).step`", "AccumulationState")),
        ),
        "plain": (
            lambda: _plain.step(_model, _two.init(_model), _model),
            (TypeError, ("`sgd(...).step`", "AccumulationState")),
        ),
        "params": (
            lambda: _two.update(_model, _two.init(_model)),
            (ValueError, ("`accumulate(...).update", "params")),
        ),
        "shape": (
            lambda: _two.step(_model, _two.init(_model), {"w": jnp.zeros(4)}),
            (ValueError, ("`accumulate(...).step`", "['w']", "(4,)")),
        ),
        "ensemble": (
            lambda: _two.step(
                _model,
                jax.vmap(_two.init)({"w": jnp.zeros((2, 3), jnp.bfloat16)}),
                _model,
            ),
            (ValueError, ("`accumulate(...).step`", "ensemble")),
        ),
    }.values(),
)
@pytest.mark.usefixtures("without_typechecker")
def test_errors(call, expected):
    error, parts = expected
    assert_raises(error, call, *parts)


@pytest.mark.parametrize(
    "old, new", [(x, y) for x in (16, 24, 32) for y in (16, 24, 32) if x != y]
)
def test_sums_of_other_bits(old, new, tmp_path):
    model = {"w": jnp.zeros((4, 8), jnp.bfloat16)}
    before, after = (fq.accumulate(_plain, 2, bits=bits) for bits in (old, new))
    state = before.init(model)
    parts = f"has {old} bits", f"keeps {new} there", "['w']", "accumulate(bits=...)"
    assert_raises(ValueError, lambda: after.step(model, state, model), *parts)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, model, state)
        restore = lambda: checkpoints.restore(model, after.init(model))
        assert_raises(CheckpointError, restore, "state.", "accumulate(bits=...)")
