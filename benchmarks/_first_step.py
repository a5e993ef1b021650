"""What the first step of a process takes, before it runs."""

import itertools
import os
import statistics
import time
from typing import Any

import jax
import jax.tree_util as jtu
import numpy as np
from _adamw_steps import optax_step, ours
from _process import in_process
from _zoo import ZOO


_PARTS = ("trace", "lower", "compile", "run")

HEADER = (
    f"{'model':>15}{'leaves':>8}  {'':8}{'trace':>8}{'lower':>8}{'compile':>9}"
    f"{'run':>8}{'lower and compile':>20}{'all':>7}"
)


def rows_of(model: str, repeats: int) -> list[dict[str, Any]]:
    """Optax's and ours: medians of so many processes."""
    rows: list[dict[str, Any]] = []
    for contender in ("optax", "auto"):
        found = [in_process(_measure, contender, model) for _ in range(repeats)]
        row: dict[str, Any] = {
            "model": model,
            "leaves": len(ZOO[model].leaves()),
            "contender": contender,
            "device": found[0]["device"],
        }
        row |= {x: statistics.median([each[x] for each in found]) for x in _PARTS}
        rows.append(row)
        reference = rows[0]
        for name, parts in (("ratio", ("lower", "compile")), ("all", _PARTS)):
            seconds = lambda row: sum([row[x] for x in parts])  # noqa: B023
            row[name] = seconds(row) / seconds(reference)
    return rows


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['model']:>15}{row['leaves']:8}  {row['contender']:8}{row['trace']:8.3f}"
        f"{row['lower']:8.3f}{row['compile']:9.3f}{row['run']:8.3f}{row['ratio']:20.2f}"
        f"{row['all']:7.2f}"
    )


def _measure(contender: str, model: str) -> dict[str, Any]:
    """In a process that has made no program yet."""
    # The driver would know what processes before had made of PTX.
    os.environ["CUDA_CACHE_DISABLE"] = "1"
    jax.config.update("jax_enable_compilation_cache", False)
    device = jax.devices()[0]
    shapes = ZOO[model].leaves()
    made = optax_step(shapes) if contender == "optax" else ours("auto", shapes)
    step, structs = made
    # Of zeros that come from the host: nothing is compiled for them.
    arrays = jtu.tree_map(
        lambda x: jax.device_put(np.zeros(x.shape, x.dtype), device), structs
    )
    jax.block_until_ready(arrays)
    times = [time.perf_counter()]
    traced = jax.jit(step, donate_argnums=(0, 1)).trace(*structs)
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    compiled = lowered.compile()
    times.append(time.perf_counter())
    jax.block_until_ready(compiled(*arrays))
    times.append(time.perf_counter())
    parts = [end - start for start, end in itertools.pairwise(times)]
    return {"device": device.device_kind} | dict(zip(_PARTS, parts, strict=True))
