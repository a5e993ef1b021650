"""Of ways to round Adam's moments, the errors of the next update in real tensors."""

from typing import Any, NamedTuple, TypeAlias

import _next_update_levels as fitted
import _next_update_roundings as by
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from _next_update_roundings import GROUP, Rounding, Thresholds
from _open_loop import beside_float32_adam, FIRST_STEP
from jaxtyping import Array, Float, Key, PyTree, Scalar, UInt8

import flashquinox as fq


B1, BATCH = 0.9, 2

# Those in which the default is closest to the paper's codec.
TENSORS = {
    "position": ".position",
    "embedding": ".embedding",
    "first q, k, v": ".blocks[0].query_key_value.weight",
    "head": ".head.weight",
}

# By range, those that are fitted to a tensor's exact directions; and as "v", those that
# are fitted to the logarithm of its second moment.
Levels: TypeAlias = dict[str, Float[Array, " 255"]]
_BINS = 2048


class Way(NamedTuple):
    first: Rounding = by.stored_by(fq.LinearCodec())
    second: Rounding = by.stored_by(fq.FittedLogCodec())
    thresholds: Thresholds = by.pairs
    of_second: Thresholds = by.even
    relative: bool = True
    # Whether what is rounded is the exact v, in each step anew.
    once: bool = False


def _ways(levels: Levels) -> dict[str, Way]:
    paper = fq.MomentCodecs.named("flashoptim")
    default, moving = Way(), by.to_nearest_where_it_moves
    of_zero_point = by.of_zero_point(4, 32)
    scales_of_4 = by.smaller_scales(4, 1, 1.5, 16)
    scales_of_8 = by.smaller_scales(8, 7, 8, 1)
    found = {
        "the paper's": Way(
            by.stored_by(paper.signed),
            by.stored_by(paper.nonnegative),
            relative=False,
        ),
        "default": default,
        "v exact": Way(second=by.exact),
        "v exact, r to nearest": Way(second=by.exact, thresholds=by.nearest),
        "r exact": Way(first=by.exact),
        "r exact, v rounded once": Way(first=by.exact, once=True),
        "r: alternating pairs": Way(thresholds=by.alternating_pairs),
        "r: to nearest where it moves": Way(first=moving(default.first)),
        "r: two pieces, 1 and 1.5": Way(first=by.two_pieces(0.5, 1.5)),
        "r: two pieces, 1 and 2": Way(first=by.two_pieces(0.5, 2.0)),
        "r: groups of 16": Way(first=by.groups_of_16),
        "r: zero point": Way(first=of_zero_point),
        "r: scales of 8": Way(first=scales_of_8),
        "r: scales of 4": Way(first=scales_of_4),
        "v: thresholds in pairs": Way(of_second=by.even_pairs),
        "v: to nearest where it moves": Way(second=moving(default.second)),
        "v: four steps": Way(second=by.four_steps),
        "v: sixteen steps": Way(second=by.any_origin(16)),
        "323 codes of r, 203 of v": Way(by.linear(161), by.any_origin(16, 202.5)),
        "the three that help": Way(of_zero_point, by.four_steps, by.alternating_pairs),
        "scales of 8, v: four steps": Way(
            scales_of_8, by.four_steps, by.alternating_pairs
        ),
        "scales of 4, v: four steps": Way(
            scales_of_4, by.four_steps, by.alternating_pairs
        ),
    }
    found["the three, v exact"] = found["the three that help"]._replace(second=by.exact)
    found["scales of 4, v: sixteen steps"] = Way(
        scales_of_4, by.any_origin(16), by.alternating_pairs
    )
    for name in ("the three that help", "scales of 4, v: four steps"):
        way = found[name]
        found[f"{name}; r moving"] = way._replace(first=moving(way.first))
    return found | _bounds(levels)


def _bounds(levels: Levels) -> dict[str, Way]:
    """Levels that were fitted to the tensor, in ranges that are not rounded, by `v`."""
    default, steps = Way(), by.any_origin(16)
    by_levels = fitted.by_levels(levels["v"], fitted.least_to_greatest)
    fitted_v = fitted.of_logarithm(by_levels)
    found = {
        "r exact, v: sixteen steps": Way(by.exact, steps),
        "r exact, v: 64 steps": Way(by.exact, by.any_origin(64)),
        "r exact, v: fitted": Way(by.exact, fitted_v),
    }
    for name, short in (("largest", "largest"), ("least to greatest", "range")):
        rounding = fitted.by_levels(levels[name], fitted.RANGES[name])
        to_nearest = Way(rounding, default.second, thresholds=by.nearest)
        ways = {
            "v stored": to_nearest,
            "v to nearest": to_nearest._replace(of_second=by.nearest),
            "v: sixteen steps": to_nearest._replace(second=steps),
            "v: fitted": to_nearest._replace(second=fitted_v),
            "v exact": to_nearest._replace(second=by.exact),
            "in pairs, v: sixteen steps": Way(rounding, steps, by.alternating_pairs),
            "in pairs, v: fitted": Way(rounding, fitted_v, by.alternating_pairs),
            "moving, v: sixteen steps": Way(
                by.to_nearest_where_it_moves(rounding), steps, by.alternating_pairs
            ),
        }
        found |= {f"fitted to {short}, {ending}": way for ending, way in ways.items()}
    return found


