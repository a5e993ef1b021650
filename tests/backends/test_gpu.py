"""The GPU kernels: interpreted, against plain XLA; and lowered for CUDA. On a GPU, also
run there."""

import functools as ft
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flashquinox as fq
from flashquinox import _compat as compat
from flashquinox._backends.gpu import BACKEND as GPU, views as gpu
from flashquinox._storage import moment_codecs
from flashquinox._storage.layout import Layout, layout_of
from flashquinox._tile.tile import TileState

from ..helpers import Case, float64, parametrize_cases, slow, Storage
from ..kernels import arrays, compiling_for, run, run_ensemble


_ours = Storage(jnp.bfloat16, 24, "flashquinox")

# Two leaves in one kernel whose last tiles are partial, and leaves of other kinds: one
# without groups, and one of which the last groups are partial.
_SHAPES = {
    "matrix": (70, 64),
    "stack": (2, 96, 96),
    "vector": (40,),
    "ragged": (37, 5),
}
# Of three models.
_ENSEMBLE = {"matrix": (3, 64, 128), "other": (3, 96, 64), "vector": (3, 40)}
# Of groups along rows: lanes that fill a tile and some that do not, and leading axes.
_ROW_SHAPES = {"narrow": (64, 5), "stack": (2, 32, 200)}


# Every rule; and every pair of a dtype, a width and a codec.
_QUICK = [
    Case("adamw", _ours),
    Case("adamw", Storage(jnp.float16, 24, "flashoptim")),
    Case("adamw-nesterov", Storage(jnp.bfloat16, 32, "float32")),
    Case("adam", Storage(jnp.float32, None, "float32")),
    Case("lion", _ours),
    Case("lion", Storage(jnp.bfloat16, None, "flashoptim")),
    Case("lion", Storage(jnp.float32, None, "flashoptim")),
    Case("sgd", Storage(jnp.float16, 32, "float32")),
    Case("sgd-momentum", Storage(jnp.float16, 32, "flashoptim")),
    Case("sgd-nesterov", Storage(jnp.float32, None, "flashquinox")),
    Case("sgdw", Storage(jnp.float16, 32, "flashquinox")),
    Case("sgdw", Storage(jnp.float16, 24, "float32")),
]


@pytest.mark.product
@parametrize_cases(quick=_QUICK.__contains__)
def test_interpreted_kernel_is_plain_xla(case):
    dtype = case.storage.dtype
    is_one_leaf = case in _QUICK and case != Case("lion", _ours)
    shapes = {"matrix": _SHAPES["matrix"]} if is_one_leaf else _SHAPES
    grads = [arrays(shapes, dtype, seed) for seed in (1, 2)]
    make = ft.partial(case.optimizer, 1e-2)
    run("gpu", make, arrays(shapes, dtype, 0), grads)


@pytest.mark.product
@pytest.mark.parametrize(
    "name, leaf",
    [("adamw", "narrow"), ("lion", "stack"), slow("adamw", "stack")],
)
def test_groups_along_rows(name, leaf):
    """Of a state that was made for a TPU."""
    shapes = {leaf: _ROW_SHAPES[leaf]}
    grads = [arrays(shapes, jnp.bfloat16, seed) for seed in (1, 2)]
    make = ft.partial(Case(name, _ours).optimizer, 1e-2)
    run("gpu", make, arrays(shapes, jnp.bfloat16, 0), grads, groups_of="tpu")


@pytest.mark.product
@pytest.mark.parametrize(
    "name, bits",
    [
        ("sgdw", 24),
        ("adamw", None),
        slow("adamw", 24),
    ],
)
def test_updates(name, bits):
    shapes = {name: _SHAPES[name] for name in ("matrix", "vector")}
    grads = [arrays(shapes, jnp.bfloat16, seed) for seed in (1, 2)]
    storage = Storage(jnp.bfloat16, bits, "flashquinox")
    make = ft.partial(Case(name, storage).optimizer, 1e-2)
    params = arrays(shapes, jnp.bfloat16, 0)
    run("gpu", make, params, grads, method="update")


