import math
import warnings
from functools import partial

import equinox as eqx
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from jax.typing import ArrayLike

import flashquinox as fq
from flashquinox import Dither, FlashOptimCodec, MomentCodecs
from flashquinox._rules.rule import MomentKind
from flashquinox._storage.layout import choose_layout, flattened, Layout
from flashquinox._storage.quant_moment import zeros
from flashquinox._storage.scales import decode_scale, encode_scale

from ..helpers import (
    assert_code_of,
    bits_of,
    float64,
    float_of,
    grid,
    of_elements,
    real_bits,
    roundtrip,
    SHAPES,
    slow,
    tree_identical,
)


_ours = {"signed": fq.SoftsignCodec(), "nonnegative": fq.FittedLogCodec()}
_kinds = pytest.mark.parametrize("kind", ["signed", "nonnegative"])
_encode = eqx.filter_jit(lambda codec, *arguments: codec.encode(*arguments))
_decode = eqx.filter_jit(lambda codec, *arguments: codec.decode(*arguments))
_decode_stored = eqx.filter_jit(lambda stored: stored.decode())
_counts = st.integers(0, 2**31 - 1)

# Small enough to compile few programs, ragged enough to meet every path.
_LAYOUTS = [
    flattened((), 32),
    Layout((0,), (-1,), 32),
    Layout((5,), (-1,), 16),
    Layout((3, 70), (-1,), 32),
    Layout((2, 40, 3), (-2,), 16),
    flattened((2, 40, 3), 128),
]


#
# Errors
#


@st.composite
def _moments(draw, largest_exponent: float = 126.3) -> tuple[Layout, np.ndarray]:
    """A layout, and float32 values for it: of any magnitude that is normal, in a spread
    that is narrow or wide, with zeros, and with an outlier in every group.
    """
    layout = draw(st.sampled_from(_LAYOUTS))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = math.prod(layout.shape)
    center = draw(st.integers(-125, 126))
    spread = draw(st.sampled_from([0, 1, 8, 60]))
    exponent = np.clip(
        center + spread * rng.uniform(-1, 1, size), -125, largest_exponent
    )
    x = np.exp2(exponent) * rng.choice([-1, 1], size)
    x[rng.random(size) < draw(st.sampled_from([0, 0.3, 1]))] = 0
    if draw(st.booleans()):
        x[::16] = np.exp2(largest_exponent)
    return layout, x.reshape(layout.shape).astype(np.float32)


def _largest(layout: Layout, x: np.ndarray) -> np.ndarray:
    """The largest of its group, for each element."""
    tile = layout.tile(jnp.asarray(x))
    return of_elements(layout, jnp.max(tile, axis=layout.tile_axis))


@pytest.mark.product
@pytest.mark.parametrize(
    "codec",
    [
        _ours["signed"],
        fq.SoftsignCodec(dithered=False),
        fq.SoftsignCodec(dithered=False, scale_mantissa_bits=7),
    ],
    ids=["default", "nearest", "7 bits"],
)
@given(moments=_moments(largest_exponent=62), count=_counts)
def test_signed_error_is_at_most_one_code(codec, moments, count):
    layout, m = moments
    stored, decoded = roundtrip(codec, layout, m, count)
    assert_code_of(stored, m)
    # The curve is odd, so signs and zeros are kept.
    assert not np.any(np.sign(decoded) * np.sign(m) < 0)
    assert not np.any(decoded[m == 0])
    # In all, a code, or half of one, where codes are farthest apart, at the end of the
    # curve, of a scale that is 129/127 of the largest and may be rounded up. The
    # arithmetic's share is 127 * 4 * 2^-24 codes.
    radius = 1 if codec.dithered else 0.5
    most = _softsign(127 + radius) - _softsign(127)
    scale = 129 / 127 * (1 + 2.0**-codec.scale_mantissa_bits)
    largest = np.max(np.abs(float64(m)), initial=0)
    if largest > 0:
        last = np.max(np.abs(stored.codes.astype(jnp.int32)))
        assert 127 - (radius == 1) <= last <= 127
    assert np.all(np.abs(decoded - m) <= most * scale * largest * (1 + 2**-14))


@given(moments=_moments(largest_exponent=62), count=_counts)
def test_linear_error_is_at_most_one_code(moments, count):
    layout, m = moments
    stored, decoded = roundtrip(fq.LinearCodec(), layout, m, count)
    assert_code_of(stored, m)
    assert not np.any(np.sign(decoded) * np.sign(m) < 0)
    assert not np.any(decoded[m == 0])
    # A scale is 1/126 of the largest, and rounded to 8 bits.
    largest = np.max(np.abs(float64(m)), initial=0)
    assert np.all(np.abs(decoded - m) <= largest / 126 * (1 + 2**-7) * (1 + 2**-14))


