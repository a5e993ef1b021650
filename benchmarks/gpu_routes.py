"""Which way to write a kernel for GPUs is fastest, and what does each one need?

    python benchmarks/gpu_routes.py
    python benchmarks/gpu_routes.py --routes ours triton --sizes 4096

The same step of AdamW of one bfloat16 matrix (decode, Adam, encode; groups of 32 along
the last axis; in place), with the same arithmetic, on one NVIDIA GPU. All but the
kernel is the library's own step. Each route is measured in a process of its own, and
one that fails is a row with its error. Without a GPU, steps are lowered for one, and
not run:

- `ours`: CUDA C++ of the tile function, compiled by NVRTC: the library's own;
- `xla`: plain XLA;
- `triton`: Pallas by Triton, deprecated in JAX 0.11.0;
- `mosaic-...`: Pallas by Mosaic GPU (`plgpu.kernel`), with lane semantics; variants of
  what a thread has;
- `jax-triton`: a kernel in Triton's own language, where jax-triton can be imported:
  `--peers DIR` adds a directory, or a wheel, to the path.

Columns:

- Gparam/s: parameters updated in a nanosecond, the median of repeats of a compiled loop
  whose carry is donated; and its share of the copy limit: the rate at which the device
  would copy the 12.25 bytes that a step of one parameter must move, as measured in the
  same run;
- regs, spill: registers of a thread in the kernel that takes the longest, by the
  profiler; and what does not fit into them, in bytes, as the driver compiles the
  kernel's PTX, where that can be had;
- trace, compile: seconds to trace and lower one step in Python; and from there until
  its first call has ended;
- lines: of code that the route needs beside the tile function, without comments;
- export: whether `jax.export` accepts the step: as it is, or with a disabled check;
- differ: the share of codes of moments that differ from plain XLA's after a step from
  the same state, and the largest difference.
"""

import argparse
import ast
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from typing import Any

from _command_line import (
    Parser,
    positive,
    positive_integer,
    run_main,
    sizes,
    store_json,
    versions,
)


_HERE = pathlib.Path(__file__).parent
_LIBRARY = _HERE.parent / "src/flashquinox/_backends/gpu"
# Of each parameter: the gradient, and twice each of weight, correction, moments and
# scales.
_BYTES = 2 + 2 * 5.125
_MOSAIC = (
    "16",
    "16-by-8",
    "8",
    "8-twice",
    "32",
    "warpgroup",
    "warpgroup-8",
    "tma",
    "tma-8",
)
ROUTES = ("ours", "xla", "triton", "jax-triton", *[f"mosaic-{x}" for x in _MOSAIC])
# What a route is written in beside the tile function.
_FILES = {
    "ours": sorted([*_LIBRARY.glob("*.py"), *_LIBRARY.glob("*.cu")]),
    "xla": [],
    "triton": [_HERE / "_gpu_routes_triton.py"],
    "jax": [_HERE / "_gpu_routes_jax_triton.py"],
    "mosaic": [_HERE / "_gpu_routes_mosaic.py"],
}


#
# One route, in a process of its own
#


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    import _gpu_routes_facts as facts
    import jax
    from _contenders import copy_bandwidth
    from _timing import Plan

    plan = Plan(arguments.repeats, arguments.seconds)
    make = partial(_step, name)
    if jax.default_backend() != "gpu":
        # There, a step is plain XLA, whatever the route.
        return facts.exported(make(side=arguments.sizes[0]))
    row: dict[str, Any] = {"device": jax.devices()[0].device_kind}
    row["copy bytes per second"] = copy_bandwidth(plan, 2**30)
    row |= facts.compiled(make(side=arguments.sizes[0]))
    row["parameters per second"] = {
        str(side): facts.rate(make(side=side), plan, side) for side in arguments.sizes
    }
    small = partial(make, side=arguments.sizes[0])
    check = lambda: facts.differences(make(side=arguments.check), arguments.check)
    more = {
        "export": lambda: facts.exported(small()),
        "differ": check,
        "kernels": lambda: facts.kernels(make(side=2 * arguments.check)),
        "profile": lambda: facts.profiled(small()),
    }
    for fact, find in more.items():
        # Without one of these, the others still count.
        try:
            row |= find()
        except Exception as error:
            row[fact] = f"{type(error).__name__}: {error}"[:300]
    return row


def _step(name: str, side: int) -> Any:
    import _gpu_routes

    if name == "xla":
        return _gpu_routes.plain_step(side)
    spike = None
    if name == "triton":
        from _gpu_routes_triton import update as spike
    elif name == "jax-triton":
        from _gpu_routes_jax_triton import update as spike
    elif name != "ours":
        from _gpu_routes_mosaic import VARIANTS

        spike = VARIANTS[name.removeprefix("mosaic-")]
    return _gpu_routes.step_by(spike, side)


#
# All of them
#


