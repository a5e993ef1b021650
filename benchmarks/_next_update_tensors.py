"""Of ways to round Adam's moments, the errors of the next update in real tensors."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from _open_loop import beside_float32_adam, FIRST_STEP
from jaxtyping import Array, Float, Float32, Int32, Key, PyTree, Scalar, UInt8

import flashquinox as fq


B1, GROUP, BATCH = 0.9, 32, 2

# Those in which the default is closest to the paper's codec.
TENSORS = {
    "position": ".position",
    "embedding": ".embedding",
    "first q, k, v": ".blocks[0].query_key_value.weight",
    "head": ".head.weight",
}

# A moment, as it is read again after it was stored in this step.
Rounding: TypeAlias = Callable[[Float[Array, "groups 32"], fq.Dither], Array]
Thresholds: TypeAlias = Callable[[Int32[Array, ""], int], fq.Dither]


def _stored_by(codec: fq.AbstractMomentCodec) -> Rounding:
    def rounding(moment, dither):
        codes, scales = codec.encode(moment, -1, dither)
        return codec.decode(codes, scales, -1, jnp.float32)

    return rounding


def _exact(moment, dither):
    del dither
    return moment


#
# Directions r
#


def _up(scale: Float32[Array, "..."], parts: int) -> Float32[Array, "..."]:
    """To the next of this many numbers between powers of two, evenly spaced."""
    scale = jnp.maximum(scale, 2.0**-60)
    fraction, power = jnp.frexp(scale)
    return jnp.ldexp(jnp.ceil(fraction * 2 * parts - 1e-5) / (2 * parts), power)


def _of_zero_point(unit: int, parts: int) -> Rounding:
    """Codes from the least to the greatest of a group. That of zero is a multiple of
    `unit`, at most 64 from the middle. With 4 and 32: 5 bits, and 11 for the scale."""

    def rounding(moment, dither):
        most = jnp.maximum(jnp.max(moment, axis=-1, keepdims=True), 0)
        least = jnp.minimum(jnp.min(moment, axis=-1, keepdims=True), 0)
        skew = (most + least) / jnp.maximum(most - least, 1e-30)
        zero = jnp.clip(-jnp.round(127.5 / unit * skew) * unit, -64, 64 - unit)
        scale = jnp.maximum(most / (126.99 - zero), -least / (127.99 + zero))
        scale = _up(scale, parts)
        return (jnp.round(moment / scale + zero + dither.code - 0.5) - zero) * scale

    return rounding


def _groups_of_16(moment, dither):
    """Scales of a byte, 16 to a factor of two."""
    halves = moment.reshape(-1, GROUP // 2)
    scale = jnp.max(jnp.abs(halves), axis=-1, keepdims=True) / 126.99
    octaves = jnp.log2(jnp.maximum(scale, 2.0**-60))
    scale = jnp.exp2(jnp.ceil(16 * octaves - 1e-4) / 16)
    codes = jnp.round(halves / scale + dither.code - 0.5)
    return (codes * scale).reshape(moment.shape)


def _quarters(moment, dither):
    """A power of two for 32 elements, in 4 bits; and in 3 bits for each 8 of them, how
    many eighths of a factor of two their scale is less."""
    most = jnp.max(jnp.abs(moment.reshape(-1, 4, GROUP // 4)), axis=-1, keepdims=True)
    octaves = jnp.log2(jnp.maximum(most / 126.99, 2.0**-60))
    highest = jnp.ceil(jnp.max(octaves, axis=1, keepdims=True) - 1e-4)
    # Directions are less than 8.
    highest = jnp.clip(highest, -19, -4)
    less = jnp.clip(jnp.floor(8 * (highest - octaves) + 1e-4), 0, 7)
    scale = jnp.exp2(highest - less / 8)
    codes = jnp.round(moment.reshape(-1, 4, GROUP // 4) / scale + dither.code - 0.5)
    return (codes * scale).reshape(moment.shape)


def _two_pieces(knee: float, ratio: float) -> Rounding:
    """Steps that are `ratio` times as long above this part of the largest element."""
    inner = round(126 * knee * ratio / (1 - knee + knee * ratio))
    steps = inner + (126 - inner) * ratio

    def bent(x, by):
        outer = jnp.sign(x) * (inner + (jnp.abs(x) - inner) * by)
        return jnp.where(jnp.abs(x) <= inner, x, outer)

    def rounding(moment, dither):
        scale = jnp.max(jnp.abs(moment), axis=-1, keepdims=True) / steps
        scale = jnp.maximum(scale, 2.0**-60)
        codes = jnp.round(bent(moment / scale, 1 / ratio) + dither.code - 0.5)
        return bent(codes, ratio) * scale

    return rounding


#
# Averages of squares v
#


def _finer_steps(moment, dither):
    """As the fitted logarithm, with four steps between powers of two where that has
    two, and origins that are multiples of as many numbers for each: 16 bits as well."""
    bits = lax.bitcast_convert_type(moment, jnp.int32)
    high = jnp.max(bits, axis=-1, keepdims=True)
    low = jnp.min(bits, axis=-1, keepdims=True)
    low = jnp.maximum(jnp.maximum(low, high - 254 * (3 << 19)), 1 << 24)
    fits = []
    for a in range(4, 8):
        origin = low // (a << 18) * (a << 18)
        k = jnp.ceil(jnp.log2(jnp.maximum((high - origin) / (254.5 * a), 1e-9)))
        step = (a * jnp.exp2(jnp.maximum(k, 10))).astype(jnp.int32)
        # An origin is a multiple of its step.
        origin = jnp.where(step > a << 18, low // step * step, origin)
        fits.append((jnp.where(high - origin <= 254.5 * step, step, 2 * step), origin))
    steps, origins = map(jnp.stack, zip(*fits, strict=True))
    best = jnp.argmin(steps, axis=0)[None]
    step = jnp.take_along_axis(steps, best, 0)[0]
    origin = jnp.take_along_axis(origins, best, 0)[0]
    codes = (bits - origin).astype(jnp.float32) / step + dither.code - 0.5
    codes = jnp.clip(jnp.round(codes), 0, 255).astype(jnp.int32)
    return lax.bitcast_convert_type(origin + codes * step, jnp.float32)


#
# Thresholds
#


def _pairs(count, leaf):
    return fq.Dither.at(count, leaf, kind="signed", relative=True)


def _alternating_pairs(count, leaf):
    """Those of even steps round up, those of odd steps down."""
    dither = _pairs(count, leaf)
    half = jnp.abs(dither.code - 0.5)
    code = 0.5 + jnp.where(count % 2 == 0, half, -half)
    return fq.Dither(code, dither.scale)


def _even(count, leaf):
    return fq.Dither.at(count, leaf, kind="nonnegative")


def _even_pairs(count, leaf):
    return fq.Dither.at(count, leaf, kind="nonnegative", relative=True)


def _nearest(count, leaf):
    return fq.Dither(jnp.float32(0.5), _even(count, leaf).scale)


class Way(NamedTuple):
    first: Rounding = _stored_by(fq.LinearCodec())
    second: Rounding = _stored_by(fq.FittedLogCodec())
    thresholds: Thresholds = _pairs
    of_second: Thresholds = _even
    relative: bool = True
    # Whether what is rounded is the exact v, in each step anew.
    once: bool = False


def ways() -> dict[str, Way]:
    paper = fq.MomentCodecs.named("flashoptim")
    found = {
        "the paper's": Way(
            _stored_by(paper.signed), _stored_by(paper.nonnegative), relative=False
        ),
        "default": Way(),
        "v exact": Way(second=_exact),
        "v exact, r to nearest": Way(second=_exact, thresholds=_nearest),
        "r exact": Way(first=_exact),
        "r exact, v rounded once": Way(first=_exact, once=True),
        "r: alternating pairs": Way(thresholds=_alternating_pairs),
        "r: two pieces, 1 and 1.5": Way(first=_two_pieces(0.5, 1.5)),
        "r: two pieces, 1 and 2": Way(first=_two_pieces(0.5, 2.0)),
        "r: groups of 16": Way(first=_groups_of_16),
        "r: zero point": Way(first=_of_zero_point(4, 32)),
        "r: scales of 8": Way(first=_quarters),
        "v: thresholds in pairs": Way(of_second=_even_pairs),
        "v: finer steps": Way(second=_finer_steps),
    }
    found["the three that help"] = Way(
        _of_zero_point(4, 32), _finer_steps, _alternating_pairs
    )
    found["scales of 8, v finer"] = Way(_quarters, _finer_steps, _alternating_pairs)
    found["these, v exact"] = found["the three that help"]._replace(second=_exact)
    return found


@jax.jit
def _errors(
    text: UInt8[Array, " bytes"], key: Key[Array, ""], b2: Scalar
) -> dict[str, dict[str, Float[Array, " steps"]]]:
    """Of a GPT that float32 Adam trains, as in the open loop of `quality.py`."""

    def next_update(way, stored, exact, grad, count, place):
        first, second = stored
        if way.relative:
            first = first * jnp.sqrt(second)
        first = B1 * first + (1 - B1) * grad
        second = b2 * second + (1 - b2) * grad**2
        root = jnp.sqrt(second)
        corrected = root / jnp.sqrt(1 - b2**count)
        update = first / (1 - B1**count) / (corrected + 1e-8)
        if way.relative:
            first = first / jnp.maximum(root, 2.0**-63)
        if way.once:
            second = exact
        in_groups = lambda x: x.reshape(-1, GROUP)
        first = way.first(in_groups(first), way.thresholds(count, place))
        second = way.second(in_groups(second), way.of_second(count, place))
        return update, (first.reshape(grad.shape), second.reshape(grad.shape))

    def start(model):
        zeros = {
            name: (jnp.zeros_like(x),) * 2 for name, (_, x) in _tensors(model).items()
        }
        return dict.fromkeys(ways(), zeros)

    def watch(stored, grads, exact, state):
        count, errors, after = optax.tree.get(state, "count"), {}, {}
        nu = optax.tree.get(state, "nu")
        grad, true, v = map(_tensors, (grads, exact, nu))
        for name, way in ways().items():
            errors[name], after[name] = {}, {}
            for tensor, (place, x) in grad.items():
                update, after[name][tensor] = next_update(
                    way, stored[name][tensor], v[tensor][1], x, count, place
                )
                _, expected = true[tensor]
                difference = jnp.linalg.norm(update - expected)
                errors[name][tensor] = difference / jnp.linalg.norm(expected)
        return after, errors

    return beside_float32_adam(text, key, start, watch, b2=b2, batch=BATCH)


def _tensors(tree: PyTree) -> dict[str, tuple[int, Array]]:
    """Those of the table, with their numbers among all leaves."""
    found = {
        jtu.keystr(path): (number, x)
        for number, (path, x) in enumerate(jtu.tree_leaves_with_path(tree))
    }
    return {name: found[path] for name, path in TENSORS.items()}


def measure_tensors(text: UInt8[np.ndarray, " bytes"]) -> list[dict[str, Any]]:
    """Errors over the paper's."""
    rows = [{"way": name, "error, of the paper's": {}} for name in ways()]
    for b2 in (0.999, 0.95):
        (key,) = jax.random.split(jax.random.key(0), 1)
        steps = _errors(jnp.asarray(text), key, jnp.float32(b2))
        means = jtu.tree_map(lambda x: float(x[FIRST_STEP:].mean()), steps)
        for row in rows:
            mean, paper = means[row["way"]], means["the paper's"]
            row["error, of the paper's"][str(b2)] = {
                tensor: mean[tensor] / paper[tensor] for tensor in TENSORS
            }
    return rows


def print_tensors(rows: list[dict[str, Any]]) -> None:
    settings = list(rows[0]["error, of the paper's"])
    width = 15 * len(TENSORS) + 7
    print(" " * 26 + "".join(f"{f'b2 = {b2}':^{width}}" for b2 in settings))
    names = "".join(f"{name:>15}" for name in TENSORS) + f"{'worst':>7}"
    print(" " * 26 + names * len(settings))
    for row in rows:
        print(f"{row['way']:26}", end="")
        for errors in row["error, of the paper's"].values():
            cells = "".join(f"{error:15.3f}" for error in errors.values())
            print(f"{cells}{max(errors.values()):7.3f}", end="")
        print()
