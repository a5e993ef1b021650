"""The GPU kernels: interpreted, against plain XLA; and lowered for CUDA. On a GPU, also
run there."""

import functools as ft
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import SingleDeviceSharding

import flashquinox as fq
from flashquinox import _compat as compat
from flashquinox._backends.cpp import control_flow, disk_cache, translation
from flashquinox._backends.cpp.view import View
from flashquinox._backends.gpu import BACKEND as GPU, nvrtc
from flashquinox._backends.gpu.threads import Threads
from flashquinox._storage.layout import Layout

from ..helpers import (
    Case,
    float64,
    OURS,
    parametrize_cases,
    Storage,
    tree_identical,
)
from ..kernels import arrays, compiling_for, needs_compiler, run, run_ensemble
from .cases import ENSEMBLE, LAYOUTS, PACKED, PACKED_SHAPES, run_layout, SHAPES


def _view(shape, axes, group_size=32):
    return View.of(Layout(shape, axes, group_size), has_scales=True)


def test_views():
    assert _view((3, 64), (-1,)) == View(3, 64, 1, 32)
    assert _view((2, 64, 5), (-2,)) == View(2, 64, 5, 32)
    assert _view((64, 3, 5), (-3,)) == View(1, 64, 15, 32)
    whole, last, each = (_view((4, n), axes) for n, axes in _RUNS)
    assert (whole.groups, last.groups, each.groups) == (8, 7, 8)
    assert whole.is_consecutive and last.is_consecutive and not each.is_consecutive
    assert View.of(Layout((7, 5), (-1,), 32), has_scales=False).size == 35


# The length of four rows, and the axes of groups: whole ones, a partial one at the end
# of all rows, and one at the end of each.
_RUNS = [(64, (-1,)), (50, (-2, -1)), (50, (-1,))]


@pytest.mark.parametrize("group_size", [1, 7, 16, 32, 48, 128, 1000])
@pytest.mark.parametrize("rows", [3, 2**17])
def test_threads(group_size, rows):
    """Every element has a thread, of those that exchange numbers, and reads where the
    device can."""
    view = View(rows, group_size, 1, group_size)
    threads = Threads.of([view])
    assert threads.lanes <= 32 and threads.lanes & (threads.lanes - 1) == 0
    assert threads.lanes * threads.elements >= group_size
    assert threads.blocks(view) * 128 >= view.groups * threads.lanes
    for members in (1, 3):
        aligned = threads.aligned([view], members > 1)
        assert group_size % aligned == 0 and threads.elements % aligned == 0
        assert members == 1 or view.size % aligned == 0
    # Of a whole group, in each of its threads.
    left = [group_size - i * threads.elements for i in range(threads.lanes)]
    assert threads.are_full([view]) == (min(left) >= threads.elements)
    longer = View(rows, group_size + 1, 1, group_size)
    assert threads.are_full([view, longer]) == (group_size == 1)
    # Each run begins where the one before it ends.
    assert threads.aligned([longer], False) == 1


def _to_host(x):
    there = SingleDeviceSharding(jax.devices("cpu")[0], memory_kind="pinned_host")
    return jax.device_put(x, there) if x.size > 500 else x


@pytest.mark.once
@needs_compiler
def test_state_in_host_memory():
    """Kernels take whole leaves there. Layers of stacks come and go."""
    draw = lambda *shape: jax.random.normal(jax.random.key(1), shape, jnp.bfloat16)
    model = {"in": draw(24, 64), "up": draw(3, 64, 37), "odd": draw(3, 37, 64)}
    loss = fq.LayeredLoss(
        blocks=lambda m: (m["up"], m["odd"]),
        prologue=lambda m, x, key: x @ m["in"],
        block=lambda m, x, batch, key: x + jnp.tanh(x @ m[0]) @ m[1],
        epilogue=lambda m, x, batch, key: jnp.mean(x.astype(float) ** 2),
    )
    optim = fq.adamw(1e-2, backend="gpu")
    step = jax.jit(lambda *args: optim.step(*args))
    release = jax.jit(lambda *args: fq.release_step(optim, loss, *args)[:2])
    here = optim.init(model)
    away = jax.tree.map(_to_host, here)
    for take, operand in ((step, model), (release, draw(4, 24))):
        one, other = [take(model, state, operand) for state in (here, away)]
        assert tree_identical(one, other)
        kinds = [x.sharding.memory_kind for x in jax.tree.leaves(other[1])]
        assert kinds == [x.sharding.memory_kind for x in jax.tree.leaves(away)]
        assert kinds.count("pinned_host") == 9


