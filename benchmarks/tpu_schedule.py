"""How long is the TPU kernel's schedule, and does memory or arithmetic limit it?

No TPU is needed, only `libtpu`: its compiler works for every generation on any machine,
and writes down the schedule, bundle by bundle. A bundle is what a core issues in one
cycle: some operations on each of its units. Nothing reorders bundles at run time, so
that their number is the number of cycles, but for waiting on memory. What is compiled
is `optim.step` of one bfloat16 weight, of 4096 x 4096 or of each shape of `--shapes`,
with bfloat16 gradients, model and state donated.

The schedule, per 1024 parameters (a register of float32):

- bundles: that run, each counted as often as the loops around it turn: the start of the
  kernel, and what each step of the grid costs, are included;
- floor: the bundles for which memory needs as long: bytes moved x clock / bandwidth.
  The kernel moves each byte once: gradient, and the old and the new of weight and
  state. Where bundles / floor is below 1, arithmetic hides behind memory;
- limit: the unit with the fewest free slots, and the share of its slots that is taken;
- spilled: the share of vector stores that only free a register.

Where two cores are one device (v5p), each does half of the grid: these figures are
those of one core, for its half of the parameters and of the bandwidth.

Bandwidths and clocks are from JAX's own table of TPUs: clock = peak bfloat16 rate /
multiply-adds in a cycle. Where that is more than 2.5 GHz, the table's idea of a matrix
unit is not that of the peak rate, and there is no floor.

Memory, in bytes, of the compiled program:

- temp: in HBM, beside arguments and results. The scalars that the kernel needs are
  there, 16 KiB apart on v5p;
- above arguments: the same at its peak, with what XLA keeps in VMEM between fusions,
  but not a kernel's own VMEM;
- aliased: whether all weights and state are updated in place.

Plain XLA does the same step from the same state (`backend="xla"`). Its bytes accessed
are XLA's estimate, fusion by fusion, and count what moves between HBM and VMEM or stays
in VMEM alike; the kernel's are its operands and results.

With `--models`, instead of all this: AdamW on the models of `zoo.py`, by the schedules
of their leaves of 16 Ki elements and more, each of which has a kernel of its own.

- bundles, floor: means over parameters, of a leaf the larger of the two in "time";
- Optax: the floor of its AdamW on float32, 28 bytes per parameter, over "time". Where
  it is above 1, a step takes less time than Optax's can.

First of all, bundles of a kernel with a known number of vector stores are counted the
same way. The counts must agree.
"""

import argparse
import dataclasses
import functools as ft
import importlib.metadata
import math
import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from _command_line import (
    in_few_words,
    Parser,
    run_main,
    shapes,
    some_of,
    write_json,
)
from _tpu import (
    compile_for,
    device,
    grid,
    operand_bytes,
    Program,
    Schedule,
    schedule,
    ScheduleError,
    set_up,
    TOPOLOGIES,
)
from _zoo import ZOO
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import PyTree

import flashquinox as fq


Shape = tuple[int, ...]

OPTIMIZERS: dict[str, Callable[..., fq.Optimizer]] = {
    "adamw": fq.adamw,
    "adam": fq.adam,
    "lion": fq.lion,
    "sgd": ft.partial(fq.sgd, momentum=0.9),
    "sgdw": ft.partial(fq.sgdw, momentum=0.9),
}

UNITS = ("VALU", "EUP", "XLU", "VLOAD", "VSTORE", "SALU")

HIGHEST_CLOCK = 2.5e9


@dataclasses.dataclass(frozen=True)
class Core:
    """Of a TPU, by JAX's table."""

    bandwidth: float
    clock: float

    @staticmethod
    def of(chip: str) -> "Core | None":
        try:
            from jax._src import tpu_info
        except ImportError:
            try:
                from jax._src.pallas.mosaic import tpu_info
            except ImportError:
                return None
        target = device(chip)
        version = tpu_info.chip_version_from_device_kind(target.device_kind)
        if version is None:
            return None
        info = tpu_info.get_tpu_info_for_chip(version, target.num_cores)
        per_cycle = info.num_mxus * 2 * info.mxu_column_size**2
        clock = info.bf16_ops_per_second / per_cycle
        return Core(info.mem_bw_bytes_per_second, clock)

    @property
    def plausible(self) -> bool:
        return self.clock <= HIGHEST_CLOCK

    def floor(self, bytes_per_parameter: float) -> float:
        """In bundles per 1024 parameters."""
        return bytes_per_parameter * 1024 * self.clock / self.bandwidth


