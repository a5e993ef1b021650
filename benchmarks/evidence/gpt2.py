"""GPT-2 124M from the beginning: how far is each way to store weights and moments from
float32?

    python benchmarks/evidence/gpt2.py --data data --out results/evidence/gpt2 \\
        --optimizer adamw --contender ours --seeds 0-4

Batches of 8 windows of 1024 tokens; a warm-up of a tenth, then a cosine to zero at
the end; gradients are clipped at norm 1. Each contender takes the learning rate, of
three, that has the lowest validation loss after 300 steps of seed 100. Then come the
seeds. With --rate, all is at that rate, to tell what the choice did; with --b2, Adam
has another one. With --steps, runs are of another length, at the rate that was chosen.
Contenders are in `_recipes.py`; the data are made by `data.py`.

A file for each run: mean training losses and largest updates of spans of steps,
validation losses (262,144 tokens that are not trained on), tokens a second, and the
device's peak memory. The largest update is that of any weight, in units of the peak
learning rate. It is measured in every step, and that is in the seconds and in the
memory.

--small trains a model of a few thousand parameters, to try this on a CPU.
"""

import dataclasses
import pathlib
import time
from typing import Any

import _benchmarks  # noqa: F401
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from _command_line import Parser, positive, positive_integer, run_main
from _gpt import Attention, float32_weights, loss
from _recipes import CONTENDERS, first_weights, narrow, Recipe, recipes, Training
from _runs import best_rate, Folder
from _tokens import batches, digest, Tokens
from jaxtyping import PyTree
from pretraining import fastest_attention, seeds


RECIPES = recipes(
    rates={
        "adamw": (3e-4, 1e-3, 3e-3),
        "lion": (3e-5, 1e-4, 3e-4),
        "sgd": (0.1, 0.3, 1.0),
        "muon": (3e-4, 1e-3, 3e-3),
    },
    decays={"adamw": 0.1, "lion": 1.0, "sgd": 0.0, "muon": 0.1},
    adam_b2=0.95,
    max_norm=1.0,
)
TUNING_SEED = 100
# Of optimizers that are compared over another number of steps than `Task` has.
STEPS = {"muon": 1000}


@dataclasses.dataclass(frozen=True)
class Task:
    width: int = 768
    layers: int = 12
    vocabulary: int = 50257
    context: int = 1024
    batch: int = 8
    steps: int = 800
    tuning_steps: int = 300
    # Losses are stored as means of spans of so many steps.
    span: int = 20
    # Validation losses are measured this often in a run.
    validations: int = 5
    validation_batches: int = 32
    attention: Attention = "xla"


SMALL = Task(
    width=32,
    layers=2,
    vocabulary=256,
    context=32,
    batch=4,
    steps=40,
    tuning_steps=20,
    span=4,
    validation_batches=2,
)


def split(tokens: Tokens, block: int = 65536) -> tuple[Tokens, Tokens]:
    """To train on, and to validate: every 20th block of tokens."""
    numbers = np.arange(len(tokens)) // block
    held_out = numbers % 20 == 19
    return tokens[~held_out], tokens[held_out]


