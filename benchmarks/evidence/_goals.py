"""What a gap to float32 may be, and which gaps are: the first table of the page
"Evidence"."""

import dataclasses
import pathlib

from _gaps import (
    Cell,
    Cells,
    finetune_cells,
    gap,
    gpt2_cells,
    gpt2_cells_of_other_b2,
    gpt2_cells_of_other_lengths,
    image_cells,
    long_cells,
)
from _page import CASES, gap_cells, MODELS, OPTIMIZERS, table, update_ratios
from _recipes import REFERENCE


# Of the 95 % interval of a gap, in nats and in points; and of the largest update in
# those of float32.
MOST_LOSS, MOST_POINTS, MOST_UPDATE = 0.015, 0.3, 1.5
# What is compared with the paper's codec: the defaults, and what mends Muon.
_OURS = {"ours": "", "ours-16-bit-momentum": ", momentum in 16 bits"}


@dataclasses.dataclass
class _Kind:
    """Cells of one task: what their figure is called, with how many digits it is shown,
    what a gap may be (None: no goal was set), and the sign of a gap that is worse."""

    title: str
    unit: str
    cells: Cells
    digits: int
    most: float | None
    worse: int


def _kinds(results: pathlib.Path) -> list[_Kind]:
    results = results / "evidence"
    gpt2 = [("GPT-2", gpt2_cells(results / "gpt2"))]
    for steps, cells in gpt2_cells_of_other_lengths(results / "gpt2").items():
        gpt2.append((f"GPT-2, {steps} steps", cells))
    for b2, cells in gpt2_cells_of_other_b2(results / "gpt2").items():
        gpt2.append((f"GPT-2, \u03b2\u2082 = {b2:g}", cells))
    kinds = [_Kind(title, "nats", cells, 4, MOST_LOSS, 1) for title, cells in gpt2]
    for model, title in MODELS.items():
        cells = image_cells(results / "images", model)
        kinds.append(_Kind(title, "points", cells, 2, MOST_POINTS, -1))
    for case, title in CASES.items():
        cells = long_cells(results / "long", case)
        kinds.append(_Kind(title, "nats", cells, 4, None, 1))
    for (optimizer, rate), of in finetune_cells(results / "finetune").items():
        title = f"fine-tuning, rate {rate:g}"
        kinds.append(_Kind(title, "nats", {optimizer: of}, 4, None, 1))
    return kinds


def _pairs(kind: _Kind) -> list[tuple[str, Cell, Cell, dict[str, Cell]]]:
    return [
        (f"{kind.title}, {OPTIMIZERS[optimizer]}", of["ours"], of[REFERENCE], of)
        for optimizer, of in kind.cells.items()
        if "ours" in of
    ]


def summary(results: pathlib.Path) -> str:
    """Every gap between flashquinox and float32, beside its goal."""
    header = [
        "flashquinox less float32",
        *("seeds", "gap ± standard error", "95 % interval", "goal", "within it?"),
    ]
    rows = []
    for kind in _kinds(results):
        for title, ours, reference, _ in _pairs(kind):
            mean, interval, _ = gap_cells(ours, reference, kind.digits)
            goal, within = "\u2013", "\u2013"
            if kind.most is not None:
                # In a narrow column, a line does not break between them.
                goal = f"±\u00a0{kind.most}"
                within = "yes" if _is_within(ours, reference, kind.most) else "**no**"
            seeds = len(ours.results.keys() & reference.results.keys())
            rows.append(
                [f"{title}: {kind.unit}", str(seeds), mean, interval, goal, within]
            )
    return table(header, rows)


def beside_paper(results: pathlib.Path) -> str:
    """Every gap between flashquinox and the paper's codec, each at its own rate."""
    header = [
        "flashquinox less the paper's codec",
        *("seeds", "gap ± standard error", "95 % interval", "that is"),
    ]
    rows = []
    for kind in _kinds(results):
        for title, _, _, of in _pairs(kind):
            if (paper := of.get("flashoptim")) is None:
                continue
            for name, more in _OURS.items():
                if (cell := of.get(name)) is not None:
                    seeds = len(cell.results.keys() & paper.results.keys())
                    cells = gap_cells(cell, paper, kind.digits)
                    rows.append([f"{title}{more}: {kind.unit}", str(seeds), *cells])
    return table(header, rows)


def tables(results: pathlib.Path) -> dict[str, str]:
    return {"in-short": summary(results), "beside-paper": beside_paper(results)}


def _is_within(ours: Cell, reference: Cell, most: float) -> bool:
    here = gap(ours, reference)
    return abs(here.mean) + here.half_width <= most


def failures(results: pathlib.Path) -> list[str]:
    """Which goals are missed, a line each."""
    found = []
    for kind in _kinds(results):
        if kind.most is None:
            continue
        for where, ours, reference, of in _pairs(kind):
            if not _is_within(ours, reference, kind.most):
                here = gap(ours, reference)
                text = f"{here.mean:+.4f} ± {here.half_width:.4f} (95 %)"
                goal = f"± {kind.most}"
                found.append(f"{where}: the gap is {text}, not within {goal}")
            if (ratio := max(update_ratios(ours, reference))) > MOST_UPDATE:
                found.append(f"{where}: the largest update is {ratio:.2f} of float32's")
            if "flashoptim" in of:
                paper = gap(ours, of["flashoptim"])
                if kind.worse * paper.mean - paper.half_width > 0:
                    found.append(f"{where}: worse than the paper's codec")
    return found