def lines_of_code(path: pathlib.Path) -> int:
    """Lines with code: without comments, docstrings, and empty ones."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return len(re.findall(r"^\s*[^\s/].*$|^\s*/[^/].*$", text, re.MULTILINE))
    found: set[int] = set()
    for node in ast.walk(tree := ast.parse(text)):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.stmt) and not is_text:
            found.add(node.lineno)
    documentation = {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    lines = enumerate(text.splitlines(), 1)
    is_code = lambda line: line.strip() and not line.strip().startswith("#")
    return len([i for i, x in lines if is_code(x) and i not in documentation])


def in_own_process(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--only", name, *sys.argv[1:]]
    with tempfile.TemporaryDirectory() as folder:
        # Read by jax-triton when it is imported.
        environment = os.environ | {"JAX_TRITON_DUMP_DIR": folder}
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=arguments.timeout,
                env=environment,
            )
        except subprocess.TimeoutExpired:
            return {"error": f"more than {arguments.timeout:.0f} seconds"}
    found = re.findall(r"^ROW (.*)$", done.stdout, re.MULTILINE)
    if found:
        return json.loads(found[-1])
    lines = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
    if arguments.verbose:
        print("\n".join(lines[-40:]), file=sys.stderr)
    errors = [x for x in lines if re.match(r"[\w.]*(Error|Exception)\b", x)]
    text = (errors or lines)[-1]
    return {"error": f"exit {done.returncode}: {text[:300]}"}


def print_row(row: dict[str, Any]) -> None:
    start = f"{row['route']:20}"
    if "error" in row:
        print(start + row["error"], flush=True)
        return
    if "copy bytes per second" not in row:
        print(f"{start}not run, as there is no GPU; export: {row['export']}")
        return
    limit = row["copy bytes per second"] / _BYTES
    rates = row["parameters per second"]
    cells = [f"{x / 1e9:9.1f}{x / limit:8.1%}" for x in rates.values()]
    shown = lambda key: str(row.get(key, "-"))
    # Of the one kernel.
    kernels = row["kernels"] if isinstance(row["kernels"], dict) else {}
    local = [x.get("local bytes", "-") for x in kernels.values()]
    spill = local[0] if len(local) == 1 else "-"
    differ = f"{shown('differ'):>15}"
    if "largest difference" in row:
        differ = f"{row['differ']:10.1e}{row['largest difference']:5d}"
    print(
        start
        + "".join(cells)
        + f"{shown('registers'):>6}{spill:>7}"
        + f"{row['trace seconds']:8.2f}{row['compile seconds']:9.2f}"
        + f"{row['lines']:7d}{differ}"
        + f"  {shown('export')}",
        flush=True,
    )


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--routes", nargs="+", choices=ROUTES, default=list(ROUTES))
    parser.add_argument(
        "--sizes",
        type=sizes,
        default=[4096, 16384],
        help="sides of matrices (default: 4096,16384)",
    )
    parser.add_argument("--check", type=positive_integer, default=1024)
    parser.add_argument("--repeats", type=positive_integer, default=5)
    parser.add_argument("--seconds", type=positive, default=0.1, help="of a repeat")
    parser.add_argument(
        "--timeout", type=positive, default=120.0, help="seconds of a route"
    )
    parser.add_argument(
        "--peers", type=pathlib.Path, action="append", default=[], metavar="DIR"
    )
    parser.add_argument("--verbose", action="store_true", help="show errors in full")
    parser.add_argument("--only", choices=ROUTES, help=argparse.SUPPRESS)
    parser.add_json()
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    sys.path[:0] = map(str, arguments.peers)
    if arguments.only is not None:
        print("ROW", json.dumps(measure(arguments.only, arguments)))
        return
    there = versions("jax", "jaxlib", "triton", "jax-triton", "flashquinox")
    print(", ".join(f"{k} {v}" for k, v in there.items()))
    columns = "".join(f"{x:>8}²{'limit':>8}" for x in arguments.sizes)
    print(
        f"{'':20}{columns}{'regs':>6}{'spill':>7}{'trace':>8}{'compile':>9}"
        f"{'lines':>7}{'differ':>10}{'':5}  export"
    )
    rows = []
    for name in arguments.routes:
        row = {"route": name} | in_own_process(name, arguments)
        files = _FILES[name.partition("-")[0]]
        row["lines"] = sum([lines_of_code(path) for path in files])
        print_row(row)
        rows.append(row)
        if arguments.json is not None:
            store_json(arguments.json, {"versions": there, "rows": rows})
    key = "copy bytes per second"
    measured = [row[key] for row in rows if key in row]
    if measured:
        print(f"Copy limit: {statistics.median(measured) / 1e9:.0f} GB/s")
    if arguments.json is not None:
        print(f"Wrote {arguments.json}.")


if __name__ == "__main__":
    run_main(main)
