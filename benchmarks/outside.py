"""How long do functions of models and states take outside of programs?

    python benchmarks/outside.py
    python benchmarks/outside.py --models resnet50,efficientnet-b0 --json outside.json

Outside of `jit`, JAX compiles a program for each operation and shape. Functions of this
library put small arrays of all shapes into the same few programs. For each model and
function, in a process that has called none of them:

- shapes: how many shapes the model has;
- seconds, programs: what its first call takes, and how many programs are compiled;
- of each shape: the same if every shape has programs of its own.
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from _command_line import Parser, run_main, some_of, versions, write_json
from _process import in_process, keep_programs_in
from _zoo import ZOO

import flashquinox as fq
from flashquinox._common import eager
from flashquinox.exchange import from_optax, to_optax


_DEFAULT = "mlp,resnet50,efficientnet-b0,gpt2"


def measure(model: str, alone: bool, kept: str) -> dict[str, Any]:
    """What each function takes."""
    keep_programs_in(kept)
    if alone:
        eager._MOST_BYTES = eager._MOST_BYTES_BOTH_WAYS = 0
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: Any) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    draw = np.random.default_rng(0)
    weights = {
        name: jax.device_put(draw.standard_normal(shape, np.float32))
        for name, shape in ZOO[model].leaves().items()
    }
    optim = fq.adamw(1e-3)
    rows: dict[str, Any] = {}

    def timed(name: str, function: Callable[[], Any]) -> Any:
        compiled.clear()
        start = time.perf_counter()
        result = jax.block_until_ready(function())
        rows[name] = (time.perf_counter() - start, len(compiled))
        return result

    prepared, state = timed("prepare", lambda: fq.prepare(weights, optim))
    timed("master_weights", lambda: fq.master_weights(prepared, state))
    timed("widen_corrections", lambda: fq.widen_corrections(prepared, state))
    timed("cast", lambda: fq.cast(weights, jnp.float16))
    timed("ema(...).init", lambda: fq.ema(0.9).init(prepared, state))
    numerics = lambda: fq.check_numerics(prepared, state, 1e-3) and None
    timed("check_numerics", numerics)
    zeros = jtu.tree_map(lambda x: np.zeros(x.shape, np.float32), weights)
    adam = optax.ScaleByAdamState(jnp.int32(1), zeros, zeros)
    others = (adam, optax.EmptyState(), optax.EmptyState())
    timed("from_optax", lambda: from_optax(others, state))
    timed("to_optax", lambda: to_optax(state, others))
    return {
        "device": jax.devices()[0].device_kind,
        "shapes": len(set(ZOO[model].leaves().values())),
        "rows": rows,
    }


def rows_of(model: str) -> list[dict[str, Any]]:
    found = []
    for alone in (False, True):
        with tempfile.TemporaryDirectory() as kept:
            found.append(in_process(measure, model, alone, kept))
    together, alone = found
    return [
        {
            "model": model,
            "shapes": together["shapes"],
            "function": name,
            "device": together["device"],
            "seconds": seconds,
            "programs": programs,
            "seconds of each shape": alone["rows"][name][0],
            "programs of each shape": alone["rows"][name][1],
        }
        for name, (seconds, programs) in together["rows"].items()
    ]


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--models", type=partial(some_of, list(ZOO)), default=_DEFAULT)
    parser.add_json()
    settings = parser.parse_args()
    there = versions("jax", "jaxlib", "optax", "flashquinox")
    print(", ".join(f"{k} {v}" for k, v in there.items()))
    print(
        f"{'model':>16}{'shapes':>8}  {'function':18}{'seconds':>9}{'programs':>10}"
        f"{'of each shape':>18}"
    )
    rows = []
    for model in settings.models:
        for row in rows_of(model):
            rows.append(row)
            print(
                f"{model:>16}{row['shapes']:8}  {row['function']:18}"
                f"{row['seconds']:9.2f}{row['programs']:10}"
                f"{row['seconds of each shape']:11.2f}"
                f"{row['programs of each shape']:7}",
                flush=True,
            )
    write_json(settings.json, versions=there, rows=rows)


if __name__ == "__main__":
    run_main(main)
