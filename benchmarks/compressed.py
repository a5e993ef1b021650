"""What does `flashquinox.compress` save, and does it cost anything? Every optimizer in
`optax` and `optax.contrib` that has a state of the size of the weights.

Each trains a network of two layers on a task with noise (--width), for --steps steps,
in float32: alone, and with its state compressed; from the same weights, with the same
batches. Printed: bytes of the state for each parameter, the loss at the end (the mean
of the last tenth), and the time of a step in a compiled loop (the least of three).

Roundings of the state make another run of it, and so does a change of the first weights
by one part in a thousand: `apart` is by how much the loss differs for each of the two,
as a share of the loss. An optimizer loses by compression where the first number is
positive, and much more than the second. --page FILE.md writes these into the page.
"""

import argparse
import inspect
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
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
    "acprop": {"learning_rate": 1e-4},
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
    "simplified_ademamix": {"learning_rate": 1e-5},
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


def train(
    settings: argparse.Namespace, optim: Any, scale: float = 1.0
) -> dict[str, float]:
    width = settings.width
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {
        "up": (width, 2 * width),
        "bias": (2 * width,),
        "down": (2 * width, width),
    }
    params = {
        name: scale * jax.random.normal(key, shape) / shape[0] ** 0.5
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
    times = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(run((params, state), keys))
        times.append(time.perf_counter() - start)
    last = [float(x) for x in losses[-max(1, settings.steps // 10) :]]
    return {
        "bytes per parameter": held / parameters,
        "loss": statistics.fmean(last),
        "microseconds": 1e6 * min(times) / settings.steps,
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
            row["other weights"] = train(settings, make(), 1.001)
            one, *others = (
                row[x]["loss"] for x in ("float32", "compressed", "other weights")
            )
            row["apart"] = [x / one - 1 for x in others]
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
    apart = "   ".join(f"{x:+7.2%}" for x in row["apart"])
    print(f"{row['optimizer']:28}{'   '.join(pairs)}   {apart}", flush=True)


_BEGIN, _END = "<!-- compressed.py -->\n", "<!-- end -->\n"


def write_page(page: Path, rows: list[dict[str, Any]]) -> None:
    """Puts the table between two lines of the page."""
    lines = [
        "| optimizer | bytes per parameter | loss | apart | by other weights | µs |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| `{row['optimizer']}` | {row['error']} | | | | |")
            continue
        pair = lambda key, form, row=row: " → ".join(
            f"{row[x][key]:{form}}" for x in ("float32", "compressed")
        )
        compressed, other = (f"{x:+.2%}" for x in row["apart"])
        cells = [
            f"`{row['optimizer']}`",
            pair("bytes per parameter", ".2f"),
            pair("loss", ".5f"),
            compressed,
            other,
            pair("microseconds", ".0f"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    before, found, rest = page.read_text().partition(_BEGIN)
    _, ended, after = rest.partition(_END)
    if not found or not ended:
        sys.exit(f"{page} has no lines {_BEGIN.strip()} and {_END.strip()}")
    table = "".join(f"{line}\n" for line in lines)
    page.write_text(f"{before}{_BEGIN}\n{table}\n{_END}{after}")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--width", type=positive_integer, default=128, help="(128)")
    add("--steps", type=positive_integer, default=300, help="(300)")
    add("--only", nargs="+", metavar="NAME", help="these optimizers")
    add("--page", type=Path, metavar="FILE.md", help="put the table into this page")
    parser.add_json()
    return parser.parse_args()


def main() -> None:
    settings = parse_arguments()
    warnings.simplefilter("ignore")
    (device, *_) = jax.devices()
    there = versions("jax", "jaxlib", "optax") | {"flashquinox": fq.__version__}
    print(f"{device.device_kind};", ", ".join(f"{k} {v}" for k, v in there.items()))
    titles = "bytes per parameter", "loss", "microseconds a step", "apart"
    print(f"{'':28}{titles[0]:23}{titles[1]:24}{titles[2]:23}{titles[3]}")
    rows = []
    for row in measure(settings):
        print_row(row)
        rows.append(row)
    if settings.page is not None:
        write_page(settings.page, rows)
    write_json(settings.json, device=device.device_kind, versions=there, rows=rows)


if __name__ == "__main__":
    run_main(main)
