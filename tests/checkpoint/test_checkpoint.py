"""Checkpoints restore bit for bit, wherever they are restored to; or say why not.

What needs several devices, or a process that dies, runs in processes of its own: this
file is also their program.
"""

import importlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import flashquinox as fq
from flashquinox._checkpoint import files
from flashquinox._common.digest import digest
from flashquinox._storage.moment_codecs import MomentCodecs
from flashquinox._storage.scales import decode_scale
from flashquinox.checkpoint import CheckpointError, Checkpoints

from ..helpers import (
    assert_code_of,
    float64,
    parametrize_cases,
    slow,
    tree_identical,
    weights,
)


def _model(rows=64):
    rng = np.random.default_rng(0)
    return {
        "layers": [
            jnp.asarray(rng.standard_normal((rows, 128)), jnp.bfloat16),
            jnp.asarray(rng.standard_normal((128,)), jnp.bfloat16),
        ],
        "activation": jax.nn.relu,
    }


def _train(optim, model, state, steps=2):
    for seed in range(steps):
        rng = np.random.default_rng(seed)

        def grad(x, rng=rng):
            if not eqx.is_inexact_array(x):
                return None
            size = np.exp(3 * rng.standard_normal(x.shape))
            return jnp.asarray(size * rng.standard_normal(x.shape), x.dtype)

        model, state = optim.step(model, state, jtu.tree_map(grad, model))
    return model, state


def _trained(optim=None, rows=64):
    optim = optim or fq.adamw(1e-2)
    model = _model(rows)
    return _train(optim, model, optim.init(model))


def _scrambled(tree, seed=0):
    """The same tree with other bits."""
    rng = np.random.default_rng(seed)

    def scramble(x):
        bits = np.frombuffer(rng.bytes(x.nbytes), np.uint8)
        return jnp.asarray(bits.view(x.dtype).reshape(x.shape))

    return _replaced(tree, scramble)


def _replaced(tree, function):
    return jtu.tree_map(lambda x: function(x) if eqx.is_array(x) else x, tree)


def _zeros(tree):
    # Not compiled.
    def zeros(x):
        new = np.zeros(x.shape, x.dtype)
        if isinstance(x, np.ndarray):
            return new
        return jax.device_put(new, x.sharding if x.committed else None)

    return _replaced(tree, zeros)


def _assert_restores(checkpoints, model, state, step=None):
    restored = checkpoints.restore(_zeros(model), _zeros(state), step)
    assert tree_identical(restored, (model, state))


def _raises(call, *parts):
    with pytest.raises(CheckpointError) as info:
        call()
    message = str(info.value)
    for part in parts:
        assert part in message, message
    assert message.endswith(".")


#
# One device
#


@pytest.mark.product
@parametrize_cases(lambda case: case.name == "adamw")
def test_every_storage(case, tmp_path):
    model = case.weights()
    optim = case.optimizer(1e-2)
    state = _scrambled(optim.init(model))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, model, state)
        _assert_restores(checkpoints, model, state)


class _WithEverything(eqx.Module):
    norm: eqx.nn.BatchNorm
    key: jax.Array
    keys: jax.Array
    old_key: jax.Array
    numpy: np.ndarray
    number: np.generic
    narrow: jax.Array
    complex: jax.Array
    flags: jax.Array
    named: dict
    rate: float
    nothing: None


def _with_everything(fill):
    norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
        4, "batch", mode="batch", dtype=jnp.bfloat16
    )
    state = _replaced(state, lambda x: jnp.full_like(x, fill))
    model = _WithEverything(
        norm=norm,
        key=jax.random.key(fill),
        keys=jax.random.split(jax.random.key(fill, impl="rbg"), 3),
        old_key=jax.random.PRNGKey(fill),
        numpy=np.arange(6.0).reshape(2, 3).T * fill,
        number=np.int64(fill + 2**40),
        narrow=jnp.asarray([fill % 8, -2, 3], jnp.int4),
        complex=jnp.asarray([fill + 2j]),
        flags=jnp.asarray([True, fill > 2]),
        named={"a/b": jnp.asarray(fill), 'c.%\n"é': jnp.zeros((0, 3))},
        rate=0.5,
        nothing=None,
    )
    return model, state


def test_every_kind_of_leaf(tmp_path):
    saved, like = _with_everything(5), _with_everything(1)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, *saved)
        restored = checkpoints.restore(*like)
    assert not tree_identical(_key_data(like), _key_data(saved))
    assert tree_identical(_key_data(restored), _key_data(saved))
    types = [type(x) for x in jtu.tree_leaves(restored)]
    assert types == [type(x) for x in jtu.tree_leaves(saved)]
    assert jax.random.key_impl(restored[0].keys) == jax.random.key_impl(saved[0].keys)

    # Of what is no array, the value of the argument.
    _, state = _trained()
    with Checkpoints(tmp_path / "python") as checkpoints:
        checkpoints.save(0, {"rate": 0.5, "f": jax.nn.relu}, state)
        model, _ = checkpoints.restore({"rate": 0.1, "f": jax.nn.gelu}, state)
    assert model == {"rate": 0.1, "f": jax.nn.gelu}


def _key_data(tree):
    is_key = lambda x: (
        isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    )
    return jtu.tree_map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)


def test_numpy_and_shapes(tmp_path):
    model, state = _trained()
    as_numpy = _replaced((model, state), np.asarray)
    like = eqx.filter_eval_shape(_trained)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, model, state)
        to_shapes = checkpoints.restore(*like)
        to_arrays = checkpoints.restore(model, state)
        to_numpy = checkpoints.restore(*_replaced(as_numpy, np.zeros_like))
        checkpoints.save(1, *to_numpy)
        _assert_restores(checkpoints, model, state)
    assert tree_identical(to_shapes, (model, state))
    assert tree_identical(to_numpy, as_numpy)
    arrays = [x for x in jtu.tree_leaves(to_numpy) if eqx.is_array_like(x)]
    assert arrays and all(isinstance(x, np.ndarray) for x in arrays)
    # As new arrays are: not bound to one device.
    for x in filter(eqx.is_array, jtu.tree_leaves((to_shapes, to_arrays))):
        assert not x.committed


