"""Gaps between contenders and float32, paired by seeds, of the files of `gpt2.py`,
`images.py` and `long.py`."""

import dataclasses
import json
import math
import pathlib
import statistics
from collections.abc import Callable
from typing import Any, TypeVar

import _benchmarks  # noqa: F401
import numpy as np
from _paired import Gap
from _recipes import CONTENDERS, REFERENCE


T = TypeVar("T", int, float)


@dataclasses.dataclass
class Cell:
    """The runs of one contender with its chosen rate.

    - `setting`: what all contenders of a gap must have in common.
    - `results`: the figure at the end of each seed.
    - `curves`: mean training losses of spans, (spans,) for each seed.
    - `largest`: the largest update of each seed, in peak learning rates.
    """

    contender: str
    rate: float
    setting: dict[str, Any]
    results: dict[int, float]
    curves: dict[int, np.ndarray]
    largest: dict[int, float]
    records: list[dict[str, Any]]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.results.values())

    @property
    def peak(self) -> float:
        return max(self.largest.values())


# Of each optimizer, the cells of the contenders, in their order.
Cells = dict[str, dict[str, Cell]]


def gap(cell: Cell, reference: Cell) -> Gap:
    """Of the ends, over the seeds that both have."""
    if cell.setting != reference.setting:
        both = {**cell.setting, **reference.setting}
        differs = [k for k in both if cell.setting.get(k) != reference.setting.get(k)]
        raise ValueError(
            f"{cell.contender} and {reference.contender} are no pair: their "
            f"{', '.join(differs)} differ."
        )
    seeds = sorted(cell.results.keys() & reference.results.keys())
    return Gap.of([cell.results[seed] - reference.results[seed] for seed in seeds])


def standard_error(found: Gap) -> float:
    return found.deviation / math.sqrt(found.seeds)


def curve_gap(cell: Cell, reference: Cell) -> tuple[np.ndarray, np.ndarray]:
    """Of each span, the mean of the paired differences and its standard error."""
    seeds = sorted(cell.curves.keys() & reference.curves.keys())
    each = np.stack([cell.curves[seed] - reference.curves[seed] for seed in seeds])
    if len(seeds) < 2:
        return each[0], np.zeros_like(each[0])
    return each.mean(axis=0), each.std(axis=0, ddof=1) / math.sqrt(len(seeds))


def _records(folder: pathlib.Path, pattern: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob(pattern))]


def _collected(cells: list[tuple[str, Cell]]) -> Cells:
    """Optimizers without float32, or with it alone, are left out: there is nothing to
    compare."""
    found: Cells = {}
    for optimizer in ("adamw", "lion", "sgd", "muon"):
        of = {cell.contender: cell for name, cell in cells if name == optimizer}
        if REFERENCE in of and len(of) > 1:
            found[optimizer] = {name: of[name] for name in CONTENDERS if name in of}
    return found


def gpt2_cells(folder: pathlib.Path) -> Cells:
    """Each contender at its own rate."""
    return _at_own_rates(_records(folder, "*-seed-*.json"))


def gpt2_cells_at_one_rate(folder: pathlib.Path) -> list[Cells]:
    """Of optimizers with runs at a given rate, all contenders at each rate that float32
    has, its own one first."""
    records = _records(folder, "*-seed-*.json")
    records = [x for x in records if not _options(x) & {"steps", "b2"}]
    given = {x["recipe"]["optimizer"] for x in records if "rate" in _options(x)}
    own = _at_own_rates(records)
    found = []
    for name in (name for name in own if name in given):
        of = [x for x in records if x["recipe"]["optimizer"] == name]
        rates = {x["rate"] for x in of if x["contender"] == REFERENCE}
        own_rate = own[name][REFERENCE].rate
        for rate in sorted(rates, key=lambda rate: (rate != own_rate, rate)):
            found.append(_gpt2_cells([x for x in of if x["rate"] == rate]))
    return found


def gpt2_cells_of_other_lengths(folder: pathlib.Path) -> dict[int, Cells]:
    """Each contender at its own rate, of each number of steps that was asked for."""
    return _by_option(folder, "steps", lambda record: record["steps"])


