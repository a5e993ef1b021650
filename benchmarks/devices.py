"""How much faster is a step of the optimizer on all devices than on one?

    python benchmarks/devices.py
    python benchmarks/devices.py --fake-devices 8 --sizes 1024 --models ''

Columns:

- one: seconds for a step with all weights on one device: the median of the repeats;
- all: with each matrix divided over all devices, rows or columns, as in fully sharded
  data parallelism;
- ratio: of the two. With n devices, 1/n is ideal;
- equal: whether weights and state are the same, bit for bit, after five steps.

Steps are of AdamW, on bfloat16 weights, alone: no model is run. Leaves are square
matrices, or those of GPT-2 124M or a Llama of 1.2 billion parameters.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from _command_line import (
    Parser,
    positive,
    positive_integer,
    run_main,
    sizes,
    some_of,
    versions,
    write_json,
)
from _models import count, gpt2, llama, Shapes
from _timing import Plan, time_loop
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import flashquinox as fq


MODELS: dict[str, Callable[[], Shapes]] = {"gpt2": gpt2, "llama": llama}


def divided(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """The last axis, or else the one before, in parts of whole groups. Other leaves are
    on every device."""
    spec: list[str | None] = [None] * len(shape)
    if len(shape) >= 2:
        axes = (i for i in (-1, -2) if shape[i] % (32 * mesh.size) == 0)
        for axis in list(axes)[:1]:
            spec[axis] = "fsdp"
    return NamedSharding(mesh, PartitionSpec(*spec))


def steps(plan: Plan, shapes: Shapes, mesh: Mesh) -> tuple[dict[str, float], Any]:
    """The timing on a mesh; and weights and state after five steps, on the host."""
    optim = fq.adamw(1e-3, weight_decay=0.01)
    shardings = {name: divided(mesh, shape) for name, shape in shapes.items()}

    def arrays(seed: int, size: float) -> dict[str, jax.Array]:
        keys = jax.random.split(jax.random.key(seed), len(shapes))
        return {
            name: jax.jit(
                lambda key, shape=shape: (size * jax.random.normal(key, shape)).astype(
                    jnp.bfloat16
                ),
                out_shardings=shardings[name],
            )(key)
            for key, (name, shape) in zip(keys, shapes.items(), strict=True)
        }

    params, grads = arrays(0, 0.02), arrays(1, 1e-3)

    def step(carry: Any, grads: Any) -> Any:
        params, state = carry
        return optim.step(params, state, grads)

    carry = params, optim.init(params)
    one_step = jax.jit(step, donate_argnums=0)
    for _ in range(5):
        carry = one_step(carry, grads)
    result = jtu.tree_map(
        np.asarray, (carry[0], carry[1].moments, carry[1].corrections)
    )
    timing, _ = time_loop(plan, step, carry, grads)
    return dataclasses.asdict(timing), result


def same_bits(ours: Any, theirs: Any) -> bool:
    pairs = zip(*map(jtu.tree_leaves, (ours, theirs)), strict=True)
    return all(x.tobytes() == y.tobytes() for x, y in pairs)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add(
        "--sizes",
        type=sizes,
        default=[8192, 16384],
        help="sides of square matrices (default: 8192,16384)",
    )
    add(
        "--models",
        type=lambda text: some_of(MODELS, text) if text else [],
        default=list(MODELS),
        help="some of gpt2,llama (default: all; empty for none)",
    )
    add("--repeats", type=positive_integer, default=7, help="(default: 7)")
    add("--seconds", type=positive, default=0.2, help="of a repeat (default: 0.2)")
    add("--fake-devices", type=positive_integer, help="parts of the CPU")
    parser.add_json()
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.fake_devices is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", arguments.fake_devices)
    devices = jax.devices()
    there = versions("jax", "jaxlib", "flashquinox")
    print(f"{len(devices)} of {devices[0].device_kind};", there)
    if len(devices) == 1:
        sys.exit("There is one device. `--fake-devices 8` makes eight of a CPU.")
    one, every = (
        Mesh(np.array(x), ("fsdp",), axis_types=(AxisType.Auto,))
        for x in (devices[:1], devices)
    )
    plan = Plan(arguments.repeats, arguments.seconds)
    leaves = {str(n): {"matrix": (n, n)} for n in arguments.sizes}
    leaves |= {name: MODELS[name]() for name in arguments.models}
    print(f"{'leaves':>8}{'one':>12}{'all':>12}{'ratio':>8}  equal")
    rows = []
    for name, shapes in leaves.items():
        (alone, expected), (together, found) = (
            steps(plan, shapes, mesh) for mesh in (one, every)
        )
        row = {
            "leaves": name,
            "parameters": count(shapes),
            "one": alone,
            "all": together,
            "ratio": together["median"] / alone["median"],
            "equal": same_bits(found, expected),
        }
        rows.append(row)
        print(
            f"{name:>8}{alone['median']:12.6f}{together['median']:12.6f}"
            f"{row['ratio']:8.3f}  {row['equal']}",
            flush=True,
        )
    write_json(
        arguments.json,
        devices=[device.device_kind for device in devices],
        versions=there,
        rows=rows,
    )


if __name__ == "__main__":
    run_main(main)
