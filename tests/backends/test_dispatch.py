"""The interface of backends, and what dispatch caches."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flashquinox as fq
from flashquinox._backends import platforms

from ..kernels import arrays, compiling_for, needs_compiler


_LINE = 'Backend: TypeAlias = Literal["auto", "xla", "cpu", "tpu", "gpu"]'
_PROGRAM = """
import sys
import jax, jax.numpy as jnp, numpy as np
import flashquinox as fq
from flashquinox._backends import dispatch, toy

assert toy.calls == []
shapes = {"a": (64, 32), "b": (40,), "c": (3, 64), "d": (64, 32)}
leaf = lambda seed, shape: np.random.default_rng(seed).standard_normal(shape)
params, grads = (
    {name: jnp.asarray(leaf(i, x), jnp.bfloat16) for name, x in shapes.items()}
    for i in (0, 1)
)

def step(backend):
    optim = fq.adamw(1e-2, backend=backend)
    # Groups are where the toy wants them: along rows.
    state = fq.adamw(1e-2, backend="toy").init(params)
    return jax.jit(lambda *args: optim.step(*args))(params, state, grads)

same = lambda x, y: all(map(np.array_equal, *map(jax.tree.leaves, (x, y))))
reference = step("xla")
views = [("view", *shape) for shape in shapes.values()]
assert toy.calls == ["load"], toy.calls
toy.calls.clear()
assert same(step("toy"), reference)
first = [*views, "batches"]
# Of a batch of two and one of one.
updates = [("update", n, False) for n in (2, 1)]
assert toy.calls == [*first, *updates], toy.calls
toy.calls.clear()
# Batches are those that were traced.
assert same(step("toy"), reference)
assert toy.calls == first, toy.calls
toy.calls.clear()
# Chosen for its device, beside plain XLA for others.
assert same(step("auto"), reference)
assert toy.calls == [*first, *updates], toy.calls
assert dispatch.prefers_rows("toy") and dispatch.prefers_rows("auto")
assert not dispatch.prefers_rows("xla")

sys.modules["json.scanner"] = None
from flashquinox._backends import platforms
platforms._loaded.cache_clear()
try:
    fq.lion(1e-2, backend="toy")
except ImportError as error:
    assert "needs `json.scanner`" in str(error), error
    print("done")
