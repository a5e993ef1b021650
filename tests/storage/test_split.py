from collections.abc import Callable
from functools import partial

import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Bool, UInt32

import flashquinox as fq
from flashquinox._storage.split import encode_correction

from ..helpers import bits_of, float_of, tree_identical


# Each is one program of an array, where their operations are many.
_encode = jax.jit(fq.ECCWeight.encode, static_argnums=(1, 2))
_decode = jax.jit(lambda split: split.decode())
_correct = jax.jit(encode_correction, static_argnums=2)


#
# What the split promises, as integers
#

_MAGNITUDE = np.uint32(0x7FFF_FFFF)
_SIGN = np.uint32(0x8000_0000)
_INFINITY = np.uint32(0x7F80_0000)


def _bfloat16_promises(
    bits: UInt32[Array, " n"], width: int
) -> dict[str, Bool[Array, " n"]]:
    """For each float32 pattern, whether each promise of a bfloat16 split is kept."""
    split = fq.ECCWeight.encode(float_of(bits), jnp.bfloat16, width)
    again = fq.ECCWeight.encode(split.decode(), jnp.bfloat16, width)
    decoded = bits_of(split.decode())
    weight = lax.bitcast_convert_type(split.weight, jnp.uint16).astype(jnp.uint32) << 16
    magnitude = bits & _MAGNITUDE
    nan = magnitude > _INFINITY
    infinite = magnitude == _INFINITY
    # 24 bits end at 0x7F7F_FF00. As in IEEE arithmetic, what lies half a step beyond
    # the largest number rounds to infinity; 32 bits reach all finite numbers.
    overflows = ~nan & (magnitude >= (0x7F7F_FF80 if width == 24 else _INFINITY))
    inside = ~nan & ~overflows
    # Patterns order magnitudes, so these are errors in steps of float32.
    error = _distance(decoded & _MAGNITUDE, magnitude)
    rounding = _distance(weight & _MAGNITUDE, decoded & _MAGNITUDE)
    weight_nan = (weight & _MAGNITUDE) > _INFINITY
    return {
        "within half a step": ~inside | (error <= (128 if width == 24 else 0)),
        "sign": nan | ((decoded & _SIGN) == (bits & _SIGN)),
        "weight within half a unit": ~inside | (rounding <= 0x8000),
        "overflow is infinite": ~overflows | ((decoded & _MAGNITUDE) == _INFINITY),
        "infinity is kept": ~infinite | ((weight == bits) & (split.correction == 0)),
        "NaN is kept": weight_nan == nan,
        "only NaN becomes NaN": jnp.isnan(split.decode()) == nan,
        "zero is kept": (magnitude != 0) | ((weight == bits) & (decoded == bits)),
        "decode, then encode": _same_split(split, again),
    }


def _float16_promises(
    bits: UInt32[Array, " n"], width: int
) -> dict[str, Bool[Array, " n"]]:
    """Likewise for float16."""
    split = fq.ECCWeight.encode(float_of(bits), jnp.float16, width)
    again = fq.ECCWeight.encode(split.decode(), jnp.float16, width)
    decoded = bits_of(split.decode())
    weight = lax.bitcast_convert_type(split.weight, jnp.uint16)
    magnitude = bits & _MAGNITUDE
    nan = magnitude > _INFINITY
    # 65520, where float16 rounds to infinity, less half a step of the 24-bit
    # correction.
    largest = bits_of(jnp.float32(65520 - 2**-4 if width == 24 else 65520))
    overflows = ~nan & (magnitude >= largest)
    normal = ~nan & ~overflows & (magnitude >= bits_of(jnp.float32(2**-14)))
    small = ~nan & ~overflows & ~normal
    # The int8 correction counts 2^5 float32 steps; the int16 one counts single steps.
    error = _distance(decoded & _MAGNITUDE, magnitude)
    # Below 2^-14 the spacing is 2^-37 for the int16 correction, 2^-32 for the int8 one,
    # which is rounded from it: half a step each, and the bound of both rounded up to
    # the next float32.
    absolute = jnp.abs(split.decode() - float_of(bits))
    bound = np.float32((2**-33 + 2**-38 if width == 24 else 2**-38) * (1 + 2**-23))
    return {
        "within half a step": ~normal | (error <= (16 if width == 24 else 0)),
        "within half a step below 2^-14": ~small | (absolute <= bound),
        "sign": nan | ((decoded & _SIGN) == (bits & _SIGN)),
        "overflow is infinite": ~overflows | ((decoded & _MAGNITUDE) == _INFINITY),
        "NaN is kept": jnp.isnan(split.weight) == nan,
        "only NaN becomes NaN": jnp.isnan(split.decode()) == nan,
        "zero is kept": (magnitude != 0)
        | ((weight.astype(jnp.uint32) << 16 == bits) & (decoded == bits)),
        "decode, then encode": _same_split(split, again),
    }