def test_linear_codes_of_what_is_no_number():
    m = np.ones((3, 32), np.float32)
    m[0, 5], m[1, 5], m[2, 5] = np.inf, np.nan, 2.0**100
    for count in range(5):
        _, decoded = roundtrip(fq.LinearCodec(), Layout(m.shape, (-1,), 32), m, count)
        assert np.all(decoded[:, 5] == 0)
        assert np.all(np.abs(np.delete(decoded, 5, 1) - 1) <= 1 / 63)


@pytest.mark.product
@pytest.mark.parametrize(
    "codec",
    [
        _ours["nonnegative"],
        fq.FittedLogCodec(dithered=False),
        fq.FittedLogCodec(fitted=False),
    ],
    ids=["default", "nearest", "coarsest"],
)
@given(moments=_moments(), count=_counts)
def test_nonnegative_error_is_at_most_one_step(codec, moments, count):
    layout, v = moments
    v = np.abs(v)
    stored, decoded = roundtrip(codec, layout, v, count)
    assert_code_of(stored, v)
    if v.size == 0:
        return
    # In all, a coarsest step of 3 * 2^19 of the 2^23 bits of a power of two; below 31.6
    # powers of two (with zeros), code 0 is less than what is there:
    # 2^31 * (1 + f) / (1 + f - 0.6) >= 2^31.5, as f < 1.
    largest = _largest(layout, v)
    error = np.abs(float64(decoded) - v)
    # Or of 3 * 2^21, beside huge elements.
    relative = np.where(largest > 2.0**32, 3 / 4, 3 / 16)
    # Or for 1.25 * 2^23, the last normal number that can be code 0.
    uncovered = np.maximum(2**-31.5 * largest, 1.25 * 2.0**-126)
    assert np.all((error <= relative * float64(v)) | (decoded <= uncovered))


@given(_moments(), _counts)
def test_no_code_of_a_nonzero_group_is_zero(moments, count):
    layout, v = moments
    # Not even that of zero; where the group has a number that arithmetic does not take
    # for zero, as all that `_moments` makes are.
    v = np.abs(v)
    _, decoded = roundtrip(_ours["nonnegative"], layout, v, count)
    if v.size > 0:
        assert np.all(decoded[_largest(layout, v) > 0] > 0)


@_kinds
@given(moments=_moments(), count=_counts)
def test_zeros_stay_zero(kind, moments, count):
    layout, x = moments
    stored, decoded = roundtrip(_ours[kind], layout, np.zeros_like(x), count)
    assert not decoded.any()
    assert not np.any(stored.scales)


@_kinds
@pytest.mark.parametrize("layout", _LAYOUTS[2:])
def test_a_group_keeps_its_damage(kind, layout):
    """NaN does not leave its group. Among averages of squares, it does not become a
    number either."""
    x = np.linspace(0.5, 1, math.prod(layout.shape), dtype=np.float32)
    x = x.reshape(layout.shape)
    _, good = roundtrip(_ours[kind], layout, x, 7)
    x[(0,) * x.ndim] = np.nan
    _, decoded = roundtrip(_ours[kind], layout, x, 7)
    group = np.zeros(layout.scale_shape, bool)
    group[(0,) * group.ndim] = True
    group = of_elements(layout, group)
    assert np.array_equal(decoded[~group], good[~group])
    if kind == "nonnegative":
        assert np.isnan(decoded[(0,) * x.ndim])
    else:
        assert np.isfinite(decoded).all() and decoded[(0,) * x.ndim] == 0


@pytest.mark.parametrize(
    "name", [name for name in MomentCodecs.names() if name != "float32"]
)
def test_no_moment_is_infinite(name):
    """What is too large is stored as a number, and what is beside it keeps its sign."""
    largest = [2.0**62, 3e30, float(np.finfo(np.float32).max), np.inf]
    x = np.full((2 * len(largest), 32), 0.5, np.float32)
    x[:, 3] = [*largest, *[-number for number in largest]]
    codecs, dither = MomentCodecs.named(name), Dither.at(jnp.asarray(1), 0)
    # A rule has b / (1 - b) times an average.
    of_kinds = (codecs.signed, x, 1e6), (codecs.nonnegative, np.abs(x), 1.0)
    for codec, group, factor in of_kinds:
        codes, scales = _encode(codec, jnp.asarray(group), -1, dither)
        operands = codes, scales, -1, jnp.float32, jnp.float32(factor)
        decoded = np.asarray(_decode(codec, *operands))
        assert np.isfinite(decoded).all()
        assert np.all(np.sign(decoded) * np.sign(group) >= 0)


