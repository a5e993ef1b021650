import dataclasses
import math
import warnings
from functools import partial

import equinox as eqx
import flashquinox as fq
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flashquinox import Dither, FlashOptimCodec, MomentCodecs
from flashquinox._codec import decode_scale, encode_scale
from flashquinox._layout import choose_layout, Layout
from hypothesis import given

from .helpers import (
    assert_code_of,
    bits_of,
    float64,
    float_of,
    roundtrip,
    SHAPES,
    tree_identical,
)


_ours = MomentCodecs.named("flashquinox")
_kinds = pytest.mark.parametrize("kind", ["signed", "nonnegative"])

# Small enough to compile few programs, ragged enough to meet every path.
_LAYOUTS = [
    Layout((), None, 32),
    Layout((0,), -1, 32),
    Layout((5,), -1, 16),
    Layout((3, 70), -1, 32),
    Layout((70, 3), -2, 32),
    Layout((2, 40, 3), -2, 16),
    Layout((2, 40, 3), None, 128),
]


#
# Errors
#


@st.composite
def _moments(draw, largest_exponent: int = 126) -> tuple[Layout, np.ndarray]:
    """A layout, and float32 values for it: of any magnitude that is normal, in a spread
    that is narrow or wide, with zeros, and with an outlier in every group.
    """
    layout = draw(st.sampled_from(_LAYOUTS))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = math.prod(layout.shape)
    center = draw(st.integers(-125, largest_exponent))
    spread = draw(st.sampled_from([0, 1, 8, 60]))
    exponent = np.clip(center + spread * rng.uniform(-1, 1, size), -125, largest_exponent)
    x = np.exp2(exponent) * rng.choice([-1, 1], size)
    x[rng.random(size) < draw(st.sampled_from([0, 0.3, 1]))] = 0
    if draw(st.booleans()):
        x[::16] = np.exp2(largest_exponent)
    return layout, x.reshape(layout.shape).astype(np.float32)


@given(_moments(), st.integers(0, 2**31 - 1))
def test_signed_error_is_below_half_a_code(moments, count):
    layout, m = moments
    stored, decoded = roundtrip(_ours.signed, layout, m, count)
    assert_code_of(stored, m)
    # The curve is odd, so signs and zeros are kept.
    assert not np.any(np.sign(decoded) * np.sign(m) < 0)
    assert not np.any(decoded[m == 0])
    # In all, half a code where codes are farthest apart, at the end of the curve (127
    # and half a code more, where the scale is rounded down): 0.5 * 254 / 126.5^2 of it.
    largest = np.max(np.abs(float64(m)), initial=0)
    assert np.all(np.abs(decoded - m) <= 0.00794 * (1 + 2**-8) * largest)


@given(_moments(), st.integers(0, 2**31 - 1))
def test_nonnegative_error_is_below_one_code(moments, count):
    layout, v = moments
    v = np.abs(v)
    stored, decoded = roundtrip(_ours.nonnegative, layout, v, count)
    assert_code_of(stored, v)
    assert np.all(decoded >= 0)


@given(_moments(), st.integers(0, 2**31 - 1))
def test_nonzero_is_never_stored_as_zero(moments, count):
    layout, v = moments
    # A code below may be smaller by 1 - (1 + 1/sqrt(k))^-2 < 3/4, the scale by 2^-7: what
    # is two binades above the subnormals, which arithmetic flushes, must not vanish.
    v = np.maximum(np.abs(v), np.float32(2.0**-123))
    _, decoded = roundtrip(_ours.nonnegative, layout, v, count)
    assert np.all(decoded > 0)


@_kinds
@given(moments=_moments(), count=st.integers(0, 2**31 - 1))
def test_zeros_stay_zero(kind, moments, count):
    layout, x = moments
    stored, decoded = roundtrip(_ours.of(kind), layout, np.zeros_like(x), count)
    assert not decoded.any()
    assert not np.any(stored.scales)


