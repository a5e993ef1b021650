"""State in host memory: how fast do steps stream it, and what fits?

Parts, each in a process of its own:

- `rate`: AdamW on a billion parameters. The bytes of the state over the time of a step,
  which moves them in both directions at once; beside them, what `jax.device_put` copies
  in one direction, and in both at once. The bytes on the device between steps.
- `optax`: the same steps by Optax in the usual way: its float32 state is in host
  memory, and each step copies it to the device and back.
- `equal`: 20 steps of AdamW, Lion, SGD and Muon beside the same ones with the state on
  the device: how many arrays differ in any bit.
- `8B`, `8B-4x4096`: Llama-3.1-8B's shapes with gradient release, on one window of
  2048 tokens and on four of 4096: peak of device memory, seconds a step, losses.
  `8B-device`, `8B-4x4096-device`: the same with the state on the device.
- `30B`: 60 layers of width 6656, on 1024 tokens. It needs 113 GB of host memory, and
  `XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB=96`, which this program sets.

Random weights and tokens; the same batch in every step.

    python benchmarks/offload.py
    python benchmarks/offload.py --parts 8B --steps 20 --json out.json
    python benchmarks/offload.py --small
"""

import dataclasses
import gc
import os
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import BrokenExecutor
from functools import partial
from typing import Any