#
# Lowered
#


_TARGET = "__gpu$xla.gpu.ptx"


def _exported(optim: fq.Optimizer, params) -> jax.export.Exported:
    """The step for CUDA, of the leaves of its arguments: modules cannot be stored."""
    state = jax.eval_shape(optim.init, params)
    leaves, structure = jax.tree.flatten((params, state, params))
    step = lambda leaves: jax.tree.leaves(optim.step(*structure.unflatten(leaves)))
    check = jax.export.DisabledSafetyCheck.custom_call(_TARGET)
    with compiling_for("NVIDIA H100 80GB HBM3", "cuda"):
        export = jax.export.export(
            jax.jit(step), platforms=["cuda"], disabled_checks=[check]
        )
        return export(leaves)


def _kernels(optim: fq.Optimizer, params) -> int:
    """The number of kernels in the step for CUDA."""
    return _exported(optim, params).mlir_module().count(f"@{_TARGET}")


def _shapes(dtype, **shapes):
    return {name: jax.ShapeDtypeStruct(x, dtype) for name, x in shapes.items()}


# Every dtype, width and codec, and kernels of each number of moments.
_LOWERED = [
    Case("adamw", OURS),
    Case("adamw", Storage(jnp.bfloat16, 32, "float32")),
    Case("adamw", Storage(jnp.float16, 24, "flashoptim")),
    Case("adamw", Storage(jnp.float32, None, "flashquinox")),
    Case("lion", OURS),
    Case("sgd", OURS),
]


# Rules of whole leaves that have moments before and after.
_PASSES = {"lamb": 2, "adafactor-whole": 2}


@needs_compiler
def test_host_memory_is_where_it_was():
    """A kernel writes to arrays in host memory that XLA takes for read. Another one
    after it ends the program if XLA has moved them meanwhile, of which this one does
    not know."""
    optim = fq.adamw(1e-2, backend="gpu")
    weights = {"w": jnp.zeros((64, 64), jnp.bfloat16)}
    state = jax.tree.map(_to_host, optim.init(weights))
    step = jax.jit(optim.step).trace(weights, state, weights)
    with compiling_for("NVIDIA H100", "gpu"):
        text = step.lower(lowering_platforms=("cuda",)).as_text()
    order = ["lend", "addresses", "adam", "give_back"]
    found = [text.index(f'name = "flashquinox_{name}"') for name in order]
    assert found == sorted(found)
    assert text.count("trap;") == 1


@needs_compiler
@pytest.mark.product
@parametrize_cases(
    lambda case: case.name == "adamw" or case.storage == OURS,
    quick=_LOWERED.__contains__,
)
def test_lowers_for_cuda(case):
    """Every way to store a leaf, and every rule: what is lowered for them is apart."""
    params = _shapes(case.storage.dtype, matrix=(70, 64))
    optim = case.optimizer(1e-3, backend="gpu")
    assert _kernels(optim, params) == _PASSES.get(case.name, 1)


@needs_compiler
@pytest.mark.product
@parametrize_cases(
    lambda case: case.name == "adamw" or case.storage == OURS,
    quick=_LOWERED[:1].__contains__,
)
def test_rules_and_codecs_of_this_library_have_no_loops(case, monkeypatch):
    """JAX would write them out, whatever their length."""
    seen, translate = [], translation._translate
    record = lambda *args: seen.append(args) or translate(*args)
    monkeypatch.setattr(translation, "_translate", record)
    params = _shapes(case.storage.dtype, matrix=(66, 64))
    _kernels(case.optimizer(1e-3, backend="gpu"), params)
    structures = [args[0] for args in seen]
    assert structures and all(map(translation._has_no_loops, structures))
    monkeypatch.setattr(translation, "_has_no_loops", lambda structure: False)
    for name in ("scan", "while"):
        monkeypatch.delitem(control_flow.RULES, name)
    for args in seen:
        translate.__wrapped__(*args)


@needs_compiler
@pytest.mark.product
@pytest.mark.parametrize("moments", ["log", "learned"])
def test_curves_lower_for_cuda(moments):
    params = _shapes(jnp.bfloat16, first=(70, 64), second=(64, 64))
    optim = fq.adamw(1e-3, storage=fq.Storage(moments=moments), backend="gpu")
    assert _kernels(optim, params) == 1


