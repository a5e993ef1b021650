"""A kernel against plain XLA."""

import contextlib
import functools as ft
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
import scipy.special
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh

import flashquinox as fq
from flashquinox._backends.cpu import compiler
from flashquinox._backends.gpu import nvrtc

from .helpers import array_of, float64


Arrays: TypeAlias = dict[str, jax.Array]


# Compiled once for a shape, and not operation by operation.
_master_weights = eqx.filter_jit(fq.master_weights)


# Older interpreters compile a weight and its correction into two programs, in which a
# product and a sum may be one operation or two. So may they in one program that XLA
# does not optimize: it computes them once for each of its results. If that leads to
# roundings in different directions, the two do not belong together: by one unit of the
# weight.
_NOT_OPTIMIZED = "--xla_backend_optimization_level=0"
_COMPILES_APART = jax.__version_info__ < (0, 11) or _NOT_OPTIMIZED in os.environ.get(
    "XLA_FLAGS", ""
)


# Significant ones.
_STORED_BITS = {
    jnp.dtype(jnp.bfloat16): 8,
    jnp.dtype(jnp.float16): 11,
    jnp.dtype(jnp.float32): 24,
}


def _is_there(needed: Callable[[], object]) -> bool:
    try:
        needed()
    except ImportError:
        return False
    return True


# NVIDIA's, for which no GPU is needed: there are packages of it for Linux.
has_compiler = _is_there(nvrtc.load)
needs_compiler = pytest.mark.skipif(not has_compiler, reason="needs NVRTC")
# Of programs for CPUs.
has_cpp_compiler = _is_there(compiler.command)
needs_cpp_compiler = pytest.mark.skipif(
    not has_cpp_compiler, reason="needs a C++ compiler"
)


@contextlib.contextmanager
def compiling_for(kind: str, platform: str, cores: int = 1):
    """Kernels ask for their device."""
    device = AbstractDevice(kind, cores, platform)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        yield


def tpu_devices(topology: str) -> Sequence[Any]:
    """TPUs to compile for. The compiler is there on Linux."""
    pytest.importorskip("libtpu")
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def arrays(shapes, dtype, seed: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    # Rows of very different size, for moments to use the range of their codes.
    size = lambda shape: np.exp2(rng.uniform(-20, 0, (*shape[:-1], 1)))
    return {
        name: array_of(rng.standard_normal(shape) * size(shape), dtype)
        for name, shape in shapes.items()
    }


def assert_same(ours, reference, params, old, grads, approximate=False) -> None:
    """Of a new model and its state, codes and scales are the same bit for bit, but for
    one code in 10^4 and step that may differ by one (and does so in the next steps as
    well, as moments decay slowly): a product and a sum are one operation in
    one program and two in another. So numbers may lie a rounding of float32 apart, of
    the largest term of their sum: half a unit in the last place. For weights, that
    shows in a master weight of 32 bits, which has every bit of a float32; of 24 bits or
    fewer it seldom is one (one time in 512 where no terms cancel).

    Where a device's divisions and roots are `approximate`, or another compiler decides
    which of two products is one operation with their sum, it may be four such units. A
    master weight differs as often as that is of one of its own units, which are small
    where terms cancel.
    """
    assert jtu.tree_structure(ours) == jtu.tree_structure(reference)
    (model, state), (expected_model, expected_state) = ours, reference
    assert np.array_equal(state.count, expected_state.count)
    is_moment = lambda x: isinstance(x, fq.QuantMoment)
    by_path = lambda tree: dict(jtu.tree_flatten_with_path(tree, is_leaf=is_moment)[0])
    of_params = by_path(params)
    sizes = {
        path: np.abs(float64(of_params[path])) + np.abs(np.nan_to_num(float64(grad)))
        for path, grad in by_path(grads).items()
    }
    for name in state.moments:
        moments = [by_path(x.moments[name]) for x in (state, expected_state, old)]
        # A rule may keep a moment of some leaves only.
        assert moments[0].keys() == moments[1].keys() == moments[2].keys()
        for path, new in moments[0].items():
            expected, before = (x[path] for x in moments[1:])
            if is_moment(new):
                steps = int(np.max(np.asarray(state.count)))
                _assert_same_codes(new, expected, steps)
                continue
            new, expected, before = map(float64, (new, expected, before))
            size, roundings = np.abs(before) + np.abs(expected), 4
            if new.shape == sizes[path].shape:
                size = size + sizes[path]
            else:
                # A mean of that many squares, in any order.
                roundings += sizes[path].size // new.size
            assert np.all(np.abs(new - expected) <= size * roundings * 2**-24)
    is_none = lambda x: x is None
    corrections = jtu.tree_leaves(state.corrections, is_leaf=is_none)
    masters = jtu.tree_leaves(_master_weights(model, state))
    expected_masters = jtu.tree_leaves(_master_weights(expected_model, expected_state))
    for param, new, expected, correction in zip(
        jtu.tree_leaves(params), masters, expected_masters, corrections, strict=True
    ):
        is_exact = correction is not None and correction.dtype == jnp.int16
        dtype = jnp.dtype(param.dtype)
        narrow = dtype != jnp.float32
        param, new, expected = map(float64, (param, new, expected))
        # The terms of an update, which may cancel, are no larger than 4 learning rates:
        # in Adam's, (1 - b1) / sqrt(1 - b2) < 4 of a gradient; in others, gradients.
        size = np.maximum(np.abs(param), np.abs(expected - param)) + 4 * 1e-2
        # A unit of the stored weight, where its rounding went the other way.
        bits = _STORED_BITS[dtype] + (0 if correction is None else 8)
        unit = np.abs(expected) * 2.0 ** (1 - bits)
        bound = size * 2**-22
        if narrow and not is_exact:
            bound += unit
        different = new != expected
        difference = np.abs(new - expected)[different]
        if _COMPILES_APART:
            outliers = difference > bound[different]
            assert np.sum(outliers) <= 1e-3 * different.size
            bound = np.abs(expected) * 2**-7 + bound
            # Another code may turn a sign, of which one in a hundred is as close to 0.
            turned = difference > bound[different]
            steps = int(np.max(np.asarray(state.count)))
            assert np.sum(turned) <= _most_of(1e-6 * steps * different.size)
        else:
            assert np.all(difference <= bound[different])
        if narrow and not is_exact:
            most = 0.01 * different.size + 1
            if approximate:
                error = size * 2**-21
                chance = error / np.maximum(unit / 2, error)
                most = _most_of(np.sum(chance))
            assert np.sum(different) <= most


def _assert_same_codes(new, expected, steps: int) -> None:
    def differences(part: str) -> np.ndarray:
        ours, theirs = getattr(new, part), getattr(expected, part)
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        return np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int))

    codes, scales = differences("codes"), differences("scales")
    others = np.sum(scales != 0)
    assert others <= _most_of(1e-4 * steps * scales.size)
    # Codes of a group with another scale stand for other numbers.
    most = new.group_size * others
    assert np.sum(codes > 1) <= most
    assert np.sum(codes != 0) <= most + _most_of(1e-4 * steps * codes.size)