@_kinds
@pytest.mark.parametrize("layout", _LAYOUTS[2:])
def test_a_group_keeps_its_damage(kind, layout):
    """NaN and infinity do not leave their group, and no group turns them into numbers."""
    for bad in (np.nan, np.inf):
        x = np.linspace(0.5, 1, math.prod(layout.shape), dtype=np.float32)
        x = x.reshape(layout.shape)
        _, good = roundtrip(_ours.of(kind), layout, x, 7)
        x[(0,) * x.ndim] = bad
        _, decoded = roundtrip(_ours.of(kind), layout, x, 7)
        first = layout.tile(jnp.zeros(layout.shape))
        group = jnp.zeros_like(layout.tile_scales(jnp.zeros(layout.scale_shape)))
        group = group.at[(0,) * group.ndim].set(1)
        group = np.asarray(layout.untile(jnp.broadcast_to(group, first.shape))) == 1
        assert np.array_equal(decoded[~group], good[~group])
        assert not np.isfinite(decoded[(0,) * x.ndim])


@_kinds
def test_largest_keeps_its_code(kind):
    """The largest of a group is worth its scale, whichever way the scale was rounded."""
    x = np.exp2(np.random.default_rng(0).uniform(-20, 20, (400, 1))).astype(np.float32)
    x = np.broadcast_to(x, (400, 32))
    for count in range(20):
        _, decoded = roundtrip(_ours.of(kind), Layout(x.shape, -1, 32), x, count)
        # 2^-8 of the scale, squared for the second moment, plus one code at its end.
        quantum = 2 * 2 / 254 if kind == "nonnegative" else 0
        bound = 2**-8 if kind == "signed" else 2**-7 + quantum
        assert np.max(np.abs(decoded / x - 1)) <= bound * 1.01


#
# The curves, as their docstrings have them
#


def test_softsign():
    curve = fq.Softsign()
    q = np.arange(-127, 128, dtype=np.float32)
    n = float64(q) / (254 - np.abs(float64(q)))
    scale = np.float32(3.7)
    expanded = float64(curve.expand(jnp.asarray(q), jnp.asarray(scale)))
    # Two roundings of float32.
    np.testing.assert_allclose(expanded, n * scale, rtol=2**-22)
    amplitude = jnp.asarray(expanded.astype(np.float32))
    compressed = float64(curve.compress(amplitude, jnp.asarray(scale)))
    np.testing.assert_allclose(compressed, q, rtol=2**-21)
    np.testing.assert_allclose(127 * 2 * n / (1 + np.abs(n)), q, rtol=1e-12)


def test_fourth_root():
    curve = fq.FourthRoot()
    k = curve.offset
    q = np.arange(256, dtype=np.float32)
    scale = np.float32(3.7)
    expanded = float64(curve.expand(jnp.asarray(q), jnp.asarray(scale)))
    roots = scale * (float64(q) ** 2 + k) / (254**2 + k)
    np.testing.assert_allclose(expanded, roots**2, rtol=2**-20)
    # The step between neighbors is bounded by 1 / sqrt(k), plus 1 / k for its curvature.
    assert np.all(np.diff(roots) / roots[:-1] <= 1 / math.sqrt(k) + 1 / k)
    amplitude = curve.amplitude(jnp.asarray(expanded.astype(np.float32)))
    compressed = float64(curve.compress(amplitude, jnp.asarray(scale)))
    # The inverse loses what float32 cannot hold of `q^2 + k`: 2^-22 (q^2 + k) / 2q.
    bound = 2**-21 * (q**2 + k) / np.maximum(2 * q, 2**-6) + 2**-21 * q
    assert np.all(np.abs(compressed - q)[1:] <= bound[1:])
    assert compressed[0] <= 0.01


#
# Scales
#


