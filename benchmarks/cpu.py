"""How fast is a step on CPUs, and what does it need, beside Optax?

    python benchmarks/cpu.py
    python benchmarks/cpu.py --shapes 4096x4096,1000x1001 --json cpu.json

AdamW: ours on bfloat16 weights, by programs in C++ and by plain XLA, and with moments
in float32; Optax's on float32 weights. Columns:

- step: milliseconds of a compiled step whose arguments are donated: the median of the
  repeats, in which all contenders take turns;
- temp: what the compiled step takes beside its arguments, in bytes per parameter;
- trace: seconds to trace and lower it, where nothing was traced before; with the
  program in C++, which is compiled then, and kept for later processes of a user;
- compile: seconds to compile it;
- in brackets: as multiples of Optax's; of trace and compile, of the sum of the two.
"""

import os
import pathlib
import statistics
import time
from typing import Any


os.environ["JAX_PLATFORMS"] = "cpu"
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _command_line import (
    Parser,
    positive_integer,
    run_main,
    shapes,
    versions,
    write_json,
)
from _process import without_kept_programs

import flashquinox as fq


_SHAPES = ",".join(["512x512", "512x2048", "2048x512", "1000x512"] * 5)


def _optax_step(weights: Any, state: Any, grads: Any) -> Any:
    updates, state = _OPTAX.update(grads, state, weights)
    return optax.apply_updates(weights, updates), state


_OPTAX = optax.adamw(1e-3, weight_decay=0.01)
_ours = lambda **options: fq.adamw(1e-3, weight_decay=0.01, **options)
_OURS, _BY_XLA = _ours(backend="cpu"), _ours(backend="xla")
_PLAIN = _ours(backend="cpu", storage=fq.Storage(moments="float32"))
CONTENDERS = {
    "optax float32": (_OPTAX.init, _optax_step, jnp.float32),
    "flashquinox": (_OURS.init, _OURS.step, jnp.bfloat16),
    "flashquinox, plain XLA": (_BY_XLA.init, _BY_XLA.step, jnp.bfloat16),
    "flashquinox, float32 moments": (_PLAIN.init, _PLAIN.step, jnp.bfloat16),
}


class _Contender:
    def __init__(self, name: str, shapes: list[tuple[int, ...]]):
        init, step, dtype = CONTENDERS[name]
        rng = np.random.default_rng(0)
        weights = [jnp.asarray(rng.normal(0, 0.02, x), dtype) for x in shapes]
        self.grads = [0.01 * x for x in weights]
        state = jax.jit(init)(weights)
        jax.clear_caches()
        start = time.perf_counter()
        step = jax.jit(step, donate_argnums=(0, 1))
        lowered = step.lower(weights, state, self.grads)
        self.trace = time.perf_counter() - start
        self.step = lowered.compile()
        self.compile = time.perf_counter() - start - self.trace
        size = sum(x.size for x in weights)
        memory: Any = self.step.memory_analysis()
        self.temp = memory.temp_size_in_bytes / size
        self.carry = weights, state
        self.seconds: list[float] = []

    def run(self) -> None:
        start = time.perf_counter()
        self.carry = jax.block_until_ready(self.step(*self.carry, self.grads))
        self.seconds.append(time.perf_counter() - start)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--shapes", type=shapes, default=_SHAPES)
    parser.add_argument("--repeats", type=positive_integer, default=31)
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    without_kept_programs()
    contenders = {name: _Contender(name, options.shapes) for name in CONTENDERS}
    for _ in range(options.repeats + 1):
        for contender in contenders.values():
            contender.run()
    rows = {
        name: {
            # The first run of each is left out.
            "step_ms": 1e3 * statistics.median(x.seconds[1:]),
            "fastest_step_ms": 1e3 * min(x.seconds[1:]),
            "temp_bytes_per_parameter": x.temp,
            "trace_s": x.trace,
            "compile_s": x.compile,
        }
        for name, x in contenders.items()
    }
    base = rows["optax float32"]
    prepared = lambda row: row["trace_s"] + row["compile_s"]
    for name, row in rows.items():
        print(
            f"{name:30} step {row['step_ms']:7.1f} ms "
            f"[{row['step_ms'] / base['step_ms']:.2f}]  "
            f"temp {row['temp_bytes_per_parameter']:5.2f} B/param  "
            f"trace {row['trace_s']:.2f} s  compile {row['compile_s']:.2f} s "
            f"[{prepared(row) / prepared(base):.2f}]"
        )
    write_json(
        options.json,
        cores=os.cpu_count(),
        shapes=options.shapes,
        versions=versions("flashquinox", "jax", "jaxlib", "optax"),
        rows=rows,
    )


if __name__ == "__main__":
    run_main(main)