os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# JAX takes three quarters of the device's memory at most, unless it is told otherwise.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
os.environ.setdefault("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "96")

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
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


AWAY: dict[str, Any] = {"state_memory": "pinned_host"}
THIRTY = Sizes(60, 6656, 16384, 52, 52, 32000)
SMALL = Sizes(2, 256, 512, 4, 4, 512)


#
# A billion parameters
#


def rate(small: bool, steps: int) -> dict[str, Any]:
    shape, number = ((256, 256), 2) if small else ((8192, 8192), 15)
    optim = fq.adamw(1e-3, weight_decay=0.01, **AWAY)
    weights = _weights(shape, number)
    state = jax.block_until_ready(optim.init(weights))
    at_rest = _device_bytes((weights, state))
    gc.collect()
    in_use = _memory_stats().get("bytes_in_use")
    grads = jtu.tree_map(lambda x: x * jnp.bfloat16(0.01), weights)
    seconds, facts, _ = _time(jax.jit(optim.step, donate_argnums=(0, 1)), steps)(
        weights, state, grads
    )
    parameters = shape[0] * shape[1] * number
    moved = _host_bytes(state)
    return {
        "parameters": parameters,
        "state bytes in host memory": moved,
        "device bytes per parameter at rest": at_rest / parameters,
        "allocated device bytes per parameter at rest": in_use and in_use / parameters,
        "seconds": seconds,
        "GB/s each way": moved / seconds / 1e9,
        **facts,
        **_copy_rates(2**16 if small else 2**29),
    }


def usual_way(small: bool, steps: int) -> dict[str, Any]:
    shape, number = ((256, 256), 2) if small else ((8192, 8192), 15)
    optim = optax.adamw(1e-3, weight_decay=0.01)
    device = jax.devices()[0]
    there, here = (
        jax.sharding.SingleDeviceSharding(device, memory_kind=kind)
        for kind in ("pinned_host", "device")
    )
    weights = _weights(shape, number)
    away = lambda x: jax.device_put(x, there)
    masters = jtu.tree_map(lambda x: away(x.astype(jnp.float32)), weights)
    state = jtu.tree_map(
        lambda x: (
            away(np.zeros(x.shape, x.dtype)) if x.ndim else jnp.zeros((), x.dtype)
        ),
        jax.eval_shape(optim.init, jtu.tree_map(_float32, weights)),
    )
    is_away = jtu.tree_map(lambda x: x.ndim > 0, (masters, state))

    def step(weights: Any, kept: Any, grads: Any) -> Any:
        masters, state = jtu.tree_map(
            lambda x, is_away: (
                jax.device_put(x, jax.memory.Space.Device) if is_away else x
            ),
            kept,
            is_away,
        )
        wide = jtu.tree_map(lambda x: x.astype(jnp.float32), grads)
        updates, state = optim.update(wide, state, masters)
        masters = optax.apply_updates(masters, updates)
        weights = jtu.tree_map(lambda x: x.astype(jnp.bfloat16), masters)
        kept = jtu.tree_map(
            lambda x, is_away: (
                jax.device_put(x, jax.memory.Space.Host) if is_away else x
            ),
            (masters, state),
            is_away,
        )
        return weights, kept

    grads = jtu.tree_map(lambda x: x * jnp.bfloat16(0.01), weights)
    kept = (masters, state)
    moved = _host_bytes(kept)
    outs = (
        jtu.tree_map(lambda _: here, weights),
        jtu.tree_map(lambda x: there if x else here, is_away),
    )
    compiled = jax.jit(step, donate_argnums=(0, 1), out_shardings=outs)
    seconds, facts, _ = _time(compiled, steps)(weights, kept, grads)
    parameters = shape[0] * shape[1] * number
    return {
        "parameters": parameters,
        "state bytes in host memory": moved,
        "seconds": seconds,
        "GB/s each way": moved / seconds / 1e9,
        **facts,
    }


def _float32(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, jnp.float32)


def _weights(shape: tuple[int, int], number: int) -> list[Any]:
    draw = jax.jit(lambda key: jax.random.normal(key, shape, jnp.bfloat16) * 0.02)
    return [draw(key) for key in jax.random.split(jax.random.key(0), number)]


def _copy_rates(size: int) -> dict[str, float]:
    device = jax.devices()[0]
    here, there = (
        jax.sharding.SingleDeviceSharding(device, memory_kind=kind)
        for kind in ("device", "pinned_host")
    )
    x = jax.device_put(np.ones(size, np.int8), there)
    y = jax.device_put(np.ones(size, np.int8), here)
    into = lambda: jax.device_put(x, here)
    out = lambda: jax.device_put(y, there)
    both = lambda: (into(), out())
    found = {}
    for name, copy in (("in", into), ("out", out), ("both at once", both)):
        seconds = []
        for _ in range(8):
            start = time.perf_counter()
            jax.block_until_ready(copy())
            seconds.append(time.perf_counter() - start)
        rate = size / statistics.median(seconds[2:]) / 1e9
        found[f"device_put GB/s, {name}"] = rate
    return found


#
# The same bits
#


def equal(small: bool, steps: int) -> dict[str, Any]:
    side = 256 if small else 2048
    shapes = {
        "stack": (8, side, side // 2),
        "odd": (3, 37, side),
        "long": (2**16 + 5,),
        "bias": (side,),
    }
    keys = jax.random.split(jax.random.key(0), len(shapes))
    pairs = zip(shapes.items(), keys, strict=True)
    weights = {
        name: jax.random.normal(key, shape, jnp.bfloat16) * 0.02
        for (name, shape), key in pairs
    }
    optimizers: dict[str, Callable[..., fq.Optimizer]] = {
        "adamw": partial(fq.adamw, 1e-3, weight_decay=0.01),
        "lion": partial(fq.lion, 1e-4, weight_decay=0.01),
        "sgd": partial(fq.sgd, 1e-2, momentum=0.9),
        "muon": partial(fq.muon, 1e-3),
    }
    differing = {}
    for name, make in optimizers.items():
        ends = []
        for options in ({}, AWAY):
            optim = make(**options)
            model, state = weights, optim.init(weights)
            step = jax.jit(optim.step, donate_argnums=1)
            for i in range(2 if small else 20):
                model, state = step(model, state, _grads(weights, i))
            ends.append([np.asarray(x) for x in jtu.tree_leaves((model, state))])
        pairs = zip(*ends, strict=True)
        differing[name] = sum(x.tobytes() != y.tobytes() for x, y in pairs)
    return {"differing arrays": differing}


@jax.jit
def _grads(weights: Any, number: Any) -> Any:
    draw = lambda x: 0.01 * jax.random.normal(jax.random.key(number), x.shape, x.dtype)
    return jtu.tree_map(draw, weights)


#
# Llamas
#


def llama(
    sizes: Sizes, batch: int, window: int, options: Any, small: bool, steps: int
) -> dict[str, Any]:
    if small:
        sizes, window = SMALL, 16
    optim = fq.adamw(1e-5, weight_decay=0.01, **options)
    make = lambda key: Llama(sizes, key, jnp.bfloat16)
    model = jax.block_until_ready(jax.jit(make)(jax.random.key(0)))
    start = time.perf_counter()
    state = jax.block_until_ready(optim.init(model))
    seconds_of_init = time.perf_counter() - start
    tokens = jax.random.randint(
        jax.random.key(1), (batch, window + 1), 0, sizes.vocabulary
    )
    parameters = sum(x.size for x in jtu.tree_leaves(model))
    at_rest, away = _device_bytes((model, state)), _host_bytes(state)
    step = jax.jit(
        lambda model, state, batch: fq.release_step(optim, loss, model, state, batch),
        donate_argnums=(0, 1),
    )
    seconds, facts, losses = _time(step, steps)(model, state, tokens)
    return {
        "parameters": parameters,
        "device bytes at rest": at_rest,
        "host bytes": away,
        "seconds": seconds,
        "seconds of init": seconds_of_init,
        "losses": losses,
        **facts,
    }


#
# Measuring
#


def _time(step: Any, steps: int) -> Callable[..., Any]:
    """The median of the seconds of all steps but the first two, what the compiler
    tells, and the losses, if there are any."""

    def run(model: Any, state: Any, operand: Any) -> Any:
        start = time.perf_counter()
        compiled = step.lower(model, state, operand).compile()
        compile_seconds = time.perf_counter() - start
        seconds, losses = [], []
        for _ in range(max(3, steps)):
            start = time.perf_counter()
            model, state, *value = compiled(model, state, operand)
            jax.block_until_ready((model, state))
            seconds.append(time.perf_counter() - start)
            losses += [float(x) for x in value]
        analysis = compiled.memory_analysis()
        facts = {
            "seconds to trace and compile": compile_seconds,
            "seconds of all steps": seconds,
            "temporary bytes": analysis.temp_size_in_bytes,
            "temporary host bytes": analysis.host_temp_size_in_bytes,
            "peak device bytes": _memory_stats().get("peak_bytes_in_use"),
        }
        return statistics.median(seconds[2:]), facts, losses

    return run


def _device_bytes(tree: Any) -> int:
    return sum(x.nbytes for x in jtu.tree_leaves(tree) if not _is_away(x))


def _host_bytes(tree: Any) -> int:
    return sum(x.nbytes for x in jtu.tree_leaves(tree) if _is_away(x))


def _is_away(x: Any) -> bool:
    return x.sharding.memory_kind == "pinned_host"


def _memory_stats() -> dict[str, int]:
    return jax.devices()[0].memory_stats() or {}


PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "rate": rate,
    "optax": usual_way,
    "equal": equal,
    "8B": partial(llama, SIZES["8B"], 1, 2048, AWAY),
    "8B-device": partial(llama, SIZES["8B"], 1, 2048, {}),
    "8B-4x4096": partial(llama, SIZES["8B"], 4, 4096, AWAY),
    "8B-4x4096-device": partial(llama, SIZES["8B"], 4, 4096, {}),
    "30B": partial(llama, THIRTY, 1, 1024, AWAY),
}


def measure(part: str, small: bool, steps: int) -> dict[str, Any]:
    device = jax.devices()[0].device_kind
    return PARTS[part](small, steps) | {"device": device} | _host_peak()


def _host_peak() -> dict[str, int]:
    """The largest memory that this process has had, pinned memory included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak bytes of the process": peak * 1024}


def print_part(name: str, found: dict[str, Any], indent: str = "") -> None:
    print(f"{indent}{name}", flush=True)
    for key, value in found.items():
        if isinstance(value, dict):
            print_part(key, value, indent + "  ")
        elif isinstance(value, list):
            shown = ", ".join(f"{x:.3f}" for x in value)
            print(f"{indent}  {key}: {shown}", flush=True)
        else:
            shown = f"{value:,.3f}" if isinstance(value, float) else f"{value}"
            shown = f"{value:,}" if isinstance(value, int) else shown
            print(f"{indent}  {key}: {shown}", flush=True)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "--parts",
        type=partial(some_of, PARTS),
        default=list(PARTS),
        help=f"comma-separated; of {', '.join(PARTS)} (default: all)",
    )
    parser.add_argument(
        "--steps", type=positive_integer, default=20, help="to take (default: 20)"
    )
    parser.add_argument(
        "--small", action="store_true", help="small shapes, to try the program"
    )
    parser.add_json()
    arguments = parser.parse_args()
    there = versions("jax", "jaxlib", "optax", "equinox", "flashquinox")
    print(", ".join(f"{k} {v}" for k, v in there.items()))
    parts = {}
    for part in arguments.parts:
        try:
            parts[part] = in_process(measure, part, arguments.small, arguments.steps)
        # Out of memory, above all: of the device, or of the host, which ends a process.
        except (jax.errors.JaxRuntimeError, MemoryError, BrokenExecutor) as error:
            parts[part] = {"error": in_few_words(error)}
        print_part(part, parts[part])
    write_json(
        arguments.json,
        versions=there,
        sizes={
            "8B": dataclasses.asdict(SIZES["8B"]),
            "30B": dataclasses.asdict(THIRTY),
        },
        steps=arguments.steps,
        small=arguments.small,
        parts=parts,
    )


if __name__ == "__main__":
    run_main(main)
