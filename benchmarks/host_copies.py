"""State in host memory, copied beside products: is the time of the copies hidden?

A loop over layers, from the last to the first, like the backward pass of
`flashquinox.release_step`: eight products of matrices a layer, and three arrays of its
state in host memory, which arrive, are changed, and leave. XLA copies their slices by
engines, as their offsets are affine in the counter of the loop. Printed is the median
of the milliseconds of a loop:

- `products`: nothing else;
- `on the device`: the state is there;
- `in CUDA graphs`: what a layer has become leaves beside the next one's first products,
  whose own arrives beside the others. XLA records all of it into one graph, which
  takes one thing after the other;
- `without graphs`: the same, with `xla_gpu_enable_command_buffer=""`;
- `out of graphs`: the same with graphs, and some bytes go from one memory to the other
  beside each batch of copies, which no graph can hold.

    python benchmarks/host_copies.py --json results.json
    python benchmarks/host_copies.py --small
"""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any


os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from _command_line import Parser, run_main, versions, write_json
from jax.sharding import SingleDeviceSharding


Sizes = dict[str, int]
LARGE: Sizes = {"layers": 16, "width": 8192, "products": 8, "bytes": 2**26, "arrays": 3}
SMALL: Sizes = {"layers": 4, "width": 64, "products": 3, "bytes": 2**10, "arrays": 3}
WITHOUT_GRAPHS = {"xla_gpu_enable_command_buffer": ""}
_HOST, _DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


def _to_host(x: Any) -> Any:
    return jax.device_put(x, _HOST)


def _to_device(x: Any) -> Any:
    return jax.device_put(x, _DEVICE)


def _index(x: Any, i: Any) -> Any:
    return lax.dynamic_index_in_dim(x, i, keepdims=False)


def _write(stack: Any, new: Any, i: Any) -> Any:
    return [
        lax.dynamic_update_index_in_dim(x, y, i, 0)
        for x, y in zip(stack, new, strict=True)
    ]


def _products(x: Any, weight: Any, number: int) -> Any:
    for _ in range(number):
        x = (x @ weight) * jnp.bfloat16(0.01)
    return x


def _changed(arrays: Any, x: Any, one: Any) -> Any:
    """By one, once x is known."""
    zero = x[0, :1].astype(jnp.int8) * jnp.int8(0)
    return [y + (one[:1] + zero) for y in arrays]


_ONE = np.ones(8, np.int8)


def products_alone(sizes: Sizes) -> Callable[..., Any]:
    def loop(state: Any, x: Any, weights: Any) -> Any:
        turn = lambda x, weight: (_products(x, weight, sizes["products"]), None)
        return state, lax.scan(turn, x, weights, reverse=True)[0]

    return loop


def on_device(sizes: Sizes) -> Callable[..., Any]:
    def loop(state: Any, x: Any, weights: Any) -> Any:
        def turn(i: Any, carry: Any) -> Any:
            state, x = carry
            layer = sizes["layers"] - 1 - i
            x = _products(x, _index(weights, layer), sizes["products"])
            here = [_index(y, layer) for y in state]
            return _write(state, _changed(here, x, jnp.asarray(_ONE)), layer), x

        return lax.fori_loop(0, sizes["layers"], turn, (state, x))

    return loop


def beside(sizes: Sizes, out_of_graphs: bool) -> Callable[..., Any]:
    layers, number = sizes["layers"], sizes["products"]

    def turn(layer: Any, state: Any, x: Any, leaving: Any, one: Any, w: Any) -> Any:
        if leaving is not None:
            state = _write(state, _to_host(leaving), layer + 1)
        x = _products(x, w, number // 3)
        if out_of_graphs:
            x, one = lax.optimization_barrier((x, one))
            one = _to_device(one)
        x, state, one = lax.optimization_barrier((x, state, one))
        here = [_to_device(_index(y, layer)) for y in state]
        x = _products(x, w, number - number // 3)
        x, here = lax.optimization_barrier((x, here))
        new = _changed(here, x, one)
        return state, x, new, _to_host(one) if out_of_graphs else one

    def loop(state: Any, x: Any, weights: Any) -> Any:
        one = lax.optimization_barrier(jnp.asarray(_ONE))
        one = _to_host(one) if out_of_graphs else one
        last = _index(weights, layers - 1)
        # There is nothing to write yet.
        carry = turn(jnp.int32(layers - 1), state, x, None, one, last)

        def body(i: Any, carry: Any) -> Any:
            layer, (state, x, leaving, one) = layers - 2 - i, carry
            return turn(layer, state, x, leaving, one, _index(weights, layer))

        state, x, leaving, _ = lax.fori_loop(0, layers - 1, body, carry)
        return _write(state, _to_host(leaving), 0), x

    return loop


def measure(
    loop: Any, sizes: Sizes, kind: str, options: dict[str, Any], repeats: int
) -> dict[str, Any]:
    device = jax.devices()[0]
    there, here = (
        SingleDeviceSharding(device, memory_kind=kind) for kind in (kind, "device")
    )
    layers, width = sizes["layers"], sizes["width"]
    ones = np.ones((layers, sizes["bytes"]), np.int8)
    state = [jax.device_put(ones, there) for _ in range(sizes["arrays"])]
    x = jnp.ones((width, width), jnp.bfloat16)
    weights = jnp.ones((layers, width, width), jnp.bfloat16)
    outs = [there for _ in state], here
    step = jax.jit(loop, donate_argnums=(0, 1), out_shardings=outs)
    if device.platform != "gpu":
        options = {}
    compiled = step.lower(state, x, weights).compile(compiler_options=options)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        state, x = jax.block_until_ready(compiled(state, x, weights))
        seconds.append(time.perf_counter() - start)
    added = {int(y) for array in state for y in np.asarray(array[:, 0]) - 1}
    return {"ms": statistics.median(seconds[1:]) * 1e3, "additions": sorted(added)}


CONTENDERS: dict[str, tuple[Callable[[Sizes], Any], str, dict[str, Any]]] = {
    "products": (products_alone, "device", {}),
    "on the device": (on_device, "device", {}),
    "in CUDA graphs": (lambda x: beside(x, False), "pinned_host", {}),
    "without graphs": (lambda x: beside(x, False), "pinned_host", WITHOUT_GRAPHS),
    "out of graphs": (lambda x: beside(x, True), "pinned_host", {}),
}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "--small", action="store_true", help="small shapes, to try the program"
    )
    parser.add_json()
    arguments = parser.parse_args()
    sizes, repeats = SMALL if arguments.small else LARGE, 5
    there, device = versions("jax", "jaxlib"), jax.devices()[0].device_kind
    print(", ".join(f"{k} {v}" for k, v in there.items()), device)
    moved = sizes["layers"] * sizes["bytes"] * sizes["arrays"]
    print(f"{moved:,} bytes each way")
    found = {}
    for name, (make, kind, options) in CONTENDERS.items():
        found[name] = measure(make(sizes), sizes, kind, options, repeats)
        wrong = name != "products" and found[name]["additions"] != [repeats]
        print(f"{name}: {found[name]['ms']:.1f} ms{', WRONG' if wrong else ''}")
    write_json(
        arguments.json, versions=there, device=device, sizes=sizes, contenders=found
    )


if __name__ == "__main__":
    run_main(main)
