"""States in host memory: the same results, and in the same memory as before."""

import math
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import pytest
from jax.sharding import AxisType, SingleDeviceSharding

import flashquinox as fq
from flashquinox._common import host_memory, memory
from flashquinox._optimizer import advance, state_memory, together
from flashquinox._optimizer.slices import slices_of
from flashquinox._storage.layout import Layout
from flashquinox.checkpoint import Checkpoints

from ..helpers import assert_raises, slow, tree_identical


AWAY = "pinned_host"
# Of large leaves in each shape that groups take, and a small one.
_SHAPES = {
    "rows": (96, 32),
    "stack": (4, 16, 32),
    "odd": (3, 5, 111),
    "bias": (7,),
}
_MAKE = {
    "adamw": partial(fq.adamw, 1e-2, weight_decay=0.1),
    "lion": partial(fq.lion, 1e-3),
    "sgd": partial(fq.sgd, 1e-2, momentum=0.9),
    "muon": partial(fq.muon, 1e-2),
    "learned": partial(fq.adamw, 1e-2, storage=fq.Storage(moments="learned")),
    "verified": partial(fq.adamw, 1e-2, verify_weights="error", skip_nonfinite=True),
}


@pytest.fixture(autouse=True)
def _small_leaves(monkeypatch):
    """Programs are compiled in less time."""
    monkeypatch.setattr(state_memory, "_SMALL", 2**8)


def _weights(seed=0, shapes=_SHAPES):
    return {
        name: jr.normal(jr.key(seed + i), shape, jnp.bfloat16)
        for i, (name, shape) in enumerate(shapes.items())
    }


def _kinds(tree):
    return {
        jtu.keystr(path): x.sharding.memory_kind
        for path, x in jtu.tree_leaves_with_path(tree)
    }


def _to_host(x):
    (device,) = x.devices()
    return jax.device_put(x, SingleDeviceSharding(device, memory_kind=AWAY))


def _check_same(name, steps=2):
    """Steps with the state in host memory, beside those with it on the device."""
    here, away = _MAKE[name](), _MAKE[name](state_memory=AWAY)
    weights = _weights()
    one, other = (weights, here.init(weights)), (weights, away.init(weights))
    kinds = _kinds(other)
    assert AWAY in kinds.values() and "device" in kinds.values()
    step, step_away = [jax.jit(x.step, donate_argnums=1) for x in (here, away)]
    for i in range(steps):
        grads = _weights(10 * i + 10)
        one, other = step(*one, grads), step_away(*other, grads)
    assert tree_identical(one, other)
    assert _kinds(other) == kinds
    return here, away, one, other


@pytest.mark.parametrize(
    "name",
    [
        # AdamW too.
        "verified",
        "muon",
        *[slow(name) for name in ("adamw", "lion", "sgd", "learned")],
    ],
)
def test_same_bits(name, monkeypatch):
    # Of a small leaf, several slices.
    monkeypatch.setattr(together, "PORTION", 2**10)
    _check_same(name)


@pytest.mark.once
def test_same_bits_in_one_portion():
    here, away, one, other = _check_same("adamw", 1)
    grads = _weights(50)
    # Outside of `jit`, and as an update.
    assert tree_identical(here.step(*one, grads), away.step(*other, grads))
    model, state = one
    expected = jax.jit(here.update)(grads, state, model)
    model, state = other
    found = jax.jit(away.update)(grads, state, model)
    assert tree_identical(expected, found)
    assert _kinds(found[1]) == _kinds(state)


@pytest.mark.once
def test_slices_of_updates(monkeypatch):
    """`update` leaves the weights alone, also where it takes slices."""
    monkeypatch.setattr(together, "PORTION", 2**10)
    weights, grads = _weights(), _weights(1)
    here, away = _MAKE["adamw"](), _MAKE["adamw"](state_memory=AWAY)
    expected = jax.jit(here.update)(grads, here.init(weights), weights)
    found = jax.jit(away.update)(grads, away.init(weights), weights)
    assert tree_identical(expected, found)


@pytest.mark.once
def test_whole_state_by_device_put():
    """What a user puts in host memory works there, whatever the option."""
    optim, weights, grads = _MAKE["verified"](), _weights(), _weights(1)
    state = optim.init(weights)
    away = jtu.tree_map(_to_host, state)
    assert set(_kinds(away).values()) == {AWAY}
    expected = jax.jit(optim.step)(weights, state, grads)
    model, found = jax.jit(optim.step)(weights, away, grads)
    assert tree_identical(expected, (model, found))
    assert set(_kinds(found).values()) == {AWAY}
    assert set(_kinds(model).values()) == {"device"}


