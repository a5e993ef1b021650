"""How fast is a step of the optimizer alone, and what does it need?

On one GPU, in one run, this measures flashquinox beside

- optax: in float32, and in bfloat16 without master weights;
- PyTorch's fused AdamW in float32;
- FlashOptim (PyTorch) and flashoptim-jax, where they can be imported: `--peers DIR`
  (several times, if need be) adds directories of sources to the path;
- the copy limit: the rate at which the device reads an array and writes it back, by
  the bytes that a step must move.

Columns:

- Gparam/s: parameters updated in a nanosecond: the median of the repeats. Steps of JAX
  run in a loop inside of one compiled program, as in training; PyTorch's are timed by
  the events of its stream. Smallest and largest are in the JSON;
- limit: that rate, over what the copy limit allows for the bytes that must be moved;
- B/param: what weights, gradient and state take;
- temp: what the compiled step takes beside them, in bytes per parameter;
- trace: seconds to trace and lower one step, in Python;
- compile: seconds to compile it, the kernels' included. Of PyTorch, of its first step.

Leaves are square matrices, or those of a model: `gpt2` is GPT-2 124M (148 leaves),
`llama` a Llama of 1.2 billion parameters with stacked layers (11 leaves).
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import sys
from collections.abc import Callable
from functools import partial
from typing import Any


# PyTorch needs memory too.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
from _command_line import (
    in_few_words,
    Parser,
    positive,
    positive_integer,
    run_main,
    sizes,
    some_of,
    versions,
    write_json,
)
from _contenders import (
    copy_bandwidth,
    flashoptim_jax_step,
    flashoptim_step,
    optax_step,
    optional,
    our_step,
    torch_step,
    torch_with_gpu,
)
from _models import count, gpt2, llama, Shapes
from _timing import Plan


#
# What is updated
#


MODELS: dict[str, Callable[[], Shapes]] = {"gpt2": gpt2, "llama": llama}


#
# Who is measured
#


# Bytes that a step of one parameter must move: the gradient, and twice each of weight,
# correction, moments and scales.
OPTIMIZERS = {"adamw": 2 + 2 * 5.125, "lion": 2 + 2 * 4.0625, "sgdw": 2 + 2 * 4.0625}


def contenders(optimizer: str, backend: Any) -> dict[str, Callable[[Shapes], Any]]:
    """From shapes to what has a method `ready`."""
    ours = partial(our_step, optimizer, state_for="xla", backend=backend)
    found: dict[str, Callable[[Shapes], Any]] = {
        "flashquinox": ours,
        "flashquinox, groups along rows": partial(ours, state_for="tpu"),
        "flashquinox, plain XLA": partial(ours, backend="xla"),
        "optax, float32": partial(optax_step, optimizer, dtype=jnp.float32),
        "optax, bfloat16": partial(optax_step, optimizer, dtype=jnp.bfloat16),
    }
    if (torch := torch_with_gpu()) is not None:
        if optimizer == "adamw":
            found["PyTorch, fused float32"] = partial(torch_step, torch)
        if (package := optional("flashoptim")) is not None:
            found["FlashOptim"] = partial(flashoptim_step, torch, package, optimizer)
    if (package := optional("flashoptim_jax")) is not None:
        found["flashoptim-jax"] = partial(flashoptim_jax_step, package, optimizer)
    return found


#
# Tables and plots
#


# Of a round.
_STEPS = 10


def measure(
    optimizer: str, name: str, shapes: Shapes, who: str, make: Any, plan: Plan
) -> dict[str, Any]:
    row: dict[str, Any] = {"optimizer": optimizer, "leaves": name, "contender": who}
    row["parameters"] = count(shapes)
    try:
        contender = make(shapes=shapes)
        ready = contender.ready(_STEPS)
        row |= dataclasses.asdict(plan.measure(ready.run, ready.steps))
        row |= ready.facts | {"finite": ready.is_finite()}
        ready.close()
        row |= contender.facts_of_one_step()
    # Whatever stops a contender is its result, out of memory above all.
    except Exception as error:
        row["error"] = in_few_words(error)
    return row


def rate(row: dict[str, Any]) -> float:
    return row["parameters"] / row["median"] / 1e9


def print_row(row: dict[str, Any], bytes_per_second: float) -> None:
    start = f"{row['optimizer']:6}{row['leaves']:>8}  {row['contender']:32}"
    if "error" in row:
        print(start + row["error"][:60])
        return
    parameters = row["parameters"]
    limit = bytes_per_second / OPTIMIZERS[row["optimizer"]] / 1e9
    # PyTorch has no such thing.
    cell = lambda x: "-" if math.isnan(x) else f"{x:.2f}"
    temporary = cell(row.get("temporary bytes", math.nan) / parameters)
    trace = cell(row.get("trace and lower seconds", math.nan))
    print(
        f"{start}{rate(row):9.1f}{rate(row) / limit:8.1%}"
        f"{row['bytes'] / parameters:9.2f}{temporary:>7}"
        f"{trace:>7}{row['compile seconds']:9.2f}"
        + ("" if row["finite"] else "  NOT FINITE"),
        flush=True,
    )


def plot(record: dict[str, Any], directory: pathlib.Path) -> None:
    """Two pictures: the rates of all that was measured, and bytes per parameter."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    directory.mkdir(parents=True, exist_ok=True)
    rows = [row for row in record["rows"] if "error" not in row]
    if not rows:
        return
    optimizer = rows[0]["optimizer"]
    rows = [row for row in rows if row["optimizer"] == optimizer]
    leaves = list(dict.fromkeys(row["leaves"] for row in rows))
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    limit = record["copy bytes per second"] / OPTIMIZERS[optimizer] / 1e9
    figures = {
        "step-rate.png": ("Gparam/s", rate),
        "step-memory.png": (
            "bytes per parameter",
            lambda row: (
                (row["bytes"] + row.get("temporary bytes", 0)) / row["parameters"]
            ),
        ),
    }
    for file, (label, value) in figures.items():
        figure, axes = plt.subplots(figsize=(11, 4.5), layout="constrained")
        width = 0.8 / len(contenders)
        for i, contender in enumerate(contenders):
            own = {x["leaves"]: x for x in rows if x["contender"] == contender}
            places = [leaves.index(name) + i * width for name in own]
            heights = [value(row) for row in own.values()]
            axes.bar(places, heights, width, label=contender)
        centers = [i + 0.4 - width / 2 for i in range(len(leaves))]
        if value is rate:
            label_of_limit = "limit: a copy of the same bytes"
            axes.axhline(limit, color="gray", linestyle="--", label=label_of_limit)
        axes.set_xticks(centers, [_title(name) for name in leaves])
        axes.set_ylabel(label)
        axes.set_title(f"Steps of {optimizer} on one {record['device']}")
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside right upper", frameon=False, fontsize="small")
        figure.savefig(directory / file, dpi=150)
        print(f"Wrote {directory / file}.")
        plt.close(figure)


