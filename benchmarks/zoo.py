"""How fast is a step of the optimizer alone on models that people train?

    python benchmarks/zoo.py
    python benchmarks/zoo.py --models resnet50 gpt2 --contenders adamw optax
    python benchmarks/zoo.py --chips v5e v6e
    python benchmarks/zoo.py --page benchmarks/results/zoo-*.json \\
        --into docs/performance.md --plots docs/_static

Leaves have the shapes that were published, in the order in which a framework keeps
them: see `_zoo.py`. Beside models there are a few leaves of sizes that are hard, or
easy. Steps are those of

- adamw, lion: flashquinox, on bfloat16 weights;
- float32: `flashquinox.adamw` on float32 weights, so that only moments are compressed;
- optax, optax-bf16: `optax.adamw` in float32; and in bfloat16, without master weights;
- flashoptim, flashoptim-jax: AdamW of FlashOptim (PyTorch) and of flashoptim-jax, on
  bfloat16 weights, where they can be imported: `--peers DIR` adds a directory of
  sources to the path;
- if asked for, lamb, adafactor and others of flashquinox, on bfloat16 weights; and
  optax-lamb, optax-adafactor and others of Optax in float32.

**On the device that there is**, in one run with its copy bandwidth. On GPUs, steps run
in a loop inside of one compiled program; on CPUs, and for models of less than 2
million parameters also on GPUs, each is a call from Python. As many contenders as
fit into memory take turns.

- Gparam/s: parameters updated in a nanosecond: the median of the repeats;
- µs: the same, as microseconds for a step; "a call" of calls from Python;
- limit: that rate, over the one at which a copy would move the bytes that the step must
  move: gradients once, weights and state twice;
- temp: what the compiled program takes beside its arguments, in bytes per parameter;
- trace, lower, compile: seconds to trace it in Python, to lower it there, and to
    compile it; not of the contenders from lion to flashoptim-jax, whose programs are
    made at the same time. Kernels are traced and written when a program is lowered.

**With `--chips`**, the compiler for TPUs compiles steps; no TPU is needed:

- accessed: bytes that a step accesses for each parameter, by the compiler;
- temp: as above;
- in kernels: leaves that a kernel takes, and their share of the parameters;
- fusions: other programs of the step;
- copies: copies and transpositions of arrays of at least 16384 elements.

A contender that fails is a line with its error. After each model, --json has what was
found so far. Behind the tables there is a line for each model whose AdamW is slower
than Optax in float32 (on TPUs: accesses more bytes; on CPUs: takes more than 3 times as
long), or, on a GPU with more than 20 million parameters, below 0.7 of the limit.

On one H100, all of it is meant to take less than 8 minutes.
"""

import argparse
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any


# PyTorch needs memory too.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import _tpu
import _zoo_device
import _zoo_tpu
import jax
import jax.numpy as jnp
from _command_line import (
    in_few_words,
    Parser,
    positive,
    positive_integer,
    run_main,
    store_json,
    versions,
    write_json,
)
from _contenders import (
    copy_bandwidth,
    flashoptim_jax_step,
    flashoptim_step,
    optax_step,
    optional,
    OTHERS,
    our_step,
    torch_with_gpu,
)
from _models import count, Shapes
from _process import without_kept_programs
from _timing import Plan
from _zoo import ZOO
from _zoo_page import insert, page, shortfalls
from _zoo_picture import plot


CONTENDERS = (
    "adamw",
    "optax",
    "lion",
    "float32",
    "optax-bf16",
    "flashoptim",
    "flashoptim-jax",
)
_ASKED_FOR = (*OTHERS, *[f"optax-{name}" for name in OTHERS])
_RATE = {"learning_rate": 1e-3}
# On CPUs and for TPUs, if nothing else is asked for.
_FEW_CONTENDERS = ("adamw", "optax")
# On CPUs: others take minutes, or gigabytes.
_FEW_MODELS = ("mlp", "cnn", "efficientnet-b0", "resnet50", "16x1000x1001", "4096")

_VERSIONS = "jax jaxlib libtpu optax torch triton flashquinox".split()

Rows = Iterator[dict[str, Any]]


def contender(name: str) -> partial[Any] | None:
    """From shapes to what can be made ready. `None` for what is not installed."""
    match name:
        case "adamw" | "lion":
            return partial(our_step, name)
        case "float32":
            return partial(our_step, "adamw", dtype=jnp.float32)
        case "optax":
            return partial(optax_step, "adamw", dtype=jnp.float32)
        case "optax-bf16":
            return partial(optax_step, "adamw", dtype=jnp.bfloat16)
        case "flashoptim":
            torch, package = torch_with_gpu(), optional("flashoptim")
            if torch is None or package is None:
                return None
            return partial(flashoptim_step, torch, package, "adamw")
        case _ if name in OTHERS:
            return partial(our_step, name, hyperparameters=_RATE)
        case _ if name in _ASKED_FOR:
            optimizer = name.removeprefix("optax-")
            return partial(
                optax_step, optimizer, dtype=jnp.float32, hyperparameters=_RATE
            )
        case _:
            package = optional("flashoptim_jax")
            return package and partial(flashoptim_jax_step, package, "adamw")


def contenders(names: Sequence[str]) -> dict[str, partial[Any]]:
    """Those of them that are installed."""
    made = {name: contender(name) for name in names}
    return {name: make for name, make in made.items() if make is not None}