@jax.jit
def _levels(
    text: UInt8[Array, " bytes"], key: Key[Array, ""], b2: Scalar
) -> dict[str, Levels]:
    """Fitted to the exact moments of each tensor in all steps that count."""

    def counts(groups, range_):
        middle, half = range_(groups)
        found, _ = jnp.histogram((groups - middle) / half, _BINS, (-1.0, 1.0))
        return found.astype(jnp.float32)

    def start(model):
        del model

    def watch(kept, grads, exact, state):
        del kept, grads
        count = optax.tree.get(state, "count")
        directions, squares = _tensors(exact), _tensors(optax.tree.get(state, "nu"))
        found = {}
        for tensor in TENSORS:
            of_r, of_v = (
                x[tensor][1].reshape(-1, GROUP) for x in (directions, squares)
            )
            found[tensor] = {
                name: counts(of_r, range_) for name, range_ in fitted.RANGES.items()
            } | {"v": counts(fitted.logarithm(of_v), fitted.least_to_greatest)}
        return None, jtu.tree_map(lambda x: jnp.where(count > FIRST_STEP, x, 0), found)

    found = beside_float32_adam(text, key, start, watch, b2=b2, batch=BATCH)
    return jtu.tree_map(lambda x: fitted.fitted_levels(x.sum(axis=0)), found)


@jax.jit
def _errors(
    text: UInt8[Array, " bytes"],
    key: Key[Array, ""],
    b2: Scalar,
    levels: dict[str, Levels],
) -> dict[str, dict[str, Float[Array, " steps"]]]:
    """Of a GPT that float32 Adam trains, as in the open loop of `quality.py`."""
    ways = {tensor: _ways(levels[tensor]) for tensor in TENSORS}

    def next_update(way, stored, exact, grad, count, place):
        before = stored
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
        first, second, *before = [
            x.reshape(-1, GROUP) for x in (first, second, *before)
        ]
        first = way.first(first, before[0], way.thresholds(count, place))
        second = way.second(second, before[1], way.of_second(count, place))
        return update, (first.reshape(grad.shape), second.reshape(grad.shape))

    def start(model):
        return {
            tensor: dict.fromkeys(ways[tensor], (jnp.zeros_like(x),) * 2)
            for tensor, (_, x) in _tensors(model).items()
        }

    def watch(stored, grads, exact, state):
        count, errors, after = optax.tree.get(state, "count"), {}, {}
        nu = optax.tree.get(state, "nu")
        grad, true, v = map(_tensors, (grads, exact, nu))
        for tensor, (place, x) in grad.items():
            errors[tensor], after[tensor] = {}, {}
            for name, way in ways[tensor].items():
                update, after[tensor][name] = next_update(
                    way, stored[tensor][name], v[tensor][1], x, count, place
                )
                _, expected = true[tensor]
                difference = jnp.linalg.norm(update - expected)
                errors[tensor][name] = difference / jnp.linalg.norm(expected)
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
    found: dict[str, dict[str, dict[str, float]]] = {}
    for b2 in (0.999, 0.95):
        (key,) = jax.random.split(jax.random.key(0), 1)
        of_run = jnp.asarray(text), key, jnp.float32(b2)
        levels = _levels(*of_run)
        steps = _errors(*of_run, levels)
        means = jtu.tree_map(lambda x: float(x[FIRST_STEP:].mean()), steps)
        # As they are listed: `jit` sorts what it returns.
        for name in _ways(levels["position"]):
            found.setdefault(name, {})[str(b2)] = {
                tensor: means[tensor][name] / means[tensor]["the paper's"]
                for tensor in TENSORS
            }
    return [
        {"way": name, "error, of the paper's": errors} for name, errors in found.items()
    ]


_WIDTH = 46


def print_tensors(rows: list[dict[str, Any]]) -> None:
    settings = list(rows[0]["error, of the paper's"])
    width = 15 * len(TENSORS) + 7
    print(" " * _WIDTH + "".join(f"{f'b2 = {b2}':^{width}}" for b2 in settings))
    names = "".join(f"{name:>15}" for name in TENSORS) + f"{'worst':>7}"
    print(" " * _WIDTH + names * len(settings))
    for row in rows:
        print(f"{row['way']:{_WIDTH}}", end="")
        for errors in row["error, of the paper's"].values():
            cells = "".join(f"{error:15.3f}" for error in errors.values())
            print(f"{cells}{max(errors.values()):7.3f}", end="")
        print()
