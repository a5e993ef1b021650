"""What the first step of a process takes, before it runs."""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.tree_util as jtu
import numpy as np
import optax
from _absent_h100 import h100
from _adamw_steps import optax_step, ours
from _process import in_process, keep_programs_in
from _zoo import ZOO
from jax.sharding import SingleDeviceSharding

import flashquinox as fq


_OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "optax": optax.adamw,
    "flashquinox": fq.adamw,
}
_PARTS = ("trace", "lower", "compile", "run")

HEADER = (
    f"{'model':>15}{'leaves':>8}  {'':12}{'init':>8}{'trace':>8}{'lower':>8}"
    f"{'compile':>9}"
    f"{'run':>8}{'lower and compile':>20}{'all':>7}"
)


def rows_of(
    model: str, repeats: int, for_h100: bool, again: bool
) -> list[dict[str, Any]]:
    """Optax's and ours: medians of so many processes. `again`: after one that has kept
    its programs."""
    rows: list[dict[str, Any]] = []
    measure = _compile_for_h100 if for_h100 else _measure
    for contender in ("optax", "flashquinox"):
        with tempfile.TemporaryDirectory() as kept:
            if again:
                in_process(measure, contender, model, kept)
            found = [
                in_process(
                    measure,
                    contender,
                    model,
                    kept if again else tempfile.mkdtemp(dir=kept),
                )
                for _ in range(repeats)
            ]
        row: dict[str, Any] = {
            "model": model,
            "leaves": len(ZOO[model].leaves()),
            "contender": contender,
            "device": found[0]["device"],
        }
        parts = [x for x in ("init", *_PARTS) if x in found[0]]
        row |= {x: statistics.median([each[x] for each in found]) for x in parts}
        rows.append(row)
        for name, of in (("ratio", ("lower", "compile")), ("all", parts)):
            ours, reference = [sum([x[y] for y in of]) for x in (row, rows[0])]
            row[name] = ours / reference
    return rows


def line(row: dict[str, Any]) -> str:
    init, run = (f"{row[x]:.3f}" if x in row else "" for x in ("init", "run"))
    return (
        f"{row['model']:>15}{row['leaves']:8}  {row['contender']:12}{init:>8}"
        f"{row['trace']:8.3f}{row['lower']:8.3f}{row['compile']:9.3f}{run:>8}"
        f"{row['ratio']:20.2f}{row['all']:7.2f}"
    )


def _measure(contender: str, model: str, kept: str) -> dict[str, Any]:
    """In a process that has made no program yet."""
    keep_programs_in(kept)
    device = jax.devices()[0]
    shapes = ZOO[model].leaves()
    step, structs = optax_step(shapes) if contender == "optax" else ours("auto", shapes)
    # Of zeros that come from the host: nothing is compiled for them.
    arrays = jtu.tree_map(
        lambda x: jax.device_put(np.zeros(x.shape, x.dtype), device), structs
    )
    jax.block_until_ready(arrays)
    start = time.perf_counter()
    jax.block_until_ready(_OPTIMIZERS[contender](1e-3).init(arrays[0]))
    init = time.perf_counter() - start
    parts, compiled = _made(step, structs, time.perf_counter)
    start = time.perf_counter()
    jax.block_until_ready(compiled(*arrays))
    run = time.perf_counter() - start
    return {"device": device.device_kind, "init": init, "run": run} | parts


def _compile_for_h100(contender: str, model: str, kept: str) -> dict[str, Any]:
    """Where there is none, in seconds of CPU time."""
    keep_programs_in(kept)
    jax.config.update("jax_platforms", "cpu")
    placement = SingleDeviceSharding(h100())
    shapes = ZOO[model].leaves()
    step, structs = (
        optax_step(shapes) if contender == "optax" else ours("gpu", shapes, True)
    )
    structs = jtu.tree_map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement), structs
    )
    return {"device": "none"} | _made(step, structs, time.process_time)[0]


def _made(
    step: Callable[..., Any], structs: Any, now: Callable[[], float]
) -> tuple[dict[str, float], Any]:
    """How long each part takes, and the compiled step."""
    jax.config.update("jax_enable_compilation_cache", False)
    times = [now()]
    traced = jax.jit(step, donate_argnums=(0, 1)).trace(*structs)
    times.append(now())
    lowered = traced.lower()
    times.append(now())
    compiled = lowered.compile()
    times.append(now())
    parts = [end - start for start, end in itertools.pairwise(times)]
    return dict(zip(_PARTS, parts, strict=False)), compiled