@pytest.mark.product
@pytest.mark.parametrize(
    "name, group_size", [("lion", 16), ("lion", 48), ("adamw", 128)]
)
def test_other_groups(name, group_size):
    """Also where the kernel has no tile of them."""
    shapes = {"leaf": (9, 384)}
    grads = [arrays(shapes, jnp.float32, seed) for seed in (1, 2)]
    make = ft.partial(Case(name, _ours).optimizer, 1e-2, {"group_size": group_size})
    run("gpu", make, arrays(shapes, jnp.bfloat16, 0), grads)


def test_nonfinite_steps_are_skipped():
    shapes = {name: _SHAPES[name] for name in ("matrix", "vector")}
    good, bad, again = (arrays(shapes, jnp.bfloat16, seed) for seed in (1, 2, 3))
    bad["vector"] = bad["vector"].at[3].set(jnp.nan)
    make = ft.partial(Case("adamw", _ours).optimizer, 1e-2, skip_nonfinite=True)
    run("gpu", make, arrays(shapes, jnp.bfloat16, 0), [good, bad, again])


def test_leaves_with_and_without_decay():
    """They do not share a kernel, and keep their dither."""
    shapes = {name: (64, 64) for name in "abc"}
    params, grads = (arrays(shapes, jnp.bfloat16, seed) for seed in (0, 1))
    mask = {"a": True, "b": False, "c": True}
    storage = fq.Storage(master_weight_bits=None, dither_weights=True)
    make = ft.partial(fq.lion, 1e-2, weight_decay=0.1, mask=mask, storage=storage)
    run("gpu", make, params, [grads])


# Shapes, axes of groups, and sizes of groups.
_LAYOUTS = {
    # Whole groups, and one more: of a leaf that is tiny, and of one that is not.
    "tiny": ((7, 33), (-2, -1), 32),
    "large": ((131, 101), (-2, -1), 32),
    # A partial group in each of several runs, as on a mesh.
    "runs": ((6, 7, 11), (-2, -1), 32),
    "sizes": ((4, 96), (-1,), 48),
    "partial sizes": ((10, 33), (-2, -1), 80),
    # Groups along rows: partial ones, and rows of several axes.
    "rows": ((40, 6), (-2,), 32),
    "merged rows": ((2, 5, 8, 6), (-3, -2), 32),
}


@pytest.mark.product
@pytest.mark.parametrize("name", _LAYOUTS)
def test_every_layout(name, monkeypatch):
    _run_layout(name, monkeypatch)


def _run_layout(name, monkeypatch, device=None):
    shape, axes, group_size = _LAYOUTS[name]
    layout = lambda shape, size, *_: layout_of(shape, axes, size)
    monkeypatch.setattr(moment_codecs, "choose_layout", layout)
    params, *grads = [arrays({"w": shape}, jnp.bfloat16, seed) for seed in range(3)]
    storage = fq.Storage(group_size=group_size)
    make = ft.partial(fq.adamw, 1e-2, storage=storage)
    run("gpu", make, params, grads, device=device)


@pytest.mark.product
@pytest.mark.parametrize("make", [fq.lion, slow(fq.adamw)])
def test_ensembles(make):
    run_ensemble("gpu", _ENSEMBLE, make)


def _step(shape, axes=(-1,), group_size=32, dtype=jnp.bfloat16):
    leaf = jnp.zeros(shape, dtype)
    scales = {"moment": jnp.zeros(())}
    return gpu.view_of(
        Layout(shape, axes, group_size), leaf, TileState(leaf, None, {}, scales)
    )


def test_views():
    assert _step((3, 64)) == gpu.Lanes(3, 64, 32, 128)
    assert _step((3, 64), group_size=48) == gpu.Lanes(3, 64, 48, 128)
    assert _step((2, 64, 5), (-2,)) == gpu.Rows(2, 64, 32, 4096, 5)
    assert _step((64, 3, 5), (-3,)) == gpu.Rows(1, 64, 32, 4096, 15)
    assert _step((512, 480), (-2, -1)) == gpu.Lanes(1, 512 * 480, 32, 512)
    with jax.enable_x64(True):
        assert _step((3, 64), dtype=jnp.float64) is None


#
# Lowered
#


def _kernels(optim: fq.Optimizer, params) -> int:
    """The number of kernels in the step for CUDA."""
    state = jax.eval_shape(optim.init, params)
    triton = "__gpu$xla.gpu.triton"
    with compiling_for("NVIDIA H100 80GB HBM3", "cuda"):
        exported = jax.export.export(
            jax.jit(optim.step),
            platforms=["cuda"],
            disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(triton)],
        )(params, state, params)
    return exported.mlir_module().count(f"@{triton}")