@dataclasses.dataclass(frozen=True)
class Step:
    """What is compiled: the state is always the kernel's."""

    shape: Shape
    model: PyTree
    state: fq.OptimizerState
    take: Callable

    @staticmethod
    def of(shape: Shape, optimizer: str, backend: str) -> "Step":
        model = {"w": jax.ShapeDtypeStruct(shape, jnp.bfloat16)}
        make = ft.partial(OPTIMIZERS[optimizer], 1e-3)
        state = jax.eval_shape(make(backend="tpu").init, model)
        return Step(shape, model, state, make(backend=backend).step)

    def compile_for(self, chip: str, dump: pathlib.Path) -> Program:
        shapes = self.model, self.state, self.model
        return compile_for(chip, self.take, *shapes, donate=(0, 1), dump=dump)

    @property
    def updated_bytes(self) -> int:
        """Of weights and state, but for the counter of steps."""
        return _bytes((self.model, self.state)) - _bytes(self.state.steps)

    @property
    def bytes_per_parameter(self) -> float:
        """That must be read or written."""
        return (_bytes(self.model) + 2 * self.updated_bytes) / math.prod(self.shape)


def _bytes(tree: PyTree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jtu.tree_leaves(tree))


#
# A kernel whose stores are known
#


def check_counting(chip: str, dump: pathlib.Path) -> int:
    """The number of vector stores of one core. Raises if it was not counted right."""
    steps, turns, registers = 8, 16, 4
    rows = 8 * registers

    def kernel(x, doubled, increased, first):
        first[...] = x[:8]

        def turn(i, carry):
            at = pl.ds(pl.multiple_of(i * rows, rows), rows)
            doubled[at] = x[at] * 2
            increased[at] = x[at] + 1
            return carry

        jax.lax.fori_loop(0, turns, turn, None)

    def call(x):
        blocks = [pl.BlockSpec((n, 128), lambda i: (i, 0)) for n in (turns * rows, 8)]
        small = jax.ShapeDtypeStruct((steps * 8, 128), x.dtype)
        return pl.pallas_call(
            kernel,
            grid=(steps,),
            in_specs=[blocks[0]],
            out_specs=[blocks[0], *blocks],
            out_shape=[x, x, small],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
            name="known_stores",
        )(x)

    x = jax.ShapeDtypeStruct((steps * turns * rows, 128), jnp.float32)
    program = compile_for(chip, call, x, dump=dump)
    (eqn,) = program.kernels
    found = schedule(dump, eqn)
    expected = math.prod(found.core_grid) * (1 + turns * 2 * registers)
    opcodes = found.opcodes()
    counts = {
        # Registers also go to the scalar unit by the slots of stores.
        "slots": found.slots("VSTORE") - opcodes["vpush"],
        "instructions": opcodes["vst"],
    }
    for what, count in counts.items():
        if count != expected:
            raise ScheduleError(f"{count} stores by {what} on {chip}, not {expected}")
    return expected


#
# The step
#


def measure(
    chip: str, shape: Shape, optimizer: str, dump: pathlib.Path, opcodes: bool
) -> dict[str, Any]:
    step = Step.of(shape, optimizer, "tpu")
    row: dict[str, Any] = {"chip": chip, "shape": shape, "optimizer": optimizer}
    try:
        program = step.compile_for(chip, dump)
    # Compilers fail in many ways, and each is a result.
    except Exception as error:
        return {**row, "error": in_few_words(error)}
    (kernel,) = program.kernels
    found = schedule(dump, kernel)
    share = math.prod(found.core_grid) / math.prod(grid(kernel))
    registers = math.prod(shape) * share / 1024
    row |= {
        "compile seconds": round(program.seconds, 1),
        "grid": grid(kernel),
        "grid of one core": found.core_grid,
        "bundles": found.executed / registers,
        "bytes per parameter": step.bytes_per_parameter,
    }
    core = Core.of(chip)
    if core is not None and core.plausible:
        row["floor"] = core.floor(step.bytes_per_parameter)
        row["bundles / floor"] = row["bundles"] / row["floor"]
    row |= _slots(found, registers)
    row["memory"] = _memory(program, step)
    if opcodes:
        row["opcodes"] = {
            name: count / registers for name, count in found.opcodes().most_common()
        }
    return row


