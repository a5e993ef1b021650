"""Directories of checkpoints: whatever is in them, and whatever happens to them, what
is listed restores, and errors say what happened."""

import functools
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import orbax.checkpoint as ocp
import pytest

import flashquinox as fq
import flashquinox.exchange
from flashquinox._checkpoint import lock as locks, manifests
from flashquinox.checkpoint import CheckpointError, Checkpoints

from ..helpers import slow, tree_identical


_OPTIM = fq.adamw(1e-2)


@functools.cache
def _of_step(step, columns=64):
    """A model and a state that say which step they are of."""
    model = {"w": jnp.full((4, columns), step, jnp.bfloat16)}
    state = _OPTIM.init(model)
    codes = jnp.full((4, columns), step % 127, jnp.int8)
    return model, eqx.tree_at(lambda s: s.moments["mu"]["w"].codes, state, codes)


def _restores(checkpoints, step, asked=None):
    like = jtu.tree_map(jnp.zeros_like, _of_step(step))
    return tree_identical(checkpoints.restore(*like, asked), _of_step(step))


def _error(call):
    with pytest.raises(CheckpointError) as info:
        call()
    message = str(info.value)
    assert message.startswith("`Checkpoints") and message.endswith("."), message
    return message


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    with Checkpoints(directory) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, *_of_step(step))
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


#
# Names of directories
#


_SOUND = ["with space", "ü✓", "a'b\"c", "100%20", "a#b|c:d&e;f", "~x", "{b}$(d)!", "]"]


