"""The tables of the page "Evidence", of the files of runs."""

import json
import math
import pathlib
import statistics
from collections.abc import Callable
from typing import Any

from _gaps import (
    Cell,
    Cells,
    finetune_cells,
    gap,
    gpt2_cells,
    gpt2_cells_at_one_rate,
    gpt2_cells_of_other_b2,
    gpt2_cells_of_other_lengths,
    image_cells,
    long_cells,
    standard_error,
)
from _recipes import REFERENCE


TITLES = {
    "float32": "float32",
    "float32-last-bits": "float32, last bits flipped",
    "ours": "**flashquinox**",
    "flashoptim": "the paper's codec",
    "bfloat16": "bfloat16 weights",
    "ours-32": "flashquinox, 32 bits",
    "ours-nearest": "flashquinox, weights to nearest",
    "ours-16-bit-momentum": "flashquinox, momentum in 16 bits",
    "exact-moments": "24-bit weights, float32 moments",
    "flashoptim-v": "the paper's second moments alone",
    "flashoptim-v-above-zero": "the same, none stored as zero",
}
# What there is none of: an en dash.
_NONE = "\u2013"
OPTIMIZERS = {"adamw": "AdamW", "lion": "Lion", "sgd": "SGD, momentum", "muon": "Muon"}
MODELS = {
    "vit": "ViT",
    "resnet": "ResNet-18",
    "clipped-resnet": "ResNet-18, clipped",
    "cnn": "CNN on MNIST",
}
CASES = {
    "change": "change of data",
    "pruned": "half of the weights pruned",
    "sparse": "90 % of the weights pruned",
}


def sections(results: pathlib.Path) -> dict[str, str]:
    """Markdown of what there are results of."""
    found = {}
    if cells := gpt2_cells(results / "evidence/gpt2"):
        found["gpt2"] = _gpt2([cells])
    if several := gpt2_cells_at_one_rate(results / "evidence/gpt2"):
        found["gpt2-at-one-rate"] = _gpt2(several)
    for steps, cells in gpt2_cells_of_other_lengths(results / "evidence/gpt2").items():
        found[f"gpt2-{steps}-steps"] = _gpt2([cells])
    for b2, cells in gpt2_cells_of_other_b2(results / "evidence/gpt2").items():
        found[f"gpt2-b2-{b2:g}"] = _gpt2([cells])
    if rows := _image_rows(results / "evidence/images"):
        found["images"] = table(_IMAGE_HEADER, rows)
    if rows := _long_rows(results / "evidence/long"):
        found["long"] = table(_LONG_HEADER, rows)
    if rows := _finetune_rows(results / "evidence/finetune"):
        found["finetune"] = table(_FINETUNE_HEADER, rows)
    if rows := _resume_rows(results / "evidence/resume"):
        found["resume"] = table(_RESUME_HEADER, rows)
    reconstruction = results / "reconstruction-cpu.json"
    if reconstruction.exists():
        found["reconstruction"] = _reconstruction(reconstruction)
    next_update = results / "evidence/quality/open-loop.json"
    if next_update.exists():
        found["next-update"] = _next_update(next_update)
    closed = results / "evidence/quality/closed-loop.json"
    if closed.exists():
        found["closed-loop"] = _closed_loop(closed)
    return found


def table(header: list[str], rows: list[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])


def device_line(records: list[dict[str, Any]]) -> str:
    """All devices, and the versions of the first run."""
    devices = " and ".join(sorted({record["device"] for record in records}))
    versions = records[0]["versions"]
    names = ", ".join(
        f"{k} {versions[k]}" for k in ("jax", "optax", "flashquinox") if k in versions
    )
    return f"{devices}; {names}"


#
# Gaps
#