@needs_compiler
def test_leaves_share_kernels():
    """Whatever their shapes: but for vectors, which have no groups."""
    matrices = {f"matrix{i}": (64, 64 * (1 + i % 3)) for i in range(12)}
    vectors = {f"vector{i}": (40 + i,) for i in range(3)}
    odd = {f"odd{i}": (1001, 1001 + i) for i in range(8)}
    params = _shapes(jnp.bfloat16, **matrices, **vectors, **odd)
    assert _kernels(fq.lion(1e-3, backend="gpu"), params) == 1 + 1


@pytest.mark.once
@needs_compiler
def test_packed_leaves_have_fewer_arguments():
    """Of hundreds of small leaves, the arrays of the state are in common."""
    shapes = {f"matrix{i}": (64, 64) for i in range(nvrtc.most_pointers() // 4)}
    params = _shapes(jnp.bfloat16, **shapes)
    assert _kernels(fq.lion(1e-3, backend="gpu", storage=PACKED), params) == 1
    assert _kernels(fq.lion(1e-3, backend="gpu"), params) == 3


@needs_compiler
def test_a_kernel_has_no_more_leaves_than_arguments():
    # A gradient and four arrays of a state, which are results as well.
    most = (nvrtc.most_pointers() - 2) // (5 + 4)
    count = most + most // 2
    params = _shapes(jnp.bfloat16, **{f"matrix{i}": (64, 64) for i in range(count)})
    assert _kernels(fq.lion(1e-3, backend="gpu"), params) == 2


def _program(**shapes):
    """What a kernel is compiled from, of leaves with groups."""
    programs, compiled = [], nvrtc.compiled
    params = _shapes(jnp.bfloat16, **shapes)
    with pytest.MonkeyPatch.context() as patch:
        record = lambda source: programs.append(source) or compiled(source)
        patch.setattr(nvrtc, "compiled", record)
        _kernels(fq.adamw(1e-3), params)
    (program,) = programs
    return program


@pytest.fixture(scope="module")
def program():
    return _program(first=(70, 64), second=(37, 48))


@needs_compiler
@pytest.mark.parametrize(
    ["shapes", "has_parts"],
    [
        ({"first": (70, 64), "second": (37, 128)}, False),
        ({"first": (71, 64), "second": (37, 40)}, True),
        ({"first": (70, 64), "second": (5001,)}, True),
    ],
    ids=["whole", "rows", "end"],
)
def test_only_kernels_with_partial_groups_have_code_for_them(shapes, has_parts):
    """It is half of a program, and compiles as long."""
    program = _program(**shapes)
    for name in ("load_part", "store_part"):
        assert (f"{name}<N>(" in program) == has_parts


@needs_compiler
@pytest.mark.parametrize("number", [80, 86, 89, 90, 100, 120])
def test_every_architecture(number, program):
    """From the A100 to Blackwell: to what each of them executes."""
    assert nvrtc.compiled(program, f"sm_{number}").startswith(b"\x7fELF")


@needs_compiler
def test_ptx_is_for_old_drivers_and_gpus(program):
    ptx = nvrtc.compiled(program).decode()
    assert ".version 8.1\n" in ptx or ".version 8.0\n" in ptx
    assert ".target sm_80\n" in ptx
    # Registers are enough.
    assert ".local" not in ptx


@needs_compiler
@pytest.mark.parametrize("architecture", ["compute_80", "sm_90"])
def test_programs_are_kept(program, architecture, tmp_path, monkeypatch):
    folder = tmp_path / "programs"
    monkeypatch.setattr(disk_cache, "_folder_of_user", lambda: folder)
    first = nvrtc.compiled.__wrapped__(program, architecture)
    (kept,) = folder.iterdir()
    assert kept.read_bytes() == first
    with monkeypatch.context() as patch:
        # The next process compiles nothing.
        patch.setattr(disk_cache, "_made", None)
        assert nvrtc.compiled.__wrapped__(program, architecture) == first
    # Of another program, or by another compiler, it is another one.
    nvrtc.compiled.__wrapped__(f"{program}//", architecture)
    monkeypatch.setattr(nvrtc, "_compiler", lambda: ["13", "0"])
    nvrtc.compiled.__wrapped__(program, architecture)
    assert len(list(folder.iterdir())) == 3
    kept.write_bytes(first[:100])
    monkeypatch.undo()
    monkeypatch.setattr(disk_cache, "_folder_of_user", lambda: folder)
    assert nvrtc.compiled.__wrapped__(program, architecture) == first


@needs_compiler
def test_programs_where_nothing_can_be_kept(program, monkeypatch):
    def fails():
        raise OSError("No space left on device")

    monkeypatch.setattr(disk_cache, "_folder_of_user", fails)
    monkeypatch.setattr(disk_cache, "_folder_of_process", fails)
    assert nvrtc.compiled.__wrapped__(program) == nvrtc.compiled(program)


class Odd(fq.AbstractRule):
    """With an operation that kernels do not have."""

    @property
    def moments(self):
        return {"trace": fq.Moment("signed")}

    def scalars(self, count, learning_rate):
        return {"step": -learning_rate}

    def update(self, grad, weight, moments, scalars):
        trace = 0.5 * moments["trace"] + grad
        return scalars["step"] * jax.lax.bessel_i0e(trace), {"trace": trace}


class Long(Odd):
    """With a loop that is too long to be written out."""

    def update(self, grad, weight, moments, scalars):
        trace = 0.5 * moments["trace"] + grad
        root = jax.lax.fori_loop(0, 10**6, lambda i, x: x - 0.1 * (x - trace), trace)
        return scalars["step"] * root, {"trace": trace}


@needs_compiler
@pytest.mark.parametrize(
    ["rule", "reason"], [(Odd(), "`bessel_i0e`"), (Long(), "`scan` of 1000000 turns")]
)
def test_rules_that_kernels_lack_take_plain_xla(rule, reason):
    """With one warning, which says why."""
    params = _shapes(jnp.bfloat16, first=(70, 64), second=(64, 64))
    match = f"rule {type(rule).__name__}, .* {reason}"
    with pytest.warns(UserWarning, match=match) as caught:
        assert _kernels(fq.optimizer(rule, 1e-2, backend="gpu"), params) == 0
    assert len(caught) == 1


class _Device(NamedTuple):
    platform: str
    device_kind: str
    compute_capability: str


@pytest.mark.parametrize(
    "kind, capability", [("Tesla V100", "7.0"), ("AMD Instinct MI300X", "gfx942")]
)
def test_other_gpus_take_plain_xla(kind, capability):
    """With one warning, which names them."""
    with pytest.warns(UserWarning, match=f"{kind}.*{capability}") as caught:
        for _ in range(2):
            assert not GPU.serves(_Device("gpu", kind, capability))
    assert len(caught) == 1
    assert GPU.serves(_Device("gpu", "NVIDIA A100", "8.0"))
    assert not GPU.serves(_Device("cpu", "cpu", ""))


@needs_compiler
def test_exported_steps():
    """For a GPU that is not here, as bytes."""
    pytest.importorskip("flatbuffers")
    params = _shapes(jnp.bfloat16, matrix=(70, 64))
    exported = _exported(fq.adamw(1e-3), params)
    again = jax.export.deserialize(exported.serialize())
    assert again.platforms == ("cuda",)
    assert again.mlir_module() == exported.mlir_module()


@needs_compiler
def test_is_the_default_for_gpus():
    """Where the device is known. Elsewhere, plain XLA is lowered for CUDA."""
    params = _shapes(jnp.bfloat16, matrix=(70, 64))
    optim = fq.lion(1e-3)
    assert _kernels(optim, params) == 1
    is_served = lambda: GPU.serves(compat.traced_device())
    assert not is_served() or jax.default_backend() == "gpu"
    with compiling_for("TPU v5 lite", "tpu"):
        assert not is_served()


#
# On a GPU
#


def _gpus() -> list[Any]:
    try:
        return jax.devices("cuda")
    except RuntimeError:
        return []


_needs_gpu = pytest.mark.skipif(not _gpus(), reason="needs a GPU")


@_needs_gpu
@parametrize_cases()
def test_kernel_on_a_gpu_is_plain_xla(case):
    dtype = case.storage.dtype
    grads = [arrays(SHAPES, dtype, seed) for seed in (1, 2)]
    make = ft.partial(case.optimizer, 1e-2)
    run("gpu", make, arrays(SHAPES, dtype, 0), grads, device=_gpus()[0])


@_needs_gpu
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_on_a_gpu(name, monkeypatch):
    run_layout("gpu", name, monkeypatch, _gpus()[0])


@_needs_gpu
@pytest.mark.parametrize("moments", ["sqrt", "fourth_root", "log", "learned"])
def test_curves_on_a_gpu_are_plain_xla(moments):
    grads = [arrays(SHAPES, jnp.bfloat16, seed) for seed in (1, 2)]
    make = ft.partial(fq.adamw, 1e-2, storage=fq.Storage(moments=moments))
    params = arrays(SHAPES, jnp.bfloat16, 0)
    run("gpu", make, params, grads, device=_gpus()[0])


@_needs_gpu
@pytest.mark.parametrize("groups_of", ["gpu", "tpu"])
@pytest.mark.parametrize("name", ["adamw", "lion", "sgdw"])
def test_millions_of_codes_on_a_gpu(name, groups_of):
    """Enough of them to count those that differ."""
    shapes = {"matrix": (1024, 2048)}
    grads = [arrays(shapes, jnp.bfloat16, seed) for seed in (1, 2, 3)]
    params = arrays(shapes, jnp.bfloat16, 0)
    make = ft.partial(Case(name, OURS).optimizer, 1e-2)
    run("gpu", make, params, grads, groups_of=groups_of, device=_gpus()[0])


@_needs_gpu
def test_exported_steps_on_a_gpu():
    """What another process would run."""
    pytest.importorskip("flatbuffers")
    params, grads = (arrays({"m": (70, 64)}, jnp.bfloat16, seed) for seed in (0, 1))
    optim = fq.adamw(1e-2)
    operands = jax.device_put((params, optim.init(params), grads), _gpus()[0])
    exported = _exported(optim, jax.eval_shape(lambda: params))
    again = jax.export.deserialize(exported.serialize())
    with jax.default_device(_gpus()[0]):
        found = again.call(jax.tree.leaves(operands))
        expected = jax.tree.leaves(jax.jit(optim.step)(*operands))
    for x, y in zip(found, expected, strict=True):
        assert np.array_equal(x, y)


@_needs_gpu
def test_ensembles_on_a_gpu():
    run_ensemble("gpu", ENSEMBLE, device=_gpus()[0])
    packed = ft.partial(fq.adamw, storage=PACKED)
    run_ensemble("gpu", ENSEMBLE, packed, device=_gpus()[0])


@_needs_gpu
@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_packed_states_on_a_gpu(name):
    """The same bits. And they are not copied: XLA knows the parts, put together, to be
    the array."""
    params, grads = (arrays(PACKED_SHAPES, jnp.bfloat16, seed) for seed in (0, 1))
    found = []
    for storage in (PACKED, fq.Storage()):
        optim = getattr(fq, name)(1e-2, storage=storage)
        operands = jax.device_put((params, optim.init(params), grads), _gpus()[0])
        with jax.default_device(_gpus()[0]):
            step = jax.jit(optim.step, donate_argnums=(0, 1)).lower(*operands).compile()
            model, state = step(*operands)
        found.append((model, state.count, state.moments, state.corrections))
        if name != "muon":
            # The codes of the smaller matrix have 4480 bytes.
            assert step.memory_analysis().temp_size_in_bytes < 4096
    assert tree_identical(*found)


@_needs_gpu
def test_a_thousand_steps_on_a_gpu():
    """Of the same gradients, with AdamW in float32 beside it. For the bound, see
    `test_trajectory`."""
    steps, shape = 1000, (512, 512)
    key, drift_key = jax.random.split(jax.random.key(0))
    drift = 0.1 * jax.random.normal(drift_key, shape)
    ours, reference = fq.adamw(1e-3), optax.adamw(1e-3)

    def both(count, carry):
        (weight, state), (exact, exact_state) = carry
        noise = jax.random.normal(jax.random.fold_in(key, count), shape)
        grad = (drift + noise).astype(jnp.bfloat16)
        exact_grad = grad.astype(jnp.float32)
        update, exact_state = reference.update(exact_grad, exact_state, exact)
        exact = optax.apply_updates(exact, update)
        return ours.step(weight, state, grad), (exact, exact_state)

    first = arrays({"matrix": shape}, jnp.bfloat16, 0)["matrix"]
    with jax.default_device(_gpus()[0]):
        first = jax.device_put(first, _gpus()[0])
        wide = first.astype(jnp.float32)
        carry = (first, ours.init(first)), (wide, reference.init(wide))
        # Optax promotes.
        with jax.numpy_dtype_promotion("standard"):
            carry = jax.jit(lambda x: jax.lax.fori_loop(0, steps, both, x))(carry)
    (weight, state), (exact, _) = carry
    master = float64(fq.master_weights(weight, state))
    assert np.all(np.isfinite(master))
    path = float64(exact) - float64(first)
    error = master - float64(exact)
    assert np.linalg.norm(error) <= 0.03 * np.linalg.norm(path)