def test_resumed_run_is_the_same(tmp_path):
    optim = fq.adamw(1e-2)
    model, state = _trained(optim)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state.count, model, state)
        restored = checkpoints.restore(_zeros(model), _zeros(state))
    assert tree_identical(
        _train(optim, *restored, steps=3), _train(optim, model, state, steps=3)
    )


def test_state_of_a_wrapper(tmp_path):
    optim = optax.chain(optax.clip_by_global_norm(1.0), fq.lion(1e-3))
    model = weights("matrix", "bias")
    state = (optim.init(model), jax.random.PRNGKey(3))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, model, state)
        _assert_restores(checkpoints, model, state)


def test_equinox_on_one_device(tmp_path):
    model, state = _trained()
    path = str(tmp_path / "checkpoint.eqx")
    eqx.tree_serialise_leaves(path, (model, state))
    like = (_zeros(model), _zeros(state))
    assert tree_identical(eqx.tree_deserialise_leaves(path, like), (model, state))


def test_donation_and_change_after_save(tmp_path):
    numpy = np.arange(1_000_000)
    arrays = [jnp.arange(1_000_000.0), jnp.arange(4_000_000, dtype=jnp.uint8)]
    expected = _replaced((arrays, numpy), np.array)
    increase = jax.jit(lambda xs: [x + x.dtype.type(1) for x in xs], donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        for step in range(3):
            checkpoints.save(step, arrays, numpy)
            numpy += 1
            for _ in range(5):
                arrays = increase(arrays)
            jax.block_until_ready(arrays)
            restored = checkpoints.restore(arrays, numpy)
            assert tree_identical(_replaced(restored, np.asarray), tuple(expected))
            expected = _replaced((arrays, numpy), np.array)
        # What is restored to may have been donated.
        old = arrays
        arrays = increase(arrays)
        _, _ = checkpoints.restore(old, numpy)


def test_memory_of_the_host(tmp_path):
    kind = "pinned_host"
    if kind not in [m.kind for m in jax.devices()[0].addressable_memories()]:
        pytest.skip("this device has no other memory")
    model, state = _trained()
    there = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind=kind)
    put = lambda x: jax.device_put(x, there)
    offloaded = _replaced(state, put)
    like = fq.adamw(1e-2, storage=fq.Storage(group_size=64)).init(model)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, model, offloaded)
        restored = checkpoints.restore(model, offloaded)
        regrouped = checkpoints.restore(model, _replaced(like, put))
        expected = checkpoints.restore(model, like)
    assert tree_identical(restored, (model, state))
    assert tree_identical(regrouped, expected)
    for _, tree in (restored, regrouped):
        for x in filter(eqx.is_array, jtu.tree_leaves(tree)):
            assert x.sharding.memory_kind == kind


def test_full_disk(tmp_path):
    model = {"w": jnp.asarray(np.random.default_rng(0).standard_normal(100_000))}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(tmp_path, max_to_keep=1) as checkpoints:
        checkpoints.save(1, model, ())
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        try:
            with pytest.raises(Exception, match="File too large"):
                checkpoints.save(2, model, ())
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert checkpoints.all_steps() == [1]
        _assert_restores(checkpoints, model, ())
        checkpoints.save(2, model, ())
        assert checkpoints.all_steps() == [2]
        _assert_restores(checkpoints, model, ())


def test_steps(tmp_path):
    model, state = weights("matrix"), ()
    with Checkpoints(tmp_path, max_to_keep=2, keep_period=4) as checkpoints:
        assert checkpoints.latest_step() is None and checkpoints.all_steps() == []
        for step in range(8):
            checkpoints.save(step, {"w": model["matrix"] + step}, state)
        assert checkpoints.all_steps() == [0, 4, 6, 7]
        for step in (0, 4, 6, 7, None):
            restored, _ = checkpoints.restore({"w": model["matrix"]}, state, step)
            expected = model["matrix"] + (7 if step is None else step)
            assert tree_identical(restored, {"w": expected})
        _raises(lambda: checkpoints.save(7, {}, ()), "save(step=7)", "delete")
        _raises(lambda: checkpoints.save(3, {}, ()), "save(step=3)", "delete")
        _raises(lambda: checkpoints.save(-1, {}, ()), "save(step=-1)", "from 0")
        _raises(lambda: checkpoints.restore({}, (), 5), "step=5", "[0, 4, 6, 7]")
        checkpoints.delete(7)
        checkpoints.delete(6)
        _raises(lambda: checkpoints.delete(6), "delete(step=6)", "[0, 4]")
        checkpoints.save(5, model, state)
    with Checkpoints(str(tmp_path)) as reader:
        assert reader.latest_step() == 5 and type(reader.latest_step()) is int
        _assert_restores(reader, model, state)
        # Another process may write while this one reads.
        with Checkpoints(tmp_path) as writer:
            writer.save(9, model, state)
        assert reader.latest_step() == 9


def test_save_returns_before_files_are_complete(tmp_path, monkeypatch):
    import orbax.checkpoint as ocp

    released = threading.Event()
    finalize = ocp.PyTreeCheckpointHandler.finalize

    def held(self, directory):
        # In the thread of the caller, it would wait for itself.
        assert threading.current_thread() is not threading.main_thread()
        assert released.wait(timeout=20)
        finalize(self, directory)

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "finalize", held)
    model, state = _trained()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, model, state)
        assert not (tmp_path / "1").exists()
        released.set()
        assert checkpoints.latest_step() == 1
        _assert_restores(checkpoints, model, state)


def test_what_a_killed_save_leaves(tmp_path):
    model, state = weights("matrix"), ()
    leftovers = [tmp_path / f"{step}.orbax-checkpoint-tmp" for step in (2, 9)]
    for folder in leftovers:
        (folder / "arrays").mkdir(parents=True)
        (folder / "arrays" / "data").write_bytes(b"1234")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() is None
        checkpoints.save(1, model, state)
        # Another process might still write them.
        assert checkpoints.all_steps() == [1] and all(f.exists() for f in leftovers)
        checkpoints.save(2, model, state)
        checkpoints.wait()
        assert [folder.exists() for folder in leftovers] == [False, True]
        shutil.rmtree(leftovers[1])
        _assert_restores(checkpoints, model, state, 2)