def gap_cells(cell: Cell, reference: Cell, digits: int) -> list[str]:
    """The gap with its standard error, its 95 % interval, and what that says."""
    if cell.contender == REFERENCE:
        return [_NONE, _NONE, _NONE]
    found = gap(cell, reference)
    if not math.isfinite(found.mean):
        return ["diverged", _NONE, _NONE]
    if found.seeds < 2:
        return [f"{found.mean:+.{digits}f}", _NONE, "one seed"]
    low, high = found.mean - found.half_width, found.mean + found.half_width
    says = "not separable from noise" if low <= 0 <= high else "a difference"
    return [
        f"{found.mean:+.{digits}f} ± {standard_error(found):.{digits}f}",
        f"{low:+.{digits}f} to {high:+.{digits}f}",
        says,
    ]


def _update_cells(cell: Cell, reference: Cell) -> list[str]:
    if cell.contender == REFERENCE:
        return [f"{cell.peak:.3g}"]
    ratios = update_ratios(cell, reference)
    short = lambda x: f"{x:.2f}" if x < 100 else f"{x:.3g}"
    mean = short(statistics.geometric_mean(ratios))
    if len(ratios) > 1:
        mean = f"{mean}; {short(min(ratios))} to {short(max(ratios))}"
    return [f"{cell.peak:.3g} ({mean})"]


def update_ratios(cell: Cell, reference: Cell) -> list[float]:
    """Of largest updates, over the seeds that both have."""
    seeds = cell.largest.keys() & reference.largest.keys()
    return [cell.largest[seed] / reference.largest[seed] for seed in sorted(seeds)]


def _gap_rows(
    cells: Cells, digits: int, others: Callable[[Cell], list[str]]
) -> list[list[str]]:
    rows = []
    for optimizer, of in cells.items():
        reference = of[REFERENCE]
        for contender, cell in of.items():
            rows.append(
                [
                    f"{OPTIMIZERS[optimizer]}: {TITLES[contender]}",
                    f"{cell.rate:g}",
                    str(len(cell.results)),
                    f"{cell.mean:.{digits}f}",
                    *gap_cells(cell, reference, digits),
                    *_update_cells(cell, reference),
                    *others(cell),
                ]
            )
    return rows


#
# Sections
#


def _gpt2(several: list[Cells]) -> str:
    def others(cell: Cell) -> list[str]:
        speed = [x["result"]["tokens a second"] for x in cell.records]
        peak = [x["peak bytes"] for x in cell.records if x["peak bytes"]]
        memory = f"{max(peak) / 1e9:.2f}" if peak else _NONE
        return [f"{statistics.median(speed) / 1e3:.0f}", memory]

    header = [
        "validation loss, nats",
        *("rate", "seeds", "mean", "gap ± standard error", "95 % interval", "that is"),
        *("largest update", "1000 tokens/s", "peak, GB"),
    ]
    rows = [row for cells in several for row in _gap_rows(cells, 4, others)]
    records = [
        record
        for cells in several
        for of in cells.values()
        for cell in of.values()
        for record in cell.records
    ]
    return f"{table(header, rows)}\n\n({device_line(records)}.)"


_IMAGE_HEADER = [
    "accuracy on the test set, %",
    *("rate", "seeds", "mean", "gap ± standard error", "95 % interval", "that is"),
    "largest update",
]


def _image_rows(folder: pathlib.Path) -> list[list[str]]:
    rows = []
    for model, title in MODELS.items():
        for row in _gap_rows(image_cells(folder, model), 2, lambda cell: []):
            rows.append([f"{title}, {row[0]}", *row[1:]])
    return rows


_LONG_HEADER = [
    "loss on held-out text at the end, nats",
    *("rate", "seeds", "mean", "gap ± standard error", "95 % interval", "that is"),
    *("largest update", "drift of pruned weights"),
]


def _long_rows(folder: pathlib.Path) -> list[list[str]]:
    def drift(cell: Cell) -> list[str]:
        (record,) = cell.records
        values = record["result"].get("drift of pruned weights")
        return [_NONE if values is None else f"{statistics.fmean(values):.3g}"]

    rows = []
    for case, title in CASES.items():
        for row in _gap_rows(long_cells(folder, case), 4, drift):
            rows.append([f"{title}; {row[0]}", *row[1:]])
    return rows