def gpt2_cells_of_other_b2(folder: pathlib.Path) -> dict[float, Cells]:
    """All contenders at one rate, with each b2 that was asked for."""
    return _by_option(folder, "b2", lambda record: record["recipe"]["b2"])


def _by_option(
    folder: pathlib.Path, option: str, value: Callable[[dict[str, Any]], T]
) -> dict[T, Cells]:
    """Of the records whose command has an option, the cells with each value of it."""
    by_value: dict[T, list[dict[str, Any]]] = {}
    for record in _records(folder, "*-seed-*.json"):
        if option in _options(record):
            by_value.setdefault(value(record), []).append(record)
    cells = {of: _gpt2_cells(records) for of, records in sorted(by_value.items())}
    return {of: found for of, found in cells.items() if found}


def _at_own_rates(records: list[dict[str, Any]]) -> Cells:
    return _gpt2_cells(
        [x for x in records if not _options(x) & {"rate", "steps", "b2"}]
    )


def _options(record: dict[str, Any]) -> set[str]:
    return {x[2:] for x in record["command"].split() if x.startswith("--")}


def _by_cell(
    records: list[dict[str, Any]],
) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The records of each optimizer and contender."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        key = record["recipe"]["optimizer"], record["contender"]
        found.setdefault(key, []).append(record)
    return found


def _gpt2_cells(records: list[dict[str, Any]]) -> Cells:
    cells = []
    for (optimizer, contender), own in _by_cell(records).items():
        of = {record["seed"]: record for record in own}
        result = lambda name, of=of: {k: x["result"][name] for k, x in of.items()}
        first = own[0]
        cell = Cell(
            contender,
            first["rate"],
            {k: first[k] for k in ("recipe", "task", "steps", "digest")},
            result("validation loss"),
            {seed: np.asarray(record["losses"]) for seed, record in of.items()},
            result("largest update"),
            own,
        )
        cells.append((optimizer, cell))
    return _collected(cells)


def image_cells(folder: pathlib.Path, model: str) -> Cells:
    """The figure is the accuracy, in percent."""
    return _of_lanes(_records(folder, f"{model}-*-seeds*.json"), "accuracy")


def long_cells(folder: pathlib.Path, case: str) -> Cells:
    return _of_lanes(_records(folder, f"{case}-*.json"), "validation loss")


def finetune_cells(folder: pathlib.Path) -> dict[tuple[str, float], dict[str, Cell]]:
    """Of each optimizer and rate, the contenders. The figure is the loss on held-out
    text at the end."""
    by_cell: dict[tuple[str, float], dict[str, dict[int, Any]]] = {}
    for record in _records(folder, "*-seed-*.json"):
        key = record["recipe"]["optimizer"], record["rate"]
        of_contender = by_cell.setdefault(key, {}).setdefault(record["contender"], {})
        of_contender[record["seed"]] = record
    return {
        key: {
            name: _finetune_cell(name, contenders[name])
            for name in CONTENDERS
            if name in contenders
        }
        for key, contenders in sorted(by_cell.items())
    }


def _finetune_cell(contender: str, of: dict[int, Any]) -> Cell:
    """Of the records of each seed."""
    (first, *_) = of.values()
    return Cell(
        contender,
        first["rate"],
        {k: first[k] for k in ("recipe", "task", "rate")},
        {seed: x["result"]["loss after"] for seed, x in of.items()},
        {seed: np.asarray(x["losses"]) for seed, x in of.items()},
        {},
        [*of.values()],
    )


def _of_lanes(records: list[dict[str, Any]], name: str) -> Cells:
    """Of records that each have several seeds; those of a cell may be several."""
    cells = []
    for (optimizer, contender), own in _by_cell(records).items():
        first = own[0]
        seeds = [seed for record in own for seed in record["seeds"]]
        of = lambda values, seeds=seeds: dict(zip(seeds, values, strict=True))
        ends = lambda name, own=own: [
            x for record in own for x in record["result"][name]
        ]
        cell = Cell(
            contender,
            first["rate"],
            {k: first[k] for k in ("recipe", "task")},
            of(ends(name)),
            of([x for record in own for x in np.asarray(record["losses"]).T]),
            of(ends("largest update")),
            own,
        )
        cells.append((optimizer, cell))
    return _collected(cells)
