"""What does a call of a compiled step from Python cost, beside Optax?

    python benchmarks/calls.py
    python benchmarks/calls.py --leaves 8 64 --repeats 9 --json calls.json
    python benchmarks/calls.py --wall

Models of small leaves, half of them matrices of 64 x 64 and half vectors: what the
device computes takes less time than the call. For each number of leaves, and for
AdamW of this library, with and without `pack_below`, and Optax's (in float32):

- arrays: of weights and state, which a step gets and gives, and of gradients, which it
    gets;
- arrays alone: microseconds of a call of the identity, which gets and gives these
    arrays as a list;
- in trees: the same as weights and state, which JAX takes apart and puts together;
- step: of a step, under `jax.jit`;
- filter_jit: the same under `eqx.filter_jit`.

The arrays of weights and state are donated. Times are CPU time of the thread that
calls, which on a machine that does other things is less disturbed. On CPUs, programs
run in it too, some more than others: there, `--wall` tells more, which is wall time.
Each figure is the smallest of the repeats, which take turns. The last lines have the
ratios to Optax.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from _command_line import Parser, positive_integer, run_main, versions, write_json
from _contenders import JaxStep, optax_step, our_step
from _timing import Calls, Plan


_WAYS = ("arrays alone", "in trees", "step", "filter_jit")


def ways(made: JaxStep, clock: Callable[[], float]) -> dict[str, Calls]:
    new = lambda tree: jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), tree)
    structs = made.params, made.state
    grads = new(made.grads)
    step = lambda carry, grads: made.step(carry[0], carry[1], grads)
    donate = lambda function: jax.jit(function, donate_argnums=0)
    identity = donate(lambda carry, _: carry)
    # Of `filter_jit`, what is not donated comes first.
    filtered = eqx.filter_jit(
        lambda grads, carry: step(carry, grads), donate="all-except-first"
    )
    calls = partial(Calls, operands=(grads,), clock=clock)
    return {
        "arrays alone": calls(identity, jtu.tree_leaves(new(structs))),
        "in trees": calls(identity, new(structs)),
        "step": calls(donate(step), new(structs)),
        "filter_jit": calls(lambda x, y: filtered(y, x), new(structs)),
    }


def measure(
    leaves: int, plan: Plan, clock: Callable[[], float]
) -> list[dict[str, Any]]:
    shapes = {str(i): (64, 64) if i % 2 else (64,) for i in range(leaves)}
    made = {
        "packed": our_step("adamw", shapes, pack_below=2**16),
        "adamw": our_step("adamw", shapes),
        "optax": optax_step("adamw", shapes, jnp.float32),
    }
    calls = {name: ways(step, clock) for name, step in made.items()}
    times: dict[Any, list[float]] = {}
    counts = {
        (name, way): plan.times(calls[name][way].run) for name in made for way in _WAYS
    }
    for _ in range(plan.repeats):
        for (name, way), count in counts.items():
            seconds = calls[name][way].run(count) / count
            times.setdefault((name, way), []).append(seconds)
    rows = []
    for name, step in made.items():
        kept = len(jtu.tree_leaves((step.params, step.state)))
        row = {"leaves": leaves, "optimizer": name, "arrays": kept, "gradients": leaves}
        rows.append(row | {way: min(times[name, way]) for way in _WAYS})
    *ours, others = rows
    for row in ours:
        ratios = {way: row[way] / others[way] for way in _WAYS}
        name = f"{row['optimizer']}/optax"
        rows.append({"leaves": leaves, "optimizer": name} | ratios)
    return rows


def line(row: dict[str, Any]) -> str:
    if "arrays" in row:
        arrays = f"{row['arrays']} + {row['gradients']}"
        figures = [f"{row[way] * 1e6:14.1f}" for way in _WAYS]
    else:
        arrays, figures = "", [f"{row[way]:14.2f}" for way in _WAYS]
    return f"{row['leaves']:6} {row['optimizer']:13}{arrays:>11}{''.join(figures)}"


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--leaves", nargs="+", type=positive_integer, default=[8, 32])
    parser.add_argument("--repeats", type=positive_integer, default=25)
    parser.add_argument("--wall", action="store_true", help="wall time")
    parser.add_json()
    settings = parser.parse_args()
    clock = time.perf_counter if settings.wall else time.thread_time
    kind = jax.devices()[0].device_kind
    there = versions("jax", "jaxlib", "equinox", "optax", "flashquinox")
    print(f"{kind}, " + ", ".join(f"{k} {v}" for k, v in there.items()) + "; µs")
    print(f"{'leaves':>6} {'':13}{'arrays':>11}" + "".join(f"{x:>14}" for x in _WAYS))
    rows = []
    for leaves in settings.leaves:
        for row in measure(leaves, Plan(settings.repeats, 0.02), clock):
            rows.append(row)
            print(line(row), flush=True)
    write_json(settings.json, device=kind, versions=there, rows=rows)


if __name__ == "__main__":
    run_main(main)
