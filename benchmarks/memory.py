"""How many bytes does a training step take, with and without gradient release?

A Llama with stacked layers, whose blocks are computed again in the backward pass, on
one window of tokens, in bfloat16: forward pass, backward pass, and AdamW,

- of optax: float32 master weights and moments. Every step makes a bfloat16 copy of the
  weights, and differentiates by that;
- of flashquinox: bfloat16 weights with corrections, and 8-bit moments;
- the same with gradient release, `flashquinox.release_step`;
- the same with its state in host memory, on TPUs (`benchmarks/offload.py` has GPUs).

Columns, as the compiler of the platform counts them, in bytes per parameter:

- arguments: weights, state and batch;
- temp: what the step takes beside them: gradients, and activations;
- peak: both;
- host: what the step takes in host memory, beside the state that may be there.

Platforms are that of JAX, `cpu` or `gpu`, and those that the TPU compiler knows, which
needs no TPU: v4, v5e, v5p, v6e and tpu7x. "does not fit": the compiler found more than
the memory of one device.

With `--steps`, the model is made, with random weights, and trained for that many steps
on random tokens. Beside it are then the most that the device's allocator had given out
(none on CPUs), and the milliseconds of a step, the median of all but the first.

    python benchmarks/memory.py
    python benchmarks/memory.py --model 8B --window 2048 --contenders release \\
        --platforms gpu --steps 10
"""

import argparse
import dataclasses
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any


os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import _tpu
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from _command_line import (
    in_few_words,
    Parser,
    positive_integer,
    run_main,
    some_of,
    versions,
    write_json,
)
from _llama import Llama, loss, SIZES, Sizes
from _process import in_process

import flashquinox as fq


LEARNING_RATE, WEIGHT_DECAY = 1e-5, 0.01
CONTENDERS = {
    "optax": "optax, float32 master weights",
    "ordinary": "flashquinox",
    "release": "flashquinox, gradient release",
    "offload": "..., state in host memory",
}


@dataclasses.dataclass(frozen=True)
class Training:
    """How a contender begins, and its step: from what it keeps and a batch to what it
    keeps and the loss."""

    dtype: Any
    init: Callable[[Any], Any]
    step: Callable[[Any, Any, Any], tuple[Any, Any, Any]]