"""


@pytest.mark.once
def test_a_backend_is_one_file_and_one_line(tmp_path):
    """In a copy of the library."""
    copy = tmp_path / "flashquinox"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(fq.__file__).parent, copy, ignore=ignore)
    source = Path(__file__).parent / "toy_backend.py"
    shutil.copy(source, copy / "_backends" / "toy.py")
    platforms_file = copy / "_backends" / "platforms.py"
    text = platforms_file.read_text()
    assert text.count(_LINE) == 1
    # In the place of the one for CPUs.
    platforms_file.write_text(text.replace(_LINE, _LINE.replace('"cpu"', '"toy"')))
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["done"]


def test_no_toy_is_left():
    with pytest.raises(
        ValueError, match="must be one of 'auto', 'xla', 'cpu', 'tpu', 'gpu'"
    ):
        fq.lion(1e-2, backend="toy")  # pyright: ignore


#
# Batches are traced once
#


_PARAMS = {f"w{i}": jnp.ones((64, 96), jnp.bfloat16) for i in range(6)}


@pytest.mark.parametrize("backend", ["auto", "xla", "gpu", "tpu"])
def test_equal_leaves_are_traced_once(backend):
    """In a process, whatever the program."""
    traced = []

    class Counted(fq.AbstractRule):
        @property
        def moments(self):
            return {}

        def scalars(self, count, learning_rate):
            return {"step": -learning_rate}

        def update(self, grad, weight, moments, scalars):
            traced.append(grad.shape)
            return scalars["step"] * grad, {}

    optim = fq.optimizer(Counted(), 1e-2, backend=backend)
    state = optim.init(_PARAMS)
    traced.clear()
    for _ in range(2):
        step = jax.jit(lambda *args: optim.step(*args))
        # For this platform alone, whichever kernels are in programs for others.
        step.lower(_PARAMS, state, _PARAMS)
        assert len(traced) == 1


@pytest.mark.once
def test_what_was_traced_is_of_one_device(monkeypatch):
    """And of a process whose kernels are there."""
    optim = fq.lion(1e-2, backend="tpu")
    state = optim.init(_PARAMS)

    def text(kind=None):
        if kind is None:
            traced = jax.jit(lambda *args: optim.step(*args)).trace(
                _PARAMS, state, _PARAMS
            )
            return traced.lower(lowering_platforms=("tpu",)).as_text()
        with compiling_for(kind, "tpu"):
            return text()

    unknown, v4, v6 = text(), text("TPU v4"), text("TPU v6 lite")
    assert len({unknown, v4, v6}) == 3
    # v4 has no narrow integers, and v6 a root of one instruction.
    assert text("TPU v4") == v4 and text() == unknown
    loaded = platforms._loaded
    absent = lambda backend: (None, "absent") if backend.needs else loaded(backend)
    with monkeypatch.context() as patch:
        patch.setattr(platforms, "_loaded", absent)
        with pytest.warns(UserWarning, match="no kernels for TPUs"):
            assert "tpu_custom_call" not in text("TPU v4")
    platforms._warn_of_plain_xla.cache_clear()
    assert "tpu_custom_call" in text("TPU v4")


def test_a_batch_for_gpus_is_the_same_elsewhere():
    """A program that is traced for a GPU, and compiled for a CPU: leaves that share a
    kernel there keep their own scalars."""
    params, grads = (
        arrays(dict.fromkeys("abc", (64, 96)), jnp.bfloat16, i) for i in (0, 1)
    )
    optim = fq.lion(1e-2)
    state = optim.init(params)
    with compiling_for("NVIDIA H100 80GB HBM3", "cuda"):
        traced = jax.jit(optim.step).trace(params, state, grads)
    found = traced.lower(lowering_platforms=("cpu",)).compile()(params, state, grads)
    reference = fq.lion(1e-2, backend="xla")
    expected = jax.jit(reference.step)(params, state, grads)
    for x, y in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert np.array_equal(x, y)


_KERNELS = {
    "cuda": ("NVIDIA H100 80GB HBM3", "gpu", "xla.gpu.ptx"),
    "tpu": ("TPU v5 lite", "tpu", "tpu_custom_call"),
}


@pytest.mark.parametrize(
    "platform", [pytest.param("cuda", marks=needs_compiler), "tpu", "cpu"]
)
def test_numbers_of_64_bits_are_for_leaves_of_64_bits(platform):
    """With `jax_enable_x64`, other leaves are updated as they are without it."""
    shapes = {"matrix": (64, 96), "odd": (7, 11), "vector": (40,)}
    params, grads = (arrays(shapes, jnp.bfloat16, i) for i in (0, 1))

    def made() -> Any:
        optim = fq.adamw(1e-2, weight_decay=0.1)
        state = optim.init(params)
        step = jax.jit(optim.step)
        if platform == "cpu":
            return jax.tree.leaves(step(params, state, grads))
        kind, name, call = _KERNELS[platform]
        with compiling_for(kind, name):
            traced = step.trace(params, state, grads)
            text = traced.lower(lowering_platforms=(platform,)).as_text()
        return [text.count(call)]

    expected = made()
    with jax.enable_x64(True):
        found = made()
    assert all(map(np.array_equal, found, expected)), (found, expected)
    if platform != "cpu":
        assert found[0] > 0
        return
    with jax.enable_x64(True):
        wide = {name: x.astype(jnp.float64) for name, x in params.items()}
        optim = fq.adamw(1e-2)
        new, _ = jax.jit(optim.step)(wide, optim.init(wide), wide)
        assert all(x.dtype == jnp.float64 for x in new.values())
