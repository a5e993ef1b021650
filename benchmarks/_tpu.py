"""Compiles for TPUs on a machine without one, and reads the compiler's schedules."""

import dataclasses
import functools as ft
import math
import os
import pathlib
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.tree_util as jtu
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

from flashquinox._backends.dispatch import by_platform


TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}


class ScheduleError(Exception):
    """A dump that is not as this module believes dumps to be."""


def set_up(dump: pathlib.Path | None = None) -> None:
    """Before anything is compiled: libtpu reads all of this once, when it is loaded.
    Schedules go into the directory `dump`."""
    jax.config.update("jax_platforms", "cpu")
    # Otherwise libtpu asks the network which TPU this machine has.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # No TPU is used, so other processes may compile for some at the same time.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    if dump is None:
        return
    flags = os.environ.get("LIBTPU_INIT_ARGS", "")
    dumping = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
    os.environ["LIBTPU_INIT_ARGS"] = f"{flags} {dumping}".strip()


@ft.cache
def device(chip: str) -> Any:
    return topologies.get_topology_desc(
        platform="tpu", topology_name=TOPOLOGIES[chip]
    ).devices[0]


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled function, and the kernels in it: `pallas_call` equations."""

    compiled: Any
    kernels: list[Any]
    seconds: float


def compile_for(
    chip: str,
    function: Callable,
    *shapes: Any,
    donate: tuple[int, ...] = (),
    dump: pathlib.Path | None = None,
) -> Program:
    """Leaves the dump of this program, and of no other, in that directory: the one of
    `set_up`. Shapes that have no sharding are those of arrays on the device."""
    for file in dump.iterdir() if dump is not None else ():
        file.unlink()
    target = device(chip)
    here = SingleDeviceSharding(target)
    shapes = jtu.tree_map(
        lambda x: (
            x
            if x.sharding is not None
            else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)
        ),
        shapes,
    )
    # Kernels ask this mesh for their generation.
    kind = AbstractDevice(target.device_kind, target.num_cores, "tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=kind)):
        traced = jax.jit(function, donate_argnums=donate).trace(*shapes)
        start = time.perf_counter()
        compiled = traced.lower().compile()
        seconds = time.perf_counter() - start
        kernels = [
            eqn
            for eqn in equations(traced.jaxpr.jaxpr)
            if eqn.primitive.name == "pallas_call"
        ]
    return Program(compiled, kernels, seconds)


def on_host(chip: str, tree: Any) -> Any:
    """Shapes of a state in host memory: those of large arrays are there, as
    `state_memory="pinned_host"` has them."""
    there = SingleDeviceSharding(device(chip), memory_kind="pinned_host")

    def one(x: Any) -> Any:
        if x.size < 2**14:
            return x
        space = jax.memory.Space.Host
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=there, _memory_space=space
        )

    return jtu.tree_map(one, tree)


def moved(text: str, least: int, operations: str = "copy|transpose") -> list[str]:
    """The arrays of at least so many elements, such as "bf16[2,3]", that these
    operations of a compiled program make."""
    line = rf"\s*(?:ROOT )?%\S+ = \(?(\w+\[([\d,]*)\])[^=]* (?:{operations})\("
    found = filter(None, map(re.compile(line).match, text.splitlines()))
    return [x[1] for x in found if elements(x[2]) >= least]


def elements(lengths: str) -> int:
    """Of an array with axes of these lengths, such as "2,3"."""
    return math.prod(int(x) for x in lengths.split(",") if x)


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations, those of inner functions included; of steps, as on TPUs."""
    for eqn in jaxpr.eqns:
        yield eqn
        if eqn.primitive.name == by_platform.name:
            function = by_platform.function_of(eqn.params, "tpu")
            step = jax.make_jaxpr(function)(*[x.aval for x in eqn.invars])
            yield from equations(step.jaxpr)
        for inner in jtu.tree_leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            # Closed jaxprs have their jaxpr inside.
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


#
# Kernels as written
#


def grid(kernel: Any) -> tuple[int, ...]:
    return tuple(kernel.params["grid_mapping"].grid)


def kernel_name(kernel: Any) -> str:
    params = kernel.params
    return params["name"] if "name" in params else params["name_and_src_info"].name


