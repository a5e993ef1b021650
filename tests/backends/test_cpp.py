"""Kernels in C++ against plain XLA: those of GPUs, interpreted, and those of CPUs."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flashquinox as fq

from ..helpers import (
    Case,
    CASES,
    float64,
    OURS,
    pairwise,
    parametrize_cases,
    slow,
    Storage,
)
from ..kernels import arrays, needs_cpp_compiler, run, run_ensemble
from .cases import ENSEMBLE, LAYOUTS, PACKED, PACKED_SHAPES, run_layout, SHAPES


BACKENDS = pytest.mark.parametrize(
    "backend", ["gpu", pytest.param("cpu", marks=needs_cpp_compiler)]
)

# Of groups along rows: lanes that fill a tile and some that do not, and leading axes.
_ROW_SHAPES = {"narrow": (64, 5), "stack": (2, 32, 200)}


# Pairs of a rule, a dtype and a codec; every width, and every optimizer of these rules.
_QUICK = pairwise(
    [case for case in CASES if case.rule in ("adam", "lion", "sgd")],
    ("rule", "dtype"),
    ("rule", "moments"),
    ("dtype", "moments"),
    ("width", "width"),
    ("name", "name"),
    known=[Case("adamw", OURS), Case("lion", OURS)],
)


@BACKENDS
@pytest.mark.product
@parametrize_cases(quick=_QUICK.__contains__)
def test_interpreted_kernel_is_plain_xla(backend, case):
    dtype = case.storage.dtype
    is_one_leaf = case in _QUICK and case != Case("lion", OURS)
    shapes = {"matrix": SHAPES["matrix"]} if is_one_leaf else SHAPES
    grads = [arrays(shapes, dtype, seed) for seed in (1, 2)]
    make = ft.partial(case.optimizer, 1e-2)
    run(backend, make, arrays(shapes, dtype, 0), grads)


@BACKENDS
@pytest.mark.product
@pytest.mark.parametrize(
    "name, leaf",
    [("adamw", "narrow"), ("lion", "stack"), slow("adamw", "stack")],
)
def test_groups_along_rows(backend, name, leaf):
    """Of a state that was made for a TPU."""
    shapes = {leaf: _ROW_SHAPES[leaf]}
    grads = [arrays(shapes, jnp.bfloat16, seed) for seed in (1, 2)]
    make = ft.partial(Case(name, OURS).optimizer, 1e-2)
    run(backend, make, arrays(shapes, jnp.bfloat16, 0), grads, groups_of="tpu")


@BACKENDS
@pytest.mark.product
@pytest.mark.parametrize(
    "name, bits",
    [
        ("sgdw", 24),
        ("adamw", None),
        slow("adamw", 24),
    ],
)
def test_updates(backend, name, bits):
    shapes = {name: SHAPES[name] for name in ("matrix", "vector")}
    grads = [arrays(shapes, jnp.bfloat16, seed) for seed in (1, 2)]
    storage = Storage(jnp.bfloat16, bits, "flashquinox")
    make = ft.partial(Case(name, storage).optimizer, 1e-2)
    params = arrays(shapes, jnp.bfloat16, 0)
    run(backend, make, params, grads, method="update")


@BACKENDS
@pytest.mark.product
@pytest.mark.parametrize(
    "name, group_size", [("lion", 16), ("lion", 48), ("adamw", 128)]
)
def test_other_groups(backend, name, group_size):
    """Also where the kernel has no tile of them."""
    shapes = {"leaf": (9, 384)}
    grads = [arrays(shapes, jnp.float32, seed) for seed in (1, 2)]
    make = ft.partial(Case(name, OURS).optimizer, 1e-2, {"group_size": group_size})
    run(backend, make, arrays(shapes, jnp.bfloat16, 0), grads)


@BACKENDS
@pytest.mark.parametrize("name", ["adamw", slow("lion"), slow("muon")])
def test_packed_states(backend, name):
    grads = [arrays(PACKED_SHAPES, jnp.bfloat16, seed) for seed in (1, 2)]
    params = arrays(PACKED_SHAPES, jnp.bfloat16, 0)
    run(backend, ft.partial(getattr(fq, name), 1e-2, storage=PACKED), params, grads)


@BACKENDS
@pytest.mark.once
def test_packed_states_of_ensembles(backend):
    run_ensemble(backend, ENSEMBLE, ft.partial(fq.adamw, storage=PACKED))


@BACKENDS
@pytest.mark.once
def test_nonfinite_steps_are_skipped(backend):
    shapes = {name: SHAPES[name] for name in ("matrix", "vector")}
    good, bad, again = (arrays(shapes, jnp.bfloat16, seed) for seed in (1, 2, 3))
    bad["vector"] = bad["vector"].at[3].set(jnp.nan)
    make = ft.partial(Case("adamw", OURS).optimizer, 1e-2, skip_nonfinite=True)
    run(backend, make, arrays(shapes, jnp.bfloat16, 0), [good, bad, again])


@BACKENDS
def test_leaves_with_and_without_decay(backend):
    """They do not share a kernel, and keep their dither."""
    shapes = {name: (64, 64) for name in "abc"}
    params, grads = (arrays(shapes, jnp.bfloat16, seed) for seed in (0, 1))
    mask = {"a": True, "b": False, "c": True}
    storage = fq.Storage(master_weight_bits=None, dither_weights=True)
    make = ft.partial(fq.lion, 1e-2, weight_decay=0.1, mask=mask, storage=storage)
    run(backend, make, params, [grads])


def _bits(x):
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _integers(x):
    return jnp.round(1000 * x).astype(jnp.int32)


# Of numbers between -1 and 1.
_OPERATIONS = {
    function.__name__: function
    for function in [
        *[jnp.abs, jnp.sign, jnp.square, jnp.ceil, jnp.floor, jnp.round, jnp.exp],
        *[jnp.exp2, jnp.expm1, jnp.log1p, jnp.cbrt, jnp.sin, jnp.cos, jnp.tan],
        *[jnp.arcsin, jnp.arccos, jnp.arctan, jnp.sinh, jnp.cosh, jnp.tanh],
        *[jnp.arcsinh, jnp.arctanh, jax.lax.erf, jax.lax.erfc, jax.lax.logistic],
        jnp.isfinite,
    ]
} | {
    "sqrt": lambda x: jnp.sqrt(jnp.abs(x)),
    "log": lambda x: jnp.log(2 + x),
    "log2": lambda x: jnp.log2(2 + x),
    "rsqrt": lambda x: jax.lax.rsqrt(2 + x),
    # XLA's differs more where it is small.
    "lgamma": lambda x: jax.lax.lgamma(40 + x),
    "acosh": lambda x: jnp.arccosh(3 + x),
    "pow": lambda x: (2 + x) ** x,
    "integer_pow": lambda x: (2 + x) ** -3 + x**2 + x**5,
    "rem": lambda x: jax.lax.rem(x, jnp.float32(0.3)),
    "div": lambda x: 1 / x,
    "atan2": lambda x: jnp.arctan2(x, 1 - x),
    "nextafter": lambda x: jnp.nextafter(x, 2 * x),
    "away": lambda x: jax.lax.round(10 * x, jax.lax.RoundingMethod.AWAY_FROM_ZERO),
    "clip": lambda x: jnp.clip(x, -0.5, 0.25),
    "compared": lambda x: (x < 0.1) | (x >= 0.2) & (x != 0.5) ^ ~(x <= -0.3),
    "equal": lambda x: jnp.round(x) == 0,
    "cases": lambda x: jax.lax.select_n(_integers(x) & 1, x, -x),
    "polynomial": lambda x: jnp.polyval(np.float32([1, -2, 3]), x),
    "bits": lambda x: (_bits(x) ^ 5) & ~(_bits(x) << 3) | 1,
    "logical": lambda x: jax.lax.shift_right_logical(_bits(x), _integers(x) & 63),
    "arithmetic": lambda x: _bits(x) >> (_integers(x) & 63),
    # Without the sign, which is below the bits that are computed with.
    "short": lambda x: jax.lax.shift_right_logical(
        _integers(x).astype(jnp.int16), np.int16(3)
    ),
    "left": lambda x: jax.lax.shift_left(_bits(x), _integers(x) & 63),
    "wrapped": lambda x: _bits(x) * _bits(x) + _bits(x) - 7,
    "integers": lambda x: jnp.abs(-_integers(x)) + jnp.sign(_integers(x)),
    "quotients": lambda x: jax.lax.rem(_integers(x), 7) - jax.lax.div(_integers(x), 7),
    "extremes": lambda x: jnp.maximum(_integers(x), 3) - jnp.minimum(_integers(x), -3),
    "bytes": lambda x: _integers(x).astype(jnp.int8) * jnp.int8(3),
    "words": lambda x: _integers(x).astype(jnp.uint16) >> np.uint16(3),
    "half": lambda x: (1e-7 * x).astype(jnp.float16).astype(jnp.float32) * 1e7,
    # Its bits: of the number, XLA may keep more.
    "brain": lambda x: jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.int16),
    "saturated": lambda x: (1e12 * x).astype(jnp.int32),
    "not negative": lambda x: (1e12 * x).astype(jnp.uint32),
    "largest byte": lambda x: (1e3 * x).astype(jnp.int8),
    "no number": lambda x: jnp.where(x < 0, jnp.nan, x).astype(jnp.int32),
    "by zero": lambda x: (
        jax.lax.div(7, _integers(x) // 500) + jax.lax.rem(7, _integers(x) // 500)
    ),
    "by minus one": lambda x: (
        jax.lax.div(jnp.int32(-(2**31)), jnp.sign(_integers(x)))
        + jax.lax.rem(jnp.int32(-(2**31)), jnp.sign(_integers(x)))
    ),
    "large divisor": lambda x: 1e38 / (jnp.sign(x) * 2e38),
    "erf_inv": jax.lax.erf_inv,
    "either": lambda x: jnp.maximum(x < 0, x > 0.5) & ~jnp.minimum(x < 0.1, x > -0.1),
    "infinite": lambda x: jnp.where(x < 0, jnp.inf, -jnp.inf),
}


class Operations(fq.AbstractRule):
    """A moment for the result of each operation."""

    @property
    def moments(self):
        return {name: fq.Moment("signed") for name in _OPERATIONS}

    def scalars(self, count, learning_rate):
        return {}

    def update(self, grad, weight, moments, scalars):
        found = {name: f(grad) for name, f in _OPERATIONS.items()}
        return -grad, {name: x.astype(jnp.float32) for name, x in found.items()}


@BACKENDS
@pytest.mark.once
def test_operations(backend):
    """Those of users' rules."""
    params = {"w": jnp.zeros((8, 64), jnp.bfloat16)}
    rng = np.random.default_rng(0)
    grads = {"w": jnp.asarray(rng.uniform(-1, 1, (8, 64)), jnp.float32)}
    found = {}
    for name in (backend, "xla"):
        storage = fq.Storage(moments="float32")
        optim = fq.optimizer(Operations(), 1.0, storage=storage, backend=name)
        _, state = jax.jit(optim.step)(params, optim.init(params), grads)
        found[name] = {key: float64(x["w"]) for key, x in state.moments.items()}
    # Functions of the C library are within some units in the last place.
    is_close = ft.partial(np.allclose, rtol=2**-20, atol=2**-22)
    found_there, expected = found[backend], found["xla"]
    wrong = [x for x in expected if not is_close(found_there[x], expected[x])]
    assert not wrong


@BACKENDS
@pytest.mark.product
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout(backend, name, monkeypatch):
    run_layout(backend, name, monkeypatch)


@BACKENDS
@pytest.mark.product
@pytest.mark.parametrize("make", [fq.lion, slow(fq.adamw)])
def test_ensembles(backend, make):
    run_ensemble(backend, ENSEMBLE, make)