def _most_of(expected: float) -> int:
    """How many rare events there may be, where so many are expected: one time in a
    million, there are more."""
    return math.ceil(scipy.special.pdtrik(1 - 1e-6, expected))


def _uncancelled(grads: Arrays, params: Arrays) -> Arrays:
    """Gradients with another sign where they cancel with what a weight decay of 0.1
    adds to them: their sum is the rounding of either, and rules divide by its size."""

    def one(grad: jax.Array, param: jax.Array) -> jax.Array:
        wide, decay = float64(grad), 0.1 * float64(param)
        cancels = np.abs(wide + decay) < 2**-6 * np.abs(wide)
        return jnp.where(cancels, -grad, grad)

    return {name: one(grad, params[name]) for name, grad in grads.items()}


def run(
    backend: str,
    make: Callable[..., fq.Optimizer],
    params: Any,
    grads: Sequence[Arrays],
    method: str = "step",
    groups_of: str | None = None,
    device: Any = None,
    first: int = 0,
    **kwargs,
) -> None:
    """Steps of the kernel, on a device, and of plain XLA, each from the state of the
    latter. Groups are as the backend `groups_of` has them: by default, the first one.
    The kernel takes no step before step `first`.
    """
    kernel, plain = (make(backend=name, **kwargs) for name in (backend, "xla"))
    state = make(backend=groups_of or backend, **kwargs).init(params)

    def take(optim, params, state, grad):
        if method == "step":
            return optim.step(params, state, grad)
        return optim.update(grad, state, params)

    take_kernel, take_plain = (jax.jit(ft.partial(take, x)) for x in (kernel, plain))
    here = jax.devices("cpu")[0]
    for i, grad in enumerate(grads):
        grad = _uncancelled(grad, params)
        results = [take_plain(params, state, grad)]
        if i >= first:
            there = jax.device_put((params, state, grad), device)
            # What is compiled depends on it.
            with jax.default_device(device):
                found = jax.device_put(take_kernel(*there), here)
            results.insert(0, found)
        if method == "update":
            results = [(optax.apply_updates(params, u), s) for u, s in results]
        if i >= first:
            other = device is not None or backend in ("gpu", "cpu")
            assert_same(*results, params, state, grad, approximate=other)
        params, state = results[-1]


def run_ensemble(
    backend: str,
    shapes: dict[str, Any],
    make: Callable[..., fq.Optimizer] = fq.adamw,
    device: Any = None,
) -> None:
    """A step of models that `vmap` stacks along the first axis, as in `run`."""
    params, grads = (arrays(shapes, jnp.bfloat16, seed) for seed in (0, 1))
    kernel, plain = (make(1e-2, backend=name) for name in (backend, "xla"))
    state = jax.vmap(kernel.init)(params)
    there = jax.device_put((params, state, grads), device)
    with jax.default_device(device):
        found = jax.jit(jax.vmap(kernel.step))(*there)
    found = jax.device_put(found, jax.devices("cpu")[0])
    expected = jax.jit(jax.vmap(plain.step))(params, state, grads)
    is_approximate = device is not None or backend in ("gpu", "cpu")
    assert_same(found, expected, params, state, grads, approximate=is_approximate)