def _scales() -> np.ndarray:
    rng = np.random.default_rng(0)
    x = np.exp2(rng.uniform(-126, 127.99, 300)).astype(np.float32)
    return np.concatenate([x, np.exp2(np.arange(-126, 128, 9, dtype=np.float32))])


@pytest.mark.parametrize("mantissa_bits", [7, 8])
def test_scale_is_a_neighbor(mantissa_bits):
    x = jnp.asarray(_scales())
    unit = 2 ** (23 - mantissa_bits)
    for threshold in (0, 1, 2**15 - 1, 2**15, 2**16 - 1):
        stored = encode_scale(x, jnp.uint32(threshold), mantissa_bits)
        found = np.asarray(bits_of(decode_scale(stored, mantissa_bits))).astype(int)
        # Less than one unit in the last stored place, and so 2^-mantissa_bits.
        assert np.all(np.abs(found - np.asarray(bits_of(x)).astype(int)) < unit)
    exact = float_of(bits_of(x) // unit * unit)
    for threshold in (0, 2**16 - 1):
        stored = encode_scale(exact, jnp.uint32(threshold), mantissa_bits)
        assert tree_identical(decode_scale(stored, mantissa_bits), exact)


@pytest.mark.parametrize("mantissa_bits", [7, 8])
def test_scale_is_unbiased(mantissa_bits):
    # Over all thresholds, the mean of the stored bits is the exact ones: for integers, the
    # sum over t < n of floor((b + t) / n) is b. So in values, within a binade.
    x = jnp.asarray(_scales()[::5])
    n = 2 ** (23 - mantissa_bits)
    encode = lambda t: encode_scale(x, t, mantissa_bits).astype(jnp.uint32)
    stored = jax.lax.map(encode, jnp.arange(2**16, dtype=jnp.uint32), batch_size=2**10)
    total = np.asarray(stored).astype(np.int64).sum(axis=0)
    largest = (0x7F80_0000 // n - 1) * n
    inside = np.asarray(bits_of(x)) <= largest
    assert inside.sum() > 50
    # Each of the n thresholds comes 2^16 / n times.
    expected = np.asarray(bits_of(x)).astype(np.int64) * (2**16 // n)
    assert np.array_equal(total[inside], expected[inside])


@pytest.mark.parametrize("mantissa_bits", [7, 8])
@pytest.mark.parametrize("threshold", [0, 2**15, 2**16 - 1])
def test_special_scales(mantissa_bits, threshold):
    largest = np.finfo(np.float32).max
    nan = np.array(0x7FFF_FFFF, np.uint32).view(np.float32)
    special = jnp.asarray([0, np.inf, np.nan, nan, largest], jnp.float32)
    stored = encode_scale(special, jnp.uint32(threshold), mantissa_bits)
    decoded = np.asarray(decode_scale(stored, mantissa_bits))
    assert decoded[0] == 0
    assert decoded[1] == np.inf
    assert np.isnan(decoded[2:4]).all()
    assert np.isfinite(decoded[4])


#
# Dither
#


def _sequence(leaf: int, length: int, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
    at = jax.vmap(partial(Dither.at, leaf=leaf))
    dither = at(start + jnp.arange(length, dtype=jnp.int32))
    return float64(dither.code), float64(dither.scale) / 2**16


@pytest.mark.parametrize("leaf", [0, 1, 17, 1000])
@pytest.mark.parametrize("start", [0, 10**6, 2**31 - 5000])
def test_dither_is_equidistributed(leaf, start):
    n = 2000
    for sequence in _sequence(leaf, n, start):
        assert np.all((sequence >= 0) & (sequence < 1))
        # The discrepancy of the multiples of a number whose continued fraction has small
        # terms is O(log n / n); of random numbers, it is 1 / sqrt(n) = 45 / n.
        rank = np.arange(n) / n
        assert np.max(np.abs(np.sort(sequence) - rank)) <= 12 / n


def test_dithers_of_code_and_scale_are_independent():
    code, scale = _sequence(3, 4096)
    counts, *_ = np.histogram2d(code, scale, bins=8, range=[[0, 1], [0, 1]])
    # Even, as of a lattice: each cell would hold 64 +- 8 by chance.
    assert np.all(np.abs(counts - 64) <= 16)


def test_dithers_of_leaves_differ():
    first = np.array([_sequence(leaf, 1)[0][0] for leaf in range(300)])
    assert np.max(np.abs(np.sort(first) - np.arange(300) / 300)) <= 12 / 300


def test_dither_is_a_function_of_the_count():
    at = lambda count: Dither.at(jnp.asarray(count), 5)
    assert tree_identical(at(12), at(12))
    assert not tree_identical(at(12), at(13))


#
# Many steps
#


def _decay(codec, v: np.ndarray, steps: int, b2: float) -> np.ndarray:
    """`v` after `steps` steps of `v <- b2 v` through the codec: every one of them."""
    layout = choose_layout(v.shape, 32)

    def step(carry, count):
        codes, scales = carry
        value = codec.decode(codes, scales, jnp.float32)
        dither = Dither.at(count, 0)
        carry = codec.encode(jnp.float32(b2) * value, layout.tile_axis, dither)
        return carry, layout.untile(codec.decode(*carry, jnp.float32))

    first = codec.encode(
        layout.tile(jnp.asarray(v)), layout.tile_axis, Dither.at(jnp.asarray(0), 0)
    )
    counts = 1 + jnp.arange(steps, dtype=jnp.int32)
    return float64(jax.jit(partial(jax.lax.scan, step))(first, counts)[1])


@pytest.mark.parametrize("b2", [0.999, 0.9995])
def test_second_moments_decay(b2):
    steps = 3000
    rng = np.random.default_rng(0)
    v = np.exp2(rng.uniform(-10, 0, (8, 64))).astype(np.float32)
    exact = float64(v) * b2 ** (1 + np.arange(steps))[:, None, None]
    ratio = _decay(_ours.nonnegative, v, steps, b2) / exact
    total = ratio.mean(axis=(1, 2))
    # One rounding of the first step is never undone. Single values: a few codes (of 2 / q
    # in the root and 4 / q in v) from there; the mean over 512 values, whose roundings
    # share a threshold but not a code, a fraction of one.
    k = _ours.nonnegative.companding.offset
    q = np.sqrt(np.sqrt(v / v.max(axis=1, keepdims=True)) * (254**2 + k) - k)
    assert np.all(np.abs(ratio - 1) <= 5 * 4 / q)
    assert np.all(np.abs(total - 1) <= 0.03)


def test_rounding_to_nearest_would_stall():
    nearest = dataclasses.replace(_ours.nonnegative, dithered=False)
    steps, b2 = 3000, 0.9995
    v = np.exp2(np.random.default_rng(0).uniform(-10, 0, (8, 64))).astype(np.float32)
    exact = float64(v) * b2 ** (1 + np.arange(steps))[:, None, None]
    total = (_decay(nearest, v, steps, b2) / exact).mean(axis=(1, 2))
    assert np.max(np.abs(total - 1)) > 0.2


def test_first_moments_are_rounded_to_nearest():
    # Whatever the dither, so long as the scale is representable.
    m = np.random.default_rng(0).uniform(-1, 1, (4, 32)).astype(np.float32)
    m[:, 0] = 1
    layout = Layout(m.shape, -1, 32)
    codes = [roundtrip(_ours.signed, layout, m, count)[0].codes for count in range(9)]
    assert all(tree_identical(codes[0], x) for x in codes)


#
# The codec of the paper
#


def _numpy_flashoptim(kind: str, x: np.ndarray) -> tuple[np.ndarray, ...]:
    """The formulas of the paper, for one group of float32: codes, scale, decoded."""
    one, half = np.float32(1), np.float32(0.5)
    if kind == "signed":
        scale = np.maximum(np.max(np.abs(x)), np.float32(1e-12))
        n = x / scale
        y = np.float32(2) * n / (one + np.abs(n))
        codes = np.floor(y * np.float32(127) + half).astype(np.int8)
    else:
        root = np.sqrt(x)
        scale = np.maximum(np.max(root), np.float32(1e-12))
        codes = np.floor(root / scale * np.float32(255) + half).astype(np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        scale = scale.astype(np.float16)
    if kind == "signed":
        y = codes.astype(np.float32) / np.float32(127)
        decoded = y / (np.float32(2) - np.abs(y)) * scale.astype(np.float32)
    else:
        root = codes.astype(np.float32) / np.float32(255) * scale.astype(np.float32)
        decoded = root * root
    return codes, scale, decoded


@_kinds
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("jit", [False, True])
def test_flashoptim_against_numpy(kind, shape, jit):
    codec = FlashOptimCodec(kind)
    layout = MomentCodecs.named("flashoptim").layout(shape, 32)
    assert layout.axis is None
    rng = np.random.default_rng(0)
    for magnitude in (1e-3, 1.0, 300.0):
        x = (magnitude * rng.standard_normal(shape)).astype(np.float32)
        x = np.asarray(x * x if kind == "nonnegative" else x)
        step = lambda x: roundtrip(codec, layout, x, 0)[0]
        stored = (eqx.filter_jit(step) if jit else step)(jnp.asarray(x))
        assert stored.scales.dtype == jnp.float16
        groups = [x.ravel()[i : i + 32] for i in range(0, x.size, 32)]
        expected = [_numpy_flashoptim(kind, group) for group in groups]
        empty = np.zeros(0, np.float32)
        codes, scales, decoded = (
            np.concatenate([np.atleast_1d(e[i]).ravel() for e in expected] or [empty])
            for i in range(3)
        )
        assert np.array_equal(np.ravel(stored.codes), codes)
        assert np.array_equal(stored.scales, scales)
        decode = eqx.filter_jit(lambda s: s.decode()) if jit else lambda s: s.decode()
        assert np.array_equal(np.ravel(decode(stored)), decoded)


#
# No compression, and the choice
#


def test_full_precision_is_the_identity():
    layout = choose_layout((3, 40), 32)
    x = np.random.default_rng(0).standard_normal((3, 40)).astype(np.float32)
    stored, decoded = roundtrip(MomentCodecs.named("float32").signed, layout, x, 0)
    assert isinstance(stored, jax.Array)
    assert tree_identical(decoded, x)


@pytest.mark.parametrize("name", MomentCodecs.names())
@_kinds
def test_init_is_zero(name, kind):
    codecs = MomentCodecs.named(name)
    for shape in SHAPES.values():
        stored = codecs.of(kind).init(codecs.layout(shape, 32), jnp.float32)
        decoded = stored.decode() if isinstance(stored, fq.QuantMoment) else stored
        assert tree_identical(decoded, jnp.zeros(shape))


def test_codecs_are_hashable():
    # They are static fields of the state.
    for name in MomentCodecs.names():
        codecs = MomentCodecs.named(name)
        assert hash(codecs) == hash(MomentCodecs.named(name))


@_kinds
def test_decode_of_an_ensemble(kind):
    layout = choose_layout((2, 64), 32)
    x = np.random.default_rng(0).uniform(0.1, 1, (3, 2, 64)).astype(np.float32)
    store = lambda x: roundtrip(_ours.of(kind), layout, x, 0)[0]
    ensemble = eqx.filter_vmap(store)(jnp.asarray(x))
    assert ensemble.codes.shape == (3, 2, 64)
    decoded = jax.vmap(lambda moment: moment.decode())(ensemble)
    for i in range(3):
        assert tree_identical(decoded[i], store(jnp.asarray(x[i])).decode())