def loop_lengths(kernel: Any) -> list[int]:
    """Of the loops in the body of a kernel."""
    body = equations(kernel.params["jaxpr"])
    return [eqn.params["length"] for eqn in body if eqn.primitive.name == "scan"]


def operand_bytes(kernel: Any) -> int:
    """Of all operands and results, each once."""
    avals = [x.aval for x in (*kernel.invars, *kernel.outvars)]
    return sum(aval.size * aval.dtype.itemsize for aval in avals)


#
# Kernels as scheduled
#


@dataclasses.dataclass(frozen=True)
class Bundle:
    """One very long instruction word."""

    # In how many loops it is by the dump, or one of its instructions was.
    depth: int
    text: str
    # How many slots of each unit are taken.
    slots: dict[str, int]

    @property
    def empty(self) -> bool:
        return _EMPTY.search(self.text) is not None


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Of one core's part of a kernel."""

    bundles: list[Bundle]
    # Of each unit, how many slots a bundle has.
    capacity: dict[str, int]
    # The part of the grid that one core does.
    core_grid: tuple[int, ...]
    # How often each bundle runs.
    runs: list[int]

    @property
    def executed(self) -> int:
        return sum(self.runs)

    def slots(self, unit: str) -> int:
        """How many slots of this unit are taken in all."""
        pairs = zip(self.bundles, self.runs, strict=True)
        return sum(bundle.slots[unit] * runs for bundle, runs in pairs)

    def opcodes(self) -> Counter[str]:
        """How often each vector instruction runs."""
        counter = Counter()
        for bundle, runs in zip(self.bundles, self.runs, strict=True):
            code = _COMMENT.sub("", bundle.text)
            for operation, store in _OPCODE.findall(code):
                counter[operation or store] += runs
        return counter


_BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:\s*((?:>\s*)*)\{")
_EMPTY = re.compile(r":\s*\{\}")
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_OPCODE = re.compile(r"= (v[a-z][\w.]*)|(vst[\w.]*) ")
_GRID = re.compile(r"iteration_bounds: \(([\d, ]+)\)")
_JUMP = re.compile(r"sbr\.rel \(!?(%p\w+)\) target = \$region(\d+)")
_EXIT = r"= scmp\.ge\.s32\.totalorder (%s\w+), (\d+) /\* loop exit test \*/"

# More than on any generation.
_MOST_BEHIND_JUMP = 8


def schedule(dump: pathlib.Path, kernel: Any) -> Schedule:
    """That of a kernel from its last compilation."""
    text = _read(dump, kernel, "final_bundles")
    table = _read(dump, kernel, "final_hlo-static-per-bundle-utilization")
    capacity, slots = _utilization(table)
    bundles = _bundles(text, slots)
    bounds = {
        tuple(int(x) for x in bounds.split(",") if x.strip())
        for bounds in _GRID.findall(text)
    }
    if len(bounds) != 1:
        raise ScheduleError(f"{len(bounds)} grids in the dump of a kernel")
    (core_grid,) = bounds
    if math.prod(grid(kernel)) % math.prod(core_grid) != 0:
        raise ScheduleError(f"a grid {grid(kernel)}, and of one core {core_grid}")
    runs = _runs(bundles, math.prod(core_grid), loop_lengths(kernel))
    return Schedule(bundles, capacity, core_grid, runs)


def _read(dump: pathlib.Path, kernel: Any, what: str) -> str:
    # The name of the kernel, the number of its instance, and that of the pass. Other
    # passes have names that end alike.
    name = re.compile(rf"\d+-{kernel_name(kernel)}(\.\d+)?-\d+-{what}\.txt")
    files = [file for file in dump.iterdir() if name.fullmatch(file.name)]
    if len(files) != 1:
        raise ScheduleError(f"{len(files)} files {what} for {kernel_name(kernel)}")
    return files[0].read_text()


def _utilization(table: str) -> tuple[dict[str, int], list[dict[str, int]]]:
    """What there is of each unit, and what each bundle takes."""
    _, names, capacity, _, *rows = table.splitlines()
    units = [name.strip() for name in names.split(",")]

    def numbers(row: str) -> dict[str, int]:
        return dict(zip(units, map(int, row.split()), strict=True))

    return numbers(capacity), [numbers(row) for row in rows if row.strip()]


def _bundles(text: str, slots: list[dict[str, int]]) -> list[Bundle]:
    # Comments may hold line breaks; a bundle ends where the next one starts.
    parts = []
    for line in text.splitlines():
        start = _BUNDLE.match(line)
        if start is not None:
            parts.append((start[1].count(">"), [line]))
        elif parts:
            parts[-1][1].append(line)
    if len(parts) != len(slots):
        raise ScheduleError(f"{len(parts)} bundles, but {len(slots)} in the table")
    return [
        Bundle(depth, "\n".join(lines), used)
        for (depth, lines), used in zip(parts, slots, strict=True)
    ]


def _runs(bundles: list[Bundle], steps: int, lengths: list[int]) -> list[int]:
    """How often each bundle runs: once outside of the loop over the grid. In that loop,
    in all of its turns, but for the kernel's own body, which the turns that only fill
    and drain the pipeline jump over; and in the loops of the body, as often as they
    turn. Other bundles that a turn jumps over count. For a grid of one step, there is
    no loop.
    """
    jumps, runs = _jumps(bundles), [1] * len(bundles)
    loops = sorted(_loop(bundles, jump) for jump in jumps if jump.target <= jump.source)
    inner = loops if steps == 1 else loops[1:]
    for loop in inner:
        if loop.turns not in lengths:
            raise ScheduleError(f"{loop.turns} turns of a loop written as {lengths}")
    if steps > 1:
        _count_grid(runs, jumps, loops, steps)
    for loop in inner:
        for i in range(loop.start, loop.end):
            runs[i] *= loop.turns
    return runs


def _count_grid(
    runs: list[int], jumps: list["_Jump"], loops: list["_Loop"], steps: int
) -> None:
    """Counts the turns of the loop over the grid, the first one. Of a body without
    loops, it is not known what is jumped over: all counts."""
    if not loops or any(loop.end > loops[0].end for loop in loops[1:]):
        raise ScheduleError(f"{len(loops)} loops, not a grid's and others inside")
    outer, *inner = loops
    if not steps <= outer.turns <= steps + 2:
        raise ScheduleError(f"{outer.turns} turns for a grid of {steps} steps")
    runs[outer.start : outer.end] = [outer.turns] * (outer.end - outer.start)
    if not inner:
        return
    first, last = inner[0].start, max(loop.end for loop in inner)
    around = [
        jump
        for jump in jumps
        if outer.start <= jump.source < first and last <= jump.target
    ]
    if len(around) != 1:
        raise ScheduleError(f"{len(around)} jumps over the body of a kernel")
    body = slice(around[0].source + 1, around[0].target)
    runs[body] = [steps] * (body.stop - body.start)


@dataclasses.dataclass(frozen=True)
class _Jump:
    source: int
    target: int
    condition: str


@dataclasses.dataclass(frozen=True, order=True)
class _Loop:
    """From a bundle to before another one."""

    start: int
    end: int
    turns: int


def _jumps(bundles: list[Bundle]) -> list[_Jump]:
    jumps = []
    for source, bundle in enumerate(bundles):
        for condition, region in _JUMP.findall(bundle.text):
            mark = re.compile(rf"Start(/End empty)? region {region}\b")
            targets = [i for i, x in enumerate(bundles) if mark.search(x.text)]
            if len(targets) != 1:
                raise ScheduleError(f"{len(targets)} targets of a jump")
            jumps.append(_Jump(source, targets[0], condition))
    return jumps


def _loop(bundles: list[Bundle], jump: _Jump) -> _Loop:
    """One that counts up by 1 from 0."""
    start, end = jump.target, jump.source + 1
    # Some bundles behind a jump still belong to the loop. Their marks tell, though one
    # or the other may have the marks of an instruction from elsewhere, or be empty.
    depth = bundles[start].depth
    for i in range(end, min(end + _MOST_BEHIND_JUMP, len(bundles))):
        if bundles[i].depth >= depth and not bundles[i].empty:
            end = i + 1
    while end < len(bundles) and bundles[end].empty:
        end += 1
    text = "\n".join(bundle.text for bundle in bundles[start:end])
    exits = re.findall(rf"{jump.condition} {_EXIT}", text)
    if len(exits) != 1:
        raise ScheduleError(f"{len(exits)} exits of a loop")
    ((counter, limit),) = exits
    if f"{counter} = sadd.s32 1, " not in text:
        raise ScheduleError("a loop that does not count up by 1")
    return _Loop(start, end, int(limit))