def _distance(x: Array, y: Array) -> Array:
    return jnp.where(x > y, x - y, y - x)


def _same_split(split: fq.ECCWeight, again: fq.ECCWeight) -> Array:
    pattern = lambda x: lax.bitcast_convert_type(x.weight, jnp.uint16)
    same = (pattern(split) == pattern(again)) & (split.correction == again.correction)
    return same | jnp.isnan(split.weight)


_PROMISES: dict[str, Callable] = {
    "bfloat16": _bfloat16_promises,
    "float16": _float16_promises,
}

_splits = pytest.mark.parametrize(
    "dtype,width", [(d, w) for d in ("bfloat16", "float16") for w in (24, 32)]
)


@partial(jax.jit, static_argnums=(1, 2))
def _broken(bits: UInt32[Array, " n"], dtype: str, width: int) -> dict[str, tuple]:
    """For each promise, how many patterns break it, and one that does."""
    return {
        name: (jnp.sum(~kept), bits[jnp.argmin(kept)])
        for name, kept in _PROMISES[dtype](bits, width).items()
    }


def _assert_kept(bits: UInt32[Array, " n"], dtype: str, width: int) -> None:
    for name, (count, example) in jax.device_get(_broken(bits, dtype, width)).items():
        assert count == 0, f"{name}: {count} patterns, such as {example:#010x}"


#
# Encode, then decode
#


def _patterns() -> UInt32[np.ndarray, " n"]:
    """Every sign and exponent, with mantissas around every tie of every rounding, and a
    dense sample of all others.
    """
    ties = [
        0,
        1 << 4,
        1 << 5,
        1 << 7,
        1 << 8,
        1 << 12,
        1 << 13,
        1 << 15,
        1 << 16,
        1 << 23,
    ]
    near = np.arange(-3, 4)
    edges = np.unique((np.add.outer(ties, ties)[..., None] + near) % 2**23)
    high = (np.arange(0, 128, 9)[:, None] << 16) + np.arange(-3, 4) * 128 + 0x8000
    random = np.random.default_rng(0).integers(0, 2**23, 2000)
    mantissas = np.unique(np.concatenate([edges, high.ravel(), random]))
    exponents = np.arange(512, dtype=np.uint32) << 23
    return (exponents[:, None] | mantissas.astype(np.uint32)).ravel()


@_splits
def test_sampled_patterns(dtype, width):
    _assert_kept(jnp.asarray(_patterns()), dtype, width)


_CHUNK = 2**24


