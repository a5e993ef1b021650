"""Thresholds that follow gradients which return after some number of steps.

Rounding by the multiples of one irrational number is even, but where the step of a
gradient times that number is nearly whole, each gradient meets nearly the same
threshold. This compares such thresholds with those of the library, whose multiples are
of another number after 2048 steps:

- second moments: elements whose gradient comes every so many steps, each beside one
    that has none, so that codes are coarse; with b2 = 0.999, by the multiples of the
    golden ratio and by the default. Each of 64 elements has another phase. The column
    is the length of an update over that without rounding, the mean over the last nine
    tenths of 20,000 steps: of the elements with the least and the most.
- weights: steps that return after so many steps and add up to nothing, of 0.05 to 20
    units of a master weight's last place, by the multiples of the root of 2 and by the
    default. The column is how far a weight has moved after 20,000 steps, in these
    units: the root of the mean square of 200 elements.

Takes seconds on a CPU.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _command_line import Parser, run_main, versions, write_json
from jaxtyping import Array, Float

import flashquinox as fq
from flashquinox._storage.thresholds import rounding_threshold


STEPS, LEAF, B2, PHASES = 20_000, 3, 0.999, 64
# In which the multiples return nearly, and two in which they do not.
PERIODS_OF_MOMENTS = (16, 55, 89, 144, 200)
PERIODS_OF_WEIGHTS = (16, 70, 169, 200, 408)


def _multiples(number: int) -> Callable[[Array], Array]:
    """Of a number in units of 2^-32, as a threshold of 16 bits."""
    return lambda count: (count.astype(jnp.uint32) * np.uint32(number)) >> 16


def _golden(count: Array) -> fq.Dither:
    code = _multiples(0x9E3779B9)(count) | np.uint32(1)
    default = fq.Dither.at(count, LEAF)
    return fq.Dither(code.astype(jnp.float32) * np.float32(2**-16), default.scale)


def _default(count: Array) -> fq.Dither:
    return fq.Dither.at(count, LEAF)


def update_lengths(
    at: Callable[[Array], fq.Dither], period: int
) -> Float[Array, " phases"]:
    """Of each phase, the mean length of an update over that without rounding."""
    codec, phases = fq.FittedLogCodec(), jnp.arange(PHASES)
    has_gradients = jnp.asarray([False, True])

    def decoded(codes: Array, scales: Any) -> Array:
        return codec.decode(codes, scales, -1, jnp.float32).reshape(PHASES, 2)

    def step(carry: Any, count: Array) -> tuple[Any, Array]:
        codes, scales, exact = carry
        is_due = ((count + phases) % period == 0)[:, None] & has_gradients
        square = jnp.where(is_due, (1 - B2) * period, 0.0)
        new = B2 * decoded(codes, scales) + square
        codes, scales = codec.encode(new.reshape(-1, 32), -1, at(count))
        exact = B2 * exact + square
        length = jnp.sqrt(exact[:, 1] / decoded(codes, scales)[:, 1])
        return (codes, scales, exact), length

    start = jnp.broadcast_to(jnp.where(has_gradients, 1.0, 0.0), (PHASES, 2))
    stored = codec.encode(start.reshape(-1, 32), -1, at(jnp.asarray(1)))
    counts = 2 + jnp.arange(STEPS, dtype=jnp.int32)
    _, lengths = jax.lax.scan(step, (*stored, start), counts)
    return jnp.mean(lengths[STEPS // 10 :], axis=0)


def moved(at: Callable[[Array], Array], period: int) -> float:
    """Where weights are whose steps add up to nothing, in units of their last place."""
    rng, n = np.random.default_rng(0), 200
    counts = jnp.arange(STEPS, dtype=jnp.int32)
    threshold = np.asarray(jax.vmap(at)(counts))[:, None] / 2**16
    size, phase = np.exp(rng.uniform(-3, 3, n)), rng.uniform(0, 2 * np.pi, n)
    angle = 2 * np.pi * (np.arange(STEPS) % period)[:, None] / period
    steps = size * np.cos(angle + phase)
    return float(np.sqrt(np.mean(np.sum(np.floor(steps + threshold) - steps, 0) ** 2)))


def measure() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for period in PERIODS_OF_MOMENTS:
        row: dict[str, Any] = {"of": "second moments", "period": period}
        for name, at in (("golden ratio", _golden), ("default", _default)):
            lengths = jax.jit(update_lengths, static_argnums=(0, 1))(at, period)
            row[name] = [float(jnp.min(lengths)), float(jnp.max(lengths))]
        rows.append(row)
    default = lambda count: rounding_threshold(count, LEAF)
    for period in PERIODS_OF_WEIGHTS:
        row = {"of": "weights", "period": period}
        for name, at in (("root of 2", _multiples(0x6A09E667)), ("default", default)):
            row[name] = moved(at, period)
        rows.append(row)
    return rows


def print_rows(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        of, period, *columns = row.items()
        found = [
            f"{name}: "
            + (
                f"{x:.0f}"
                if isinstance(x, float)
                else " to ".join(f"{y:.3f}" for y in x)
            )
            for name, x in columns
        ]
        print(f"{of[1]}, every {period[1]} steps: " + "; ".join(found))


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_json()
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    rows = measure()
    print_rows(rows)
    write_json(
        arguments.json,
        arguments={"steps": STEPS, "phases": PHASES, "b2": B2},
        versions=versions("jax", "numpy"),
        results=rows,
    )


if __name__ == "__main__":
    run_main(main)
