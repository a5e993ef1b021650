"""Ways to round Adam's moments, those that the library does not have among them."""

import functools
import math
from collections.abc import Callable
from typing import TypeAlias

import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

import flashquinox as fq


GROUP = 32

# From a moment, what was read of it in this step, and the thresholds: what the next
# step reads.
Rounding: TypeAlias = Callable[
    [Float[Array, "groups 32"], Float[Array, "groups 32"], fq.Dither], Array
]
Thresholds: TypeAlias = Callable[[Int32[Array, ""], int], fq.Dither]


def stored_by(codec: fq.AbstractMomentCodec) -> Rounding:
    def rounding(moment, before, dither):
        del before
        codes, scales = codec.encode(moment, -1, dither)
        return codec.decode(codes, scales, -1, jnp.float32)

    return rounding


def exact(moment, before, dither):
    del before, dither
    return moment


def to_nearest_where_it_moves(rounding: Rounding) -> Rounding:
    """To nearest where a moment has moved by more than one step since it was read."""

    def both(moment, before, dither):
        def by(threshold):
            code = jnp.float32(threshold)
            return rounding(moment, before, fq.Dither(code, dither.scale))

        step = by(1 - 2.0**-16) - by(2.0**-16)
        moves = jnp.abs(moment - before) > step
        return jnp.where(moves, by(0.5), rounding(moment, before, dither))

    return both


#
# Directions r
#


def _up(scale: Float32[Array, "..."], parts: int) -> Float32[Array, "..."]:
    """To the next of this many numbers between powers of two, evenly spaced."""
    scale = jnp.maximum(scale, 2.0**-60)
    fraction, power = jnp.frexp(scale)
    return jnp.ldexp(jnp.ceil(fraction * 2 * parts - 1e-5) / (2 * parts), power)


def of_zero_point(unit: int, parts: int) -> Rounding:
    """Codes from the least to the greatest of a group. That of zero is a multiple of
    `unit`, at most 64 from the middle. With 4 and 32: 5 bits, and 11 for the scale."""

    def rounding(moment, before, dither):
        del before
        most = jnp.maximum(jnp.max(moment, axis=-1, keepdims=True), 0)
        least = jnp.minimum(jnp.min(moment, axis=-1, keepdims=True), 0)
        skew = (most + least) / jnp.maximum(most - least, 1e-30)
        zero = jnp.clip(-jnp.round(127.5 / unit * skew) * unit, -64, 64 - unit)
        scale = jnp.maximum(most / (126.99 - zero), -least / (127.99 + zero))
        scale = _up(scale, parts)
        return (jnp.round(moment / scale + zero + dither.code - 0.5) - zero) * scale

    return rounding


