"""What does learned companding cost?

A step of AdamW with `moments="learned"` begins with a fit of the curves, if one is due.
Its time is that of a step with a fit less that of a step without. From step 128 on, one
is due every 64 steps: the last column is the time of a fit over that of 64 steps.

    python benchmarks/learning.py
"""

import argparse
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from _command_line import (
    Parser,
    positive,
    positive_integer,
    run_main,
    some_of,
    versions,
    write_json,
)
from _models import gpt2, llama, Shapes
from _timing import Plan, time_loop

import flashquinox as fq


# Steps between fits, in the long run; and a step with a fit, and one without.
INTERVAL, WITH_FIT, WITHOUT_FIT = 64, 640, 641
MODELS: dict[str, Shapes] = {"gpt2": gpt2(), "llama": llama()}


def measure(shapes: Shapes, plan: Plan) -> dict[str, float]:
    optim = fq.adamw(1e-4, moments="learned")
    filled = lambda value: {
        name: jnp.full(shape, value, jnp.bfloat16) for name, shape in shapes.items()
    }
    seconds = {}
    for count in (WITH_FIT, WITHOUT_FIT):

        def step(carry: Any, grads: Any, count: int = count) -> Any:
            params, state = carry
            state = optax.tree.set(state, count=jnp.int32(count))
            return optim.step(params, state, grads)

        params, grads = filled(1.0), filled(1e-3)
        carry = params, jax.jit(optim.init)(params)
        timing, _ = time_loop(plan, step, carry, grads)
        seconds[count] = timing.median
    fit = seconds[WITH_FIT] - seconds[WITHOUT_FIT]
    return {
        "step seconds": seconds[WITHOUT_FIT],
        "fit seconds": fit,
        "share": fit / (INTERVAL * seconds[WITHOUT_FIT]),
    }


def main() -> None:
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models",
        type=partial(some_of, MODELS),
        default=["gpt2"],
        help=f"comma-separated; of {', '.join(MODELS)} (default: gpt2)",
    )
    parser.add_argument(
        "--repeats", type=positive_integer, default=7, help="(default: 7)"
    )
    parser.add_argument(
        "--seconds", type=positive, default=2.0, help="of a repeat (default: 2)"
    )
    parser.add_json()
    arguments = parser.parse_args()
    (device, *_) = jax.devices()
    there = versions("jax", "jaxlib", "flashquinox")
    print(f"{device.device_kind};", ", ".join(f"{k} {v}" for k, v in there.items()))
    print(f"{'':8}{'step':>12}{'fit':>12}{'of all steps':>14}")
    rows = []
    for model in arguments.models:
        plan = Plan(arguments.repeats, arguments.seconds)
        row: dict[str, Any] = {"model": model} | measure(MODELS[model], plan)
        rows.append(row)
        print(
            f"{model:8}{1e3 * row['step seconds']:9.3f} ms"
            f"{1e3 * row['fit seconds']:9.3f} ms{row['share']:14.2%}",
            flush=True,
        )
    write_json(
        arguments.json,
        device=device.device_kind,
        versions=there,
        rows=rows,
    )


if __name__ == "__main__":
    run_main(main)