def _slots(found: Schedule, registers: float) -> dict[str, Any]:
    """Slots taken and slots there are, per 1024 parameters."""
    slots = {
        unit: (
            found.slots(unit) / registers,
            found.capacity[unit] * found.executed / registers,
        )
        for unit in UNITS
    }
    fullness = {unit: used / most for unit, (used, most) in slots.items()}
    limit = max(fullness, key=lambda unit: fullness[unit])
    spilled = found.slots("VSTORE:SPILL") / found.slots("VSTORE")
    return {
        "limit": limit,
        "limit taken": fullness[limit],
        "spilled stores": spilled,
        "slots": slots,
    }


def _memory(program: Program, step: Step) -> dict[str, Any]:
    stats = program.compiled.memory_analysis()
    arguments = stats.argument_size_in_bytes
    alias = stats.alias_size_in_bytes
    peak = getattr(stats, "peak_memory_in_bytes", None)
    # The counter of steps is padded.
    counter = alias - step.updated_bytes
    return {
        "temp": stats.temp_size_in_bytes,
        "above arguments": None if peak is None else peak - arguments,
        "arguments": arguments,
        "alias": alias,
        "all aliased": _bytes(step.state.steps) <= counter <= 4096,
    }


def compare(
    chip: str, shape: Shape, optimizer: str, dump: pathlib.Path
) -> dict[str, Any]:
    """The kernel beside plain XLA: memory and traffic."""
    row: dict[str, Any] = {"chip": chip, "shape": shape, "optimizer": optimizer}
    try:
        for backend in ("tpu", "xla"):
            step = Step.of(shape, optimizer, backend)
            program = step.compile_for(chip, dump)
            row[backend] = _memory(program, step)
            moved = int(program.compiled.cost_analysis()["bytes accessed"])
            if backend == "tpu":
                # XLA does not look into kernels.
                moved = sum(operand_bytes(kernel) for kernel in program.kernels)
            row[backend]["bytes accessed"] = moved
    except Exception as error:
        return {**row, "error": in_few_words(error)}
    return row


#
# Models
#


def measure_models(chip: str, names: list[str], dump: pathlib.Path) -> dict[str, Any]:
    core = Core.of(chip)
    if core is None or not core.plausible:
        raise ScheduleError(f"there is no memory floor of {chip}")
    leaves = {
        name: [x for x in ZOO[name].leaves().values() if math.prod(x) >= _LEAST]
        for name in names
    }
    distinct = dict.fromkeys(shape for each in leaves.values() for shape in each)
    rows = {shape: measure(chip, shape, "adamw", dump, False) for shape in distinct}
    optax = core.floor(_OPTAX_BYTES)
    return {
        "leaves": list(rows.values()),
        "models": [
            {"chip": chip, "model": name} | _of_model([rows[x] for x in each], optax)
            for name, each in leaves.items()
            if each
        ],
    }


# Smaller leaves share kernels.
_LEAST = 2**14
# Of float32: the gradient, and weight and both moments as they were and will be.
_OPTAX_BYTES = 7 * 4


def _of_model(leaves: list[dict[str, Any]], optax: float) -> dict[str, Any]:
    counted = [leaf for leaf in leaves if "error" not in leaf]
    sizes = [math.prod(leaf["shape"]) for leaf in counted]

    def mean(of: Callable[[dict[str, Any]], float]) -> float:
        pairs = zip(sizes, counted, strict=True)
        return sum(size * of(leaf) for size, leaf in pairs) / sum(sizes)

    time = mean(lambda leaf: max(leaf["bundles"], leaf["floor"]))
    return {
        "parameters": sum(sizes),
        "leaves not counted": len(leaves) - len(counted),
        "bundles": mean(lambda leaf: leaf["bundles"]),
        "floor": mean(lambda leaf: leaf["floor"]),
        "time": time,
        "optax floor / time": optax / time,
    }


