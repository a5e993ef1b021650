"""How long does JAX take to trace, lower and compile a step, beside Optax?

    python benchmarks/tracing.py
    python benchmarks/tracing.py --models gpt2,ddpm --backends auto,xla --repeats 3
    python benchmarks/tracing.py --compile --backends auto
    python benchmarks/tracing.py --first --models 16384,cnn
    python benchmarks/tracing.py --first --again
    python benchmarks/tracing.py --first --absent-h100

A program is traced and lowered once for each of its shapes, before it is compiled. For
each model and backend:

- first: seconds to trace the step where nothing was traced before: the median of the
  repeats, before each of which all caches are cleared;
- again: the same for another program with a step of the same leaves;
- lower: seconds to lower the step of the first program;
- ratio: of "first", to Optax's;
- both: the same of "first" and "lower" together. Kernels are traced when a program is
  lowered;
- compile, all: with `--compile`, seconds to compile the step for this CPU, with weights
    and state donated; and the ratio of all three together;
- calls: how many functions of this library Python calls in the first trace and its
  lowering;
- frames: how many of them are on the stack when the tile function is called first, as
    the program is lowered.

Seconds are of CPU time, of all threads together: tracing and lowering have one, LLVM
several.

With `--first`, each step is the first one of a process, and made for the device that is
there, also a GPU. Seconds are of wall time, the medians of so many processes:

- init: of the state, outside of programs. It comes first, so that what the first
    compilation of a process takes longer than others is in it, if it compiles anything;
- trace, lower, compile: NVIDIA's compiler makes PTX of kernels when a step is lowered;
- run: its first call, in which the driver makes of PTX what the GPU executes, and one
  step;
- lower and compile, all: their ratios to Optax's.

With `--again`, each process is the second one, and finds what the first has kept on
disk: PTX of kernels, programs for CPUs, and what NVIDIA's driver makes of PTX. Programs
of XLA, which JAX keeps if it is told to, are compiled again.

With `--absent-h100`, it is compiled for an H100 where there is none, which needs JAX's
plugin for CUDA, and not run. Seconds are of CPU time, of all threads together.

Steps are of AdamW: ours on bfloat16 weights, Optax's on float32 weights. No device is
needed: programs of "gpu" and "tpu" are traced and lowered for an H100 and a v5e, by
the default backend of these devices. "auto" and "xla" are for a CPU.
"""

import argparse
import contextlib
import itertools
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
from _adamw_steps import optax_step, ours
from _command_line import (
    Parser,
    positive_integer,
    run_main,
    some_of,
    versions,
    write_json,
)
from _models import count
from _zoo import ZOO
from jax.sharding import AbstractDevice, AbstractMesh

import flashquinox as fq
from flashquinox._backends.cpp import translation
from flashquinox._backends.dispatch import Backend
from flashquinox._tile import shapes as tile_shapes


# Others take longer.
_FEW_MODELS = ["mlp", "gpt2", "resnet50"]
BACKENDS: tuple[Backend, ...] = ("auto", "xla", "gpu", "tpu")
# The device of each backend: its kind, cores and platform.
_DEVICES = {
    "gpu": ("NVIDIA H100 80GB HBM3", 1, "cuda"),
    "tpu": ("TPU v5 lite", 1, "tpu"),
}
# Where tiles begin: for plain XLA, GPUs and TPUs.
_TILE_FUNCTIONS = ("update_tile_of_any_shape", "update_tile", "advance")
_SOURCES = str(pathlib.Path(fq.__file__).parent) + os.sep


@contextlib.contextmanager
def device_of(backend: str) -> Iterator[str]:
    """Traces for the device of a backend. Gives its platform."""
    if backend not in _DEVICES:
        yield "cpu"
        return
    kind = AbstractDevice(*_DEVICES[backend])
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=kind)):
        yield kind.platform


def clear_caches() -> None:
    jax.clear_caches()
    tile_shapes._tape.cache_clear()
    translation._translate.cache_clear()


def seconds(
    step: Callable[..., Any],
    arguments: tuple[Any, ...],
    backend: str,
    repeats: int,
    with_compile: bool,
) -> dict[str, float]:
    """The medians."""
    rows = []
    for _ in range(repeats):
        clear_caches()
        with device_of(backend) as platform:
            times = [time.process_time()]
            # Programs of their own: `jax.jit` of one function would be one.
            programs = [
                jax.jit(lambda *args: step(*args), donate_argnums=(0, 1)).trace(
                    *arguments
                )
                for _ in range(2)
                if times.append(time.process_time()) is None
            ]
            times.append(time.process_time())
            lowered = programs[0].lower(lowering_platforms=(platform,))
            times.append(time.process_time())
            if with_compile and platform == "cpu":
                lowered.compile()
                times.append(time.process_time())
        rows.append([end - start for start, end in itertools.pairwise(times[1:])])
    medians = map(statistics.median, zip(*rows, strict=True))
    return dict(zip(("first", "again", "lower", "compile"), medians, strict=False))