def test_without_arrays(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step, tree in enumerate(({}, {"f": jax.nn.relu}, {"x": jnp.zeros((0, 3))})):
            checkpoints.save(step, tree, ())
            _assert_restores(checkpoints, tree, ())
        assert checkpoints.all_steps() == [0, 1, 2]


def test_after_close(tmp_path):
    model, state = weights("matrix"), ()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, model, state)
    with pytest.raises(ValueError, match="came after `close`") as info:
        checkpoints.save(2, model, state)
    message = str(info.value)
    assert "`Checkpoints.save(step=2)`" in message and str(tmp_path) in message
    checkpoints.close()
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    # There is nothing to wait for.
    _assert_restores(checkpoints, model, state)


@pytest.mark.usefixtures("without_typechecker")
def test_how_many_to_keep(tmp_path):
    model, state = weights("matrix"), ()
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, model, state)
    for name in ("max_to_keep", "keep_period"):
        for value in (0, -1, 1.5, 1.0, "3", True, [2]):
            with pytest.raises(ValueError) as info:
                Checkpoints(tmp_path / "new", **{name: value})
            message = str(info.value)
            assert f"`Checkpoints({name}=...)`" in message and "from 1" in message
            assert message.endswith(f"got {value!r}.")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]
    with Checkpoints(tmp_path, max_to_keep=None, keep_period=None) as checkpoints:
        checkpoints.save(3, model, state)
        assert checkpoints.all_steps() == [1, 2, 3]
    with Checkpoints(tmp_path, max_to_keep=np.int64(1)) as checkpoints:
        checkpoints.save(4, model, state)
        assert checkpoints.all_steps() == [4]


def test_relative_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Checkpoints("below/here") as checkpoints:
        checkpoints.save(0, weights("matrix"), ())
    assert (tmp_path / "below" / "here" / "0").is_dir()


#
# Groups elsewhere
#


@pytest.mark.product
@pytest.mark.parametrize(
    "old,new",
    [
        ({}, {"backend": "tpu"}),
        ({"backend": "tpu"}, {}),
        slow({}, {"storage": fq.Storage(group_size=64)}),
        (
            {"storage": fq.Storage(moments="flashoptim")},
            {"storage": fq.Storage(moments="flashoptim", group_size=64)},
        ),
    ],
)
def test_other_groups(old, new, tmp_path):
    # AdamW, one way.
    make = fq.lion if old == {"backend": "tpu"} else fq.adamw
    model, state = _trained(make(1e-2, **old | {"backend": "auto"}))
    state = _as_laid_out(state, make(1e-2, **old).init(model), tmp_path / "old")
    like = make(1e-2, **new).init(model)
    with Checkpoints(tmp_path / "new") as checkpoints:
        checkpoints.save(0, model, state)
        new_model, new_state = checkpoints.restore(_zeros(model), like)
        shape_like = eqx.filter_eval_shape(make(1e-2, **new).init, model)
        again = checkpoints.restore(_replaced(model, np.asarray), shape_like)
    assert jtu.tree_structure(new_state) == jtu.tree_structure(like)
    assert tree_identical(new_model, model)
    assert tree_identical(again[1], new_state)
    assert tree_identical(new_state.corrections, state.corrections)
    assert tree_identical(new_state.steps, state.steps)
    for name, found in new_state.moments.items():
        found, stored = found["layers"], state.moments[name]["layers"]
        if "storage" not in old:
            assert tree_identical(found[1], stored[1])
        assert found[0].scales.shape != stored[0].scales.shape
        _assert_nearest(found[0], stored[0])


def _as_laid_out(state, like, directory):
    """A trained state in the groups of another one."""
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(0, None, state)
        _, state = checkpoints.restore(None, like)
    return state


def _assert_nearest(found, stored):
    codec = found.codec
    if isinstance(codec, fq.FittedLogCodec):
        codec = fq.FittedLogCodec(dithered=False)
    if isinstance(codec, fq.LinearCodec):
        codec = fq.LinearCodec(dithered=False)
        layout = found.layout
        tile = layout.tile(jnp.abs(stored.decode_stored()))
        exact = float64(jnp.max(tile, axis=layout.tile_axis)) / 126
        error = np.abs(float64(decode_scale(found.scales, 7)) - exact)
        # Half a place of eight bits.
        assert np.all(error <= (2.0**-8 + 2.0**-20) * exact)
    found = fq.QuantMoment(
        found.codes, found.scales, found.axes, found.group_size, codec
    )
    assert_code_of(found, np.asarray(stored.decode_stored()))
    assert not np.array_equal(np.asarray(found.codes), np.asarray(stored.codes))


@pytest.mark.once
def test_other_groups_of_an_ensemble(tmp_path):
    model = jnp.stack([_model()["layers"][0]] * 2)
    states = {}
    for size in (32, 64):
        optim = fq.adamw(
            1e-2, storage=fq.Storage(moments="flashoptim", group_size=size)
        )
        states[size] = jax.vmap(optim.init)(model)
    optim = fq.adamw(1e-2, storage=fq.Storage(moments="flashoptim"))
    grads = jnp.asarray(
        np.random.default_rng(0).standard_normal(model.shape), model.dtype
    )
    model, state = jax.vmap(optim.step)(model, states[32], grads)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, model, state)
        _, restored = checkpoints.restore(model, states[64])
        ones = []
        for member in range(2):
            pick = lambda tree, member=member: _replaced(tree, lambda x: x[member])
            checkpoints.save(member + 1, pick(model), pick(state))
            ones.append(checkpoints.restore(pick(model), pick(states[64]))[1])
    assert tree_identical(restored, jtu.tree_map(lambda *xs: jnp.stack(xs), *ones))


#
# What is wrong
#


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    model, state = _trained()
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(3, model, state)
    return directory, model, state


