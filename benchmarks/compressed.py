"""What does `flashquinox.compress` save, and does it cost anything? Every optimizer in
`optax` and `optax.contrib` that has a state of the size of the weights.

Each trains a network of two layers on a task with noise (--width), for --steps steps,
in float32: alone, and with its state compressed; from the same weights, with the same
batches. Printed: bytes of the state for each parameter, the loss at the end (the mean
of the last tenth), and the time of a step in a compiled loop.
"""

import argparse
import inspect
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
import optax.contrib
from _command_line import (
    in_few_words,
    Parser,
    positive_integer,
    run_main,
    versions,
    write_json,
)
from jaxtyping import PyTree

import flashquinox as fq


# Where 0.01 is no good learning rate, or there are other arguments.
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "adadelta": {"learning_rate": 1.0},
    "adagrad": {"learning_rate": 0.1},
    "cocob": {},
    "dadapt_adamw": {"learning_rate": 1.0},
    "dog": {"learning_rate": 1.0},
    "dowg": {"learning_rate": 1.0},
    "lars": {"learning_rate": 1.0, "trust_coefficient": 0.01},
    "lbfgs": {"learning_rate": 0.1, "linesearch": None},
    "lion": {"learning_rate": 1e-3},
    "madgrad": {"learning_rate": 1e-3},
    "prodigy": {"learning_rate": 1.0},
    "schedule_free_sgd": {"learning_rate": 0.5},
    "sgd": {"learning_rate": 0.1, "momentum": 0.9},
    "signum": {"learning_rate": 1e-3},
    "rprop": {"learning_rate": 1e-4},
}
# They need a loss or another derivative at each update, or are no optimizers alone.
_OTHERS = {
    "differentially_private_aggregate",
    "dpsgd",
    "mechanize",
    "momo",
    "momo_adam",
    "polyak_sgd",
    "reduce_on_plateau",
    "sam",
    "schedule_free",
    "sophia",
    "split_real_and_imaginary",
}


def optimizers() -> Iterator[tuple[str, Callable[[], optax.GradientTransformation]]]:
    """The names and the makers of all optimizers."""
    for module in (optax, optax.contrib):
        for name, make in sorted(vars(module).items()):
            if not inspect.isfunction(make) or name in _OTHERS:
                continue
            file = inspect.getmodule(make)
            of_module = "optax.contrib" if module is optax.contrib else "alias"
            if name.startswith(("_", "scale_by")) or of_module not in str(file):
                continue
            parameters = inspect.signature(make).parameters
            arguments = _ARGUMENTS.get(name, {"learning_rate": 0.01})
            if "learning_rate" in parameters or name == "cocob":
                yield name, lambda make=make, given=arguments: make(**given)


def loss(params: PyTree, batch: Any) -> Any:
    x, target = batch
    hidden = jax.nn.relu(x @ params["up"] + params["bias"][None])
    return jnp.mean((hidden @ params["down"] - target) ** 2)


def train(settings: argparse.Namespace, optim: Any) -> dict[str, float]:
    width = settings.width
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {
        "up": (width, 2 * width),
        "bias": (2 * width,),
        "down": (2 * width, width),
    }
    params = {
        name: jax.random.normal(key, shape) / shape[0] ** 0.5
        if len(shape) == 2
        else jnp.zeros(shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=False)
    }
    teacher = jax.random.normal(keys[3], (width, width)) / width**0.5
    state = optim.init(params)
    parameters = sum(x.size for x in jtu.tree_leaves(params))
    held = sum(x.nbytes for x in jtu.tree_leaves(state) if hasattr(x, "nbytes"))

    def step(carry: Any, key: Any) -> Any:
        params, state = carry
        x, noise = jax.random.normal(key, (2, 64, width))
        batch = x, jnp.tanh(x @ teacher) + 0.1 * noise
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = optim.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    run = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys))
    keys = jax.random.split(jax.random.key(1), settings.steps)
    _, losses = jax.block_until_ready(run((params, state), keys))
    start = time.perf_counter()
    jax.block_until_ready(run((params, state), keys))
    seconds = time.perf_counter() - start
    last = [float(x) for x in losses[-max(1, settings.steps // 10) :]]
    return {
        "bytes per parameter": held / parameters,
        "loss": statistics.fmean(last),
        "microseconds": 1e6 * seconds / settings.steps,
    }


def measure(settings: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name, make in optimizers():
        if settings.only and name not in settings.only:
            continue
        row: dict[str, Any] = {"optimizer": name}
        try:
            row["float32"] = train(settings, make())
            if row["float32"]["bytes per parameter"] < 1:
                continue
            row["compressed"] = train(settings, fq.compress(make()))
        except Exception as error:
            row["error"] = in_few_words(error)
        yield row


def print_row(row: dict[str, Any]) -> None:
    if "error" in row:
        print(f"{row['optimizer']:28}{row['error']}", flush=True)
        return
    before, after = row["float32"], row["compressed"]
    pairs = [
        f"{before[key]:{form}} -> {after[key]:{form}}"
        for key, form in (
            ("bytes per parameter", "6.2f"),
            ("loss", "8.5f"),
            ("microseconds", "8.0f"),
        )
    ]
    print(f"{row['optimizer']:28}{'   '.join(pairs)}", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--width", type=positive_integer, default=128, help="(128)")
    add("--steps", type=positive_integer, default=300, help="(300)")
    add("--only", nargs="+", metavar="NAME", help="these optimizers")
    parser.add_json()
    return parser.parse_args()


def main() -> None:
    settings = parse_arguments()
    warnings.simplefilter("ignore")
    (device, *_) = jax.devices()
    there = versions("jax", "jaxlib", "optax") | {"flashquinox": fq.__version__}
    print(f"{device.device_kind};", ", ".join(f"{k} {v}" for k, v in there.items()))
    print(f"{'':28}bytes per parameter    loss                    microseconds a step")
    rows = []
    for row in measure(settings):
        print_row(row)
        rows.append(row)
    write_json(settings.json, device=device.device_kind, versions=there, rows=rows)


if __name__ == "__main__":
    run_main(main)
