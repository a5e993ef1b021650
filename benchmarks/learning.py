"""What does learned companding cost?

Steps of AdamW, alone, in one run:

- default: the codec that is the default;
- fixed: the curves that learned ones begin with, which do not learn;
- learned: the same, with a parameter in the state, between fits;
- fit: a step that begins with a fit of the parameters, less one that does not.

The cost of learning is what "learned" takes more than "fixed", and its fits: one every
4 steps up to step 32, every 16 up to step 128, and every 64 from then on. The last
columns are that cost, in units of a "fixed" step: over the first 1000 steps, and in the
long run.

    python benchmarks/learning.py
"""

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
from flashquinox._backends.learning import is_due


# Steps with a fit and without one, in the long run.
WITH_FIT, WITHOUT_FIT = 640, 641
FIRST_STEPS, LATER_STEPS = range(1000), range(6400, 12800)
MODELS: dict[str, Shapes] = {"gpt2": gpt2(), "llama": llama()}


def fixed_curves() -> fq.MomentCodecs:
    """Those of `"learned"`, where they begin."""
    learned = fq.MomentCodecs.named("learned")

    def fixed(codec: Any) -> fq.CompandedCodec:
        curve = fq.RationalCurve(codec.curve.a, codec.curve.root)
        return fq.CompandedCodec(codec.kind, curve)

    return fq.MomentCodecs(fixed(learned.signed), fixed(learned.nonnegative))


def seconds_of_step(
    shapes: Shapes, moments: str | fq.MomentCodecs, count: int, plan: Plan
) -> float:
    optim = fq.adamw(1e-4, storage=fq.Storage(moments=moments))

    # The number of the step is an operand: of a constant, the compiler would know
    # whether a fit is due.
    def step(carry: Any, grads: Any, count: jax.Array) -> Any:
        params, state = carry
        return optim.step(params, optax.tree.set(state, count=count), grads)

    filled = lambda value: {
        name: jnp.full(shape, value, jnp.bfloat16) for name, shape in shapes.items()
    }
    params, grads = filled(1.0), filled(1e-3)
    carry = params, jax.jit(optim.init)(params)
    timing, _ = time_loop(plan, step, carry, grads, jnp.int32(count))
    return timing.median


def measure(shapes: Shapes, plan: Plan) -> dict[str, float]:
    seconds = {
        name: seconds_of_step(shapes, moments, count, plan)
        for name, moments, count in (
            ("default", "flashquinox", WITHOUT_FIT),
            ("fixed", fixed_curves(), WITHOUT_FIT),
            ("learned", "learned", WITHOUT_FIT),
            ("with a fit", "learned", WITH_FIT),
        )
    }
    seconds["fit"] = seconds["with a fit"] - seconds["learned"]

    def cost(steps: range) -> float:
        fits = sum(bool(is_due(jnp.int32(step))) for step in steps) / len(steps)
        more = seconds["learned"] - seconds["fixed"] + fits * seconds["fit"]
        return more / seconds["fixed"]

    costs = {"first 1000 steps": cost(FIRST_STEPS), "long run": cost(LATER_STEPS)}
    return {f"{name} seconds": x for name, x in seconds.items()} | costs


def main() -> None:
    parser = Parser(__doc__)
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
    columns = ("default", "fixed", "learned", "fit")
    costs = ("first 1000 steps", "long run")
    print(f"{'ms':8}" + "".join(f"{x:>10}" for x in columns), *costs, sep="  ")
    rows = []
    for model in arguments.models:
        plan = Plan(arguments.repeats, arguments.seconds)
        row: dict[str, Any] = {"model": model} | measure(MODELS[model], plan)
        rows.append(row)
        print(
            f"{model:8}"
            + "".join(f"{1e3 * row[f'{x} seconds']:10.3f}" for x in columns),
            *(f"{row[name]:{len(name)}.2%}" for name in costs),
            sep="  ",
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