_weight = "['layers'][0]"


@pytest.mark.parametrize(
    "make,parts",
    [
        (
            lambda: (_model(rows=32), fq.adamw(1e-3).init(_model(rows=32))),
            [f"model{_weight}", "(64, 128)", "(32, 128)", "bfloat16"],
        ),
        (
            lambda: (_model() | {"more": jnp.zeros(2)}, fq.adamw(1e-3).init(_model())),
            ["has nothing at `model['more']`", "float32 of shape (2,)"],
        ),
        (
            lambda: ({"layers": []}, fq.adamw(1e-3).init(_model())),
            [f"at `model{_weight}`", "no array", "(64, 128)"],
        ),
        (
            lambda: (
                fq.cast(_model(), jnp.float32),
                fq.adamw(1e-3).init(_model()),
            ),
            [f"model{_weight}", "bfloat16", "float32"],
        ),
        (
            lambda: (_model(), fq.lion(1e-3).init(_model())),
            [f"state.moments['mu']{_weight}", "relative to 'nu'", "SoftsignCodec("],
        ),
        (
            lambda: (_model(), fq.sgd(1e-3).init(_model())),
            [f"state.moments['mu']{_weight}", "no array", "optimizer"],
        ),
        (
            lambda: (
                _model(),
                fq.adamw(1e-3, storage=fq.Storage(master_weight_bits=32)).init(
                    _model()
                ),
            ),
            [f"corrections{_weight}", "int8", "int16", "master_weight_bits"],
        ),
        (
            lambda: (
                _model(),
                fq.adamw(1e-3, storage=fq.Storage(master_weight_bits=None)).init(
                    _model()
                ),
            ),
            [f"corrections{_weight}", "int8", "no array", "master_weight_bits"],
        ),
        (
            lambda: (
                _model(),
                fq.adamw(1e-3, storage=fq.Storage(moments="float32")).init(_model()),
            ),
            [f"['mu']{_weight}", "LinearCodec(", "FullPrecision()", "moments="],
        ),
        (
            lambda: (
                _model(),
                fq.adamw(1e-3, storage=fq.Storage(moments="flashoptim")).init(_model()),
            ),
            [f"['mu']{_weight}", "LinearCodec(", "FlashOptimCodec(kind='signed')"],
        ),
        (lambda: (_model(), ()), ["`state", "no array"]),
    ],
)
def test_other_trees(make, parts, saved):
    directory, *_ = saved
    model, state = make()
    with Checkpoints(directory) as checkpoints:
        before = _replaced((model, state), np.array)
        _raises(
            lambda: checkpoints.restore(model, state),
            "`Checkpoints.restore`",
            f"{directory}/3",
            *parts,
        )
        assert tree_identical(_replaced((model, state), np.array), before)


def test_64_bits(saved):
    directory, model, state = saved
    like = model | {"more": jax.ShapeDtypeStruct((), np.int64)}
    with Checkpoints(directory) as checkpoints:
        _raises(
            lambda: checkpoints.restore(like, state),
            "`model['more']`",
            "int64",
            "jax_enable_x64",
        )


def test_shardings_that_do_not_divide(tmp_path):
    mesh = jax.sharding.Mesh(jax.devices()[:4], ("data",))
    keys = jax.random.split(jax.random.key(0), 6)
    arrays = {"w": jnp.ones((6, 64)), "keys": keys}

    def like(name, spec):
        x = arrays[name]
        there = NamedSharding(mesh, spec)
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there)
        return arrays | {name: shape}

    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, arrays, ())
        for name, shape in (("w", "(6, 64)"), ("keys", "(6,)")):
            with pytest.raises(CheckpointError) as info:
                checkpoints.restore(like(name, P("data")), ())
            message = str(info.value)
            for part in (f"`model['{name}']`", shape, "'data'", "(data=4)", "another"):
                assert part in message, message
            assert "damaged" not in message and "delete" not in message
        for spec in (P(None, "data"), P()):
            restored, _ = checkpoints.restore(like("w", spec), ())
            assert restored["w"].sharding == NamedSharding(mesh, spec)
            assert tree_identical(_key_data(restored), _key_data(arrays))


def test_what_is_no_damage(saved, monkeypatch):
    directory, model, state = saved
    with Checkpoints(directory) as checkpoints:

        def fail(error):
            def read(*_):
                raise error

            monkeypatch.setattr(files, "read", read)

        # The machine has too little memory: that is for the caller to see.
        for error in (MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")):
            fail(error)
            with pytest.raises(type(error)) as info:
                checkpoints.restore(model, state)
            assert info.value is error
        # What it may be is not said to be damage.
        fail(OSError("Too many open files.\nAnd so on"))
        _raises(
            lambda: checkpoints.restore(model, state),
            "cannot be read (OSError: Too many open files). Unless",
        )


def test_other_codec_of_the_checkpoint(tmp_path):
    model, state = _trained(fq.adamw(1e-3, storage=fq.Storage(moments="float32")))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, model, state)
        _raises(
            lambda: checkpoints.restore(model, fq.adamw(1e-3).init(model)),
            f"['mu']{_weight}",
            "by FullPrecision()",
            "uses LinearCodec(",
        )


def test_scales_of_before_keep_their_bits(tmp_path):
    codecs = lambda codec, **options: fq.MomentCodecs(
        codec, fq.FittedLogCodec(), **options
    )
    before = fq.SoftsignCodec(dithered=False, scale_mantissa_bits=7)
    now = fq.SoftsignCodec(scale_mantissa_bits=7)
    optims = [
        fq.adamw(1e-3, storage=fq.Storage(moments=moments))
        for moments in (codecs(before, relative=None), codecs(now))
    ]
    model, state = _trained(optims[0])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, model, state)
        _, found = checkpoints.restore(model, optims[1].init(model))
    stored, again = (s.moments["mu"]["layers"][0] for s in (state, found))
    assert again.relative_to == "nu"
    assert_code_of(again, np.asarray(stored.decode()))