@pytest.mark.slow
def test_learned_parameters_by_device_put():
    optim, weights, grads = _MAKE["learned"](), _weights(), _weights(1)
    state = optim.init(weights)
    expected = jax.jit(optim.step)(weights, state, grads)
    found = jax.jit(optim.step)(weights, jtu.tree_map(_to_host, state), grads)
    assert tree_identical(expected, found)


@pytest.mark.once
def test_ensemble():
    optim = _MAKE["adamw"]()
    weights = jtu.tree_map(lambda *x: jnp.stack(x), _weights(), _weights(1))
    state = eqx.filter_vmap(optim.init)(weights)
    away = jtu.tree_map(_to_host, state)
    step = jax.jit(lambda *args: eqx.filter_vmap(optim.step)(*args))
    assert tree_identical(step(weights, state, weights), step(weights, away, weights))


@pytest.mark.once
@pytest.mark.parametrize("kind", [AxisType.Auto, slow(AxisType.Explicit)])
def test_mesh(kind, monkeypatch):
    """Each device has its own part of the state in its host's memory."""
    monkeypatch.setattr(together, "PORTION", 2**10)
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(kind,))
    shapes = {"rows": (128, 64), "stack": (4, 128, 32), "bias": (7,)}
    weights = _weights(shapes=shapes)
    blocks = lambda tree: tree["stack"]
    shardings = fq.fsdp_shardings(weights, mesh, blocks=blocks)
    weights = jax.device_put(weights, shardings)
    grads = jtu.tree_map(lambda x: x * jnp.bfloat16(0.5), weights)
    here, away = _MAKE["adamw"](), _MAKE["adamw"](state_memory=AWAY)
    one, other = here.init(weights), away.init(weights)
    shardings = [x.sharding.spec for x in jtu.tree_leaves(one)]
    assert [x.sharding.spec for x in jtu.tree_leaves(other)] == shardings
    expected = jax.jit(here.step)(weights, one, grads)
    found = jax.jit(away.step, donate_argnums=1)(weights, other, grads)
    assert tree_identical(expected, found)
    codes = found[1].moments["mu"]["rows"].codes
    assert codes.sharding.memory_kind == AWAY
    assert {x.data.size for x in codes.addressable_shards} == {codes.size // 4}


def _layered():
    layers, width = 3, 32
    model = _weights(
        shapes={"in": (64, width), "out": (width, 64), "up": (layers, width, 64)}
    )
    loss = fq.LayeredLoss(
        blocks=lambda m: m["up"],
        prologue=lambda m, batch, key: m["in"][batch],
        block=lambda up, x, batch, key: x + jnp.tanh(x @ up) @ up.T,
        epilogue=lambda m, x, batch, key: jnp.mean((x @ m["out"]).astype(float) ** 2),
    )
    return model, loss, jnp.arange(16)


@pytest.mark.once
@pytest.mark.parametrize("name", [slow("adamw"), "muon"])
def test_release(name):
    model, loss, batch = _layered()
    found = []
    for options in ({}, {"state_memory": AWAY}):
        optim = _MAKE[name](**options)
        state = optim.init(model)
        kinds = _kinds(state)
        step = jax.jit(partial(fq.release_step, optim, loss), donate_argnums=1)
        new, state, _ = step(model, state, batch)
        assert _kinds(state) == kinds
        found.append(step(new, state, batch))
    assert tree_identical(*found)


#
# Beginning and end
#


@pytest.mark.once
@pytest.mark.parametrize("small", [True, False])
def test_prepare_and_functions_of_states(small, tmp_path, monkeypatch):
    if not small:
        monkeypatch.setattr("flashquinox._common.eager._MOST_BYTES_BOTH_WAYS", 0)
    model = jtu.tree_map(lambda x: x.astype(jnp.float32) * 1.001, _weights())
    here, away = _MAKE["adamw"](), _MAKE["adamw"](state_memory=AWAY)
    one, other = fq.prepare(model, here), fq.prepare(model, away)
    kinds = _kinds(other[1])
    assert kinds[".corrections['rows']"] == AWAY
    assert kinds[".corrections['bias']"] == kinds[".steps.count"] == "device"
    assert tree_identical(one, other)
    # Inside of `jit`.
    assert tree_identical(one, eqx.filter_jit(lambda x: fq.prepare(x, away))(model))
    step = jax.jit(away.step)
    one, other = step(*one, _weights(1)), step(*other, _weights(1))
    masters = fq.master_weights(*other)
    assert tree_identical(fq.master_weights(*one), masters)
    back = fq.from_master_weights(masters, *other)
    assert tree_identical(back, other) and _kinds(back) == _kinds(other)
    narrowed = fq.narrow_corrections(other[0], fq.widen_corrections(*other))
    assert tree_identical(narrowed, other[1]) and _kinds(narrowed) == kinds
    reports = [str(fq.check_numerics(*x, learning_rate=1e-3)) for x in (one, other)]
    assert reports[0] == reports[1]
    moved = [fq.map_moments(lambda x: x * 0.5, x[1]) for x in (one, other)]
    assert tree_identical(*moved) and _kinds(moved[1]) == _kinds(other[1])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, *other)
        checkpoints.wait()
        expected = step(*other, _weights(2))
        # Into host memory, and to the device.
        for like in (other, one):
            restored = checkpoints.restore(*like)
            assert tree_identical(restored, other) and _kinds(restored) == _kinds(like)
            assert tree_identical(step(*restored, _weights(2)), expected)