def groups_of_16(moment, before, dither):
    """Scales of a byte, 16 to a factor of two."""
    del before
    halves = moment.reshape(-1, GROUP // 2)
    scale = jnp.max(jnp.abs(halves), axis=-1, keepdims=True) / 126.99
    octaves = jnp.log2(jnp.maximum(scale, 2.0**-60))
    scale = jnp.exp2(jnp.ceil(16 * octaves - 1e-4) / 16)
    codes = jnp.round(halves / scale + dither.code - 0.5)
    return (codes * scale).reshape(moment.shape)


def smaller_scales(size: int, most: int, per_octave: float, of_all: int) -> Rounding:
    """A scale for 32 elements, `of_all` to a factor of two and 16 of these; and for
    each `size` of them, by how many steps theirs is less: at most `most`, `per_octave`
    to a factor of two."""

    def rounding(moment, before, dither):
        del before
        parts = moment.reshape(-1, GROUP // size, size)
        largest = jnp.max(jnp.abs(parts), axis=-1, keepdims=True)
        octaves = jnp.log2(jnp.maximum(largest / 126.99, 2.0**-60))
        highest = jnp.max(octaves, axis=1, keepdims=True)
        highest = jnp.ceil(of_all * highest - 1e-4) / of_all
        # Directions are less than 8.
        highest = jnp.clip(highest, -19, -4)
        less = jnp.floor(per_octave * (highest - octaves) + 1e-4)
        scale = jnp.exp2(highest - jnp.clip(less, 0, most) / per_octave)
        codes = jnp.round(parts / scale + dither.code - 0.5)
        return (codes * scale).reshape(moment.shape)

    return rounding


def two_pieces(knee: float, ratio: float) -> Rounding:
    """Steps that are `ratio` times as long above this part of the largest element."""
    inner = round(126 * knee * ratio / (1 - knee + knee * ratio))
    steps = inner + (126 - inner) * ratio

    def bent(x, by):
        outer = jnp.sign(x) * (inner + (jnp.abs(x) - inner) * by)
        return jnp.where(jnp.abs(x) <= inner, x, outer)

    def rounding(moment, before, dither):
        del before
        scale = jnp.max(jnp.abs(moment), axis=-1, keepdims=True) / steps
        scale = jnp.maximum(scale, 2.0**-60)
        codes = jnp.round(bent(moment / scale, 1 / ratio) + dither.code - 0.5)
        return bent(codes, ratio) * scale

    return rounding


def linear(codes: float) -> Rounding:
    """From minus to plus this many codes."""

    def rounding(moment, before, dither):
        del before
        scale = jnp.max(jnp.abs(moment), axis=-1, keepdims=True) / (codes - 0.01)
        scale = _up(scale, 64)
        return jnp.round(moment / scale + dither.code - 0.5) * scale

    return rounding


#
# Averages of squares v
#


def _lattice(moment, origin, step, dither):
    bits = lax.bitcast_convert_type(moment, jnp.int32)
    codes = (bits - origin).astype(jnp.float32) / step + dither.code - 0.5
    codes = jnp.clip(jnp.round(codes), 0, 255).astype(jnp.int32)
    return lax.bitcast_convert_type(origin + codes * step, jnp.float32)


def _span(moment) -> tuple[Int32[Array, "groups 1"], Int32[Array, "groups 1"]]:
    bits = lax.bitcast_convert_type(moment, jnp.int32)
    high = jnp.max(bits, axis=-1, keepdims=True)
    low = jnp.min(bits, axis=-1, keepdims=True)
    return jnp.maximum(jnp.maximum(low, high - 254 * (3 << 19)), 1 << 24), high


def _least_step(a: int, span: Int32[Array, "..."], last: float, finest: int):
    """Of a 2^k, with k at least `finest`."""
    k = jnp.ceil(jnp.log2(jnp.maximum(span / (last * a), 1e-9)))
    return (a * jnp.exp2(jnp.maximum(k, finest))).astype(jnp.int32)


def four_steps(moment, before, dither):
    """As the fitted logarithm, with four steps between powers of two where that has
    two, and origins that are multiples of as many numbers for each: 16 bits as well."""
    del before
    low, high = _span(moment)
    fits = []
    for a in range(4, 8):
        origin = low // (a << 18) * (a << 18)
        step = _least_step(a, high - origin, 254.5, 10)
        # An origin is a multiple of its step.
        origin = jnp.where(step > a << 18, low // step * step, origin)
        fits.append((jnp.where(high - origin <= 254.5 * step, step, 2 * step), origin))
    steps, origins = map(jnp.stack, zip(*fits, strict=True))
    best = jnp.argmin(steps, axis=0)[None]
    step = jnp.take_along_axis(steps, best, 0)[0]
    origin = jnp.take_along_axis(origins, best, 0)[0]
    return _lattice(moment, origin, step, dither)


def any_origin(parts: int, last: float = 254.5) -> Rounding:
    """As the fitted logarithm, with this many steps between powers of two, and origins
    that are any multiples of their steps: more than 16 bits for them. Codes up to
    `last`."""
    finest = 12 - int(math.log2(parts))

    def rounding(moment, before, dither):
        del before
        low, high = _span(moment)
        widest, of_each = high - low, range(parts, 2 * parts)
        steps = [_least_step(a, widest, last - 1, finest) for a in of_each]
        step = functools.reduce(jnp.minimum, steps)
        return _lattice(moment, low // step * step, step, dither)

    return rounding


#
# Thresholds
#


def pairs(count, leaf):
    return fq.Dither.at(count, leaf, kind="signed", relative=True)


def alternating_pairs(count, leaf):
    """Those of even steps round up, those of odd steps down."""
    dither = pairs(count, leaf)
    half = jnp.abs(dither.code - 0.5)
    code = 0.5 + jnp.where(count % 2 == 0, half, -half)
    return fq.Dither(code, dither.scale)


def even(count, leaf):
    return fq.Dither.at(count, leaf, kind="nonnegative")


def even_pairs(count, leaf):
    return fq.Dither.at(count, leaf, kind="nonnegative", relative=True)


def nearest(count, leaf):
    return fq.Dither(jnp.float32(0.5), even(count, leaf).scale)