@pytest.mark.usefixtures("without_typechecker")
def test_what_cannot_be_saved(tmp_path):
    donated = jnp.arange(3.0) + 1
    jax.jit(lambda x: x + 1, donate_argnums=0)(donated)
    with Checkpoints(tmp_path) as checkpoints:
        for value, part in (
            (jax.ShapeDtypeStruct((2,), jnp.float32), "has no value"),
            (np.array(["a", "b"]), "<U1"),
            (np.array([object()]), "object"),
            (np.array([1.0], ">f4"), ">f4"),
            (donated, "donated"),
        ):
            with pytest.raises(TypeError, match=r"model\['x'\]") as info:
                checkpoints.save(0, {"x": value}, ())
            assert part in str(info.value)
        with pytest.raises(TypeError, match="outside of `jit`"):
            jax.jit(lambda x: checkpoints.save(0, {"x": x}, ()))(jnp.zeros(2))
        for optim in (fq.adamw(1e-3), optax.adam(1e-3)):
            with pytest.raises(TypeError, match="where its state belongs"):
                checkpoints.save(0, {"x": jnp.zeros(2)}, optim)
        assert checkpoints.all_steps() == []


def test_leaves_of_one_name(tmp_path):
    class Key:
        def __repr__(self):
            return "key"

    with Checkpoints(tmp_path) as checkpoints:
        a, b = Key(), Key()
        tree = [jnp.zeros(2), jnp.ones(2)]
        jtu.register_pytree_with_keys(
            Key,
            lambda _: (tuple((jtu.DictKey(a), x) for x in tree), None),
            lambda _, xs: b,
        )
        _raises(lambda: checkpoints.save(0, Key(), ()), "two leaves", "model[key]")


def test_foreign_directories(tmp_path, saved):
    model, state = _model(), fq.adamw(1e-3).init(_model())
    # Nothing there, other files, and the directory of the step itself.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").write_bytes(b"1234")
    (tmp_path / "other" / "subfolder").mkdir()
    for directory in (tmp_path / "none", tmp_path / "other", saved[0] / "3"):
        with Checkpoints(directory) as checkpoints:
            _raises(
                lambda c=checkpoints: c.restore(model, state),
                "there is no checkpoint",
                str(directory),
            )
    # A directory that only looks like a step.
    (tmp_path / "numbers" / "7").mkdir(parents=True)
    (tmp_path / "numbers" / "7" / "data").write_bytes(b"1234")
    with Checkpoints(tmp_path / "numbers") as checkpoints:
        _raises(lambda: checkpoints.restore(model, state), "numbers")
    # A checkpoint that Orbax wrote for someone else.
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(tmp_path / "orbax") as manager:
        manager.save(1, args=ocp.args.StandardSave({"w": jnp.ones(3)}))
    with Checkpoints(tmp_path / "orbax") as checkpoints:
        _raises(lambda: checkpoints.restore(model, state), "no checkpoint of flashq")
    # A file.
    eqx.tree_serialise_leaves(str(tmp_path / "file.eqx"), model)
    _raises(lambda: Checkpoints(tmp_path / "file.eqx"), "is a file")


@pytest.mark.parametrize(
    "change,parts",
    [
        (
            {"format_version": 4, "flashquinox_version": "9.1"},
            ["version 4", "flashquinox 9.1", fq.__version__, "Install"],
        ),
        ({"format_version": 0}, ["version 0", "reads format versions 1, 2 and 3"]),
        ({"format": "something"}, ["not a checkpoint of flashquinox"]),
        ({"contents": {"arrays": {}, "moments": {}}}, ["manifest is altered"]),
        ({"sha256": None}, ["manifest is altered"]),
        ("[]", ["not a checkpoint of flashquinox"]),
        ("{}", ["not a checkpoint of flashquinox"]),
        ("{", ["damaged"]),
    ],
)
def test_manifests(change, parts, saved, tmp_path):
    directory, model, state = saved
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "3" / "flashquinox" / "metadata"
    manifest = json.loads(path.read_text())
    # Readable, and by name.
    codes = manifest["contents"]["arrays"][f"state.moments['mu']{_weight}.codes"]
    assert codes["shape"] == [64, 128] and codes["dtype"] == "int8"
    is_text = isinstance(change, str)
    path.write_text(change if is_text else json.dumps(manifest | change))
    with Checkpoints(tmp_path) as checkpoints:
        _raises(lambda: checkpoints.restore(model, state), f"{tmp_path}/3", *parts)


