"""Without what kernels are made with, steps take plain XLA."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import flashquinox as fq
from flashquinox._backends import platforms

from ..kernels import compiling_for, has_compiler


# Each absent part, and what cannot be done then.
_PARTS = {
    "libnvrtc": "gpu",
    "jax.experimental.pallas.tpu": "tpu",
    "jax.experimental.pallas": "tpu",
}

# As a module that was removed: to import it is an error, or to load a library. JAX,
# which takes long, is imported once for all.
_PROGRAM = """
import ctypes, os, sys, warnings
import equinox, jax, jax.numpy as jnp, optax

def load(path):
    raise OSError(f"{path} cannot be opened")

def without(part):
    if part.startswith("lib"):
        ctypes.CDLL = load
    sys.modules[part] = None
    warnings.simplefilter("error")
    import flashquinox as fq
    params = {"w": jnp.ones((32, 32), jnp.bfloat16)}
    optim = fq.lion(1e-2, storage=fq.Storage(moments="float32"))
    jax.eval_shape(optim.step, params, optim.init(params), params)
    for backend in ("gpu", "tpu"):
        try:
            fq.lion(1e-2, backend=backend)
            print(part, backend)
        except ImportError as error:
            needed = "libnvrtc" if backend == "gpu" else "jax.experimental.pallas.tpu"
            expected = f'`lion(backend="{backend}")` needs `{needed}`, '
            assert expected in str(error), error

for part in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        without(part)
        sys.exit()
    assert os.waitpid(child, 0)[1] == 0, part
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that divide")
def test_import_and_step_without():
    """Without a word, where no kernel would have been used: on a CPU."""
    command = [sys.executable, "-c", _PROGRAM, *_PARTS]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {tuple(line.split()) for line in done.stdout.splitlines()}
    present = {"tpu"} | ({"gpu"} if has_compiler else set())
    assert found == {
        (part, name) for part, absent in _PARTS.items() for name in present - {absent}
    }


# Pallas, and how it compiles for GPUs, may go: JAX has deprecated the way by Triton.
_LOWERED = """
import sys
for name in ("jax.experimental.pallas", "jax._src.pallas.triton"):
    sys.modules[name] = None
sys.modules["jax._src.pallas.mosaic_gpu"] = None
import jax, jax.numpy as jnp, flashquinox as fq
from jax.sharding import AbstractDevice, AbstractMesh

device = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
mesh = AbstractMesh((), (), abstract_device=device)
params = {"w": jnp.ones((70, 64), jnp.bfloat16), "b": jnp.ones(70, jnp.bfloat16)}
for make in (fq.adamw, fq.lion):
    optim = make(1e-3)
    state = optim.init(params)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(optim.step).trace(params, state, params)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    print(text.count("xla.gpu.ptx"))
"""


@pytest.mark.once
@pytest.mark.skipif(not has_compiler, reason="needs NVRTC")
def test_kernels_for_gpus_need_nothing_of_pallas():
    """And warn of nothing, also where warnings are errors."""
    command = [sys.executable, "-W", "error", "-c", _LOWERED]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Of the matrix, and of the vector, which is stored without groups.
    assert done.stdout.split() == ["2", "2"]


_FIRST_STEPS = """
import sys, jax, jax.numpy as jnp, flashquinox as fq
assert not any(name.startswith("jax.experimental.pallas") for name in sys.modules)
params = {"w": jnp.ones((64, 64))}
optim = fq.sgd(1e-2)
state, traces = optim.init(params), []

def step(params, state):
    traces.append(params)
    return optim.step(params, state, params)

step = jax.jit(step)
for _ in range(2):
    params, state = step(params, state)
print(len(traces))
"""


def test_the_first_step_is_traced_once():
    """Kernels are not imported while it is."""
    done = subprocess.run(
        [sys.executable, "-c", _FIRST_STEPS], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1"]


_DEVICES = {"gpu": ("NVIDIA H100 80GB HBM3", "cuda"), "tpu": ("TPU v5 lite", "tpu")}


@pytest.fixture
def no_kernels(monkeypatch):
    loaded = platforms._loaded
    absent = lambda backend: (None, "absent") if backend.needs else loaded(backend)
    monkeypatch.setattr(platforms, "_loaded", absent)
    platforms._warn_of_plain_xla.cache_clear()
    yield
    platforms._warn_of_plain_xla.cache_clear()


@pytest.mark.parametrize("name", _DEVICES)
def test_one_warning_where_kernels_would_have_been_used(name, no_kernels):
    """On their device, which is not there either: the program is only traced."""
    params = {"w": jnp.ones((32, 64), jnp.bfloat16)}
    optim = fq.lion(1e-2, storage=fq.Storage(moments="float32"))
    state = optim.init(params)
    with compiling_for(*_DEVICES[name]), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lowered = ""
        for _ in range(2):
            traced = jax.jit(optim.step).trace(params, state, params)
            platform = platforms.named(name).platform
            lowered = traced.lower(lowering_platforms=(platform,)).as_text()
    messages = [str(x.message) for x in caught if "flashquinox" in str(x.message)]
    assert len(messages) == 1
    assert f"`{platforms.named(name).needs}`" in messages[0]
    assert "plain XLA" in messages[0]
    assert "xla.gpu" not in lowered and "tpu_custom_call" not in lowered


def test_nothing_stands_in_for_modules():
    """Other libraries see the modules that there are."""
    for path in Path(fq.__file__).parent.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert not re.search(r"sys\.modules\[.*\] *=|sys\.modules\.(setd|upd)", source)
