"""Programs in C++ for CPUs: how they are compiled and kept, and what XLA makes of them.
`test_cpp.py` compares what they compute."""

import functools as ft
import re
import shutil
import stat
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flashquinox as fq
from flashquinox._backends import platforms
from flashquinox._backends.cpp import disk_cache
from flashquinox._backends.cpp.view import View
from flashquinox._backends.cpu import compiler
from flashquinox._backends.cpu.kernel import Kernel

from ..helpers import tree_identical
from ..kernels import arrays, needs_cpp_compiler, run


pytestmark = needs_cpp_compiler

_SOURCE = """
extern "C" __attribute__((visibility("default")))
XLA_FFI_Error* NAME(XLA_FFI_CallFrame* frame) {
  auto* extension = frame->extension_start;
  if (extension && extension->type == XLA_FFI_Extension_Metadata) {
    XLA_FFI_Metadata* metadata = ((XLA_FFI_Metadata_Extension*)extension)->metadata;
    metadata->api_version.major_version = XLA_FFI_API_MAJOR;
    metadata->api_version.minor_version = XLA_FFI_API_MINOR;
  }
  return nullptr;
}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where programs are kept; nothing is compiled yet."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compiler, "command", ft.cache(compiler.command.__wrapped__))
    monkeypatch.setattr(compiler, "_libraries", {})
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *_, **__: None)
    monkeypatch.setattr(disk_cache, "_folder_of_user", lambda: tmp_path / "programs")
    monkeypatch.setattr(disk_cache, "_temporary", [])
    return tmp_path / "programs"


def _files(folder):
    return sorted(folder.iterdir())


def test_programs_are_kept(folder, monkeypatch):
    name = compiler.target_of(_SOURCE)
    (kept,) = _files(folder)
    assert kept.name.startswith(name) and stat.S_IMODE(folder.stat().st_mode) == 0o700
    # The next process needs no compiler.
    monkeypatch.setattr(disk_cache, "_made", None)
    compiler._libraries.clear()
    assert compiler.target_of(_SOURCE) == name


def test_a_file_that_was_cut_off_is_made_again(folder):
    name = compiler.target_of(_SOURCE)
    (kept,) = _files(folder)
    whole = kept.read_bytes()
    # Another file: this process has opened the first one.
    kept.unlink()
    kept.write_bytes(whole[:9000])
    compiler._libraries.clear()
    assert compiler.target_of(_SOURCE) == name
    assert kept.read_bytes() == whole


@pytest.mark.parametrize("problem", ["a file", "no home"])
def test_where_nothing_can_be_kept(folder, problem, monkeypatch):
    """A program is then of one process."""
    if problem == "a file":
        folder.write_text("not a folder")
    else:
        monkeypatch.setattr(disk_cache, "_folder_of_user", _fails)
    assert compiler.target_of(_SOURCE).startswith("flashquinox_step_")
    assert len(disk_cache._temporary) == 1


def _fails():
    raise RuntimeError("Could not determine home directory.")


def test_what_the_compiler_says(folder):
    with pytest.raises(compiler.CompilationError, match=r"error: .*nonsense") as caught:
        compiler.target_of("int x = nonsense;")
    assert "\n" not in str(caught.value)
    assert not _files(folder)


def test_compilers(folder, monkeypatch):
    found = compiler.command()
    monkeypatch.setenv("CXX", f"{found[0]} -DTWO")
    compiler.command.cache_clear()
    assert compiler.command()[:2] == (found[0], "-DTWO")
    compiler.target_of(_SOURCE)
    monkeypatch.setenv("CXX", "no-such-compiler")
    compiler.command.cache_clear()
    with pytest.raises(ImportError, match="no no-such-compiler on PATH"):
        compiler.command()


def test_without_a_compiler(folder, monkeypatch):
    """Plain XLA, without a word; an error where a program was asked for."""
    fresh = ft.cache(platforms._loaded.__wrapped__)
    monkeypatch.setattr(platforms, "_loaded", fresh)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ImportError, match=r"`lion\(backend=\"cpu\"\)` needs `g\+\+"):
        fq.lion(1e-3, backend="cpu")
    params = {"w": jnp.ones((3, 64), jnp.bfloat16)}
    optim = fq.lion(1e-3)
    state = optim.init(params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = jax.jit(optim.step).lower(params, state, params).as_text()
    assert "flashquinox_step_" not in text


def test_is_the_default():
    params = {"w": jnp.ones((3, 64), jnp.bfloat16)}
    calls = {}
    for backend in ("auto", "cpu", "xla"):
        optim = fq.lion(1e-3, backend=backend)
        text = jax.jit(optim.step).lower(params, optim.init(params), params).as_text()
        calls[backend] = len(re.findall("custom_call.*flashquinox_step_", text))
    assert calls == {"auto": 1, "cpu": 1, "xla": 0}


# Of every size and kind: one call for each way to store leaves.
_SHAPES = {
    "matrix": (512, 300),
    "kernel": (64, 48, 3, 3),
    "odd": (7, 1001),
    "vector": (2000,),
    "tiny": (5,),
    "scalar": (),
}


@pytest.mark.parametrize("make", [fq.adamw, fq.lion, ft.partial(fq.sgdw, momentum=0.9)])
@pytest.mark.parametrize("method", ["step", "update"])
def test_nothing_is_copied(make, method):
    """A step whose arguments are donated works in place; and so does an update, which
    takes the place of the gradient, and leaves the model alone. A scalar is a number
    that XLA keeps apart."""
    params = arrays(_SHAPES, jnp.float32, 0)
    optim = make(1e-3)
    model, state = fq.prepare(params, optim)
    grads = jax.tree.map(jnp.ones_like, model)
    donated = {"step": ("model", "state"), "update": ("grads", "state")}[method]

    def take(model, state, grads):
        if method == "step":
            return optim.step(model, state, grads)
        return optim.update(grads, state, model)

    step = jax.jit(take, donate_argnames=donated)
    compiled = step.lower(model, state, grads).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4096
    entry = compiled.as_text().split("ENTRY")[1]
    sizes = re.findall(r"= \w+\[([\d,]*)\]\S* copy\(", entry)
    assert all(x == "" or np.prod([*map(int, x.split(","))]) <= 5 for x in sizes)
    # Nothing is lost where they are kept.
    kept = jax.tree.map(jnp.copy, (model, state, grads))
    expected = jax.jit(take)(model, state, grads)
    assert tree_identical((model, state, grads), kept)
    assert tree_identical(step(model, state, grads), expected)


@pytest.mark.once
def test_many_blocks():
    """Of leaves that take many turns of many threads. These take them in another order
    each time."""
    shapes = {"large": (1000, 1001), "small": (3, 11), "middle": (300, 512)}
    params, grads = (arrays(shapes, jnp.bfloat16, seed) for seed in (0, 1))
    run("cpu", ft.partial(fq.adamw, 1e-2), params, [grads])
    optim = fq.adamw(1e-2)
    step, operands = jax.jit(optim.step), (params, optim.init(params), grads)
    first = step(*operands)
    assert all(tree_identical(step(*operands), first) for _ in range(20))


def test_plan():
    """Blocks are of whole batches, and no leaf shares one."""
    views = tuple([View(1, n, 1, 32) for n in (5, 32 * 1000, 10**7)])
    kernel = Kernel("name", views, 0, 2, None, (0,), members=3)
    leaves, members, blocks, of_block, threads, *_ = kernel.plan.tolist()
    assert (leaves, members, of_block) == (3, 3, 512)
    of_leaves = kernel.plan[9:].reshape(leaves, -1)
    # 1 and 1000 groups, and 312,500.
    assert of_leaves[:, 0].tolist() == [0, 1, 3] and blocks == 3 + 611
    # What leaves have in one array.
    assert kernel.plan[5:7].tolist() == [10_032_005, 313_501]
    assert of_leaves[:, -2:].tolist() == [[0, 0], [5, 1], [32_005, 1001]]
    assert threads == -(-3 * 313_501 // 512)


@pytest.mark.parametrize("count", [8, 200])
def test_packed_states_are_not_copied(count):
    """A program takes common arrays as they are, for as many leaves as it has."""
    shapes = {str(i): (64, 64) if i % 2 else (64,) for i in range(count)}
    params = arrays(shapes, jnp.bfloat16, 0)
    found = []
    for pack_below in (0, 2**16):
        optim = fq.adamw(1e-2, storage=fq.Storage(pack_below=pack_below))
        step = jax.jit(optim.step, donate_argnums=(0, 1))
        compiled = step.lower(params, optim.init(params), params).compile()
        text = compiled.as_text()
        operations = [f" {x}(" for x in ("slice", "dynamic-slice", "concatenate")]
        found.append([text.count(x) for x in operations])
        # Of scalars and pointers.
        assert compiled.memory_analysis().temp_size_in_bytes < 64 * count + 4096
    assert found[0] == found[1]


def test_exported_steps_are_plain_xla():
    """Other machines have no program."""
    params = {"w": jnp.ones((3, 64), jnp.bfloat16)}
    optim = fq.lion(1e-3)
    step, operands = jax.jit(optim.update), (params, optim.init(params), params)
    exported = jax.export.export(step)(*operands)
    assert "flashquinox_step_" not in exported.mlir_module()
    assert tree_identical(exported.call(*operands), step(*operands))
    # Where it is not exported, it has one.
    assert "flashquinox_step_" in step.lower(*operands).as_text()
