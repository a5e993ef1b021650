"""What XLA makes of gradient release with a state in host memory, for an H100: no GPU
is needed, but JAX's plugin for CUDA (`jax_cuda12_plugin`).

The loop of the backward pass, as the program of an H100 runs it: copies by engines
(`AsyncStart`, with what they copy by), CUDA graphs (`CommandBuffer`, with the number of
kernels in them) and kernels, in their order.

    python benchmarks/host_schedule.py --size 8B --window 1024
"""

import os
import pathlib
import re
import tempfile
from typing import Any


os.environ["XLA_FLAGS"] = f"--xla_dump_to={tempfile.mkdtemp()}"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from _absent_h100 import h100
from _command_line import Parser, positive_integer, run_main, versions
from _llama import Llama, loss, SIZES
from jax.sharding import SingleDeviceSharding

import flashquinox as fq


def compile_step(size: str, window: int) -> None:
    device = SingleDeviceSharding(h100())
    optim = fq.adamw(1e-5, weight_decay=0.01, backend="gpu")
    model = jax.eval_shape(lambda: Llama(SIZES[size], jax.random.key(0), jnp.bfloat16))
    state = jax.eval_shape(optim.init, model)
    placed = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device)
    tokens = jax.ShapeDtypeStruct((1, window + 1), jnp.int32)
    model, state, tokens = jtu.tree_map(placed, (model, state, tokens))
    # Arguments of such a program are on the device.
    is_large = lambda x: x.ndim > 0 and x.size >= 2**9
    three = lambda x: x * jnp.asarray(3, x.dtype)
    host, here = jax.memory.Space.Host, jax.memory.Space.Device

    def step(model: Any, state: Any, tokens: Any) -> Any:
        away = lambda x: jax.device_put(three(x), host) if is_large(x) else x
        state = lax.optimization_barrier(jtu.tree_map(away, state))
        new = fq.release_step(optim, loss, model, state, tokens)
        model, state, value = lax.optimization_barrier(new)
        back = lambda x: three(jax.device_put(x, here)) if is_large(x) else x
        return model, jtu.tree_map(back, state), value

    traced = jax.jit(step, donate_argnums=(0, 1)).trace(model, state, tokens)
    traced.lower(lowering_platforms=("cuda",)).compile()


def last_loop() -> list[str]:
    """The operations of the last loop, and how deep they are in graphs and copies."""
    folder = pathlib.Path(os.environ["XLA_FLAGS"].partition("=")[2])
    (path,) = folder.glob("*jit_step.thunk_sequence_after_thunk*")
    body = path.read_text().rpartition("body:")[2]
    # What comes after the loop is not indented.
    body = re.split(r"^\d", body, maxsplit=1, flags=re.MULTILINE)[0]
    lines = re.findall(r"^ +\d+: .*$", body, re.MULTILINE)
    return [
        re.sub(r" *\[(prev|source).*?\]", " ", x.replace(":", "", 1)) for x in lines
    ]


def shown(lines: list[str]) -> list[str]:
    found: list[str] = []
    first = len(lines[0]) - len(lines[0].lstrip())
    for line in lines:
        depth = len(line) - len(line.lstrip()) - first
        kind = line.split()[1].removeprefix("k")
        if depth == 0:
            found.append(kind)
        elif kind in ("Copy", "CustomKernel"):
            found[-1] += f" {kind}"
    counted, last, times = [], "", 0
    for kind in [*found, ""]:
        if kind == last:
            times += 1
            continue
        if last:
            name, *inside = last.split()
            held = {x: inside.count(x) for x in sorted(set(inside))}
            text = ", ".join(f"{number} {x}" for x, number in held.items())
            counted.append(f"{times} x {name}" + (f" ({text})" if text else ""))
        last, times = kind, 1
    return counted


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--size", choices=SIZES, default="1.2B", help="default: 1.2B")
    parser.add_argument("--window", type=positive_integer, default=1024)
    arguments = parser.parse_args()
    there = versions("jax", "jaxlib")
    print(", ".join(f"{k} {v}" for k, v in there.items()))
    compile_step(arguments.size, arguments.window)
    print("\n".join(shown(last_loop())))


if __name__ == "__main__":
    run_main(main)