@pytest.mark.parametrize("flips", [4, slow(16)])
def test_damage(flips, saved, tmp_path, capfd):
    directory, model, state = saved
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    shutil.copytree(tmp_path / "3", tmp_path / "1")
    rng = random.Random(0)
    before = _replaced((model, state), np.array)
    found = {}
    with Checkpoints(tmp_path) as checkpoints:

        def restores():
            try:
                restored = checkpoints.restore(model, state)
            except CheckpointError as error:
                message = str(error)
                assert str(tmp_path / "3") in message and message.endswith("."), message
                # Another one, and how to be rid of this one; unless it looks like one
                # of another program or version.
                if "format version" not in message:
                    assert "[1]" in message and "delete(3)" in message, message
                return False
            # Never wrong data.
            assert tree_identical(restored, (model, state))
            return True

        for path in sorted((tmp_path / "3").rglob("*")):
            if not path.is_file():
                continue
            data = path.read_bytes()
            kind = "/".join(path.relative_to(tmp_path / "3").parts[:2])
            seen = found.setdefault(kind, [])
            for position in rng.sample(range(8 * len(data)), flips):
                flipped = bytearray(data)
                flipped[position // 8] ^= 1 << position % 8
                path.write_bytes(flipped)
                seen.append(restores())
            for length in (0, len(data) // 2, len(data) - 1):
                path.write_bytes(data[:length])
                seen.append(restores())
            # Not told from one that was being deleted.
            path.unlink()
            assert checkpoints.all_steps() == [1] or kind == "commit_success.txt"
            path.write_bytes(data)
        assert restores()
        assert tree_identical(_replaced((model, state), np.array), before)
    # Of the files that matter, most damage is seen.
    assert not any(found["flashquinox/metadata"])
    assert not any(found["arrays/manifest.ocdbt"])
    # No thread in the background says what the error says.
    assert "Traceback" not in capfd.readouterr().err


def test_wrong_arrays_behind_a_right_manifest(saved, tmp_path):
    # As if Orbax had read other bits, or those of another array.
    directory, model, state = saved
    other = jtu.tree_map(
        lambda x: x if x is not model["layers"][0] else x.at[3, 5].multiply(-1), model
    )
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, other, state)
    shutil.copy(directory / "3/flashquinox/metadata", tmp_path / "3/flashquinox")
    with Checkpoints(tmp_path) as checkpoints:
        _raises(lambda: checkpoints.restore(model, state), "damaged", f"model{_weight}")


@pytest.mark.parametrize(
    "dtype",
    [
        *(jnp.bool_, jnp.int4, jnp.int8, jnp.uint16, jnp.int32, np.int64),
        *(jnp.float8_e4m3fn, jnp.bfloat16, jnp.float32, np.float64),
        *(jnp.complex64, np.complex128),
    ],
)
def test_digest(dtype):
    rng = np.random.default_rng(0)
    size = np.dtype(dtype).itemsize
    data = rng.integers(0, 256, (3, 5, size), np.uint8)
    if dtype in (jnp.bool_, jnp.int4):
        data = data % (2 if dtype == jnp.bool_ else 8)
    x = data.view(dtype)[..., 0]
    expected = int(digest("a", x))
    assert int(digest("b", x)) != expected
    assert int(digest("a", x.T)) != expected
    if jax.dtypes.canonicalize_dtype(dtype) == dtype:
        assert int(digest("a", jnp.asarray(x))) == expected
    bits = {jnp.bool_: 1, jnp.int4: 3}.get(dtype, 8 * size)
    for index in np.ndindex(3, 5):
        for bit in rng.permutation(bits)[:4]:
            flipped = data.copy()
            flipped[(*index, bit // 8)] ^= np.uint8(1 << bit % 8)
            assert int(digest("a", flipped.view(dtype)[..., 0])) != expected
    # Two arrays of one shape that change places.
    assert int(digest("a", x)) + int(digest("b", x)) != 2 * expected


def test_without_orbax(monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    for name in ("flashquinox.checkpoint", "flashquinox._checkpoint.checkpoints"):
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"pip install \"flashquinox\[checkpoint\]\""):
        importlib.import_module("flashquinox.checkpoint")


#
# Other versions of the library
#


_DATA = Path(__file__).parent / "data"
# Each was written by the library of its time, with these arguments: the first one; one
# of the first day, with moments as in the paper; one when there were curves to choose;
# and one when manifests began to list files.
_NEAREST = fq.MomentCodecs(
    fq.SoftsignCodec(dithered=False), fq.FittedLogCodec(), relative=None
)
_CURVES = MomentCodecs.named(("learned", "sqrt"))
_WRITTEN = {
    "checkpoint-format-1": fq.Storage(master_weight_bits=24, moments=_NEAREST),
    "checkpoint-format-1-paper": fq.Storage(
        master_weight_bits=32, moments="flashoptim"
    ),
    "checkpoint-format-1-curves": fq.Storage(
        master_weight_bits=24,
        moments=fq.MomentCodecs(_CURVES.signed, _CURVES.nonnegative, relative=None),
    ),
    "checkpoint-format-1-files": fq.Storage(master_weight_bits=24, moments=_NEAREST),
}
# What `moments` was called then. First moments are stored otherwise now.
_CALLED = {
    "checkpoint-format-1": "flashquinox",
    "checkpoint-format-1-curves": ("learned", "sqrt"),
    "checkpoint-format-1-files": "flashquinox",
}


def _written(name):
    """What is stored in the repository: bits that follow from the order of the leaves
    alone."""
    optim = fq.adamw(1e-2, storage=_WRITTEN[name], backend="xla")
    model = {"w": jnp.zeros((4, 64), jnp.bfloat16), "b": jnp.zeros(3)}
    state = optim.init(model)
    if name == "checkpoint-format-1":
        key = jax.random.PRNGKey(0)
        state = (state, key, np.zeros(2, np.int64), jnp.zeros((0, 2)))
    leaves, structure = jtu.tree_flatten((model, state))
    for number, x in enumerate(leaves):
        bits = (np.arange(x.nbytes) * 89 + number) % 251
        filled = bits.astype(np.uint8).view(x.dtype).reshape(x.shape)
        leaves[number] = filled if isinstance(x, np.ndarray) else jnp.asarray(filled)
    return structure.unflatten(leaves)


@pytest.mark.parametrize("name", _WRITTEN)
def test_what_was_ever_written(name, tmp_path):
    stored = _written(name)
    like = jtu.tree_map(
        lambda x: (np if isinstance(x, np.ndarray) else jnp).zeros_like(x), stored
    )
    shutil.copytree(_DATA / name, tmp_path, dirs_exist_ok=True)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.all_steps() == [1]
        assert tree_identical(checkpoints.restore(*like), stored)
        if name in _CALLED:
            _assert_stored_as_now(checkpoints, _CALLED[name], stored, like)
        # Complete ones only: of before manifests listed files, by what must be there.
        (tmp_path / "1" / "arrays" / "manifest.ocdbt").unlink()
        assert checkpoints.all_steps() == []


def _assert_stored_as_now(checkpoints, moments, stored, like):
    """A checkpoint of before moments were relative to others is restored to a state of
    today, of the same options."""
    storage = fq.Storage(master_weight_bits=24, moments=moments)
    now = fq.adamw(1e-2, storage=storage, backend="xla").init(like[0])
    wrapped = isinstance(like[1], tuple)
    model, state = checkpoints.restore(like[0], (now, *like[1][1:]) if wrapped else now)
    state, old = (x[0] if wrapped else x for x in (state, stored[1]))
    assert tree_identical(model, stored[0])
    keep = lambda s: (s.moments["nu"], s.moments["mu"]["b"], s.corrections, s.steps)
    assert tree_identical(keep(state), keep(old))
    assert jtu.tree_structure(state) == jtu.tree_structure(now)
    before, after = (s.moments["mu"]["w"] for s in (old, state))
    exact, base = (np.asarray(x.decode()) for x in (before, old.moments["nu"]["w"]))
    if after.parameter is not None:
        # Nor does a curve mean anything whose parameter is any bits.
        assert tree_identical(after.parameter, before.parameter)
        return
    # Of bits that mean nothing, some quotients are beyond all scales.
    with np.errstate(over="ignore"):
        quotient = np.abs(exact / np.sqrt(base))
    assert np.any(quotient < 2.0**62)
    exact = np.where(quotient <= 2.0**62, exact, 0)
    assert_code_of(after, exact)


@pytest.mark.once
def test_groups_of_before(tmp_path):
    """Written by version 0.2 after three steps, with its moments as numbers beside it,
    when groups ran along one axis, which needed not be the last."""
    name = "checkpoint-format-2"
    shapes = {
        "conv": (4, 32, 3, 3),
        "matrix": (64, 33),
        "vector": (5,),
        "rows": (3, 64),
    }
    like = {name: jnp.zeros(shape, jnp.bfloat16) for name, shape in shapes.items()}
    shutil.copytree(_DATA / name, tmp_path, dirs_exist_ok=True)
    with Checkpoints(tmp_path) as checkpoints:
        _, state = checkpoints.restore(like, fq.adamw(1e-2, backend="xla").init(like))
    assert int(state.count) == 3
    with np.load(_DATA / name / "moments.npz") as exact:
        for leaf in shapes:
            base = exact[f"nu/{leaf}"]
            for kind in ("mu", "nu"):
                moment = state.moments[kind][leaf]
                if leaf == "vector":
                    assert np.array_equal(moment, exact[f"{kind}/{leaf}"])
                else:
                    assert_code_of(moment, exact[f"{kind}/{leaf}"], base=base)


def write(name, directory):
    """Wrote these checkpoints once: `python -m tests.checkpoint.test_checkpoint write
    NAME DIRECTORY`. Those of a later format go beside them."""
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(1, *_written(name))


#
# Other processes
#


def _start(program, *arguments, devices=1):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        # Most of the time goes to XLA: it optimizes less.
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} "
        "--xla_backend_optimization_level=0",
    }
    return subprocess.Popen(
        [sys.executable, "-m", __name__, program, *map(str, arguments)],
        cwd=Path(__file__).parents[2],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _run(program, *arguments, devices=1):
    process = _start(program, *arguments, devices=devices)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output


def test_import_is_lazy():
    code = "import sys, flashquinox; assert 'orbax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


@pytest.mark.once
def test_meshes(tmp_path):
    _run("meshes", tmp_path, devices=8)


def meshes(directory):
    """8 → 4 → 1 → 8 devices; automatic and explicit axes; groups elsewhere."""
    # One moment: less to compile.
    model, state = _trained(fq.lion(1e-2), rows=256)
    expected = _replaced((model, state), np.asarray)
    devices = np.array(jax.devices())
    assert len(devices) == 8

    def mesh(shape, kind, order=devices):
        order = order[: np.prod(shape)].reshape(shape)
        return jax.sharding.Mesh(order, ("x", "y"), axis_types=(kind, kind))

    def place(tree, mesh, spec=None):
        spec = P("x", "y") if spec is None else spec

        def put(x):
            there = NamedSharding(mesh, spec if x.ndim == 2 else P())
            return jax.device_put(np.asarray(x), there)

        return _replaced(tree, put)

    def assert_like(found, like, expected=expected):
        assert tree_identical(_replaced(found, np.asarray), expected)
        for x, y in zip(jtu.tree_leaves(found), jtu.tree_leaves(like), strict=True):
            if eqx.is_array(x):
                assert x.sharding == y.sharding, (x.sharding, y.sharding)

    eight = mesh((4, 2), AxisType.Auto)
    backwards = mesh((2, 4), AxisType.Explicit, devices[::-1])
    places = [
        place((model, state), eight),
        place((model, state), mesh((2, 2), AxisType.Auto), P("y", "x")),
        _replaced((model, state), lambda x: jax.device_put(x, devices[5])),
        place((model, state), backwards, P(("x", "y"))),
        place((model, state), eight, P()),
    ]
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(0, *places[0])
        for step, like in enumerate(places[1:], 1):
            found = checkpoints.restore(*_zeros(like))
            assert_like(found, like)
            checkpoints.save(step, *found)

        # The mesh that the caller has set is not that of the arrays, or is.
        explicit = place((model, state), backwards)
        for step, outer in enumerate((backwards, mesh((2, 2), AxisType.Auto)), 10):
            with jax.set_mesh(outer):
                for like in (places[0], places[2], explicit):
                    assert_like(checkpoints.restore(*like), like)
                checkpoints.save(step, *places[0])
            assert_like(checkpoints.restore(*places[1]), places[1])

        # Shapes with shardings: of devices; of an abstract mesh; and without.
        shapes = lambda tree: jtu.tree_map(
            lambda x: (
                jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
                if eqx.is_array(x)
                else x
            ),
            tree,
        )
        for like in (places[0], explicit):
            assert_like(checkpoints.restore(*shapes(like)), like)
        copy = lambda tree: _replaced(tree, jnp.copy)
        abstract = eqx.filter_eval_shape(copy, explicit)
        _raises(
            lambda: checkpoints.restore(*abstract), "names no devices", "jax.set_mesh"
        )
        with jax.set_mesh(backwards):
            found = checkpoints.restore(*abstract)
        assert tree_identical(_replaced(found, np.asarray), expected)
        assert found[0]["layers"][0].sharding.mesh == backwards

        # A donated array is saved as it was.
        sharded = place([jnp.arange(800_000.0).reshape(8, -1)], eight)
        was = _replaced(sharded, np.array)
        increase = jax.jit(lambda xs: [x + 1 for x in xs], donate_argnums=0)
        checkpoints.save(30, sharded, ())
        for _ in range(5):
            sharded = increase(sharded)
        jax.block_until_ready(sharded)
        assert tree_identical(
            _replaced(checkpoints.restore(sharded, ())[0], np.asarray), was
        )

        # Groups elsewhere: as on one device.
        checkpoints.save(40, *places[0])
        like = fq.lion(1e-2, backend="tpu").init(model)
        one = checkpoints.restore(model, like)
        assert not tree_identical(one[1].moments, state.moments)
        expected = _replaced(one, np.asarray)
        for there, spec in ((eight, P("x", "y")), (backwards, P(None, "x"))):
            like_there = place((model, like), there, spec)
            assert_like(checkpoints.restore(*like_there), like_there, expected)
        with jax.set_mesh(backwards):
            like_there = place((model, like), backwards)
            assert_like(checkpoints.restore(*like_there), like_there, expected)
        # A group that lies on two devices.
        model = {"w": model["layers"][0][:64, :96]}
        state, like = (
            fq.lion(1e-2, backend=backend).init(model) for backend in ("auto", "tpu")
        )
        axes = [x.moments["mu"]["w"].axes for x in (state, like)]
        assert axes == [(-1,), (-2,)]

        def put(x):
            spec = P(None, "y") if x.shape[-1:] == (96,) else P()
            return jax.device_put(np.asarray(x), NamedSharding(backwards, spec))

        there, like_there = _replaced((model, state), put), _replaced(like, put)
        checkpoints.save(50, *there)
        found = checkpoints.restore(there[0], like_there)
        expected = _replaced(checkpoints.restore(model, like), np.asarray)
        assert_like(found, (there[0], like_there), expected)


@pytest.mark.once
@pytest.mark.parametrize("times", [2, slow(8)])
def test_kill(times, tmp_path):
    rng = random.Random(0)
    latest = 0
    for _ in range(times):
        process = _start("save_until_killed", tmp_path)
        # Said when its first checkpoint is complete. Orbax may warn before that it
        # removes what was left of the one that was killed.
        while (line := process.stdout.readline()) != "saving\n":
            assert line, "it ended before"
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        with Checkpoints(tmp_path) as checkpoints:
            step = checkpoints.latest_step()
            assert step is not None and step > latest
            _assert_restores(checkpoints, *_of_step(step))
            latest = step


def _of_step(step):
    model = _model(rows=256)
    return _scrambled((model, fq.adamw(1e-2).init(model)), step)


def save_until_killed(directory):
    with Checkpoints(directory, max_to_keep=1) as checkpoints:
        step = (checkpoints.latest_step() or 0) + 1
        checkpoints.save(step, *_of_step(step))
        checkpoints.wait()
        print("saving", flush=True)
        while True:
            step += 1
            checkpoints.save(step, *_of_step(step))


_STEPS, _PERIOD, _KILLED = 12, 3, 8


@pytest.mark.once
def test_two_processes(tmp_path):
    for dies in (True, False):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        processes = [
            _start("train", tmp_path, port, index, dies, devices=4)
            for index in range(2)
        ]
        if dies:
            assert processes[1].wait(timeout=300) == -signal.SIGKILL
            processes[0].kill()
            processes[0].wait()
            for process in processes:
                process.stdout.close()
            continue
        for process in processes:
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output
    assert (tmp_path / "killed" / "resumed").read_text() == str(_KILLED // 3 * 3)
    assert (tmp_path / "uninterrupted" / "resumed").read_text() == "0"
    killed, uninterrupted = (
        [dict(np.load(tmp_path / run / f"weights-{i}.npz")) for i in range(2)]
        for run in ("killed", "uninterrupted")
    )
    assert tree_identical(killed, uninterrupted)
    assert any(x.size for x in killed[0].values())


def train(directory, port, index, dies):
    """One of two processes that train on a mesh of all their devices: until one dies;
    or from there to the end, and once more without a break."""
    directory, index = Path(directory), int(index)
    jax.distributed.initialize(f"localhost:{port}", 2, index)
    assert len(jax.devices()) == 8 and jax.process_count() == 2
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)

    def place(x):
        x = np.asarray(x)
        sharding = NamedSharding(mesh, P("x", "y") if x.ndim == 2 else P())
        return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])

    optim = fq.lion(1e-2, skip_nonfinite=True)

    @eqx.filter_jit(donate="all")
    def step(model, state):
        mean = jnp.mean(model["layers"][0].astype(jnp.float32))
        turn = state.count.astype(jnp.float32)

        def grad(x):
            wide = x.astype(jnp.float32)
            return (jnp.sin(37 * wide + turn) + mean).astype(x.dtype)

        return optim.step(
            model, state, jtu.tree_map(grad, eqx.filter(model, eqx.is_array))
        )

    for run in ["killed"] if dies == "True" else ["killed", "uninterrupted"]:
        _train_and_save(
            directory / run, index, optim, step, _replaced(_model(), place), dies
        )


def _train_and_save(directory, index, optim, step, model, dies):
    state = optim.init(model)
    # An array that each process has for itself, and a NumPy array.
    state = (state, jnp.arange(3), np.zeros(2))
    with Checkpoints(directory, max_to_keep=2) as checkpoints:
        start = checkpoints.latest_step() or 0
        if start > 0:
            model, state = checkpoints.restore(model, state)
            assert state[2].tolist() == [start, start]
        if index == 0:
            (directory / "resumed").write_text(str(start))
        for count in range(start + 1, _STEPS + 1):
            model, moved = step(model, state[0])
            state = (moved, state[1], np.full(2, float(count)))
            if count % _PERIOD == 0:
                checkpoints.save(count, model, state)
            if count == _KILLED and dies == "True":
                checkpoints.wait()
                if index == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
    arrays = filter(eqx.is_array, jtu.tree_leaves((model, state)))
    shards = {
        f"{number}-{shard.device.id}": np.asarray(shard.data).astype(np.float32)
        for number, x in enumerate(arrays)
        if isinstance(x, jax.Array)
        for shard in x.addressable_shards
    }
    np.savez(directory / f"weights-{index}.npz", **shards)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