@pytest.mark.parametrize("name", [*_SOUND, "a\nb\tc", "-x", "7", "a.orbax-x", "\u3000"])
def test_names_that_round_trip(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Checkpoints(name + "/") as checkpoints:
        monkeypatch.chdir("/")
        checkpoints.save(3, *_of_step(3))
    with Checkpoints(tmp_path / name) as checkpoints:
        assert checkpoints.all_steps() == [3]
        assert _restores(checkpoints, 3)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", ["a[x]", "[", "*", "a?", "back\\slash", "x/[y]/z"])
def test_names_that_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for directory in (name, tmp_path / name, f"gs://bucket/{name}"):
        message = _error(lambda d=directory: Checkpoints(d))
        assert "Use a directory without" in message
    assert os.listdir(tmp_path) == []


def test_other_directories(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with Checkpoints("~/below/here") as checkpoints:
        checkpoints.save(1, *_of_step(1))
    (tmp_path / "link").symlink_to(tmp_path / "below")
    with Checkpoints(tmp_path / "link" / "here") as checkpoints:
        assert _restores(checkpoints, 1)
    (tmp_path / "file").write_text("")
    assert "is a file" in _error(lambda: Checkpoints(tmp_path / "file"))
    assert "cannot be made" in _error(lambda: Checkpoints(tmp_path / "file" / "x"))
    assert "cannot be made" in _error(lambda: Checkpoints(tmp_path / ("x" * 300)))
    assert "is empty" in _error(lambda: Checkpoints(""))
    for name in ("a\0b", "a\ud800b"):
        assert "characters" in _error(lambda n=name: Checkpoints(tmp_path / n))
    assert "address" in _error(lambda: Checkpoints("nowhere://bucket/x"))


#
# Half a step
#


@pytest.mark.parametrize(
    "order",
    [
        "one at a time",
        "random",
        slow("as listed"),
        slow("backwards"),
    ],
)
def test_half_a_step_is_not_listed(order, copy):
    files = sorted(p for p in (copy / "1").rglob("*") if p.is_file())
    if order == "backwards":
        files.reverse()
    elif order == "random":
        random.Random(0).shuffle(files)
    with Checkpoints(copy) as checkpoints:
        for file in files:
            data = file.read_bytes()
            file.unlink()
            if 1 in checkpoints.all_steps():
                # What Orbax says when it is done.
                assert file == copy / "1" / "commit_success.txt"
                assert _restores(checkpoints, 1, 1)
            else:
                message = _error(lambda: checkpoints.restore(*_of_step(1), 1))
                assert "not complete" in message and "steps [2]" in message
                assert checkpoints.latest_step() == 2
            if order == "one at a time":
                file.write_bytes(data)
        assert _restores(checkpoints, 2)
    # What is left goes with the steps that are not kept.
    with Checkpoints(copy, max_to_keep=1) as checkpoints:
        checkpoints.save(3, *_of_step(3))
        assert checkpoints.all_steps() == [3]
    assert os.listdir(copy) == ["3"]


def test_half_of_the_latest(copy):
    (copy / "2" / "arrays" / "manifest.ocdbt").unlink()
    (copy / "0.deleted" / "arrays").mkdir(parents=True)
    with Checkpoints(copy) as checkpoints:
        assert checkpoints.latest_step() == 1
        with pytest.warns(UserWarning, match=r"copy/2 is left out, and step 1"):
            assert _restores(checkpoints, 1)
        # It makes room for a whole one.
        checkpoints.save(2, *_of_step(2))
        assert checkpoints.all_steps() == [1, 2]
        assert _restores(checkpoints, 2)
        (copy / "2" / "arrays" / "manifest.ocdbt").unlink()
        checkpoints.delete(2)
    assert os.listdir(copy) == ["1"]


def test_folders_of_others(copy):
    for name in ("4", "04", "5.5", "x"):
        (copy / name).mkdir()
        (copy / name / "mine").write_text("precious")
    with Checkpoints(copy, max_to_keep=1) as checkpoints:
        assert checkpoints.all_steps() == [1, 2]
        for call in (
            lambda: checkpoints.save(4, *_of_step(4)),
            lambda: checkpoints.delete(4),
        ):
            assert "no checkpoint of flashquinox" in _error(call)
        assert "steps [1, 2]" in _error(lambda: checkpoints.delete(9))
        checkpoints.save(5, *_of_step(5))
        assert checkpoints.all_steps() == [5]
    assert sorted(os.listdir(copy)) == ["04", "4", "5", "5.5", "x"]
    assert (copy / "4" / "mine").read_text() == "precious"


def test_deletion_is_one_rename(copy, monkeypatch):
    from flashquinox._checkpoint import directory

    def killed(folder):
        assert folder.name == "1.deleted" or not folder.exists()
        raise KeyboardInterrupt

    with Checkpoints(copy) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(directory, "_remove", lambda folder: None)
            checkpoints.delete(1)
        assert checkpoints.all_steps() == [2]
        assert (copy / "1.deleted").exists()
        checkpoints.save(3, *_of_step(3))
        checkpoints.wait()
        assert not (copy / "1.deleted").exists()


#
# Saves that fail
#


@pytest.fixture
def failing(monkeypatch):
    """Makes the next save fail in the background."""

    def arm(error):
        def fail(self, directory):
            monkeypatch.undo()
            raise error

        monkeypatch.setattr(ocp.CompositeCheckpointHandler, "finalize", fail)

    return arm


def _next_calls():
    like = lambda: _of_step(1)
    return {
        "wait": lambda c: c.wait(),
        "save": lambda c: c.save(4, *_of_step(4)),
        "restore": lambda c: c.restore(*like()),
        "restore_step": lambda c: c.restore(*like(), 1),
        "latest_step": lambda c: c.latest_step(),
        "all_steps": lambda c: c.all_steps(),
        "delete": lambda c: c.delete(1),
        "close": lambda c: c.close(),
    }


@pytest.mark.parametrize("name", _next_calls())
def test_a_save_that_fails_in_the_background(name, copy, failing, capfd):
    call = _next_calls()[name]
    failing(OSError(28, "No space left on device"))
    checkpoints = Checkpoints(copy, max_to_keep=1)
    checkpoints.save(3, *_of_step(3))
    with pytest.raises(CheckpointError) as info:
        call(checkpoints)
    message = str(info.value)
    assert message.startswith("`Checkpoints.save(step=3)` failed: OSError: [Errno 28]")
    assert "damage" not in message and "as they were: [1, 2]." in message
    assert isinstance(info.value.__cause__, OSError)
    # Once; nothing is left of it, and all goes on.
    assert sorted(os.listdir(copy)) == ["1", "2"]
    assert checkpoints.all_steps() == [1, 2]
    assert _restores(checkpoints, 2)
    if name != "close":
        checkpoints.save(3, *_of_step(3))
        assert _restores(checkpoints, 3)
    checkpoints.close()
    assert "Traceback" not in capfd.readouterr().err


def test_a_save_that_fails_at_once(copy, monkeypatch, capfd):
    async def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    checkpoints = Checkpoints(copy)
    with monkeypatch.context() as patched:
        patched.setattr(ocp.CompositeCheckpointHandler, "async_save", fail)
        # What is left behind depends on threads.
        for _ in range(5):
            with pytest.raises(CheckpointError, match=r"failed: OSError: \[Errno 28\]"):
                checkpoints.save(3, *_of_step(3))
            assert sorted(os.listdir(copy)) == ["1", "2"]
    checkpoints.save(3, *_of_step(3))
    assert _restores(checkpoints, 3)
    checkpoints.close()
    assert "Traceback" not in capfd.readouterr().err


def test_the_first_error_comes_first(copy, failing):
    failing(OSError("disk"))
    with pytest.raises(ZeroDivisionError) as info, Checkpoints(copy) as checkpoints:
        checkpoints.save(3, *_of_step(3))
        raise ZeroDivisionError
    assert "`Checkpoints.save(step=3)` failed" in info.value.__notes__[0]


def test_a_directory_that_vanishes(tmp_path):
    checkpoints = Checkpoints(tmp_path / "x")
    checkpoints.save(1, *_of_step(1))
    checkpoints.wait()
    shutil.rmtree(tmp_path / "x")
    (tmp_path / "x").write_text("a file")
    message = _error(lambda: (checkpoints.save(2, *_of_step(2)), checkpoints.wait()))
    assert "save(step=2)` failed" in message
    assert checkpoints.all_steps() == []
    (tmp_path / "x").unlink()
    checkpoints.save(3, *_of_step(3))
    assert _restores(checkpoints, 3)
    checkpoints.close()


def test_old_ones_that_cannot_be_deleted(copy, monkeypatch):
    from flashquinox._checkpoint.directory import Directory

    def fail(self, step):
        raise PermissionError(13, "Permission denied")

    with Checkpoints(copy, max_to_keep=1) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(Directory, "remove", fail)
            checkpoints.save(3, *_of_step(3))
            message = _error(checkpoints.wait)
            assert "save(step=3)` is complete, but older" in message
            assert "Permission denied" in _error(lambda: checkpoints.delete(1))
        assert checkpoints.all_steps() == [1, 2, 3]
        assert _restores(checkpoints, 3)


def test_a_full_disk(tmp_path):
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root mounts")
    arguments = ["-t", "tmpfs", "-o", "size=200k", "tmpfs", str(tmp_path)]
    if subprocess.run(["mount", *arguments], capture_output=True).returncode != 0:
        pytest.skip("this machine mounts nothing")
    try:
        rng = np.random.default_rng(0)
        large = {"w": rng.standard_normal(100_000)}
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, *_of_step(1))
            checkpoints.save(2, large, ())
            assert "No space left" in _error(checkpoints.all_steps)
            assert checkpoints.all_steps() == [1] and _restores(checkpoints, 1)
            checkpoints.save(2, *_of_step(2))
            assert _restores(checkpoints, 2)
        path = tmp_path / "model.safetensors"
        fq.exchange.save_safetensors(path, {"w": jnp.ones(3)})
        with pytest.raises(OSError, match="No space left"):
            fq.exchange.save_safetensors(path, large)
        assert sorted(os.listdir(tmp_path)) == ["1", "2", "model.safetensors"]
        found = fq.exchange.load_safetensors(path, {"w": jnp.zeros(3)})
        assert tree_identical(found, {"w": jnp.ones(3)})
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_file_that_cannot_be_written(tmp_path, monkeypatch):
    import safetensors.numpy

    path = tmp_path / "model.safetensors"
    fq.exchange.save_safetensors(path, {"w": jnp.ones(3)})

    def fail(arrays, name):
        Path(name).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(OSError, match=r"`save_safetensors`: .* could not be written"):
        fq.exchange.save_safetensors(path, {"w": jnp.zeros(3)})
    assert os.listdir(tmp_path) == ["model.safetensors"]
    found = fq.exchange.load_safetensors(path, {"w": jnp.zeros(3)})
    assert tree_identical(found, {"w": jnp.ones(3)})


#
# Several managers
#


def test_two_managers(tmp_path):
    errors = []

    def write(checkpoints):
        for step in range(1, 4):
            try:
                checkpoints.save(step, *_of_step(step))
                checkpoints.wait()
            except CheckpointError as error:
                errors.append(str(error))

    managers = [Checkpoints(tmp_path, max_to_keep=2) for _ in range(2)]
    # And two threads of the first.
    threads = [
        threading.Thread(target=write, args=(m,)) for m in [*managers, managers[0]]
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all("steps count up" in error for error in errors), errors
    for checkpoints in managers:
        assert checkpoints.all_steps() == [2, 3]
        for step in (2, 3):
            assert _restores(checkpoints, step, step)
        checkpoints.close()
    assert sorted(os.listdir(tmp_path)) == ["2", "3"]


def test_a_writer_in_another_process(copy, monkeypatch):
    program = (
        "import sys\nfrom flashquinox._checkpoint.lock import lock\n"
        "release = lock('x', sys.argv[1])\nprint('held', flush=True)\n"
        "sys.stdin.readline()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(copy)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    checkpoints = Checkpoints(copy)
    monkeypatch.setattr(locks, "_TIMEOUT", 0.1)
    for call in (
        lambda: checkpoints.save(3, *_of_step(3)),
        lambda: checkpoints.delete(1),
    ):
        assert "another `Checkpoints` has been writing" in _error(call)
    # Who reads does not wait; and a lock ends with its process.
    assert _restores(checkpoints, 2)
    process.kill()
    process.wait()
    monkeypatch.setattr(locks, "_TIMEOUT", 60.0)
    checkpoints.save(3, *_of_step(3))
    assert _restores(checkpoints, 3)


#
# What a manifest says
#


def _leaves(tree, path=()):
    """The paths of all values in a tree of JSON, containers included."""
    yield path
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, (*path, key))


_HOSTILE = [None, True, -1, 7, 10**30, 1.5, "x", [], [None], [10**30], {}, {"x": {}}]


@pytest.mark.once
def test_hostile_manifests(copy):
    # Of every field, with the digest that belongs to it.
    path = copy / "2" / "flashquinox" / "metadata"
    original = json.loads(path.read_text())
    like = jtu.tree_map(jnp.zeros_like, _of_step(2))
    values = itertools.cycle([*_HOSTILE, "absent"])
    whole = [p for p in _leaves(original["contents"]) if len(p) < 2]
    fields = [p for p in _leaves(original["contents"]) if len(p) >= 2]
    cases = [(p, v) for p in whole for v in [*_HOSTILE, "absent"]]
    cases += [(p, next(values)) for p in fields]
    with Checkpoints(copy) as checkpoints:
        for where, value in cases:
            manifest = json.loads(json.dumps(original))
            *parents, last = ["contents", *where]
            node = manifest
            for key in parents:
                node = node[key]
            if value == "absent":
                del node[last]
            else:
                node[last] = value
            contents = manifest.get("contents")
            manifest["sha256"] = manifests._sha256(contents)
            path.write_text(json.dumps(manifest))
            # It restores, as it was, or there is one clear error.
            try:
                restored = checkpoints.restore(*like, 2)
            except CheckpointError as error:
                assert str(error).endswith("."), (where, value)
            else:
                assert tree_identical(restored, _of_step(2)), (where, value)
            checkpoints.all_steps()
        for text in ("[" * 200_000, '{"a":' * 200_000, "1" * 10_000, "", "\0", "NaN"):
            path.write_text(text)
            message = _error(lambda: checkpoints.restore(*like, 2))
            assert "damaged" in message and len(message) < 1000


def test_what_cannot_be_read(copy, capfd, caplog):
    files = sorted((copy / "2" / "arrays").rglob("d/*"), key=lambda p: p.stat().st_size)
    with Checkpoints(copy) as checkpoints:
        for file in files:
            data = file.read_bytes()
            for altered in (data[:-1], bytes(len(data)), bytes(x ^ 85 for x in data)):
                file.write_bytes(altered)
                try:
                    assert _restores(checkpoints, 2, 2)
                except CheckpointError as error:
                    assert "step=` one of [1], and `delete(2)`" in str(error)
            file.write_bytes(data)
        assert _restores(checkpoints, 2)
    assert capfd.readouterr().err == "" and not caplog.records


#
# Weights alone
#


@pytest.mark.parametrize("bits,moments", [(24, "flashquinox"), (32, "float32")])
def test_weights_alone(bits, moments, tmp_path):
    optim = fq.adamw(1e-2, storage=fq.Storage(master_weight_bits=bits, moments=moments))
    plain = eqx.nn.Sequential(
        [eqx.nn.Linear(8, 8, key=jax.random.key(0)), eqx.nn.LayerNorm(8)]
    )
    model = fq.cast(plain, jnp.bfloat16, keep=eqx.nn.LayerNorm)
    state = optim.init(model)
    model, state = fq.from_master_weights(plain, model, state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, model, (jax.random.key(3), state))
        zeros = jtu.tree_map(
            lambda x: jnp.zeros_like(x) if eqx.is_array(x) else x, model
        )
        found, nothing = checkpoints.restore(zeros)
        assert nothing is None and tree_identical(found, model)
        # In float32: with what cast wrapped or without, of shapes, and in NumPy.
        shapes = eqx.filter_eval_shape(fq.cast, model, jnp.float32)
        numpy = jtu.tree_map(lambda x: np.asarray(x) if eqx.is_array(x) else x, plain)
        # The state with a key beside it is that of the same model.
        master = fq.master_weights(model, state)
        expected = [
            np.asarray(x) for x in jtu.tree_leaves(eqx.filter(master, eqx.is_array))
        ]
        for like in (plain, shapes, numpy):
            found, _ = checkpoints.restore(like)
            leaves = [x for x in jtu.tree_leaves(found) if eqx.is_array_like(x)]
            for x, y in zip(leaves, expected, strict=True):
                assert x.dtype == np.float32 and np.array_equal(np.asarray(x), y)
        # To go on with another optimizer.
        other = fq.lion(1e-3, storage=fq.Storage(master_weight_bits=bits))
        _, tuned = fq.from_master_weights(found, model, other.init(model))
        assert tree_identical(tuned.corrections, state.corrections)
        message = _error(lambda: checkpoints.restore(model, other.init(model)))
        assert "`None` to restore the weights alone" in message
        # Nothing else is converted.
        half = fq.cast(plain, jnp.float16)
        assert "bfloat16" in _error(lambda: checkpoints.restore(half))


def test_corrections_that_could_be_those_of_several_weights(tmp_path):
    model = {"a": {"w": jnp.ones((2, 32), jnp.bfloat16)}}
    model["b"] = model["a"]
    states = tuple(fq.adamw(1e-3).init(part) for part in model.values())
    wide = fq.cast(model, jnp.float32)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, model, states)
        message = _error(lambda: checkpoints.restore(wide))
        assert "`model['a']['w']`" in message and "master_weights" in message
        assert tree_identical(checkpoints.restore(model)[0], model)
        # Without corrections, there is nothing to add.
        checkpoints.save(2, model, ())
        assert tree_identical(checkpoints.restore(wide)[0], wide)


def test_checksums_that_were_not_saved(tmp_path):
    model = {"w": jnp.full((2, 32), 3, jnp.bfloat16), "b": jnp.ones(3)}
    plain, verified = (
        fq.adamw(1e-3, verify_weights=value) for value in (None, "error")
    )
    states = [optim.init(model) for optim in (plain, verified)]
    zeros = jtu.tree_map(jnp.zeros_like, model)
    with Checkpoints(tmp_path) as checkpoints:
        for step, saved in enumerate(states):
            checkpoints.save(step, model, (saved,))
            # They are those of the weights that are restored.
            for optim, expected in zip((plain, verified), states, strict=True):
                found = checkpoints.restore(zeros, (optim.init(zeros),))
                assert tree_identical(found, (model, (expected,)))