class Runner:
    """Runs of one task, which share programs."""

    def __init__(self, task: Task, tokens: Tokens):
        self.task, self.tokens = task, tokens
        self._programs: dict[Any, tuple[Any, Any, Any]] = {}
        self.training, validation = split(tokens, 65536 if task.layers > 2 else 1024)
        self.validation = batches(
            validation, 0, task.validation_batches, task.batch, task.context
        )

    def programs(self, recipe: Recipe, contender: str) -> tuple[Any, Any, Any]:
        """From a seed to weights and state; the steps of a span; validation."""
        if (recipe, contender) in self._programs:
            return self._programs[recipe, contender]
        storage = CONTENDERS[contender]
        _, static = float32_weights(self.task, 0)

        def start(seed: Any, schedule: tuple[Any, Any, Any]) -> Any:
            weights, _ = float32_weights(self.task, seed)
            weights = first_weights(contender, weights)
            return Training(recipe, storage, *schedule).start(weights)

        def of(weights: PyTree, batch: Any) -> Any:
            return loss(eqx.combine(weights, static), batch)

        def span(carry: Any, schedule: tuple[Any, Any, Any], batches: Any) -> Any:
            training = Training(recipe, storage, *schedule)
            step = lambda carry, batch: training.step(carry, lambda w: of(w, batch))
            carry, (values, largest) = jax.lax.scan(step, carry, batches)
            return carry, (jnp.mean(values), jnp.max(largest))

        def validate(carry: Any, batches: Any) -> Any:
            weights = narrow(carry[0])
            return jnp.mean(jax.lax.map(lambda batch: of(weights, batch), batches))

        compiled = jax.jit(start), jax.jit(span, donate_argnums=0), jax.jit(validate)
        return self._programs.setdefault((recipe, contender), compiled)

    def run(
        self, recipe: Recipe, contender: str, rate: float, seed: int, steps: int
    ) -> dict[str, Any]:
        task = self.task
        start, span, validate = self.programs(recipe, contender)
        schedule = tuple(jnp.float32(x) for x in (rate, max(1, steps // 10), steps))
        windows = batches(self.training, seed, steps, task.batch, task.context)
        carry = start(seed, schedule)
        every = max(1, steps // task.validations // task.span) * task.span
        measured, validated, lasted = [], [], []
        for first in range(0, steps, task.span):
            here = jnp.asarray(windows[first : first + task.span])
            begin = time.perf_counter()
            carry, found = span(carry, schedule, here)
            measured.append([float(x) for x in found])
            lasted.append(time.perf_counter() - begin)
            last = first + task.span
            if last % every == 0 or last == steps:
                value = validate(carry, jnp.asarray(self.validation))
                validated.append([last, round(float(value), 6)])
        losses, largest = zip(*measured, strict=True)
        # The first span may have compiled.
        seconds = float(np.median(lasted[1:]))
        memory = jax.devices()[0].memory_stats() or {}
        return {
            "contender": contender,
            "recipe": dataclasses.asdict(recipe),
            "rate": rate,
            "seed": seed,
            "steps": steps,
            "task": dataclasses.asdict(task),
            "digest": digest(self.tokens),
            "losses": [round(x, 6) for x in losses],
            "validation": validated,
            "largest updates": [round(x, 4) for x in largest],
            "peak bytes": memory.get("peak_bytes_in_use"),
            "result": {
                "validation loss": validated[-1][1],
                "largest update": round(max(largest), 4),
                "tokens a second": round(
                    task.batch * task.context * task.span / seconds, 1
                ),
            },
        }


def choose_rate(
    runner: Runner, folder: Folder, optimizer: str, contender: str
) -> float:
    recipe, task = RECIPES[optimizer], runner.task
    share = task.tuning_steps / task.steps
    tuned = {}
    for rate in recipe.rates:
        name = f"{optimizer}-{contender}-rate-{rate:g}"
        if folder.begin(name, share):
            record = runner.run(recipe, contender, rate, TUNING_SEED, task.tuning_steps)
            folder.end(name, record, share)
        tuned[rate] = folder.read(name)["result"]["validation loss"]
    return best_rate(tuned)


def run_cell(
    runner: Runner,
    folder: Folder,
    optimizer: str,
    contender: str,
    of: list[int],
    rate: float | None = None,
    b2: float | None = None,
    length: str = "",
) -> None:
    """`length`: the end of the cell's name, of runs that are not as long as others."""
    recipe, task = RECIPES[optimizer], runner.task
    cell = f"{optimizer}-{contender}"
    if rate is None:
        rate = choose_rate(runner, folder, optimizer, contender)
    else:
        cell = f"{cell}-at-{rate:g}"
    if b2 is not None:
        recipe = dataclasses.replace(recipe, b2=b2)
        cell = f"{cell}-b2-{b2:g}"
    cell = f"{cell}{length}"
    for seed in of:
        name = f"{cell}-seed-{seed}"
        if folder.begin(name):
            folder.end(name, runner.run(recipe, contender, rate, seed, task.steps))


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--optimizer", choices=RECIPES, required=True)
    parser.add_argument("--contender", choices=CONTENDERS, required=True)
    parser.add_argument("--seeds", type=seeds, default=[0, 1, 2], help="(default: 0-2)")
    parser.add_argument("--rate", type=positive, help="nothing is chosen")
    parser.add_argument("--b2", type=positive, help="of Adam (0.95)")
    parser.add_argument("--steps", type=positive_integer, help="(800; of Muon 1000)")
    parser.add_argument("--small", action="store_true", help="to try this on a CPU")
    arguments = parser.parse_args()
    task = SMALL if arguments.small else Task(attention=fastest_attention())
    steps = arguments.steps
    length = "" if steps is None else f"-{steps}-steps"
    if steps is None and not arguments.small:
        steps = STEPS.get(arguments.optimizer)
    if steps is not None:
        task = dataclasses.replace(task, steps=steps)
    if task.steps % task.span or task.tuning_steps % task.span:
        parser.error(f"--steps must be a multiple of {task.span}; got {task.steps}")
    if task.vocabulary == 256:
        tokens = np.fromfile(arguments.data / "speeches.txt", np.uint8)
        tokens = tokens[:400_000].astype(np.uint16)
    else:
        tokens = np.load(arguments.data / "tokens.npy")
    runner = Runner(task, tokens)
    run_cell(
        runner,
        Folder(arguments.out),
        arguments.optimizer,
        arguments.contender,
        arguments.seeds,
        arguments.rate,
        arguments.b2,
        length,
    )


if __name__ == "__main__":
    run_main(main)