def on_device(arguments: argparse.Namespace, record: dict[str, Any]) -> None:
    plan, on_gpu = Plan(arguments.repeats, arguments.seconds), _zoo_device.on_gpu()
    kind = jax.devices()[0].device_kind
    bytes_per_second = copy_bandwidth(plan, 2**30 if on_gpu else 2**27)
    record |= {"kind": "gpu" if on_gpu else "cpu", "device": kind}
    record |= {"cores": os.cpu_count(), "copy bytes per second": bytes_per_second}
    print(f"{kind}: a copy moves {bytes_per_second / 1e9:.0f} GB/s")
    names = arguments.contenders or (CONTENDERS if on_gpu else _FEW_CONTENDERS)
    chosen, compared = contenders(names), ("adamw", "optax", *_ASKED_FOR)

    def rows(shapes: Shapes) -> Rows:
        # Not one by one: they take turns.
        yield from _zoo_device.measure_model(
            shapes, chosen, plan, bytes_per_second, compared
        )

    models = arguments.models or (ZOO if on_gpu else _FEW_MODELS)
    fill(record, models, rows, _zoo_device, arguments.json)


def for_tpus(arguments: argparse.Namespace, record: dict[str, Any]) -> None:
    _tpu.set_up()
    record["kind"] = "tpu"
    chosen = contenders(arguments.contenders or _FEW_CONTENDERS)

    def rows(shapes: Shapes) -> Rows:
        for chip in arguments.chips:
            for name, make in chosen.items():
                row = {"chip": chip, "contender": name}
                groups = {"state_for": "tpu"} if make.func is our_step else {}
                try:
                    row |= _zoo_tpu.compile_step(make(shapes=shapes, **groups), chip)
                except Exception as error:
                    row["error"] = in_few_words(error)
                yield row

    fill(record, arguments.models or ZOO, rows, _zoo_tpu, arguments.json)


def fill(
    record: dict[str, Any],
    models: Iterable[str],
    rows: Callable[[Shapes], Rows],
    printer: Any,
    path: pathlib.Path | None,
) -> None:
    """The rows of these models, printed and stored as soon as they are there."""
    record["seconds"] = {}
    print(printer.HEADER)
    for model in models:
        start = time.perf_counter()
        shapes = ZOO[model].leaves()
        size = {"leaves": len(shapes), "parameters": count(shapes)}
        for row in rows(shapes):
            record["rows"].append({"model": model} | size | row)
            print(printer.line(record["rows"][-1]), flush=True)
        record["seconds"][model] = round(time.perf_counter() - start, 1)
        if path is not None:
            store_json(path, record)
    print(f"{sum(record['seconds'].values()):.0f} s")


#
# Command line
#


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    several = partial(parser.add_argument, nargs="+", default=[])
    several(
        "--models",
        choices=ZOO,
        metavar="MODEL",
        help=f"some of {' '.join(ZOO)} (default: all; on CPUs {' '.join(_FEW_MODELS)})",
    )
    several(
        "--contenders",
        choices=(*CONTENDERS, *_ASKED_FOR),
        metavar="NAME",
        help=f"some of {' '.join((*CONTENDERS, *_ASKED_FOR))} (default: of the first "
        f"{len(CONTENDERS)} all that are installed; on CPUs and for TPUs adamw optax)",
    )
    several(
        "--chips",
        choices=_tpu.TOPOLOGIES,
        metavar="CHIP",
        help=f"compile for some of {' '.join(_tpu.TOPOLOGIES)}, and measure nothing",
    )
    several(
        "--peers",
        type=pathlib.Path,
        metavar="DIR",
        help="directories to import flashoptim and flashoptim_jax from",
    )
    parser.add_argument(
        "--repeats", type=positive_integer, default=5, help="(default: 5)"
    )
    parser.add_argument(
        "--seconds", type=positive, default=0.05, help="of a repeat (default: 0.05)"
    )
    parser.add_json()
    several(
        "--page",
        type=pathlib.Path,
        metavar="JSON",
        help="measure nothing: print the tables of the documentation, of the figures "
        "in these files",
    )
    parser.add_argument(
        "--into", type=pathlib.Path, help="also put the tables into this page"
    )
    parser.add_argument(
        "--plots",
        type=pathlib.Path,
        metavar="DIR",
        help="also write the picture here, in light and in dark; of GPUs",
    )
    arguments = parser.parse_args()
    for directory in arguments.peers:
        if not directory.is_dir():
            parser.error(f"--peers: not a directory: {directory}")
    for file in arguments.page:
        if not file.is_file():
            parser.error(f"--page: no such file: {file}")
    if arguments.into is not None and not arguments.into.is_file():
        parser.error(f"--into: no such file: {arguments.into}")
    return arguments


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    sys.path[:0] = map(str, arguments.peers)
    there = versions(*_VERSIONS)
    print(", ".join(f"{k} {v}" for k, v in there.items()))
    record = {"versions": there, "rows": []}
    (for_tpus if arguments.chips else on_device)(arguments, record)
    write_json(arguments.json, **record)
    return record


def main() -> None:
    arguments = parse_arguments()
    if arguments.page:
        records = [json.loads(file.read_text()) for file in arguments.page]
    else:
        without_kept_programs()
        records = [measure(arguments)]
    sections = page(records)
    print(*sections.values(), *shortfalls(records), sep="\n\n")
    if arguments.into is not None:
        arguments.into.write_text(insert(sections, arguments.into.read_text()))
        print(f"Wrote {arguments.into}.")
    if arguments.plots is not None:
        plot(records, arguments.plots)


if __name__ == "__main__":
    run_main(main)
