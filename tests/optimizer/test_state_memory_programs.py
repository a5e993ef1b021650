"""States in host memory in whole programs: exchanged, killed, restored on other
devices, and made and placed in every way that users have."""

import signal
import subprocess
import sys
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from jax.sharding import SingleDeviceSharding

import flashquinox as fq
from flashquinox import exchange
from flashquinox._common import memory
from flashquinox._optimizer import state_memory
from flashquinox._sharding import new_arrays
from flashquinox.checkpoint import Checkpoints

from ..helpers import slow, tree_identical


AWAY = "pinned_host"
_HERE = partial(fq.adamw, 1e-2, weight_decay=0.1)
_THERE = partial(_HERE, state_memory=AWAY)


@pytest.fixture(autouse=True)
def _small_leaves(monkeypatch):
    monkeypatch.setattr(state_memory, "_SMALL", 2**8)


def _weights(seed=0):
    shapes = {"rows": (64, 32), "odd": (3, 5, 37), "bias": (7,)}
    return {
        name: jr.normal(jr.key(seed + i), shape, jnp.bfloat16)
        for i, (name, shape) in enumerate(shapes.items())
    }


def _kinds(tree):
    return [x.sharding.memory_kind for x in jtu.tree_leaves(tree)]


def _is_away(tree):
    return AWAY in _kinds(tree)


@pytest.mark.once
def test_exchange():
    """The state of Optax that both make is the same, and so is what both make of it.
    What `like` has in host memory stays there."""
    weights, grads = _weights(), _weights(1)
    wide = jtu.tree_map(lambda x: x.astype(jnp.float32), weights)
    theirs = optax.adamw(1e-2).init(wide)
    states = []
    for optim in (_HERE(), _THERE()):
        _, state = jax.jit(optim.step)(weights, optim.init(weights), grads)
        optax_state = exchange.to_optax(state, theirs)
        back = exchange.from_optax(optax_state, state)
        assert _kinds(back) == _kinds(state)
        states.append((optax_state, back))
    assert tree_identical(*states)
    assert _is_away(states[1][1]) and not _is_away(states[0][1])


@pytest.mark.once
def test_restored_on_other_devices(tmp_path):
    """From four devices to two, to one, and to the device's own memory."""
    optim = _THERE()
    meshes = [jax.make_mesh((n,), ("fsdp",), devices=jax.devices()[:n]) for n in (4, 2)]
    placed = []
    for mesh in meshes:
        weights = {"w": jr.normal(jr.key(0), (128, 64), jnp.bfloat16)}
        weights = jax.device_put(weights, fq.fsdp_shardings(weights, mesh))
        placed.append((weights, optim.init(weights)))
    (weights, state), other = placed
    _, state = jax.jit(optim.step)(weights, state, weights)
    alone = {"w": jnp.zeros((128, 64), jnp.bfloat16)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, weights, state)
        checkpoints.wait()
        for model, like in (other, (alone, optim.init(alone))):
            found = checkpoints.restore(model, like)
            assert _kinds(found) == _kinds((model, like)) and _is_away(found)
            # A state remembers the devices that it was made for.
            expected = [np.asarray(x) for x in jtu.tree_leaves((weights, state))]
            assert tree_identical(
                [np.asarray(x) for x in jtu.tree_leaves(found)], expected
            )
        here = _HERE().init(alone)
        assert not _is_away(checkpoints.restore(alone, here))