#
# Tables
#

_HEADER = f"{'chip':7}{'leaf':18}{'optimizer':10}"


def _start(row: dict[str, Any]) -> str:
    shape = "x".join(map(str, row["shape"]))
    return f"{row['chip']:7}{shape:18}{row['optimizer']:10}"


def print_constants(chips: list[str]) -> None:
    print("\nA core by JAX's table of TPUs (clock = peak rate / multiply-adds a cycle)")
    print(f"{'chip':7}{'cores of a device':>17}{'bandwidth':>14}{'clock':>12}")
    for chip in chips:
        core = Core.of(chip)
        start = f"{chip:7}{device(chip).num_cores:17}"
        if core is None:
            print(f"{start}  unknown, no floor")
            continue
        note = "" if core.plausible else ": not plausible, no floor"
        print(
            f"{start}{core.bandwidth / 1e9:9.0f} GB/s{core.clock / 1e9:8.2f} GHz{note}"
        )


def print_schedules(rows: list[dict[str, Any]]) -> None:
    print("\nPer 1024 parameters of one core")
    print(
        f"{_HEADER}{'compiled':>9}{'bundles':>9}{'floor':>8}"
        f"{'bundles/floor':>15}{'limit':>9}{'taken':>7}{'spilled':>9}"
    )
    for row in rows:
        start = _start(row)
        if "error" in row:
            print(f"{start}  {row['error']}")
            continue
        floor, ratio = (
            f"{row[name]:.2f}" if name in row else "-"
            for name in ("floor", "bundles / floor")
        )
        print(
            f"{start}{row['compile seconds']:7.1f} s{row['bundles']:9.2f}{floor:>8}"
            f"{ratio:>15}{row['limit']:>9}{row['limit taken']:7.0%}"
            f"{row['spilled stores']:9.1%}"
        )


def print_models(rows: list[dict[str, Any]]) -> None:
    print("\nMean over parameters, per 1024 of them on one core")
    print(
        f"{'chip':7}{'model':18}{'parameters':>14}{'bundles':>9}{'floor':>8}{'time':>8}"
        f"{'time/floor':>12}{'Optax':>8}{'not counted':>13}"
    )
    for row in rows:
        print(
            f"{row['chip']:7}{row['model']:18}{row['parameters']:14,}"
            f"{row['bundles']:9.2f}{row['floor']:8.2f}{row['time']:8.2f}"
            f"{row['time'] / row['floor']:12.2f}{row['optax floor / time']:8.2f}"
            f"{row['leaves not counted']:13}"
        )


def print_slots(rows: list[dict[str, Any]]) -> None:
    print("\nSlots taken / there are, per 1024 parameters of one core")
    header = "".join(f"{unit:>15}" for unit in UNITS)
    print(f"{_HEADER}{header}")
    for row in rows:
        cells = [f"{used:.1f} / {most:.1f}" for used, most in row["slots"].values()]
        cells = "".join(f"{cell:>15}" for cell in cells)
        print(f"{_start(row)}{cells}")


def print_memory(rows: list[dict[str, Any]]) -> None:
    print("\nMemory of the step, in bytes")
    print(
        f"{_HEADER}{'arguments':>13}{'alias':>13}{'temp':>12}"
        f"{'above arguments':>17}{'aliased':>9}"
    )
    for row in rows:
        memory = row["memory"]
        print(
            f"{_start(row)}{memory['arguments']:13,}"
            f"{memory['alias']:13,}{memory['temp']:12,}"
            f"{_count(memory['above arguments']):>17}"
            f"{'all' if memory['all aliased'] else 'NOT ALL':>9}"
        )