@pytest.mark.parametrize(
    "codec,bound",
    [
        # The rounding of the scale: the code of the largest remains 127.
        (fq.SoftsignCodec(dithered=False), 2**-8),
        (fq.SoftsignCodec(dithered=False, scale_mantissa_bits=7), 2**-7),
        # Or, with dither, is the one before.
        (_ours["signed"], 2**-8 + 2 / 128),
        (fq.LinearCodec(), 2**-7 + 1 / 125),
        # The finest step, 2^12 of the 2^23 bits of a power of two.
        (_ours["nonnegative"], 2**-11),
    ],
    ids=["nearest", "7 bits", "signed", "linear", "nonnegative"],
)
def test_equal_elements_are_kept(codec, bound):
    """Whichever way the scale is rounded: those just below the next one are rounded
    most."""
    x = np.exp2(np.random.default_rng(0).uniform(-20, 20, 272))
    just_below = 127 / 129 * (1 - 2**-22) * (1 + np.arange(1, 129) / 128)
    x = np.concatenate([x, just_below]).astype(np.float32)
    x = np.broadcast_to(x[:, None], (400, 32))
    for count in range(20):
        _, decoded = roundtrip(codec, Layout(x.shape, (-1,), 32), x, count)
        assert np.max(np.abs(float64(decoded) / x - 1)) <= bound + 2**-21


@pytest.mark.product
@_kinds
@pytest.mark.parametrize(
    "name",
    [
        # Curves alone differ from `learned`.
        slow(name, unless=name not in ("linear", "sqrt", "fourth_root"))
        for name in MomentCodecs.names()
    ],
)
def test_a_factor_is_a_product(name, kind):
    codec = getattr(MomentCodecs.named(name), kind)
    layout = MomentCodecs.named(name).layout((3, 70), 32)
    x = np.random.default_rng(0).standard_normal(layout.shape).astype(np.float32)
    x = x * x if kind == "nonnegative" else x
    # Of powers of four and their square roots, all products are exact.
    for factor in np.array([0.25, 4], np.float32):
        stored, _ = roundtrip(codec, layout, x, 5, factor)
        assert tree_identical(stored, roundtrip(codec, layout, x * factor, 5)[0])
    for factor in np.array([0.9, 9.7], np.float32):
        stored, decoded = roundtrip(codec, layout, x, 5, factor)
        exact = float64(x) * float64(factor)
        if isinstance(stored, fq.QuantMoment):
            assert_code_of(stored, exact)
            codes, scales = layout.tile(stored.codes), stored.scales
        else:
            np.testing.assert_allclose(float64(decoded), exact, rtol=2**-24)
            codes, scales = layout.tile(stored), None
        tile = _decode(
            codec, codes, scales, layout.tile_axis, jnp.float32, jnp.asarray(factor)
        )
        # A product is rounded once, in the scale or in the moment, and is of numbers
        # that may have been rounded by then.
        np.testing.assert_allclose(
            float64(layout.untile(tile)),
            float64(decoded) * float64(factor),
            rtol=2**-22,
        )


#
# The curves, as their docstrings have them
#


def test_softsign():
    q = np.arange(-127, 128, dtype=np.int8).reshape(5, 51)
    scale = encode_scale(jnp.full(5, 3.7), jnp.uint32(0))
    s = float64(decode_scale(scale))[:, None]
    decoded = _ours["signed"].decode(jnp.asarray(q), scale, -1, jnp.float32)
    # Four roundings of float32.
    np.testing.assert_allclose(float64(decoded), _softsign(q) * s, rtol=2**-21)


def _softsign(q: ArrayLike) -> np.ndarray:
    """The documented curve, in units of the scale."""
    n = float64(q) / (256 - np.abs(float64(q)))
    assert np.allclose(256 * n / (1 + np.abs(n)), q, rtol=1e-12)
    return n