def _shapes(dtype, **shapes):
    return {name: jax.ShapeDtypeStruct(x, dtype) for name, x in shapes.items()}


# Every dtype, width and codec, and kernels of each number of moments.
_LOWERED = [
    Case("adamw", _ours),
    Case("adamw", Storage(jnp.bfloat16, 32, "float32")),
    Case("adamw", Storage(jnp.float16, 24, "flashoptim")),
    Case("adamw", Storage(jnp.float32, None, "flashquinox")),
    Case("lion", _ours),
    Case("sgd", _ours),
]


@pytest.mark.product
@parametrize_cases(
    lambda case: case.name == "adamw" or case.storage == _ours,
    quick=_LOWERED.__contains__,
)
def test_lowers_for_cuda(case):
    """Every way to store a leaf, and every rule: what is lowered for them is apart."""
    params = _shapes(case.storage.dtype, matrix=(70, 64))
    optim = case.optimizer(1e-3, backend="gpu")
    assert _kernels(optim, params) == 1


@pytest.mark.product
@pytest.mark.parametrize("moments", ["log", "learned"])
def test_curves_lower_for_cuda(moments):
    params = _shapes(jnp.bfloat16, first=(70, 64), second=(64, 64))
    optim = fq.adamw(1e-3, storage=fq.Storage(moments=moments), backend="gpu")
    assert _kernels(optim, params) == 1


def test_leaves_share_kernels():
    small = {f"matrix{i}": (64, 64 * (1 + i % 3)) for i in range(12)}
    vectors = {f"vector{i}": (40 + i,) for i in range(3)}
    large = {f"odd{i}": (1001, 1001 + i) for i in range(8)}
    params = _shapes(jnp.bfloat16, **small, **vectors, **large)
    # No more than so many in one; and the vectors, which have no groups. Large leaves
    # have partial groups in kernels of their own.
    assert _kernels(fq.lion(1e-3, backend="gpu"), params) == 2 + 1 + 2 * 2


def test_equal_leaves_are_one_kernel():
    """12 of them take it twice, with 6 at a time, and not with 8 and with 4."""
    params = _shapes(jnp.bfloat16, **{f"matrix{i}": (64, 64) for i in range(12)})
    assert _kernels(fq.lion(1e-3, backend="gpu"), params) == 1


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
    grads = [arrays(_SHAPES, dtype, seed) for seed in (1, 2)]
    make = ft.partial(case.optimizer, 1e-2)
    run("gpu", make, arrays(_SHAPES, dtype, 0), grads, device=_gpus()[0])


@_needs_gpu
@pytest.mark.parametrize("name", _LAYOUTS)
def test_every_layout_on_a_gpu(name, monkeypatch):
    _run_layout(name, monkeypatch, _gpus()[0])


@_needs_gpu
@pytest.mark.parametrize("moments", ["sqrt", "fourth_root", "log", "learned"])
def test_curves_on_a_gpu_are_plain_xla(moments):
    grads = [arrays(_SHAPES, jnp.bfloat16, seed) for seed in (1, 2)]
    make = ft.partial(fq.adamw, 1e-2, storage=fq.Storage(moments=moments))
    params = arrays(_SHAPES, jnp.bfloat16, 0)
    run("gpu", make, params, grads, device=_gpus()[0])


@_needs_gpu
@pytest.mark.parametrize("groups_of", ["gpu", "tpu"])
@pytest.mark.parametrize("name", ["adamw", "lion", "sgdw"])
def test_millions_of_codes_on_a_gpu(name, groups_of):
    """Enough of them to count those that differ."""
    shapes = {"matrix": (1024, 2048)}
    grads = [arrays(shapes, jnp.bfloat16, seed) for seed in (1, 2, 3)]
    params = arrays(shapes, jnp.bfloat16, 0)
    make = ft.partial(Case(name, _ours).optimizer, 1e-2)
    run("gpu", make, params, grads, groups_of=groups_of, device=_gpus()[0])


@_needs_gpu
def test_ensembles_on_a_gpu():
    run_ensemble("gpu", _ENSEMBLE, device=_gpus()[0])


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
