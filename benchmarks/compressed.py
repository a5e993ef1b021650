"""What does `flashquinox.compress` save, and does it cost anything? Every optimizer in
`optax` and `optax.contrib` that has a state of the size of the weights.

Each trains a network of two layers on a task with noise (--width), for --steps steps,
in float32: alone, and with its state compressed; from the same weights, with the same
batches. Printed: bytes of the state for each parameter, the loss at the end (the mean
of the last tenth, and over --seeds), and the time of a step in a compiled loop (the
least of all seeds).

`apart` is by how much the loss differs, as a share of the loss: the mean over seeds and
its 95 % interval. An optimizer loses by compression where it is positive by more than
that, and by at least a thousandth: bold. --page FILE.md writes these into the page.
"""

import argparse
import inspect
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

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
from _paired import Gap
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
    "lbfgs": {},
    "lion": {"learning_rate": 1e-3},
    "madgrad": {"learning_rate": 1e-3},
    "prodigy": {"learning_rate": 1.0},
    "schedule_free_sgd": {"learning_rate": 0.5},
    "simplified_ademamix": {"learning_rate": 1e-5},
    "sgd": {"learning_rate": 0.1, "momentum": 0.9},
    "signum": {"learning_rate": 1e-3},
    "rprop": {"learning_rate": 1e-4},
}
# What some need beside gradients.
_NEEDS = {
    "lbfgs": ("value", "grad", "value_fn"),
    "momo": ("value",),
    "momo_adam": ("value",),
    "sophia": ("obj_fn",),
}
# They have no state of the size of the weights, or need gradients of each example.
_OTHERS = {
    "differentially_private_aggregate",
    "dpsgd",
    "polyak_sgd",
    "reduce_on_plateau",
    "split_real_and_imaginary",
}
# Those that take another transformation.
_WRAPPERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "mechanize": lambda: optax.contrib.mechanize(optax.adam(1.0)),
    "sam": lambda: optax.contrib.sam(
        optax.sgd(0.1, 0.9),
        optax.chain(optax.contrib.normalize(), optax.sgd(0.05)),
    ),
    "schedule_free": lambda: optax.contrib.schedule_free(
        optax.rmsprop(1e-3), 1e-3, state_dtype=jnp.float32
    ),
}


def optimizers() -> Iterator[tuple[str, Callable[[], optax.GradientTransformation]]]:
    """The names and the makers of all optimizers."""
    for module in (optax, optax.contrib):
        for name, make in sorted(vars(module).items()):
            if name in _WRAPPERS and module is optax.contrib:
                yield name, _WRAPPERS[name]
            if not inspect.isfunction(make) or name in _OTHERS or name in _WRAPPERS:
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


class Task(NamedTuple):
    """What a seed gives: the first weights, what makes targets, and the batches."""

    params: dict[str, jax.Array]
    teacher: jax.Array
    keys: jax.Array

    @staticmethod
    def of(settings: argparse.Namespace, seed: int) -> "Task":
        width = settings.width
        keys = jax.random.split(jax.random.key(seed), 4)
        weight = lambda key, *shape: jax.random.normal(key, shape) / shape[0] ** 0.5
        params = {
            "up": weight(keys[0], width, 2 * width),
            "bias": jnp.zeros((2 * width,)),
            "down": weight(keys[1], 2 * width, width),
        }
        steps = jax.random.split(keys[3], settings.steps)
        return Task(params, weight(keys[2], width, width), steps)


def train(
    settings: argparse.Namespace, optim: Any, needs: tuple[str, ...]
) -> dict[str, Any]:
    optim = optax.with_extra_args_support(optim)
    init = jax.jit(optim.init)

    @jax.jit
    def run(task: Task, state: Any) -> Any:
        def step(carry: Any, key: Any) -> Any:
            params, state = carry
            x, noise = jax.random.normal(key, (2, 64, settings.width))
            batch = x, jnp.tanh(x @ task.teacher) + 0.1 * noise
            value, grads = jax.value_and_grad(loss)(params, batch)
            again = lambda params: loss(params, batch)
            more = {"value": value, "grad": grads, "value_fn": again, "obj_fn": again}
            more = {key: more[key] for key in needs}
            updates, state = optim.update(grads, state, params, **more)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (task.params, state), task.keys)[1]

    losses, times, held = [], [], 0.0
    last = max(1, settings.steps // 10)
    # The first is run twice, as it is compiled.
    for seed in (0, *range(settings.seeds)):
        task = Task.of(settings, seed)
        state = init(task.params)
        start = time.perf_counter()
        found = jax.block_until_ready(run(task, state))
        times.append(time.perf_counter() - start)
        losses.append(float(jnp.mean(found[-last:])))
        held = sum(x.nbytes for x in jtu.tree_leaves(state) if hasattr(x, "nbytes"))
    parameters = sum(x.size for x in jtu.tree_leaves(Task.of(settings, 0).params))
    return {
        "bytes per parameter": held / parameters,
        "loss": statistics.fmean(losses[1:]),
        "losses": losses[1:],
        "microseconds": 1e6 * min(times) / settings.steps,
    }


def measure(settings: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name, make in optimizers():
        if settings.only and name not in settings.only:
            continue
        row: dict[str, Any] = {"optimizer": name}
        needs = _NEEDS.get(name, ())
        try:
            row["float32"] = train(settings, make(), needs)
            if row["float32"]["bytes per parameter"] < 1:
                continue
            row["compressed"] = train(settings, fq.compress(make()), needs)
            losses = [row[x]["losses"] for x in ("compressed", "float32")]
            apart = [x / y - 1 for x, y in zip(*losses, strict=True)]
            gap = Gap.of(apart)
            row["apart"], row["interval"] = gap.mean, gap.half_width
        except Exception as error:
            row["error"] = in_few_words(error)
        yield row
        jax.clear_caches()


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
    apart = text_of_apart(row)
    print(f"{row['optimizer']:28}{'   '.join(pairs)}   {apart}", flush=True)


def text_of_apart(row: dict[str, Any]) -> str:
    apart, interval = row["apart"], row["interval"]
    text = f"{apart:+.2%} ± {interval:.2%}"
    return f"**{text}**" if apart > max(interval, 1e-3) else text


_BEGIN, _END = "<!-- compressed.py -->\n", "<!-- end -->\n"


def write_page(page: Path, rows: list[dict[str, Any]]) -> None:
    """Puts the table between two lines of the page."""
    lines = [
        "| optimizer | bytes per parameter | loss | apart | µs |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| `{row['optimizer']}` | {row['error']} | | | |")
            continue
        pair = lambda key, form, row=row: " → ".join(
            f"{row[x][key]:{form}}" for x in ("float32", "compressed")
        )
        cells = [
            f"`{row['optimizer']}`",
            pair("bytes per parameter", ".2f"),
            pair("loss", ".5f"),
            text_of_apart(row),
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
    add("--seeds", type=positive_integer, default=6, help="(6)")
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
