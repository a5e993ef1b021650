"""Long runs of a small byte-level GPT: a change of data, and pruned weights.

    python benchmarks/evidence/long.py --data data --out results/evidence/long \\
        --case change --optimizer adamw --contender ours

Cases (--case), four seeds each, side by side under `vmap`:

- change: 20,000 steps, the first half on speeches, the second on a manual of Python;
- pruned: 11,000 steps on speeches. After 1,000, the smaller half of every matrix is set
  to zero and gets no gradient any more;
- sparse: the same with 90 %.

Measured: the loss on held-out text of what is trained on, at the half and at the end;
the largest update of any weight in units of the peak learning rate; and how far pruned
weights moved from zero, on average, in that unit. All contenders of an optimizer have
the same learning rate, a cosine from there to zero after a warm-up of 200 steps.
Contenders are in `_recipes.py`. --small is for a CPU.
"""

import dataclasses
import pathlib
from typing import Any

import _benchmarks  # noqa: F401
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from _command_line import Parser, run_main
from _gpt import CONTEXT, loss, sample, StackedGPT
from _recipes import CONTENDERS, first_weights, full_weights, narrow, recipes, Training
from _runs import Folder
from jaxtyping import PyTree


RATES = {"adamw": 1e-3, "lion": 1e-4, "sgd": 0.3}
RECIPES = recipes(
    rates={name: (rate, rate, rate) for name, rate in RATES.items()},
    decays={"adamw": 0.1, "lion": 1.0, "sgd": 0.0},
    adam_b2=0.95,
    max_norm=1.0,
)
# Of every matrix, which share is set to zero.
PRUNED = {"change": 0.0, "pruned": 0.5, "sparse": 0.9}
SEEDS = range(4)


@dataclasses.dataclass(frozen=True)
class Task:
    case: str
    steps: int
    # After so many steps, the text or the mask changes.
    change: int
    width: int = 256
    layers: int = 4
    batch: int = 16
    warm_up: int = 200
    chunk: int = 500


TASKS = {
    "change": Task("change", 20_000, 10_000),
    "pruned": Task("pruned", 11_000, 1_000),
    "sparse": Task("sparse", 11_000, 1_000),
}


def small(task: Task) -> Task:
    return dataclasses.replace(
        task, steps=30, change=10, width=32, layers=1, batch=2, warm_up=5, chunk=5
    )


class Text:
    """Bytes to train on, and windows of others: the last twentieth."""

    def __init__(self, path: pathlib.Path):
        # All texts have the same length, so that they share programs.
        found = np.fromfile(path, np.uint8)[:10_000_000]
        at = len(found) // 20 * 19
        self.training = jnp.asarray(found[:at])
        starts = np.linspace(at, len(found) - CONTEXT - 1, 512).astype(int)
        windows = found[starts[:, None] + np.arange(CONTEXT + 1)]
        self.held_out = jnp.asarray(windows.astype(np.int32).reshape(8, 64, -1))


