"""How long does a step of Muon take beside its Newton-Schulz products alone, and how
many bytes does its state have?

The matrices of GPT-2 124M: in each of 12 layers 768 x 2304, 768 x 768, 768 x 3072 and
3072 x 768 (--width, --layers), and no other weights. Contenders:

- products: the Newton-Schulz iteration alone: five iterations in bfloat16 of the four
  stacks, which are in memory as stacks; and of their norms. They hold random numbers,
  as in a step: GPUs multiply matrices of equal numbers with less power, so faster;
- flashquinox: a step of `flashquinox.muon`: bfloat16 weights in 24 bits, and momentum
  in 8 bits;
- optax: a step of `optax.contrib.muon` of float32 weights and momentum, with float32
  gradients.

Matrices are alone, as in a model with a list of layers, or stacked (--stacked). With
--devices, weights are divided by rows among so many devices, and products are of a
device's share. Each contender is timed in a compiled loop of ten steps, in turn. With
--parts, a profile of one such loop says what the parts of a step take, in ms.
"""

import argparse
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
import optax.contrib
from _command_line import (
    Parser,
    positive,
    positive_integer,
    run_main,
    some_of,
    versions,
    write_json,
)
from _kernel_parts import parts, text_of
from _timing import looped, Plan, STEPS_IN_LOOP, time_loop
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

import flashquinox as fq
from flashquinox._optimizer import together


CONTENDERS = ("products", "flashquinox", "optax")
# The numbers of rows and columns of a layer, in widths.
_MATRICES = {"qkv": (1, 3), "out": (1, 1), "up": (1, 4), "down": (4, 1)}
_AXES = optax.contrib.MuonDimensionNumbers(-2, -1)


def _normal(shape: tuple[int, ...]) -> Array:
    return 0.02 * jax.random.normal(jax.random.key(0), shape)


def weights(settings: argparse.Namespace) -> dict[str, Array]:
    """The matrices, in float32."""
    layers, found = settings.layers, {}
    for name, sides in _MATRICES.items():
        shape = tuple(settings.width * side for side in sides)
        stack = _normal((layers, *shape))
        if settings.stacked:
            found[name] = stack
        else:
            found |= {f"{name}{i}": stack[i] for i in range(layers)}
    return found


def sharding(settings: argparse.Namespace) -> NamedSharding | None:
    """By rows."""
    if settings.devices == 1:
        return None
    # Optax does not say how products of divided matrices are divided, so XLA must.
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((settings.devices,), ("devices",), axis_types=auto)
    before = [None] if settings.stacked else []
    return NamedSharding(mesh, PartitionSpec(*before, "devices"))


