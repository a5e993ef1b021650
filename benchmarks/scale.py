"""Compiles the step of large models for slices of TPUs, with the real TPU compiler, and
prints what each device would hold. No TPU is needed.

    python benchmarks/scale.py

Columns:

- arguments: weights, gradients and state of one device, in GB;
- B/param: that, over the parameters of one device;
- temp: what the compiled step takes beside them on each device, in MB;
- aliased: whether all of the weights and the state is updated in place;
- collectives: operations in which devices communicate;
- compile: seconds, tracing and lowering included.

Where the memory of a device is too small, the compiler says so and no more: arguments
are then all of them, over the number of devices.

The models are Llama 3.1 8B, 70B and 405B with stacked layers, bfloat16 weights and
gradients. Beside it, `optax.adamw` on float32 weights and gradients of the same
sharding: columns over `fsdp`, rows over `model`.
"""

import re
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import _tpu
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from _command_line import Parser, run_main, some_of, versions, write_json
from _models import count, llama, Shapes
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import flashquinox as fq


MODELS: dict[str, Shapes] = {
    "8B": llama(32, 4096, 14336, 1024, tied_head=False),
    "70B": llama(80, 8192, 28672, 1024, tied_head=False),
    "405B": llama(126, 16384, 53248, 1024, tied_head=False),
}
# How many devices `model` has; all others are `fsdp`.
SLICES = {
    "v5e-4x4": ("v5e:4x4", 4),
    "v5e-16x16": ("v5e:16x16", 8),
    "v5p-8x8x8": ("v5p:8x8x8", 8),
}
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "reduce-scatter",
)


def slice_mesh(name: str) -> Mesh:
    topology, model = SLICES[name]
    devices = topologies.get_topology_desc(
        platform="tpu", topology_name=topology
    ).devices
    return Mesh(np.reshape(devices, (-1, model)), ("fsdp", "model"))


def sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    spec = ["fsdp"] if len(shape) == 1 else ["model", "fsdp"]
    if len(shape) == 2 and shape[0] % (32 * mesh.shape["model"]) != 0:
        # The scales of norms, a row for each layer.
        spec = [None, "fsdp"]
    return NamedSharding(mesh, PartitionSpec(*[None] * (len(shape) - len(spec)), *spec))


def compile_step(
    make: Callable[[Any], Any], dtype: Any, shapes: Shapes, mesh: Mesh
) -> dict[str, Any]:
    shardings = {name: sharding(mesh, shape) for name, shape in shapes.items()}
    params = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=shardings[name])
        for name, shape in shapes.items()
    }
    init, step = make(shardings)
    start = time.perf_counter()
    initial = jax.jit(init).lower(params).compile()
    state = jtu.tree_map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(init, params),
        initial.output_shardings,
    )
    seconds_of_init = time.perf_counter() - start
    start = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params)
    seconds_to_trace = time.perf_counter() - start
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    memory: Any = compiled.memory_analysis()
    text = compiled.as_text() or ""
    found = {
        name: len(re.findall(rf"[ )]{name}(?:-start)?\(", text)) for name in COLLECTIVES
    }
    return {
        "argument bytes": memory.argument_size_in_bytes,
        "fits": True,
        "temporary bytes": memory.temp_size_in_bytes,
        "aliased bytes": memory.alias_size_in_bytes,
        "output bytes": memory.output_size_in_bytes,
        "collectives": {name: n for name, n in found.items() if n > 0},
        "kernels": len(re.findall(r"tpu_custom_call", text)),
        "init seconds": seconds_of_init,
        "trace seconds": seconds_to_trace,
        "compile seconds": seconds,
    }


def measure(
    make: Callable[[Any], Any], dtype: Any, shapes: Shapes, mesh: Mesh
) -> dict[str, Any]:
    try:
        return compile_step(make, dtype, shapes, mesh)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
    init, _ = make(None)
    params = {k: jax.ShapeDtypeStruct(shape, dtype) for k, shape in shapes.items()}
    arguments = jtu.tree_leaves((params, jax.eval_shape(init, params), params))
    total = sum(x.size * x.dtype.itemsize for x in arguments)
    return {"argument bytes": total // mesh.size, "fits": False}


def ours(shardings: Any) -> tuple[Callable, Callable]:
    optim = fq.adamw(1e-3, shardings=shardings, backend="tpu")
    return optim.init, optim.step


def of_optax(shardings: Any) -> tuple[Callable, Callable]:
    optim = optax.adamw(1e-3)

    def init(params: Any) -> Any:
        state: Any = optim.init(params)
        if shardings is None:
            return state
        constrain = lambda x: jax.lax.with_sharding_constraint(x, shardings)
        adam = state[0]._replace(mu=constrain(state[0].mu), nu=constrain(state[0].nu))
        return adam, *state[1:]

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = optim.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return init, step


CONTENDERS = {
    "flashquinox": (ours, jnp.bfloat16),
    "optax, float32": (of_optax, jnp.float32),
}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "--models",
        type=partial(some_of, MODELS),
        default=list(MODELS),
        help=f"comma-separated; of {', '.join(MODELS)} (default: all)",
    )
    parser.add_argument(
        "--slices",
        type=partial(some_of, SLICES),
        default=list(SLICES),
        help=f"comma-separated; of {', '.join(SLICES)} (default: all)",
    )
    parser.add_json()
    arguments = parser.parse_args()
    _tpu.set_up()
    there = versions("jax", "jaxlib", "libtpu", "optax", "flashquinox")
    print(", ".join(f"{k} {v}" for k, v in there.items()))
    print(
        f"{'':5}{'slice':>11}  {'':16}{'arguments':>10}{'B/param':>9}{'temp':>10}"
        f"{'aliased':>9}{'collectives':>13}{'compile':>9}"
    )
    rows = []
    for model in arguments.models:
        for name in arguments.slices:
            mesh = slice_mesh(name)
            for contender, (make, dtype) in CONTENDERS.items():
                shapes = MODELS[model]
                row = measure(make, dtype, shapes, mesh)
                row = {"model": model, "slice": name, "contender": contender} | row
                row |= {"parameters": count(shapes), "devices": mesh.size}
                rows.append(row)
                print_row(row)
    write_json(
        arguments.json,
        versions=there,
        rows=rows,
    )


def print_row(row: dict[str, Any]) -> None:
    size = row["argument bytes"]
    per_parameter = size * row["devices"] / row["parameters"]
    start = (
        f"{row['model']:5}{row['slice']:>11}  {row['contender']:16}"
        f"{size / 1e9:7.3f} GB{per_parameter:9.3f}"
    )
    if not row["fits"]:
        print(f"{start}  does not fit", flush=True)
        return
    # All outputs but the table of them.
    in_place = row["aliased bytes"] >= 0.999 * row["output bytes"]
    temporary = row["temporary bytes"] / 1e6
    print(
        f"{start}{temporary:7.2f} MB"
        f"{'all' if in_place else 'NOT ALL':>9}"
        f"{sum(row['collectives'].values()):13}{row['compile seconds']:7.1f} s",
        flush=True,
    )


if __name__ == "__main__":
    run_main(main)