def test_repr():
    assert "state_memory='pinned_host'" in repr(_MAKE["adamw"](state_memory=AWAY))


def test_errors(monkeypatch):
    assert_raises(
        ValueError,
        lambda: fq.adamw(1e-3, state_memory="host"),
        "`adamw(state_memory=...)` must be 'device' or 'pinned_host'; got 'host'.",
    )
    optim, weights = _MAKE["adamw"](state_memory=AWAY), _weights()
    needed = sum(
        x.nbytes
        for x in jtu.tree_leaves(optim.init(weights))
        if x.sharding.memory_kind == AWAY
    )
    monkeypatch.setattr(state_memory, "free_bytes", lambda: needed)
    optim.init(weights)
    monkeypatch.setattr(state_memory, "free_bytes", lambda: needed - 1)
    with pytest.raises(MemoryError, match=f"needs {needed:,} bytes of host memory"):
        optim.init(weights)
    monkeypatch.setattr(memory, "has_host_memory", lambda device: False)
    with pytest.raises(ValueError, match="none for the platform 'cpu'"):
        optim.init(weights)


def test_memory_that_is_left(monkeypatch):
    left = host_memory.free_bytes()
    assert left is None or left > 0
    monkeypatch.delenv(host_memory.POOL_VARIABLE, raising=False)
    assert host_memory.pool_bytes() == 64 * 2**30
    monkeypatch.setenv(host_memory.POOL_VARIABLE, "100")
    assert host_memory.pool_bytes() == 100 * 2**30
    files = {
        "/proc/meminfo": ["MemTotal: 9 kB", "MemAvailable:   7 kB"],
        "/sys/fs/cgroup/memory.max": ["5000"],
        "/sys/fs/cgroup/memory.current": ["2000"],
        "/sys/fs/cgroup/memory.stat": ["active_file 7", "inactive_file 500"],
    }
    monkeypatch.setattr(host_memory, "_lines", lambda path: files.get(path, []))
    assert host_memory.free_bytes() == 3500
    files["/sys/fs/cgroup/memory.max"] = ["max"]
    assert host_memory.free_bytes() == 7 * 1024


@pytest.mark.parametrize(
    "shape, axes",
    [
        ((100, 64), (-1,)),
        ((100, 64), (-2,)),
        ((200, 10, 8), (-3,)),
        ((5000,), (-1,)),
        ((100, 6), (-2, -1)),
        ((210, 3, 10), (-3, -2, -1)),
    ],
)
def test_slices(shape, axes):
    """Each row and each scale is in one slice, and slices have whole groups of each
    layout."""
    layouts = Layout(shape, axes, 32), Layout(shape, (-len(shape),), 48)
    found = slices_of(shape, layouts, None, math.prod(shape) // 2)
    assert found is not None and len(found) > 1
    for layout, slices in zip(layouts, zip(*found, strict=True), strict=True):
        for of, length in (("rows", shape[0]), ("of_scales", layout.scale_shape[0])):
            spans = [getattr(x, of) for x in slices]
            assert [x.start for x in spans] == [0, *[x.end for x in spans[:-1]]]
            assert spans[-1].end == length
        for x in slices:
            part = layout.of_shape((x.rows.end - x.rows.start, *shape[1:]))
            assert part.scale_shape[0] == x.of_scales.end - x.of_scales.start
    assert slices_of(shape, layouts, None, math.prod(shape)) is None


@pytest.mark.once
@pytest.mark.parametrize("make", [fq.lamb, fq.lars])
def test_portions_of_rules_that_need_whole_leaves(make, monkeypatch):
    """No more is on the device than the largest leaf, although directions of more than
    that are made together where the state is there."""
    found, portions = [], advance.portions

    def record(*args):
        chosen = portions(*args)
        found.append([len(x) for x in chosen])
        return chosen

    monkeypatch.setattr(advance, "portions", record)
    params = {f"w{i}": jnp.zeros((32, 64), jnp.bfloat16) for i in range(3)}
    optim = make(1e-3, state_memory="pinned_host", backend="xla")
    jax.eval_shape(optim.step, params, optim.init(params), params)
    assert found == [[1, 1, 1]]