@pytest.mark.slow
def test_a_kill_in_the_middle_of_a_step(tmp_path):
    """What was saved is there, and the run goes on from it as if nothing had been."""
    command = [sys.executable, "-c", _TRAIN, str(tmp_path)]
    expected = subprocess.run([*command, "whole"], capture_output=True, text=True)
    assert expected.returncode == 0, expected.stderr
    killed = subprocess.run([*command, "killed"], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL
    resumed = subprocess.run(
        [*command, "killed", "go on"], capture_output=True, text=True
    )
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout == expected.stdout != ""


# The gradient of its fifth step kills the process while the step is computed.
_TRAIN = """
import hashlib, os, pathlib, signal, sys
import jax, jax.numpy as jnp, jax.random as jr, jax.tree_util as jtu, numpy as np
import flashquinox as fq
from flashquinox.checkpoint import Checkpoints
folder, again = pathlib.Path(sys.argv[1]) / sys.argv[2], len(sys.argv) > 3
optim = fq.adamw(1e-2, state_memory="pinned_host")
model = {"w": jr.normal(jr.key(0), (256, 128), jnp.bfloat16)}
state = optim.init(model)
def grads(i):
    dies = sys.argv[2] == "killed" and not again and i == 5
    if dies:
        os.kill(os.getpid(), signal.SIGKILL)
    return np.asarray(jr.normal(jr.key(i), (256, 128)), np.float32)
@jax.jit
def step(model, state, i):
    like = jax.ShapeDtypeStruct((256, 128), jnp.float32)
    g = jax.pure_callback(grads, like, i)
    return optim.step(model, state, {"w": g.astype(jnp.bfloat16)})
with Checkpoints(folder) as checkpoints:
    first = 0
    if again:
        first = checkpoints.latest_step()
        model, state = checkpoints.restore(model, state)
    for i in range(first + 1, 8):
        model, state = step(model, state, i)
        if i <= 4:
            checkpoints.save(i, model, state)
            checkpoints.wait()
leaves = [np.asarray(x) for x in jtu.tree_leaves((model, state))]
print(hashlib.sha256(b"".join(x.tobytes() for x in leaves)).hexdigest())
"""


#
# Ways to make and to place a state
#


def test_made_inside_of_transformations():
    weights = _weights()
    optim = _THERE()
    state = optim.init(weights)
    assert _is_away(state)
    made = jax.jit(optim.init)(weights)
    assert tree_identical(made, state) and _kinds(made) == _kinds(state)
    shapes = jax.eval_shape(optim.init, weights)
    assert jtu.tree_structure(shapes) == jtu.tree_structure(state)
    stacked = jtu.tree_map(lambda x: jnp.stack([x, x]), weights)
    ensemble = eqx.filter_vmap(optim.init)(stacked)
    assert tree_identical(
        jtu.tree_map(lambda x: x[0], memory.to_device(ensemble)), state
    )


@pytest.mark.parametrize("wrapper", ["chain", slow("inject_hyperparams")])
def test_placed_by_the_user(wrapper):
    """Through Optax's wrappers, as on the device: bit for bit."""
    if wrapper == "chain":
        optim = optax.chain(optax.clip_by_global_norm(1.0), _HERE())
    else:
        optim = optax.inject_hyperparams(fq.adamw)(learning_rate=1e-2)
    weights, grads = _weights(), _weights(1)
    state = optim.init(weights)
    device = jax.devices()[0]
    there = SingleDeviceSharding(device, memory_kind=AWAY)
    away = jtu.tree_map(
        lambda x: jax.device_put(x, there) if jnp.size(x) > 2**8 else x, state
    )
    update = jax.jit(optim.update)
    expected, found = update(grads, state, weights), update(grads, away, weights)
    assert tree_identical(expected, found)
    assert _kinds(found[1]) == _kinds(away)


@pytest.mark.parametrize("jit", [False, True])
def test_too_small_a_host_or_none(jit, monkeypatch):
    """Errors before anything is allocated, also of the parts of a model on a mesh."""
    optim = _THERE()
    mesh = jax.make_mesh((4,), ("fsdp",))
    model = {"w": jnp.zeros((128, 64), jnp.bfloat16)}
    model = jax.device_put(model, fq.fsdp_shardings(model, mesh))
    needed = sum(
        x.nbytes
        for x in jtu.tree_leaves(optim.init(model))
        if x.sharding.memory_kind == AWAY
    )
    with monkeypatch.context() as patch:
        patch.setattr(state_memory, "free_bytes", lambda: needed - 1)
        patch.setattr(new_arrays, "at", lambda *args: pytest.fail("allocates"))
        if not jit:
            with pytest.raises(MemoryError, match=f"needs {needed:,} bytes"):
                optim.init(model)
    monkeypatch.setattr(memory, "has_host_memory", lambda device: False)
    init = jax.jit(optim.init) if jit else optim.init
    with pytest.raises(ValueError, match="none for the platform 'cpu'"):
        init(model)