def products(settings: argparse.Namespace) -> tuple[Callable, Any, list[Any]]:
    """The iteration on a device's share of the stacks, as a step divides them."""
    share = math.ceil(settings.layers / settings.devices)
    stacks = {}
    for name, sides in _MATRICES.items():
        shape = tuple(settings.width * x for x in sides)
        most = max(1, together.STACK // math.prod(shape))
        most = share if settings.stacked else most
        stacks[name] = [
            _normal((min(most, share - i), *shape)).astype(jnp.bfloat16)
            for i in range(0, share, most)
        ]
    transform = fq.Muon().transform

    def step(stacks: dict[str, list[Array]]) -> dict[str, list[Array]]:
        return {name: [transform(x) for x in found] for name, found in stacks.items()}

    return step, stacks, []


def flashquinox(settings: argparse.Namespace) -> tuple[Callable, Any, list[Any]]:
    there = sharding(settings)
    numbers = lambda x: jtu.tree_map(lambda _: _AXES, x)
    optim = fq.muon(
        1e-3,
        consistent_rms=0.2,
        weight_decay=0.1,
        weight_dimension_numbers=numbers,
    )
    model = fq.cast(weights(settings), jnp.bfloat16)
    model = model if there is None else jax.device_put(model, there)
    step = lambda carry, grads: optim.step(carry[0], carry[1], grads)
    # A copy: the model is donated.
    grads = jtu.tree_map(lambda x: x * 2, model)
    return step, (model, optim.init(model)), [grads]


def of_optax(settings: argparse.Namespace) -> tuple[Callable, Any, list[Any]]:
    there = sharding(settings)
    numbers = lambda x: jtu.tree_map(lambda _: _AXES, x)
    optim = optax.contrib.muon(
        1e-3,
        consistent_rms=0.2,
        weight_decay=0.1,
        muon_weight_dimension_numbers=numbers,
    )
    params = weights(settings)
    params = params if there is None else jax.device_put(params, there)

    def step(carry: Any, grads: PyTree) -> Any:
        params, state = carry
        updates, state = optim.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    grads = jtu.tree_map(lambda x: x * 2, params)
    return step, (params, jax.jit(optim.init)(params)), [grads]


MAKERS = {"products": products, "flashquinox": flashquinox, "optax": of_optax}


def measure(settings: argparse.Namespace, name: str) -> dict[str, Any]:
    step, carry, operands = MAKERS[name](settings)
    parameters = sum(math.prod(x.shape) for x in jtu.tree_leaves(weights(settings)))
    at_rest = sum(x.nbytes for x in jtu.tree_leaves(carry))
    plan = Plan(settings.repeats, settings.seconds)
    timing, carry = time_loop(plan, step, carry, *operands)
    row: dict[str, Any] = {
        "contender": name,
        "parameters": parameters,
        "milliseconds": 1e3 * timing.median,
        "smallest": 1e3 * timing.smallest,
        "largest": 1e3 * timing.largest,
    }
    if name != "products":
        row["bytes per parameter at rest"] = at_rest / parameters
    if settings.parts:
        row |= profile(step, carry, operands)
    return row


def profile(step: Callable, carry: Any, operands: list[Any]) -> dict[str, Any]:
    loop = jax.jit(looped(step, STEPS_IN_LOOP), donate_argnums=0)
    carry = jax.block_until_ready(loop(carry, *operands))
    run = lambda: jax.block_until_ready(loop(carry, *operands))
    return parts(run, STEPS_IN_LOOP)


def print_row(row: dict[str, Any], of_products: float | None) -> None:
    ratio = ""
    if of_products is not None:
        ratio = f"{row['milliseconds'] / of_products:8.3f} x products"
    size = row.get("bytes per parameter at rest")
    size = "" if size is None else f"{size:8.3f} bytes per parameter"
    span = f"({row['smallest']:.3f} to {row['largest']:.3f})"
    print(f"{row['contender']:12}{row['milliseconds']:10.3f} ms {span:22}{ratio}{size}")
    if "parts" in row:
        print("  ", text_of(row["parts"]))


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--width", type=positive_integer, default=768, help="(768)")
    add("--layers", type=positive_integer, default=12, help="(12)")
    add("--stacked", action="store_true", help="one array for the layers of a matrix")
    add("--devices", type=positive_integer, default=1, help="(1)")
    add(
        "--contenders",
        type=partial(some_of, CONTENDERS),
        default=list(CONTENDERS),
        help=f"comma-separated (default: {','.join(CONTENDERS)})",
    )
    add("--stack", type=positive_integer, help="elements of a stack, at most (2^25)")
    add("--parts", action="store_true", help="profile a loop; on GPUs")
    add("--repeats", type=positive_integer, default=7, help="(7)")
    add("--seconds", type=positive, default=0.5, help="of each repeat (0.5)")
    parser.add_json()
    settings = parser.parse_args()
    if settings.devices > len(jax.devices()):
        parser.error(f"--devices: there are {len(jax.devices())}")
    if settings.parts and jax.default_backend() != "gpu":
        parser.error("--parts: there is no GPU")
    if settings.stack is not None:
        together.STACK = settings.stack
    return settings


def main() -> None:
    settings = parse_arguments()
    (device, *_) = jax.devices()
    there = versions("jax", "jaxlib", "optax", "equinox")
    there["flashquinox"] = fq.__version__
    print(f"{settings.devices} of {device.device_kind};", there)
    rows, of_products = [], None
    for name in settings.contenders:
        row = measure(settings, name)
        if name == "products":
            of_products = row["milliseconds"]
        print_row(row, of_products if name != "products" else None)
        rows.append(row)
    write_json(
        settings.json,
        device=device.device_kind,
        devices=settings.devices,
        versions=there,
        rows=rows,
    )


if __name__ == "__main__":
    run_main(main)