@partial(jax.jit, static_argnums=(1, 2))
def _broken_in_chunk(start: UInt32[Array, ""], dtype: str, width: int) -> dict:
    """Likewise for a chunk of patterns, in blocks that fit into a cache."""
    block = jnp.arange(2**14, dtype=jnp.uint32)
    promises = lambda i: _PROMISES[dtype](
        start + i.astype(jnp.uint32) * block.size + block, width
    )

    def add(i, counts):
        return {name: counts[name] + jnp.sum(~x) for name, x in promises(i).items()}

    names = jax.eval_shape(promises, jnp.int32(0))
    return lax.fori_loop(0, _CHUNK // block.size, add, dict.fromkeys(names, 0))


@pytest.mark.slow
@_splits
def test_all_patterns(dtype, width):
    for start in range(0, 2**32, _CHUNK):
        counts = jax.device_get(_broken_in_chunk(np.uint32(start), dtype, width))
        if any(counts.values()):
            bits = jnp.arange(_CHUNK, dtype=jnp.uint32) + np.uint32(start)
            _assert_kept(bits, dtype, width)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_without_correction_is_a_rounding(dtype):
    x = float_of(jnp.asarray(_patterns()[::97]))
    split = _encode(x, dtype, None)
    assert split.correction is None
    assert tree_identical(split.weight, x.astype(dtype))
    assert tree_identical(_decode(split), split.weight.astype(jnp.float32))


def test_documented_formula():
    # `b24 = (b + 128) >> 8`, `high = (b24 + 128) >> 8`, in Python's integers.
    bits = _patterns()
    bits = bits[(bits & _MAGNITUDE) < 0x7F7F_FF80][::11]
    split = _encode(float_of(jnp.asarray(bits)), jnp.bfloat16, 24)
    b24 = (bits.astype(np.int64) + 128) >> 8
    high = (b24 + 128) >> 8
    assert np.array_equal(np.asarray(split.weight).view(np.uint16), high)
    assert np.array_equal(np.asarray(split.correction), b24 - 256 * high)


#
# Decode, then encode
#


def _all_pairs(dtype, correction_dtype) -> tuple[Array, Array]:
    """Every weight with every correction that can stand beside it."""
    weights = lax.bitcast_convert_type(jnp.arange(2**16, dtype=jnp.uint16), dtype)
    corrections = jnp.arange(-128, 128).astype(correction_dtype)
    if correction_dtype == jnp.int16:
        most = 2 ** (13 if dtype == jnp.float16 else 16) // 2
        corrections = jnp.arange(-most, most, most // 32 - 1).astype(jnp.int16)
    shape = (weights.size, corrections.size)
    return jnp.broadcast_to(weights[:, None], shape), jnp.broadcast_to(
        corrections, shape
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("correction_dtype", [jnp.int8, jnp.int16])
def test_all_pairs(dtype, correction_dtype):
    width = {jnp.int8: 24, jnp.int16: 32}[correction_dtype]

    @jax.jit
    def broken(weight, correction):
        split = fq.ECCWeight(weight, correction)
        master = split.decode()
        wide = weight.astype(jnp.float32)
        again = fq.ECCWeight.encode(master, dtype, width)
        # By its bits: arithmetic takes subnormals for zero.
        size, master_size = bits_of(wide) & _MAGNITUDE, bits_of(master) & _MAGNITUDE
        zero, infinite = size == 0, jnp.isinf(weight)
        # The pairs that no encoding gives: beyond zero and beyond infinity.
        beyond = zero & (correction < 0) | infinite & (correction != 0)
        kept = {
            "NaN": jnp.isnan(master) == jnp.isnan(weight),
            "sign": jnp.isnan(weight) | (jnp.signbit(master) == jnp.signbit(weight)),
            "finite": ~jnp.isfinite(weight) | jnp.isfinite(master),
            "infinity": ~(infinite & (correction >= 0)) | (master == wide),
            "zero": ~(zero & (correction <= 0)) | (bits_of(master) == bits_of(wide)),
            "no correction": (correction != 0)
            | jnp.isnan(weight)
            | (bits_of(master) == bits_of(wide)),
            "order": jnp.isnan(weight)
            | zero
            | infinite
            | ((master_size > size) == (correction > 0)),
            "decode, then encode": beyond | _same_split(split, again),
        }
        return {name: jnp.sum(~x) for name, x in kept.items()}

    counts = jax.device_get(broken(*_all_pairs(dtype, correction_dtype)))
    assert counts == dict.fromkeys(counts, 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("width", [24, 32])
def test_decode_is_the_documented_sum(dtype, width):
    # master = weight + correction * 2^-8 ulp(weight), for normal weights, computed in
    # float64. Corrections below a power of two count half-sized steps, as floats do
    # there.
    rng = np.random.default_rng(1)
    top = (0x7BFF if dtype == jnp.float16 else 0x7F7F) + 1
    smallest = 0x0401 if dtype == jnp.float16 else 0x0081
    pattern = rng.integers(smallest, top, 5000, dtype=np.uint16)
    mantissa_bits = jnp.finfo(dtype).nmant
    pattern = pattern[pattern % 2**mantissa_bits != 0]
    fraction_bits = 8 if width == 24 else 23 - mantissa_bits
    most = 2 ** (fraction_bits - 1)
    correction = rng.integers(-most, most, pattern.size)
    weight = pattern.view(dtype)
    wide = weight.astype(np.float64)
    ulp = 2.0 ** (np.floor(np.log2(wide)) - mantissa_bits)
    expected = wide + correction * 2.0**-fraction_bits * ulp
    correction = jnp.asarray(correction, jnp.int8 if width == 24 else jnp.int16)
    master = _decode(fq.ECCWeight(jnp.asarray(weight), correction))
    assert np.array_equal(np.asarray(master, np.float64), expected)


#
# A given weight
#


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("width", [24, 32])
def test_correction_of_the_own_weight(dtype, width):
    x = jnp.asarray(_patterns()[::7].view(np.float32))
    split = _encode(x, dtype, width)
    correction = _correct(x, split.weight, split.correction.dtype)
    assert correction.dtype == split.correction.dtype
    given, own = (
        np.asarray(_decode(fq.ECCWeight(split.weight, x))).view(np.uint32)
        for x in (correction, split.correction)
    )
    assert np.all((given == own) | np.isnan(split.weight))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_correction_of_another_weight_is_nearest(dtype):
    rng = np.random.default_rng(2)
    held = rng.integers(0, 2**16, 4000, dtype=np.uint16).view(dtype)
    held = np.where(np.isfinite(held), held, np.zeros_like(held))
    wide = held.astype(np.float32)
    # Truth within two units in the last place of the weight, and far off, either way.
    ulp = np.abs(wide) * np.float32(2.0 ** -jnp.finfo(dtype).nmant)
    off = rng.uniform(-2, 2, 4000).astype(np.float32) * ulp
    with np.errstate(over="ignore"):
        master = wide + off * rng.choice([1, 1, 1, 1000], 4000).astype(np.float32)
    master = np.where(np.isfinite(master), master, np.float32(0))

    held, master = jnp.asarray(held), jnp.asarray(master)
    correction = _correct(master, held, jnp.int8)
    # Every correction there is, tried by force. Zero weights take no step below zero.
    all_corrections = jnp.asarray(np.arange(-128, 128, dtype=np.int8))
    decode = lambda c: fq.ECCWeight(held, jnp.full_like(held, c, jnp.int8)).decode()
    reachable = np.asarray(jax.jit(jax.vmap(decode))(all_corrections), np.float64)
    truth = np.asarray(master, np.float64)
    reached = np.asarray(_decode(fq.ECCWeight(held, correction)), np.float64)
    best = np.min(np.abs(reachable - truth), axis=0)
    # Below 2^-14, a float16 master is first rounded to a multiple of 2^-37, which moves
    # the errors of two candidates apart by up to as much.
    slack = 2.0**-37 if dtype == jnp.float16 else 0
    assert np.all(np.abs(reached - truth) <= best + slack)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("width", [24, 32])
def test_correction_never_leaves_half_a_unit(dtype, width):
    rng = np.random.default_rng(3)
    master = rng.integers(0, 2**32, 20000, dtype=np.uint32).view(np.float32)
    pattern = rng.integers(0, 2**16, 20000, dtype=np.uint16)
    held = jnp.asarray(pattern.view(dtype))
    correction_dtype = jnp.int8 if width == 24 else jnp.int16
    correction = _correct(jnp.asarray(master), held, correction_dtype)
    reached = np.asarray(_decode(fq.ECCWeight(held, correction)))
    fraction_bits = 8 if width == 24 else 23 - jnp.finfo(dtype).nmant
    assert np.all(np.abs(np.int32(correction)) <= 2 ** (fraction_bits - 1))
    assert np.array_equal(np.isnan(reached), np.isnan(held))
    # The nearest number of the weight's dtype to what is reached is the weight, but for
    # exact halves.
    with np.errstate(over="ignore", invalid="ignore"):
        steps = reached.astype(dtype).view(np.int16) - pattern.view(np.int16)
    assert np.all((np.abs(steps) <= 1) | ~np.isfinite(held))


def test_correction_without_dtype_is_none():
    x = jnp.ones(3)
    assert encode_correction(x, x.astype(jnp.bfloat16), None) is None