def own_calls(
    step: Callable[..., Any], arguments: tuple[Any, ...], backend: str
) -> dict[str, int]:
    """Python's calls of functions of this library, and how many frames of them are on
    the stack when the tile function is called."""
    calls, frames = 0, 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls, frames
        del argument
        name = frame.f_code.co_filename
        if event != "call" or not name.startswith(_SOURCES):
            return
        calls += 1
        is_tile = name.startswith(os.path.join(_SOURCES, "_tile", ""))
        if frames == 0 and is_tile and frame.f_code.co_name in _TILE_FUNCTIONS:
            while (frame := frame.f_back) is not None:
                frames += frame.f_code.co_filename.startswith(_SOURCES)

    clear_caches()
    with device_of(backend) as platform:
        program = jax.jit(lambda *args: step(*args))
        sys.setprofile(profile)
        try:
            program.trace(*arguments).lower(lowering_platforms=(platform,))
        finally:
            sys.setprofile(None)
    return {"calls": calls, "frames": frames}


def _ratio(row: dict[str, Any], reference: dict[str, Any], *keys: str) -> float:
    return sum(row[key] for key in keys) / sum(reference[key] for key in keys)


def _cell(row: dict[str, Any], key: str, digits: int) -> str:
    return f"{row[key]:.{digits}f}" if key in row else ""


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    for name, known, default in (
        ("models", ZOO, _FEW_MODELS),
        ("backends", BACKENDS, BACKENDS),
    ):
        parser.add_argument(
            f"--{name}",
            type=partial(some_of, known),
            default=list(default),
            help=f"some of {','.join(known)} (default: {','.join(default)})",
        )
    parser.add_argument(
        "--repeats", type=positive_integer, default=5, help="(default: 5)"
    )
    parser.add_argument("--compile", action="store_true", help="compile for this CPU")
    parser.add_argument("--first", action="store_true", help="first steps of processes")
    parser.add_argument(
        "--absent-h100", action="store_true", help="with --first, for an H100"
    )
    parser.add_argument(
        "--again", action="store_true", help="with --first, what other processes kept"
    )
    parser.add_json()
    return parser.parse_args()


def measure_first_steps(arguments: argparse.Namespace, there: dict[str, str]) -> None:
    import _first_step

    print(_first_step.HEADER)
    rows = []
    for model in arguments.models:
        found = _first_step.rows_of(
            model, arguments.repeats, arguments.absent_h100, arguments.again
        )
        for row in found:
            rows.append(row)
            print(_first_step.line(row), flush=True)
    write_json(arguments.json, versions=there, repeats=arguments.repeats, rows=rows)


def main() -> None:
    arguments = parse_arguments()
    there = versions("jax", "jaxlib", "optax", "equinox", "flashquinox")
    print(", ".join(f"{k} {v}" for k, v in there.items()))
    if arguments.first:
        measure_first_steps(arguments, there)
        return
    jax.config.update("jax_platforms", "cpu")
    print(
        f"{'model':>15}{'leaves':>8}  {'':8}{'first':>8}{'again':>8}{'lower':>8}"
        f"{'ratio':>7}{'both':>7}{'compile':>8}{'all':>7}{'calls':>8}{'frames':>8}"
    )
    rows = []
    for model in arguments.models:
        shapes = ZOO[model].leaves()
        reference: dict[str, Any] | None = None
        for backend in ["optax", *arguments.backends]:
            make = optax_step if backend == "optax" else partial(ours, backend)
            step, operands = make(shapes)
            row: dict[str, Any] = {
                "model": model,
                "leaves": len(shapes),
                "parameters": count(shapes),
                "backend": backend,
                **seconds(
                    step, operands, backend, arguments.repeats, arguments.compile
                ),
            }
            reference = reference or row
            row["ratio"] = _ratio(row, reference, "first")
            row["both"] = _ratio(row, reference, "first", "lower")
            if "compile" in row:
                row["all"] = _ratio(row, reference, "first", "lower", "compile")
            if backend != "optax":
                row |= own_calls(step, operands, backend)
            rows.append(row)
            print(
                f"{model:>15}{len(shapes):8}  {backend:8}{row['first']:8.3f}"
                f"{row['again']:8.3f}{row['lower']:8.3f}{row['ratio']:7.2f}"
                f"{row['both']:7.2f}{_cell(row, 'compile', 3):>8}"
                f"{_cell(row, 'all', 2):>7}{row.get('calls', ''):>8}"
                f"{row.get('frames', ''):>8}",
                flush=True,
            )
    write_json(arguments.json, versions=there, repeats=arguments.repeats, rows=rows)


if __name__ == "__main__":
    run_main(main)
