"""What do sums of gradients and averages of weights in few bytes cost, and how exact
are they?

`--parts time` (a GPU, say): the leaves of a Llama 3.2 1B, or of so many layers of it,
in bfloat16, with AdamW. Printed for each way to accumulate gradients:

- state: bytes per parameter beside those of the weights and of AdamW;
- temporaries: bytes per parameter that a call needs, as the compiler counts them;
- gradient: milliseconds of a call that takes no step, and GB/s of what it has to read
  and write: the gradient, and the sum twice;
- last: milliseconds of a call that takes a step;

and likewise of one update of an average of the weights.

`--parts precision` (a CPU will do): the error of sums of 64 gradients, relative to the
largest sum on the way, and of their mean relative to the largest gradient; and of
averages of weights that drift and shake, relative to their way from the first weights,
beside a float32 average. The bfloat16 average is `optax.incremental_update`'s.

    python benchmarks/accumulation.py --parts time --json results.json
    python benchmarks/accumulation.py --parts precision
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
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
from _models import llama
from _timing import Plan, Program

import flashquinox as fq


# A step is never taken, or in each call.
_NEVER, _ALWAYS = 2**30, 1


#
# Time
#


def accumulating() -> dict[str, tuple[float, Callable[[int], Any]]]:
    """The bytes of a sum, and an optimizer that takes a step for so many gradients."""
    multi_steps = lambda dtype: (
        lambda every: optax.MultiSteps(fq.adamw(1e-3), every, accumulator_dtype=dtype)
    )
    ours = lambda bits: lambda every: fq.accumulate(fq.adamw(1e-3), every, bits=bits)
    return {
        "accumulate, 24 bits": (3, ours(24)),
        "accumulate, 16 bits": (2.0625, ours(16)),
        "accumulate, 32 bits": (4, ours(32)),
        "MultiSteps, float32": (4, multi_steps(jnp.float32)),
        "MultiSteps, bfloat16": (2, multi_steps(jnp.bfloat16)),
    }


def step(optim: Any, carry: Any, grads: Any) -> Any:
    model, state = carry
    if hasattr(optim, "step"):
        return optim.step(model, state, grads)
    updates, state = optim.update(grads, state, model)
    return optax.apply_updates(model, updates), state


def timed(plan: Plan, function: Callable, carry: Any, operand: Any) -> dict[str, float]:
    structs = jax.eval_shape(lambda: (carry(), operand()))
    program = Program(function, *structs, alone=False)
    program.carry, program.operands = jax.jit(carry)(), (jax.jit(operand)(),)
    timing = plan.measure(program.run)
    program.close()
    return program.facts | {"milliseconds": 1e3 * timing.median}


def time_all(settings: argparse.Namespace) -> Iterator[dict[str, Any]]:
    shapes = llama(layers=settings.layers)
    parameters = sum(int(np.prod(shape)) for shape in shapes.values())
    plan = Plan(settings.repeats, settings.seconds)
    ones = lambda: {k: jnp.ones(shape, jnp.bfloat16) for k, shape in shapes.items()}
    # Otherwise XLA knows what is added.
    grads = lambda: jtu.tree_map(lambda x: 1e-3 * x, ones())
    start = lambda optim: lambda: (ones(), optim.init(ones()))

    def row(name: str, size: float, found: Any, moved: float, last: Any = None) -> Any:
        per_second = moved * parameters / found["milliseconds"] / 1e6
        return {
            "name": name,
            "parameters": parameters,
            "state bytes per parameter": size,
            "temporary bytes per parameter": found["temporary bytes"] / parameters,
            "milliseconds": found["milliseconds"],
            "GB per second": per_second,
            "milliseconds of the last": None if last is None else last["milliseconds"],
        }

    plain = fq.adamw(1e-3)
    alone = timed(plan, partial(step, plain), start(plain), grads)
    # Weights, corrections and codes are read and written; scales too.
    yield row("a step alone", 0, alone, 2 + 2 * 5.125)
    for name, (size, make) in accumulating().items():
        found, last = (
            timed(plan, partial(step, make(every)), start(make(every)), grads)
            for every in (_NEVER, _ALWAYS)
        )
        yield row(name, size, found, 2 + 2 * size, last)

    ema = fq.ema(0.999)
    average = lambda: ema.init(*start(plain)())
    update = lambda average, of: ema.update(average, *of)
    found = timed(plan, update, average, start(plain))
    yield row("ema, 24 bits", 3, found, 3 + 2 * 3)
    wide = lambda: jtu.tree_map(lambda x: x.astype(jnp.float32), ones())
    update = lambda average, of: optax.incremental_update(
        fq.master_weights(*of), average, 0.001
    )
    found = timed(plan, update, wide, start(plain))
    yield row("incremental_update, float32", 4, found, 3 + 2 * 4)


def print_time(row: dict[str, Any]) -> None:
    last = row["milliseconds of the last"]
    print(
        f"{row['name']:28}{row['state bytes per parameter']:6.2f}"
        f"{row['temporary bytes per parameter']:12.3f}{row['milliseconds']:11.3f}"
        f"{row['GB per second']:9.0f}{'' if last is None else f'{last:10.3f}'}",
        flush=True,
    )


#
# Precision
#


def sums(settings: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Sums of 64 gradients."""
    normal = jax.random.normal(jax.random.key(0), (64, settings.elements))
    # Of each group of 32, all but the first are the smaller ones.
    beside = lambda size: jnp.where(jnp.arange(settings.elements) % 32 == 0, 1, size)
    kinds = {
        "of either sign": (normal, 1.0),
        "of one sign": (jnp.abs(normal), 1.0),
        "of a large mean": (normal + 4, 1.0),
        "1e-3 of the largest": (normal * beside(1e-3), 1e-3),
        "1e-5 of the largest": (normal * beside(1e-5), 1e-5),
        "1e-7 of the largest": (normal * beside(1e-7), 1e-7),
    }
    model = jnp.zeros(settings.elements, jnp.bfloat16)
    for bits in (24, 16):
        optim = fq.accumulate(fq.sgd(1.0), _NEVER, bits=bits)
        add = lambda state, x, optim=optim: (optim.step(model, state, x)[1], None)
        run = jax.jit(partial(jax.lax.scan, add))
        for kind, (grads, size) in kinds.items():
            grads = grads.astype(jnp.bfloat16)
            state, _ = run(optim.init(model), grads)
            counted = np.arange(settings.elements) % 32 > 0 if size < 1 else slice(None)
            exact = np.cumsum(np.asarray(grads, np.float64), 0)[:, counted]
            error = np.asarray(decoded(state), np.float64)[counted] - exact[-1]
            largest = np.abs(np.asarray(grads, np.float64))[:, counted].max()
            relative = error / np.abs(exact).max(0)
            yield {
                "bits": bits,
                "gradients": kind,
                "root mean square, of the sum": float(np.sqrt(np.mean(relative**2))),
                "largest, of the sum": float(np.abs(relative).max()),
                "largest, of the mean": float(np.abs(error).max() / 64 / largest),
            }