def _decoded_with(scales: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """All of these codes with each of the scales."""
    codes = np.broadcast_to(codes, (scales.size, codes.size))
    arguments = (jnp.asarray(codes), jnp.asarray(scales), -1, jnp.float32)
    return np.asarray(_decode(_ours["nonnegative"], *arguments))


@pytest.mark.parametrize("a", [2, 3])
@pytest.mark.parametrize("k", range(11, 19))
def test_fitted_log(a, k):
    """The documented form of a scale: four bits for the step, twelve for code 0; and
    equal steps on the bits."""
    # Up to where code 255 is a number.
    index = np.arange(0, (0x7F80_0000 - (255 * a << k)) // (a << 18))
    scales = (index << 4 | (k - 11) << 1 | (a == 3)).astype(np.uint16)
    q = np.arange(256, dtype=np.uint8)
    decoded = _decoded_with(np.resize(scales, 2**13), q)[: index.size]
    expected = (index * a << 18)[:, None] + q.astype(int) * (a << k)
    assert np.array_equal(decoded.view(np.uint32), expected)
    # From the first normal number on, in values: at most what a step is of the 2^23
    # bits of a power of two.
    values = float64(decoded)[(index * a << 18) >= 2**23]
    assert np.all(np.diff(values) <= (a << k) / 2**23 * values[:, :-1])


@pytest.mark.parametrize(
    "threshold", [0, 2**-24, 2**-12, 0.3, 0.5, 0.9, 1 - 2**-12, 1 - 2**-24]
)
def test_codes_keep_their_places(threshold):
    """While a group keeps its step, only what moves is rounded again: at any dither,
    and also where code 0 moves."""
    codec = _ours["nonnegative"]

    def store(v, threshold):
        dither = Dither(jnp.float32(threshold), jnp.uint32(0))
        codes, scales = _encode(codec, jnp.asarray(v), -1, dither)
        assert scales is not None
        decoded = np.asarray(_decode(codec, codes, scales, -1, jnp.float32))
        return np.asarray(codes), decoded, *grid(scales)

    rng = np.random.default_rng(0)
    v = np.exp2(rng.uniform(0, 15, (500, 1)) * rng.random((500, 32)))
    codes, v, origin, step = store(v.astype(np.float32), 0.5)

    codes_again, _, origin_again, step_again = store(v, threshold)
    kept = (step_again == step) & (origin_again == origin)
    assert np.sum(kept) > 100
    assert np.array_equal(codes_again[kept], codes[kept])

    moved = v == np.min(v, axis=1, keepdims=True)
    _, decoded, origin_again, step_again = store(
        np.where(moved, np.float32(0.9) * v, v), threshold
    )
    kept = step_again == step
    assert np.sum(kept & (origin_again < origin)) > 100
    unmoved = kept[:, None] & ~moved
    assert np.array_equal(decoded[unmoved], v[unmoved])


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
    # Over all thresholds, the mean of the stored bits is the exact ones: for integers,
    # the sum over t < n of floor((b + t) / n) is b. So in values, within a binade.
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


_nonnegative = st.floats(0, float(np.finfo(np.float32).max), width=32)


@given(_nonnegative, _nonnegative.filter(lambda x: x >= 2.0**-125))
def test_the_finest_grid_that_covers_the_range(x, y):
    smallest, largest = sorted([x, y])
    # Arithmetic may flush these.
    smallest = 0.0 if smallest < 2.0**-126 else smallest
    group = jnp.asarray([[smallest, largest]], jnp.float32)
    dither = Dither.at(jnp.asarray(1), 0)
    _, scales = _encode(_ours["nonnegative"], group, -1, dither)
    assert scales is not None
    origin, step = (x.item() for x in grid(scales))
    low, high = real_bits(np.array([smallest, largest]))
    # What is 47 powers of two below the largest, or with zeros 31, is not covered, nor
    # is what is not clearly a normal number.
    most = 254 * 3 * 2**19 - 2**21
    is_far = largest > 2.0**32 and high - low > most
    reach = most if low > 0 else 253.5 * 2**20
    low = max(low, high - reach, 1.25 * 2**23)
    # Infinity has a late code.
    low = min(low, 255 * 2**23 - 2**21)
    if is_far:
        assert (step, origin) == (3 << 21, 255 * 2**23 - 254 * (3 << 21))
        return
    grids = [
        (a << k, low // (a << unit) * (a << unit))
        for a in (2, 3)
        for k in range(11, 20)
        for unit in [19 if k == 19 else 18]
    ]
    # The span is rounded to a float32, and so is its share of 254.5 steps.
    either = [
        min(g for g in grids if high - g[1] <= 254.5 * g[0] * (1 + rounding))
        for rounding in (-(2**-22), 2**-22)
    ]
    assert (step, origin) in either


def test_special_ranges():
    # 2^-125 is the least maximum that is not taken for zero; above 2^127, codes are
    # lower by 1/120, so that none is infinite.
    largest = np.array(
        [0, np.inf, np.nan, 2.0**127.9, 2.0**-125, 1.9 * 2.0**-126], np.float32
    )
    v = np.stack([np.zeros_like(largest), largest], axis=1)
    for count in range(9):
        stored, decoded = roundtrip(
            _ours["nonnegative"], Layout(v.shape, (-1,), 32), v, count
        )
        assert not decoded[0].any() and stored.scales[0, 0] == 0
        assert 2.0**125 < decoded[1, 1] < np.inf
        assert np.isnan(decoded[2, 1])
        origin, step = grid(stored.scales)
        for i, steps in ((3, 5), (4, 1)):
            error = real_bits(float64(decoded[i, 1])) - real_bits(float64(v[i, 1]))
            assert np.abs(error) <= steps * step[i] and decoded[i, 0] > 0
        # Kept or flushed.
        assert origin[5] == 0
        assert 0 <= decoded[5, 1] <= v[5, 1] + step[5] * 2.0**-149


#
# Dither
#


def _sequence(
    leaf: int,
    length: int,
    start: int = 0,
    kind: MomentKind = "nonnegative",
    relative: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    of_leaf = partial(Dither.at, leaf=leaf, kind=kind, relative=relative)
    at = jax.jit(jax.vmap(of_leaf))
    dither = at(start + jnp.arange(length, dtype=jnp.int32))
    return float64(dither.code), float64(dither.scale) / 2**16


@pytest.mark.parametrize("leaf", [0, 1, 17, 1000])
@pytest.mark.parametrize("start", [0, 10**6, 2**31 - 5000])
def test_dither_is_equidistributed(leaf, start):
    n = 2000
    for sequence in _sequence(leaf, n, start):
        assert np.all((sequence >= 0) & (sequence < 1))
        # The discrepancy of the multiples of a number whose continued fraction has
        # small terms is O(log n / n); of random numbers, it is 1 / sqrt(n) = 45 / n.
        rank = np.arange(n) / n
        assert np.max(np.abs(np.sort(sequence) - rank)) <= 12 / n


def test_dithers_of_code_and_scale_are_independent():
    code, scale = _sequence(3, 4096)
    counts, *_ = np.histogram2d(code, scale, bins=8, range=[[0, 1], [0, 1]])
    # Even, as of a lattice: each cell would hold 64 +- 8 by chance.
    assert np.all(np.abs(counts - 64) <= 16)


@pytest.mark.parametrize("lag", [1, 2, 10])
def test_dithers_of_signed_moments_do_not_follow_from_one_another(lag):
    """As a step decays a signed moment by a tenth, its rounding meets the next ones: an
    even sequence of thresholds, in which each follows from the one before, would take
    all small codes to zero at the same step."""
    code, _ = _sequence(3, 4096 + lag, kind="signed")
    counts, *_ = np.histogram2d(code[lag:], code[:-lag], bins=8, range=[[0, 1], [0, 1]])
    # By chance, 64 +- 8 in each cell; of multiples of one number, 0 in most of them.
    assert np.all(np.abs(counts - 64) <= 40)


@pytest.mark.parametrize("start", [0, 2**31 - 5000])
def test_dithers_of_relative_moments_are_pairs(start):
    """What one threshold adds, the next one takes away; and the pairs are as those of
    other signed moments."""
    code, _ = _sequence(3, 4096, start, "signed", relative=True)
    turns = start + np.arange(4096)
    halves = turns + turns // 256
    first = np.flatnonzero((halves[:-1] % 2 == 0) & (turns[1:] % 256 != 0))
    assert len(first) > 2048 - 16
    assert np.all(code[first] + code[first + 1] == 1)
    for i in first[::100]:
        pair = int(halves[i]) // 2
        # Of other signed moments, one of 257 is left out.
        turn = pair - pair // 257
        (single,), _ = _sequence(3, 1, turn, "signed")
        assert (code[i] == single) == (turn + turn // 256 == pair)


@pytest.mark.parametrize(
    "kind, relative", [("signed", False), ("signed", True), ("nonnegative", False)]
)
@pytest.mark.parametrize("leaf", [0, 3])
@pytest.mark.parametrize("period", [55, 70, 89, 256, 1024])
def test_dithers_do_not_follow_rare_gradients(leaf, kind, relative, period):
    """Thresholds at every so many turns are spread as those at all turns are."""
    n = 100_000
    code, _ = _sequence(leaf, n, 0, kind, relative)
    for rare in (code[::period], code[period // 3 :: period]):
        rank = np.arange(len(rare)) / len(rare)
        # Of independent numbers, more in one case out of 10,000.
        assert np.max(np.abs(np.sort(rare) - rank)) <= 2.3 / np.sqrt(len(rare))


@pytest.mark.parametrize("leaf", [0, 3])
@pytest.mark.parametrize("size", [0.45, 0.8])
@pytest.mark.parametrize("period", [2, 4])
def test_dithers_of_relative_moments_do_not_follow_a_gradient(leaf, size, period):
    """Gradients that return in a few steps, with directions of less than a code, are
    rounded to both sides alike."""
    n = 6000
    code, _ = _sequence(leaf, n, kind="signed", relative=True)
    wave = size * np.cos(2 * np.pi * np.arange(n) / period)
    held = exact = total = 0.0
    for u, x in zip(code, wave, strict=True):
        exact = 0.9 * exact + x
        held = np.round(0.9 * held + x + u - 0.5)
        total += held - exact
    # Each step rounds with a standard deviation of at most 1/2, which counts for ten
    # steps.
    assert abs(total) <= 3 * 10 * 0.5 * np.sqrt(n)


@pytest.mark.parametrize("kind", ["nonnegative", "signed", "relative"])
@pytest.mark.parametrize("largest", [127, 255, -127])
def test_dithers_make_no_code_that_there_is_not(kind, largest):
    """Leaf 0 begins with the smallest threshold, and the opposite of that."""
    of = {"kind": "signed" if kind == "relative" else kind}
    code, _ = _sequence(0, 4096, **of, relative=kind == "relative")
    rounded = np.rint(np.float32(largest) + (np.float32(code) - np.float32(0.5)))
    assert np.all(rounded == largest)


def test_dithers_of_leaves_differ():
    count = jnp.asarray(0, jnp.int32)
    first = np.array([float(Dither.at(count, leaf).code) for leaf in range(300)])
    assert np.max(np.abs(np.sort(first) - np.arange(300) / 300)) <= 12 / 300


def test_dither_is_a_function_of_the_count():
    at = lambda count: Dither.at(jnp.asarray(count), 5)
    assert tree_identical(at(12), at(12))
    assert not tree_identical(at(12), at(13))


#
# Many steps
#


def _averages(
    codec, b2: float, v: np.ndarray, square, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Every step of `v <- b2 v + (1 - b2) square(count, v0)` through the codec, from
    `v0` on; and the same without it."""
    rates = jnp.asarray([b2, 1 - b2], jnp.float32)
    stored, exact = _run_averages(codec, rates, jnp.asarray(v), square, steps)
    return float64(stored), float64(exact)


@eqx.filter_jit
def _run_averages(codec, rates, v, square, steps):
    b2, rest = rates
    layout = choose_layout(v.shape, 32)
    dither = partial(Dither.at, leaf=0)

    def decode(codes, scales):
        tile = codec.decode(codes, scales, layout.tile_axis, jnp.float32)
        return layout.untile(tile)

    def step(carry, count):
        exact, codes, scales = carry
        grad = rest * square(count, v)
        new = b2 * decode(codes, scales) + grad
        stored = codec.encode(layout.tile(new), layout.tile_axis, dither(count))
        exact = b2 * exact + grad
        return (exact, *stored), (decode(*stored), exact)

    first = codec.encode(layout.tile(v), layout.tile_axis, dither(jnp.asarray(1)))
    counts = 2 + jnp.arange(steps, dtype=jnp.int32)
    return jax.lax.scan(step, (v, *first), counts)[1]


def _no_gradient(count, v):
    return jnp.float32(0)


def _normal_gradient(count, v):
    key = jax.random.fold_in(jax.random.key(0), count)
    return v * jax.random.normal(key, v.shape) ** 2


def _spread_moments() -> np.ndarray:
    return np.exp2(np.random.default_rng(0).uniform(-10, 0, (8, 64))).astype(np.float32)


@pytest.mark.parametrize("b2", [0.999, 0.9995])
def test_second_moments_decay(b2):
    v = _spread_moments()
    stored, exact = _averages(_ours["nonnegative"], b2, v, _no_gradient, 3000)
    total = stored.sum(axis=(1, 2)) / exact.sum(axis=(1, 2))
    # Ten powers of two take a step of 3 * 2^17; of the value, that is between one power
    # and the next, on average, 1 / (2 ln 2).
    code = 3 * 2**17 / 2**23 / (2 * math.log(2))
    # An element falls a code in a share (1 - b2) / code of the steps, and so its
    # logarithm by (1 - b2) ln(1 - code) / code: more by half a code than it should.
    total /= (b2 ** np.arange(1, 3001)) ** (code / 2)
    # A rotating threshold rounds down as often as that, give or take three times for
    # one element, and less than two for the mean of many.
    assert np.all(np.abs(total - 1) <= 2 * code)
    # And it goes on falling.
    assert np.all(np.diff(stored.sum(axis=(1, 2))[::200]) < 0)


def test_rounding_to_nearest_stalls():
    nearest = fq.FittedLogCodec(dithered=False)
    v = _spread_moments()
    stored, exact = _averages(nearest, 0.9995, v, _no_gradient, 3000)
    assert stored[-1].sum() / exact[-1].sum() > 2


def test_dither_is_unbiased():
    """The mean over all thresholds is the moment, where no power of two is between the
    codes next to it."""
    fraction = np.random.default_rng(0).uniform(0.1, 0.9, 32)
    v = (np.exp2(np.linspace(-5, 5, 32).round()) * (1 + fraction)).astype(np.float32)
    codec, n = _ours["nonnegative"], 512

    def at(threshold):
        dither = Dither(threshold, jnp.uint32(0))
        codes, scales = codec.encode(jnp.asarray(v), -1, dither)
        assert scales is not None
        return codec.decode(codes, scales, -1, jnp.float32), scales

    thresholds = (jnp.arange(n, dtype=jnp.float32) + 0.5) / n
    decoded, scales = jax.jit(jax.vmap(at))(thresholds)
    _, step = grid(scales)
    assert np.all(step == step[0]) and step[0] / 2**23 < 0.1
    # One threshold more or less.
    _, exponent = np.frexp(v)
    atol = np.exp2(exponent - 1.0) * step[0] / 2**23 / n
    assert np.all(np.abs(float64(decoded).mean(axis=0) - v) <= atol)


@pytest.mark.parametrize("b2", [0.95, 0.999])
def test_second_moments_are_unbiased(b2):
    """With gradients of a constant distribution, the average of the codec's average is
    the exact one, for elements that are as large as the largest of their group and for
    such that are a thousand times smaller.
    """
    v = _spread_moments()
    stored, exact = _averages(_ours["nonnegative"], b2, v, _normal_gradient, 6000)
    stored, exact = stored[3000:], exact[3000:]
    total = stored.sum(axis=(1, 2)) / exact.sum(axis=(1, 2))
    # A code is 3.4 % on average, whatever the size. Less than one is what rounding
    # leaves in the mean over a few of the times that moments need to forget.
    assert abs(np.mean(total) - 1) <= 0.03
    size = np.log2(v / v.max(axis=1, keepdims=True))
    for high in (0, -3, -6):
        chosen = (size <= high) & (size > high - 3)
        assert abs(np.mean((stored / exact)[:, chosen]) - 1) <= 0.03


@pytest.mark.parametrize("period", [89, 144])
def test_second_moments_of_rare_gradients_are_unbiased(period):
    """Also with the coarsest codes, and with gradients that return after as many steps
    as multiples of the golden ratio nearly do."""
    n, b2 = 20_000, 0.999
    v = np.stack([np.zeros(64), np.ones(64)], axis=1).astype(np.float32)
    phase = jnp.arange(64)[:, None]
    is_due = lambda count: (count + phase) % period == 0
    rare = lambda count, v: jnp.where(is_due(count), period * v, 0)
    stored, exact = _averages(_ours["nonnegative"], b2, v, rare, n)
    ratio = np.mean(stored[2000:, :, 1] / exact[2000:, :, 1], axis=0)
    # In units of v: a code is at most 1/8. Rounding by independent thresholds has a
    # variance of code (1 - b2) where an element decays, and of code^2 / 4 where its
    # gradient comes, which are forgotten after 1 / (1 - b2) steps.
    code = 1 / 8
    variance = code / 2 + code**2 / (8 * period * (1 - b2))
    # Of a mean over 18 of these times. Three standard deviations.
    assert np.all(np.abs(ratio - 1) <= 3 * np.sqrt(variance * 2 / 18))


def test_rounding_to_nearest():
    # Whatever the dither, so long as the scale is representable.
    m = np.random.default_rng(0).uniform(-1, 1, (4, 32)).astype(np.float32)
    m[:, 0] = 127 / 64
    layout = Layout(m.shape, (-1,), 32)
    nearest = fq.SoftsignCodec(dithered=False)
    stored = [roundtrip(nearest, layout, m, count)[0] for count in range(9)]
    assert np.all(decode_scale(stored[0].scales) == 129 / 64)
    assert all(tree_identical(stored[0], x) for x in stored)


def test_scales_of_first_moments_rotate():
    # Of a largest element that is no stored scale, the scales of many steps average it:
    # but for the discrepancy of the thresholds, in units of 2^-8.
    m = np.full((1, 32), 1 + 0.3 * 2**-8, np.float32)
    steps = 1000
    layout = Layout(m.shape, (-1,), 32)
    nearest = fq.SoftsignCodec(dithered=False)
    decode = lambda count: roundtrip(nearest, layout, m, count)[1][0, 0]
    found = jax.jit(jax.vmap(decode))(jnp.arange(steps))
    assert np.unique(found).size == 2
    assert abs(np.mean(float64(found)) - float64(m[0, 0])) <= 2**-8 * 12 / steps


#
# The codec of the paper
#


def _numpy_flashoptim(kind: str, x: np.ndarray) -> tuple[np.ndarray, ...]:
    """The formulas of the paper, for groups of float32: codes, scale, decoded."""
    one, half = np.float32(1), np.float32(0.5)
    if kind == "signed":
        scale = np.maximum(np.max(np.abs(x), -1, keepdims=True), np.float32(1e-12))
        n = x / scale
        y = np.float32(2) * n / (one + np.abs(n))
        codes = np.floor(y * np.float32(127) + half).astype(np.int8)
    else:
        root = np.sqrt(x)
        scale = np.maximum(np.max(root, -1, keepdims=True), np.float32(1e-12))
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
@pytest.mark.parametrize(
    "shape",
    [
        # Flattened, they are partial and full groups as the others.
        slow(shape, unless=name not in ("ragged", "kernel"), id=name)
        for name, shape in SHAPES.items()
    ],
)
def test_flashoptim_against_numpy(kind, shape):
    codec = FlashOptimCodec(kind)
    layout = MomentCodecs.named("flashoptim").layout(shape, 32)
    assert layout == flattened(shape, 32)
    rng = np.random.default_rng(0)
    for magnitude in (1e-3, 1.0, 300.0):
        x = (magnitude * rng.standard_normal(shape)).astype(np.float32)
        x = np.asarray(x * x if kind == "nonnegative" else x)
        stored, _ = roundtrip(codec, layout, x, 0)
        assert stored.scales.dtype == jnp.float16
        groups = [x.ravel()[i : i + 32] for i in range(0, x.size, 32)]
        expected = [_numpy_flashoptim(kind, group) for group in groups]
        empty = np.zeros(0, np.float32)
        codes, scales, decoded = (
            np.concatenate([e[i] for e in expected] or [empty]) for i in range(3)
        )
        _assert_same_codes(np.ravel(stored.codes), codes)
        assert np.array_equal(stored.scales, scales)
        # Whatever the codes, what is decoded from them.
        stored = eqx.tree_at(
            lambda q: q.codes,
            stored,
            jnp.asarray(codes.astype(stored.codes.dtype)).reshape(shape),
        )
        assert np.array_equal(np.ravel(_decode_stored(stored)), decoded)


@_kinds
def test_flashoptim_is_the_same_eagerly(kind):
    x = np.random.default_rng(0).uniform(0, 1, (37,)).astype(np.float32)
    layout = flattened(x.shape, 32)
    with jax.disable_jit():
        eagerly = roundtrip(FlashOptimCodec(kind), layout, x, 0)
    jitted = roundtrip(FlashOptimCodec(kind), layout, x, 0)
    _assert_same_codes(eagerly[0].codes, jitted[0].codes)
    assert tree_identical(eagerly[0].scales, jitted[0].scales)


@_kinds
def test_flashoptim_codes_of_a_million(kind):
    # A reciprocal in place of the division is seen in one code of 300,000.
    x = np.random.default_rng(0).standard_normal(32 * 2**15).astype(np.float32)
    x = x * x if kind == "nonnegative" else x
    stored, decoded = roundtrip(FlashOptimCodec(kind), flattened(x.shape, 32), x, 0)
    expected = _numpy_flashoptim(kind, x.reshape(-1, 32))
    codes, scales, expected = (x.ravel() for x in expected)
    _assert_same_codes(stored.codes, codes)
    assert np.array_equal(stored.scales, scales)
    same = np.asarray(stored.codes) == codes
    assert np.array_equal(decoded[same], expected[same])


def _assert_same_codes(codes, expected) -> None:
    """XLA may fuse the product with the sum that is rounded down. Where the product was
    rounded across a threshold, the code is the next one: at most one in 2^24 / 255.
    """
    off = np.abs(np.int32(codes) - np.int32(expected))
    assert np.max(off, initial=0) <= 1
    assert np.sum(off) <= 1 + off.size * 255 / 2**24


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

    def decoded():
        for shape in SHAPES.values():
            layout = codecs.layout(shape, 32)
            stored = zeros(codecs.of(fq.Moment(kind), shape), layout, jnp.float32)
            yield stored.decode() if isinstance(stored, fq.QuantMoment) else stored

    expected = [np.zeros(shape, np.float32) for shape in SHAPES.values()]
    assert tree_identical(jax.jit(lambda: list(decoded()))(), expected)


def test_codecs_are_hashable():
    # They are static fields of the state.
    for name in MomentCodecs.names():
        codecs = MomentCodecs.named(name)
        assert hash(codecs) == hash(MomentCodecs.named(name))


@_kinds
def test_decode_of_an_ensemble(kind):
    layout = choose_layout((2, 64), 32)
    x = np.random.default_rng(0).uniform(0.1, 1, (3, 2, 64)).astype(np.float32)
    store = lambda x: roundtrip(_ours[kind], layout, x, 0)[0]
    ensemble = eqx.filter_vmap(store)(jnp.asarray(x))
    assert ensemble.codes.shape == (3, 2, 64)
    decoded = jax.jit(jax.vmap(lambda moment: moment.decode()))(ensemble)
    for i in range(3):
        assert tree_identical(
            np.asarray(decoded)[i], roundtrip(_ours[kind], layout, x[i], 0)[1]
        )