def _title(leaves: str) -> str:
    titles = {"gpt2": "GPT-2 124M", "llama": "Llama 1.2B"}
    return titles.get(leaves, f"{leaves}²")


#
# Command line
#


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--optimizers",
        type=partial(some_of, OPTIMIZERS),
        default=list(OPTIMIZERS),
        help=f"some of {','.join(OPTIMIZERS)} (default: all)",
    )
    parser.add_argument(
        "--sizes",
        type=sizes,
        default=[1024, 2048, 4096, 8192, 16384],
        help="sides of square matrices (default: 1024,2048,4096,8192,16384)",
    )
    parser.add_argument(
        "--models",
        type=lambda text: some_of(MODELS, text) if text else [],
        default=list(MODELS),
        help="some of gpt2,llama (default: all; empty for none)",
    )
    parser.add_argument(
        "--peers",
        type=pathlib.Path,
        action="append",
        default=[],
        metavar="DIR",
        help="a directory to import flashoptim or flashoptim_jax from",
    )
    parser.add_argument(
        "--backend",
        choices=("gpu", "auto", "xla"),
        default="auto",
        help="of flashquinox (default: auto)",
    )
    parser.add_argument(
        "--repeats", type=positive_integer, default=7, help="(default: 7)"
    )
    parser.add_argument(
        "--seconds", type=positive, default=0.2, help="of a repeat (default: 0.2)"
    )
    parser.add_json()
    parser.add_argument("--plots", type=pathlib.Path, help="also write two PNGs here")
    parser.add_argument(
        "--plot-only",
        type=pathlib.Path,
        metavar="JSON",
        help="measure nothing: plot what was written here before",
    )
    arguments = parser.parse_args()
    if arguments.plot_only is not None:
        if arguments.plots is None:
            parser.error("--plot-only needs --plots, where to put the pictures")
        if not arguments.plot_only.is_file():
            parser.error(f"--plot-only: not a file: {arguments.plot_only}")
    for directory in arguments.peers:
        if not directory.is_dir():
            parser.error(f"--peers: not a directory: {directory}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if arguments.plot_only is not None:
        plot(json.loads(arguments.plot_only.read_text()), arguments.plots)
        return
    sys.path[:0] = map(str, arguments.peers)
    (device, *_) = jax.devices()
    there = versions("jax", "jaxlib", "optax", "torch", "triton", "flashquinox")
    print(f"{device.device_kind};", ", ".join(f"{k} {v}" for k, v in there.items()))
    plan = Plan(arguments.repeats, arguments.seconds)
    on_cpu = device.platform == "cpu"
    bytes_per_second = copy_bandwidth(plan, 2**26 if on_cpu else 2**30)
    print(f"Copy limit: {bytes_per_second / 1e9:.0f} GB/s, reads and writes together")
    print(
        f"{'':6}{'leaves':>8}  {'':32}{'Gparam/s':>9}{'limit':>8}{'B/param':>9}"
        f"{'temp':>7}{'trace':>7}{'compile':>9}"
    )
    leaves = {str(n): {"matrix": (n, n)} for n in arguments.sizes}
    leaves |= {name: MODELS[name]() for name in arguments.models}
    rows = []
    for optimizer in arguments.optimizers:
        for name, shapes in leaves.items():
            for who, make in contenders(optimizer, arguments.backend).items():
                row = measure(optimizer, name, shapes, who, make, plan)
                print_row(row, bytes_per_second)
                rows.append(row)
    record = {
        "device": device.device_kind,
        "versions": there,
        "copy bytes per second": bytes_per_second,
        "rows": rows,
    }
    write_json(arguments.json, **record)
    if arguments.plots is not None:
        plot(record, arguments.plots)


if __name__ == "__main__":
    run_main(main)