def decoded(state: fq.AccumulationState) -> Any:
    """The sum of a model that is one array, of which 2^-16 is stored."""
    if isinstance(state.sums, fq.QuantMoment):
        return 2**16 * state.sums.decode()
    return 2**16 * fq.ECCWeight(state.sums, state.corrections).decode()


def print_sums(row: dict[str, Any]) -> None:
    power = lambda name: f"2^{np.log2(row[name]):.1f}"
    names = ("root mean square, of the sum", "largest, of the sum")
    cells = [power(name) for name in (*names, "largest, of the mean")]
    print(
        f"{row['bits']} bits, {row['gradients']:20}{''.join(f'{x:>12}' for x in cells)}"
    )


def averages(settings: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Averages of weights that drift and shake."""
    for decay, steps, size in ((0.999, 200, 1e-4), (0.9999, 20_000, 1e-5)):
        start, found, wide, narrow = averaged(decay, steps, size, settings.elements)
        way = np.linalg.norm(wide - start)
        yield {
            "decay": decay,
            "steps": steps,
            "error of 24 bits, of the way": np.linalg.norm(found - wide) / way,
            "error of bfloat16, of the way": np.linalg.norm(narrow - wide) / way,
            "bfloat16 elements that moved": np.mean(narrow != start),
        }


def averaged(decay: float, steps: int, size: float, elements: int) -> list[np.ndarray]:
    """The first weights; their average in 24 bits, in float32 and in bfloat16."""
    first, drift, shake = jax.random.split(jax.random.key(1), 3)
    start = jax.random.normal(first, (elements,)).astype(jnp.bfloat16)
    along = size * jax.random.normal(drift, start.shape)
    optim, ema = fq.add_updates(), fq.ema(decay)

    def move(carry: Any, key: Any) -> Any:
        model, state, average, wide, narrow = carry
        way = along + 3 * size * jax.random.normal(key, along.shape)
        model, state = optim.step(model, state, way)
        average = ema.update(average, model, state)
        share = (1 - decay) / (1 - jnp.exp(average.count * np.log(decay)))
        wide = wide + share * (fq.master_weights(model, state) - wide)
        narrow = optax.incremental_update(model, narrow, 1 - decay)
        return (model, state, average, wide, narrow), None

    state = optim.init(start)
    carry = start, state, ema.init(start, state), jnp.zeros_like(along), start
    run = jax.jit(partial(jax.lax.scan, move))
    (model, _, average, wide, narrow), _ = run(carry, jax.random.split(shake, steps))
    found = ema.master_weights(average, model)
    return [np.asarray(x, np.float64) for x in (start, found, wide, narrow)]


def print_averages(row: dict[str, Any]) -> None:
    print(
        f"{row['decay']}, {row['steps']} steps: 24 bits "
        f"{row['error of 24 bits, of the way']:.4f} of the way, bfloat16 "
        f"{row['error of bfloat16, of the way']:.4f}; of its elements, "
        f"{100 * row['bfloat16 elements that moved']:.1f}% moved"
    )


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    parts = partial(some_of, ("time", "precision"))
    add("--parts", type=parts, default=["time", "precision"], help="(both)")
    add("--layers", type=positive_integer, default=16, help="of the Llama (16)")
    add("--repeats", type=positive_integer, default=5, help="of each timing (5)")
    add("--seconds", type=positive, default=0.3, help="of each repeat (0.3)")
    add("--elements", type=positive_integer, default=16384, help="to sum (16384)")
    parser.add_json()
    return parser.parse_args()


def main() -> None:
    settings = parse_arguments()
    (device, *_) = jax.devices()
    there = versions("jax", "jaxlib", "optax") | {"flashquinox": fq.__version__}
    print(f"{device.device_kind};", ", ".join(f"{k} {v}" for k, v in there.items()))
    found: dict[str, list[Any]] = {}

    def report(name: str, rows: Iterator[dict[str, Any]], show: Callable) -> None:
        found[name] = []
        for row in rows:
            show(row)
            found[name].append(row)

    if "time" in settings.parts:
        print(f"{'':28} state  temporaries  gradient  GB/s      last")
        report("time", time_all(settings), print_time)
    if "precision" in settings.parts:
        print(f"{'':29}{'sum: rms':>12}{'largest':>12}{'mean':>12}")
        report("sums", sums(settings), print_sums)
        report("averages", averages(settings), print_averages)
    write_json(settings.json, device=device.device_kind, versions=there, **found)


if __name__ == "__main__":
    run_main(main)