def training(contender: str, backend: Any) -> Training:
    reference = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    optim = fq.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY, backend=backend)

    def step_of_optax(model: Any, state: Any, batch: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(_cast(model, jnp.bfloat16), batch)
        grads = _cast(grads, jnp.float32)
        updates, state = reference.update(grads, state, model)
        return optax.apply_updates(model, updates), state, value

    def ordinary_step(model: Any, state: Any, batch: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(model, batch)
        return *optim.step(model, state, grads), value

    def step_with_release(model: Any, state: Any, batch: Any) -> Any:
        return fq.release_step(optim, loss, model, state, batch)

    return {
        "optax": Training(jnp.float32, reference.init, step_of_optax),
        "ordinary": Training(jnp.bfloat16, optim.init, ordinary_step),
        "release": Training(jnp.bfloat16, optim.init, step_with_release),
        "offload": Training(jnp.bfloat16, optim.init, step_with_release),
    }[contender]


def _cast(tree: Any, dtype: Any) -> Any:
    return jtu.tree_map(lambda x: x.astype(dtype), tree)


def measure(
    contender: str, platform: str, sizes: Sizes, batch: int, window: int, steps: int
) -> dict[str, Any]:
    """One contender. To be called in a process of its own."""
    for_tpu = platform in _tpu.TOPOLOGIES
    # A state that is made here has the groups of this platform by default.
    chosen = training(contender, "tpu" if for_tpu else "auto")
    if for_tpu:
        _tpu.set_up()
    make = lambda key: Llama(sizes, key, chosen.dtype)
    key = jax.eval_shape(lambda: jax.random.key(0))
    model = eqx.filter_eval_shape(make, key)
    state = jax.eval_shape(chosen.init, model)
    if contender == "offload":
        state = _tpu.on_host(platform, state)
    tokens = jax.ShapeDtypeStruct((batch, window + 1), jnp.int32)
    parameters = sum(x.size for x in jtu.tree_leaves(model))
    row: dict[str, Any] = {
        "contender": CONTENDERS[contender],
        "platform": platform,
        "parameters": parameters,
    }
    try:
        if for_tpu:
            with tempfile.TemporaryDirectory() as dump:
                compiled = _tpu.compile_for(
                    platform,
                    chosen.step,
                    model,
                    state,
                    tokens,
                    donate=(0, 1),
                    dump=pathlib.Path(dump),
                ).compiled
        else:
            step = jax.jit(chosen.step, donate_argnums=(0, 1))
            compiled = step.lower(model, state, tokens).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return row | {"fits": False}
    memory: Any = compiled.memory_analysis()
    row |= {
        "fits": True,
        "argument bytes": memory.argument_size_in_bytes,
        "temporary bytes": memory.temp_size_in_bytes,
        # Results that are no old arrays are among the temporaries on some platforms.
        "peak bytes": memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes),
        "host temporary bytes": memory.host_temp_size_in_bytes,
        "device": platform,
    }
    if for_tpu:
        return row
    (device, *_) = jax.devices()
    row["device"] = device.device_kind
    if steps == 0:
        return row
    return row | train(chosen, make, compiled, tokens, sizes.vocabulary, steps)


def train(
    chosen: Training,
    make: Callable,
    step: Callable,
    tokens: jax.ShapeDtypeStruct,
    vocabulary: int,
    steps: int,
) -> dict[str, Any]:
    model = jax.block_until_ready(jax.jit(make)(jax.random.key(0)))
    state = jax.block_until_ready(jax.jit(chosen.init)(model))
    batch = jax.random.randint(jax.random.key(1), tokens.shape, 0, vocabulary)
    losses, seconds = [], []
    for _ in range(steps):
        start = time.perf_counter()
        # The same batch each time: it can be learned.
        model, state, value = step(model, state, batch)
        losses.append(float(value))
        seconds.append(time.perf_counter() - start)
    in_use = jax.devices()[0].memory_stats() or {}
    return {
        "losses": losses,
        "milliseconds": 1e3 * statistics.median(seconds[1:] or seconds),
        "allocated bytes": in_use.get("peak_bytes_in_use"),
    }


def print_row(row: dict[str, Any]) -> None:
    start = f"{row['platform']:7}{row['contender']:32}"
    if not row["fits"]:
        print(f"{start}  does not fit", flush=True)
        return
    per_parameter = (
        f"{row[name] / row['parameters']:11.3f}"
        for name in (
            "argument bytes",
            "temporary bytes",
            "peak bytes",
            "host temporary bytes",
        )
    )
    line = start + "".join(per_parameter)
    if "losses" in row:
        allocated = row["allocated bytes"]
        line += f"{'-' if allocated is None else f'{allocated / 1e9:.2f} GB':>12}"
        line += f"{row['milliseconds']:9.1f} ms"
        line += f"   loss {row['losses'][0]:.2f} to {row['losses'][-1]:.2f}"
    print(line, flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    here = jax.default_backend()
    platforms = dict.fromkeys([here, *_tpu.TOPOLOGIES])
    parser.add_argument(
        "--model",
        choices=SIZES,
        default="1.2B",
        help="its size, in parameters (default: 1.2B)",
    )
    parser.add_argument(
        "--contenders",
        type=partial(some_of, CONTENDERS),
        default=list(CONTENDERS),
        help=f"comma-separated; of {', '.join(CONTENDERS)} (default: all)",
    )
    parser.add_argument(
        "--platforms",
        type=partial(some_of, platforms),
        default=[here, "v5e"],
        help=f"comma-separated; of {', '.join(platforms)} (default: {here},v5e)",
    )
    for name, default, text in (
        ("batch", 1, "windows"),
        ("window", 256, "tokens"),
    ):
        parser.add_argument(
            f"--{name}",
            type=positive_integer,
            default=default,
            help=f"{text} (default: {default})",
        )
    parser.add_argument(
        "--layers", type=positive_integer, help="instead of those of the model"
    )
    parser.add_argument(
        "--steps", type=positive_integer, default=0, help="to take (default: none)"
    )
    parser.add_json()
    arguments = parser.parse_args()
    return arguments


def main() -> None:
    arguments = parse_arguments()
    sizes = SIZES[arguments.model]
    if arguments.layers is not None:
        sizes = dataclasses.replace(sizes, layers=arguments.layers)
    there = versions("jax", "jaxlib", "libtpu", "optax", "equinox", "flashquinox")
    print(", ".join(f"{k} {v}" for k, v in there.items()))
    print(f"{'':39}{'arguments':>11}{'temp':>11}{'peak':>11}{'host':>11}")
    rows = []
    for platform in arguments.platforms:
        for contender in arguments.contenders:
            if contender == "offload" and platform not in _tpu.TOPOLOGIES:
                continue
            task = sizes, arguments.batch, arguments.window, arguments.steps
            try:
                rows.append(in_process(measure, contender, platform, *task))
            # Out of memory, above all.
            except jax.errors.JaxRuntimeError as error:
                sys.exit(in_few_words(error))
            print_row(rows[-1])
    print(f"{rows[0]['parameters'] / 1e9:.3f} billion parameters")
    write_json(
        arguments.json,
        versions=there,
        sizes=dataclasses.asdict(sizes),
        batch=arguments.batch,
        window=arguments.window,
        rows=rows,
    )


if __name__ == "__main__":
    run_main(main)
