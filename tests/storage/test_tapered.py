"""Codes of 16 bits for sums and first moments."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flashquinox as fq
from flashquinox._storage.layout import flattened, Layout
from flashquinox._storage.tapered_read import TaperedReader

from ..helpers import float64, slow
from ..kernels import arrays, run


_codec = fq.TaperedCodec()
_thresholds = (0, 1, 777, 2**15, 2**16 - 1)


@jax.jit
def _encode(x, threshold):
    """The codes and the scales of groups."""
    return _codec.encode(x, -1, fq.Dither(jnp.float32(0.5), threshold))


@jax.jit
def _decode(codes, scales):
    return _codec.decode(codes, scales, -1, jnp.float32)


def _bound(x):
    """The distance of two codes at numbers of groups, by the table of the codec."""
    x = float64(x)
    largest = np.abs(x).max(-1, keepdims=True)
    # Just below a power of two, the largest may be rounded to the one above it.
    top = np.frexp(largest * (1 + 2.0**-12))[1]
    exponent = np.frexp(x)[1]
    below = top - exponent
    digits = np.select([below < 2, below < 6, below < 14], [13, 12, 11], 10)
    return np.where(below < 29, 2.0 ** (exponent - digits), 2.0 ** (top - 38.0))


@pytest.mark.parametrize("exponent", [1, 30, 127, 200, 253, 254])
def test_codes_are_kept(exponent):
    """All of them, in order, whatever they are rounded by."""
    codes = jnp.arange(-(2**15) + 1, 2**15, dtype=jnp.int16)[None]
    scales = jnp.full(1, exponent, jnp.int16)
    x = _decode(codes, scales)
    assert bool(jnp.all(jnp.diff(x[0]) >= 0)) and not float(x[0, 2**15 - 1])
    # Arithmetic flushes smaller numbers to zero.
    is_normal = jnp.abs(x) >= jnp.finfo(jnp.float32).tiny
    for threshold in _thresholds:
        again, scale = _encode(x, jnp.uint32(threshold))
        assert bool(jnp.all(jnp.where(is_normal, again == codes, True)))
        assert int(scale[0]) == exponent


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_is_within_a_code_and_unbiased(size):
    rng = np.random.default_rng(0)
    shrunk = np.exp2(-rng.uniform(0, 31, (64, 32)))
    x = jnp.asarray(size * rng.standard_normal((64, 32)) * shrunk, jnp.float32)
    # Arithmetic flushes what is below the smallest normal number.
    bound, least, errors = _bound(x), float(jnp.finfo(jnp.float32).tiny), []
    for threshold in range(0, 2**16, 2**10):
        found = _decode(*_encode(x, jnp.uint32(threshold + 511)))
        errors.append(float64(found) - float64(x))
        assert np.all(np.abs(errors[-1]) <= bound + least)
    # Over 64 thresholds that are evenly spaced.
    assert np.all(np.abs(np.mean(errors, 0)) <= bound / 64 + least)


def test_what_is_not_finite_and_zeros():
    """Of a group, each is for itself."""
    x = np.full((5, 32), 3.0, np.float32)
    x[0, 5], x[1, 5], x[2, 5], x[3], x[4, 5] = np.inf, np.nan, -np.inf, 0, 3.4028235e38
    codes, scales = _encode(jnp.asarray(x), jnp.uint32(9))
    found = np.asarray(_decode(codes, scales))
    assert np.all(np.isnan(found[:3, 5])) and np.all(found[3] == 0)
    assert np.all(np.delete(found[:3], 5, 1) == 3)
    # The largest number is not rounded to infinity, and hides the others.
    assert found[4, 5] == pytest.approx(3.4028235e38, rel=2.0**-12)
    assert np.all(np.isfinite(found[4]))
    nothing = _decode(jnp.zeros_like(codes), jnp.zeros_like(scales))
    assert not np.any(nothing)


@pytest.mark.once
@pytest.mark.parametrize(
    "layout",
    [flattened((), 32), flattened((0,), 32), Layout((3, 70), (-1,), 32)],
    ids=["scalar", "nothing", "partial"],
)
def test_is_read_as_bfloat16(layout):
    """The nearest, and zeros as scales; of a NaN, a NaN."""
    x = jax.random.normal(jax.random.key(0), layout.shape)
    x = jnp.where(x > 1.5, jnp.nan, x)
    codes, scales = _encode(layout.tile(x), jnp.uint32(3))
    wide = _decode(codes, scales)
    reader, half = TaperedReader(), fq.Dither(jnp.float32(0.5), jnp.uint32(0))
    bits, zeros = reader.encode(wide, -1, half)
    found = jax.lax.bitcast_convert_type(bits, jnp.bfloat16)
    assert np.array_equal(
        float64(found), float64(wide.astype(jnp.bfloat16)), equal_nan=True
    )
    assert not np.any(zeros) and zeros.shape == scales.shape
    assert np.array_equal(
        reader.decode(codes, scales, -1, jnp.float32), wide, equal_nan=True
    )


@pytest.mark.parametrize("backend", ["gpu", slow("tpu")])
@pytest.mark.parametrize("make", [fq.sgd, slow(fq.adamw)])
def test_kernels_store_momenta_so(backend, make):
    """As plain XLA does."""
    codecs = fq.MomentCodecs(_codec, fq.FittedLogCodec())
    options = {"storage": fq.Storage(moments=codecs)}
    if make is fq.sgd:
        options["momentum"] = 0.9
    shapes = {"leaf": (64, 128)}
    params, *grads = (arrays(shapes, jnp.bfloat16, seed) for seed in range(4))
    run(backend, partial(make, 0.1, **options), params, grads)


def test_a_momentum_that_stops_decays():
    """To nothing, and before that by what float32's adds up to."""
    codecs = fq.MomentCodecs(_codec, fq.FittedLogCodec())
    storage = fq.Storage(master_weight_bits=32, moments=codecs)
    optim = fq.sgd(1.0, momentum=0.9, storage=storage)
    w = jnp.zeros((32, 128), jnp.bfloat16)
    grad = jnp.full_like(w, 1e-3).at[:, 0].set(1.0)
    state = optim.init(w)
    w, state = jax.jit(optim.step)(w, state, grad)
    # One of the first group of a row goes on, and keeps its scale.
    grad = grad.at[:, 1:].set(0.0)

    def step(carry, _):
        return optim.step(*carry, grad), None

    (w, state), _ = jax.jit(lambda x: jax.lax.scan(step, x, None, 400))((w, state))
    moved = float64(fq.master_weights(w, state))[:, 1:]
    # Each step rounds to 10 bits and more, evenly around what it rounds.
    np.testing.assert_allclose(moved, -float(grad.dtype.type(1e-3)) / 0.1, rtol=2.0**-6)
    assert not np.any(np.asarray(state.moments["trace"].codes)[:, 1:32])