def print_comparison(rows: list[dict[str, Any]]) -> None:
    print("\nThe kernel and plain XLA, in bytes")
    print(
        f"{_HEADER}{'':8}{'temp':>14}{'above arguments':>17}"
        f"{'accessed':>16}{'per parameter':>15}"
    )
    for row in rows:
        for backend, name in (("tpu", "kernel"), ("xla", "XLA")):
            start = f"{_start(row)}{name:8}"
            if "error" in row:
                print(f"{start}{row['error']}")
                break
            memory = row[backend]
            moved = memory["bytes accessed"]
            print(
                f"{start}{memory['temp']:14,}{_count(memory['above arguments']):>17}"
                f"{moved:16,}{moved / math.prod(row['shape']):15.2f}"
            )


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def print_opcodes(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        print(f"\nVector instructions per 1024 parameters: {_start(row)}")
        cells = [f"{name:24}{count:8.2f}" for name, count in row["opcodes"].items()]
        for i in range(0, len(cells), 3):
            print("   ".join(cells[i : i + 3]))


def rounded(tree: Any) -> Any:
    """For JSON: five significant digits of each fraction."""
    if isinstance(tree, dict):
        return {name: rounded(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [rounded(value) for value in tree]
    return float(f"{tree:.5g}") if isinstance(tree, float) else tree


#
# Command line
#


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    for option, names in {"--chips": TOPOLOGIES, "--optimizers": OPTIMIZERS}.items():
        parser.add_argument(
            option,
            type=ft.partial(some_of, names),
            default=list(names),
            help=f"some of {','.join(names)} (default: all)",
        )
    parser.add_argument("--shapes", type=shapes, default="4096x4096")
    parser.add_argument(
        "--models", nargs="?", type=ft.partial(some_of, ZOO), const=[*ZOO]
    )
    parser.add_argument(
        "--opcodes", action="store_true", help="also count vector instructions"
    )
    parser.add_json()
    arguments = parser.parse_args()
    try:
        importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        parser.error("libtpu is not installed (pip install flashquinox[tpu])")
    return arguments


def run(arguments: argparse.Namespace, dump: pathlib.Path) -> dict[str, Any]:
    chips, optimizers = arguments.chips, arguments.optimizers
    checked = {chip: check_counting(chip, dump) for chip in chips}
    print("Stores counted as they must be on", ", ".join(checked))
    print_constants(chips)
    cores = {
        chip: None if (core := Core.of(chip)) is None else dataclasses.asdict(core)
        for chip in chips
    }
    start = {"known stores": checked, "cores": cores}
    if arguments.models is not None:
        found = [measure_models(chip, arguments.models, dump) for chip in chips]
        leaves = [leaf for each in found for leaf in each["leaves"]]
        models = [model for each in found for model in each["models"]]
        print_schedules(leaves)
        print_models(models)
        leaves = [{k: x[k] for k in x if k not in ("slots", "memory")} for x in leaves]
        return start | {"leaves": leaves, "models": models}
    rows = [
        measure(chip, shape, optimizer, dump, arguments.opcodes)
        for chip in chips
        for shape in arguments.shapes
        for optimizer in optimizers
    ]
    print_schedules(rows)
    compiled = [row for row in rows if "error" not in row]
    print_slots(compiled)
    print_memory(compiled)
    if arguments.opcodes:
        print_opcodes(compiled)
    comparison = [
        compare(chip, shape, "adamw", dump)
        for chip in chips
        for shape in arguments.shapes
    ]
    print_comparison(comparison)
    return start | {"steps": rows, "kernel and plain XLA": comparison}


def main() -> None:
    arguments = parse_arguments()
    versions = {
        name: importlib.metadata.version(name)
        for name in ("jax", "libtpu", "flashquinox")
    }
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    with tempfile.TemporaryDirectory() as directory:
        dump = pathlib.Path(directory)
        set_up(dump)
        try:
            device(arguments.chips[0])
            results = run(arguments, dump)
        except (ScheduleError, jax.errors.JaxRuntimeError) as error:
            sys.exit(f"tpu_schedule.py: {in_few_words(error)}")
    write_json(
        arguments.json,
        arguments={
            "chips": arguments.chips,
            "optimizers": arguments.optimizers,
            "shapes": arguments.shapes,
        },
        versions=versions,
        results=rounded(results),
    )


if __name__ == "__main__":
    run_main(main)
