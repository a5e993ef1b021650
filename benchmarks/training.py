"""How long does a whole training step take, and how much memory?

GPT-2 124M (148 leaves) in Equinox, on batches of 8 windows of 1024 tokens, in bfloat16:
forward pass, backward pass, and AdamW,

- of flashquinox: bfloat16 weights with corrections, and 8-bit moments;
- of optax: float32 master weights and moments. Every step makes a bfloat16 copy of the
  weights, and differentiates by that.

Every contender runs in a process of its own, its steps in a loop inside of one compiled
program. Columns:

- ms: milliseconds for a step: the median of the repeats;
- ratio: that, over optax's;
- state: gigabytes of weights and state between steps;
- peak: gigabytes in use at most, as the device's allocator counts them (none on CPUs);
- temp: gigabytes that the compiled step takes beside weights, state and batch.
"""

import argparse
import dataclasses
import os
import sys
from typing import Any


os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from _command_line import (
    in_few_words,
    Parser,
    positive,
    positive_integer,
    run_main,
    versions,
    write_json,
)
from _gpt import GPT, loss
from _process import in_process
from _timing import Plan, time_loop

import flashquinox as fq


OURS, REFERENCE = "flashquinox", "optax, float32 master weights"
LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.01


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained. The vocabulary is GPT-2's."""

    width: int
    layers: int
    batch: int
    context: int
    vocabulary: int = 50257


def measure(contender: str, task: Task, plan: Plan) -> dict[str, Any]:
    """One contender. To be called in a process of its own."""
    (device, *_) = jax.devices()
    model_key, batch_key = jax.random.split(jax.random.key(0))
    model = GPT(
        task.width,
        task.layers,
        heads=max(1, task.width // 64),
        vocabulary=task.vocabulary,
        context=task.context,
        tied_head=True,
        key=model_key,
    )
    master, static = eqx.partition(model, eqx.is_inexact_array)
    del model
    shape = task.batch, task.context + 1
    batch = jax.random.randint(batch_key, shape, 0, task.vocabulary, jnp.int32)

    def gradient(weights: Any, batch: jax.Array) -> tuple[jax.Array, Any]:
        of_weights = lambda weights: loss(eqx.combine(weights, static), batch)
        return jax.value_and_grad(of_weights)(weights)

    if contender == OURS:
        optim = fq.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        weights, state = jax.jit(lambda master: fq.prepare(master, optim))(master)

        def step(carry: Any, batch: jax.Array) -> Any:
            weights, state, _ = carry
            value, grads = gradient(weights, batch)
            return *optim.step(weights, state, grads), value

    else:
        weights = master
        reference = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        state = jax.jit(reference.init)(weights)

        def step(carry: Any, batch: jax.Array) -> Any:
            weights, state, _ = carry
            value, grads = gradient(_cast(weights, jnp.bfloat16), batch)
            grads = _cast(grads, jnp.float32)
            updates, state = reference.update(grads, state, weights)
            return optax.apply_updates(weights, updates), state, value

    carry = weights, state, jnp.zeros(())
    del master, weights, state
    parameters = sum(x.size for x in jtu.tree_leaves(carry[0]))
    size = sum(x.size * x.dtype.itemsize for x in jtu.tree_leaves(carry))
    compiled = jax.jit(step, donate_argnums=0).lower(carry, batch).compile()
    memory: Any = compiled.memory_analysis()
    timing, carry = time_loop(plan, step, carry, batch)
    in_use = device.memory_stats() or {}
    return {
        "contender": contender,
        **dataclasses.asdict(timing),
        "parameters": parameters,
        "bytes": size,
        "peak bytes": in_use.get("peak_bytes_in_use"),
        "temporary bytes": memory.temp_size_in_bytes,
        "loss": float(carry[2]),
        "device": device.device_kind,
    }


def _cast(tree: Any, dtype: Any) -> Any:
    return jtu.tree_map(lambda x: x.astype(dtype), tree)


def print_rows(rows: list[dict[str, Any]]) -> None:
    print(f"{'':32}{'ms':>8}{'ratio':>7}{'state':>7}{'peak':>7}{'temp':>7}{'loss':>7}")
    reference = next(row for row in rows if row["contender"] == REFERENCE)
    for row in rows:
        peak = row["peak bytes"]
        print(
            f"{row['contender']:32}{1e3 * row['median']:8.2f}"
            f"{row['median'] / reference['median']:7.3f}{row['bytes'] / 1e9:7.2f}"
            f"{'-' if peak is None else f'{peak / 1e9:.2f}':>7}"
            f"{row['temporary bytes'] / 1e9:7.2f}{row['loss']:7.2f}"
        )


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    for name, default in (
        ("width", 768),
        ("layers", 12),
        ("batch", 8),
        ("context", 1024),
        ("repeats", 7),
    ):
        parser.add_argument(
            f"--{name}",
            type=positive_integer,
            default=default,
            help=f"(default: {default})",
        )
    parser.add_argument(
        "--seconds", type=positive, default=2.0, help="of a repeat (default: 2)"
    )
    parser.add_json()
    arguments = parser.parse_args()
    if arguments.width % 64 != 0:
        parser.error("--width must be a multiple of 64, the width of a head")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    task = Task(arguments.width, arguments.layers, arguments.batch, arguments.context)
    plan = Plan(arguments.repeats, arguments.seconds)
    try:
        rows = [in_process(measure, name, task, plan) for name in (OURS, REFERENCE)]
    # Out of memory, above all.
    except jax.errors.JaxRuntimeError as error:
        sys.exit(in_few_words(error))
    there = versions("jax", "jaxlib", "optax", "equinox", "flashquinox")
    print(f"{rows[0]['device']};", ", ".join(f"{k} {v}" for k, v in there.items()))
    print(f"{rows[0]['parameters'] / 1e6:.1f} million parameters")
    print_rows(rows)
    write_json(
        arguments.json,
        versions=there,
        task=dataclasses.asdict(task),
        rows=rows,
    )


if __name__ == "__main__":
    run_main(main)