_FINETUNE_HEADER = [
    "SmolLM2-135M on held-out text",
    *("seeds", "perplexity before", "after", "loss, nats", "gap ± standard error"),
    *("95 % interval", "that is", "loss with weights in bfloat16"),
]


def _finetune_rows(folder: pathlib.Path) -> list[list[str]]:
    def mean(cell: Cell, name: str) -> float:
        return statistics.fmean(x["result"][name] for x in cell.records)

    rows = []
    for (optimizer, rate), of in finetune_cells(folder).items():
        for contender, cell in of.items():
            rows.append(
                [
                    f"{OPTIMIZERS[optimizer]}, rate {rate:g}: {TITLES[contender]}",
                    str(len(cell.results)),
                    f"{mean(cell, 'perplexity before'):.2f}",
                    f"{mean(cell, 'perplexity after'):.2f}",
                    f"{cell.mean:.4f}",
                    *gap_cells(cell, of[REFERENCE], 4),
                    f"{mean(cell, 'loss after in bfloat16'):.4f}",
                ]
            )
    return rows


_RESUME_HEADER = [
    "60 steps, cut five times",
    *("devices of the parts", "losses that are equal", "checksums", "equal"),
]


def _resume_rows(folder: pathlib.Path) -> list[list[str]]:
    rows = []
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        checksums = [record[f"checksum {x}"] for x in ("without a cut", "with cuts")]
        rows.append(
            [
                f"{OPTIMIZERS[record['optimizer']]}, {record['case']}",
                ", ".join(map(str, record["devices"])),
                f"{record['equal losses']} of {record['steps']}",
                ", ".join(f"`{x}`" for x in dict.fromkeys(checksums)),
                "yes" if record["result"]["equal"] else "no",
            ]
        )
    return rows


def _reconstruction(path: pathlib.Path) -> str:
    record = json.loads(path.read_text())
    rows = []
    for name, found in record["splits"].items():
        # The first are the subnormal numbers.
        normal = {k: x[1:] for k, x in found.items()}
        rows.append(
            [
                name,
                f"{max(normal['largest']):.3g}",
                f"{statistics.fmean(normal['mean']):.3g}",
                f"{statistics.fmean(normal['exact']):.2%}",
                f"{found['largest'][0]:.3g}",
            ]
        )
    header = [
        "relative error",
        *("largest", "mean", "exact", "largest of subnormal numbers"),
    ]
    return table(header, rows)


def _next_update(path: pathlib.Path) -> str:
    record = json.loads(path.read_text())
    rows = []
    for setting, found in record["results"].items():
        for row in found:
            errors = [f"{x:.2%}" for x in row["error"].values()]
            rows.append(
                [
                    f"{setting.replace('b2', 'β₂ =')}, {row['codec']}",
                    *errors,
                    f"{row['worst']:.3g}",
                ]
            )
    names = list(next(iter(record["results"].values()))[0]["error"])
    return table(["error of the next update", *names, "largest ratio"], rows)


def _closed_loop(path: pathlib.Path) -> str:
    record = json.loads(path.read_text())
    rows = []
    for setting, found in record["results"].items():
        for row in found:
            reference = row["codec"] == "float32 AdamW"
            text = f"{row['gap']:+.5f} ± {row['standard error']:.5f}"
            rows.append(
                [
                    f"{setting.replace('lr', 'rate')}: {row['codec']}",
                    f"{row['loss']:.4f}",
                    _NONE if reference else text,
                    f"{row['largest |u|, median seed']:.3g}",
                    f"{row['largest |u|, worst seed']:.3g}",
                ]
            )
    header = [
        "byte-level GPT, 500 steps, 48 seeds",
        *("loss", "gap ± standard error", "largest update: median seed", "worst seed"),
    ]
    return table(header, rows)