class Runner:
    def __init__(self, task: Task, optimizer: str, contender: str):
        self.task, self.contender = task, contender
        self.storage = CONTENDERS[contender]
        schedule = (RATES[optimizer], task.warm_up, task.steps)
        self.training = Training(RECIPES[optimizer], self.storage, *schedule)
        self.start = jax.jit(jax.vmap(self._start))
        self.chunk = jax.jit(
            jax.vmap(self._chunk, in_axes=(0, 0, 0, None, None)), donate_argnums=0
        )
        self.judge = jax.jit(jax.vmap(self._judge, in_axes=(0, None)))
        self.prune = jax.jit(jax.vmap(self._prune))
        self.drift = jax.jit(jax.vmap(self._drift))

    def _weights(self, seed: Any) -> tuple[PyTree, PyTree]:
        task = self.task
        model = StackedGPT(
            task.width,
            task.layers,
            heads=max(1, task.width // 64),
            vocabulary=256,
            context=CONTEXT,
            key=jax.random.key(seed),
        )
        return eqx.partition(model, eqx.is_inexact_array)

    def _start(self, seed: Any) -> Any:
        weights, _ = self._weights(seed)
        return self.training.start(first_weights(self.contender, weights))

    def _loss(self, weights: PyTree, windows: Any) -> Any:
        return loss(eqx.combine(weights, self._weights(0)[1]), windows)

    def _chunk(self, carry: Any, seed: Any, kept: Any, text: Any, first: Any) -> Any:
        key = jax.random.key(seed + 1_000_000)

        def step(carry: Any, count: Any) -> Any:
            windows = sample(text, self.task.batch, jax.random.fold_in(key, count))

            def of(weights: PyTree) -> Any:
                if kept is not None:
                    held = jax.lax.stop_gradient(weights)
                    weights = jtu.tree_map(jnp.where, kept, weights, held)
                return self._loss(weights, windows)

            return self.training.step(carry, of)

        carry, found = jax.lax.scan(step, carry, first + jnp.arange(self.task.chunk))
        return carry, (jnp.mean(found[0]), jnp.max(found[1]))

    def _judge(self, carry: Any, windows: Any) -> Any:
        weights = narrow(carry[0])
        return jnp.mean(jax.lax.map(lambda x: self._loss(weights, x), windows))

    def _prune(self, carry: Any) -> tuple[Any, PyTree]:
        """Sets weights to zero; and which were kept."""
        weights, state = carry

        def of(x: Any) -> Any:
            if x.ndim < 2:
                return jnp.ones(x.shape, bool)
            size = jnp.abs(x.astype(jnp.float32))
            # Each layer of a stack by itself.
            axes = (-2, -1)
            return size > jnp.quantile(
                size, PRUNED[self.task.case], axis=axes, keepdims=True
            )

        kept = jtu.tree_map(of, full_weights(self.storage, carry))
        weights = jtu.tree_map(
            lambda x, k: jnp.where(k, x, jnp.zeros_like(x)), weights, kept
        )
        return (weights, state), kept

    def _drift(self, carry: Any, kept: PyTree) -> Any:
        leaves = jtu.tree_leaves(full_weights(self.storage, carry))
        pairs = [*zip(leaves, jtu.tree_leaves(kept), strict=True)]
        moved = sum(jnp.sum(jnp.where(k, 0, jnp.abs(x))) for x, k in pairs)
        count = sum(jnp.sum(~k) for _, k in pairs)
        return moved / count / self.training.rate

    def run(self, texts: list[Text]) -> dict[str, Any]:
        task = self.task
        seeds = jnp.asarray([*SEEDS], jnp.int32)
        carry, kept = self.start(seeds), None
        text, rows, largest, held_out = texts[0], [], [], {}
        if PRUNED[task.case]:
            # All weights at first.
            ones = lambda x: jnp.ones(x.shape, bool)
            kept = jtu.tree_map(ones, carry[0])
        for first in range(0, task.steps, task.chunk):
            if first == task.change:
                held_out["before the change"] = self._judged(carry, text)
                text = texts[-1]
                if kept is not None:
                    carry, kept = self.prune(carry)
            carry, found = self.chunk(
                carry, seeds, kept, text.training, jnp.int32(first)
            )
            rows.append([round(float(x), 6) for x in found[0]])
            largest.append([round(float(x), 4) for x in found[1]])
        result = {
            "validation loss": self._judged(carry, text),
            "largest update": np.max(largest, axis=0).tolist(),
        }
        if kept is not None:
            result["drift of pruned weights"] = [
                round(float(x), 4) for x in self.drift(carry, kept)
            ]
        return {
            "task": dataclasses.asdict(task),
            "recipe": dataclasses.asdict(self.training.recipe),
            "rate": self.training.rate,
            "seeds": [*SEEDS],
            "losses": rows,
            "largest updates": largest,
            "held out": held_out,
            "result": result,
        }

    def _judged(self, carry: Any, text: Text) -> list[float]:
        return [round(float(x), 6) for x in self.judge(carry, text.held_out)]


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--case", choices=TASKS, required=True)
    parser.add_argument("--optimizer", choices=RECIPES, required=True)
    parser.add_argument("--contender", choices=CONTENDERS, required=True)
    parser.add_argument("--small", action="store_true", help="to try this on a CPU")
    arguments = parser.parse_args()
    task = TASKS[arguments.case]
    folder = Folder(arguments.out)
    name = f"{task.case}-{arguments.optimizer}-{arguments.contender}"
    if folder.begin(name):
        if arguments.small:
            task = small(task)
        names = ("speeches", "manual") if task.case == "change" else ("speeches",)
        texts = [Text(arguments.data / f"{x}.txt") for x in names]
        runner = Runner(task, arguments.optimizer, arguments.contender)
        record = {"contender": arguments.contender, **runner.run(texts)}
        folder.end(name, record)


if __name__ == "__main__":
    run_main(main)
