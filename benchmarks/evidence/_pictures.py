"""The pictures of the page "Evidence"."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from _gaps import Cells, curve_gap, gpt2_cells, image_cells, long_cells
from _page import MODELS, OPTIMIZERS
from _recipes import REFERENCE


# The background is that of the documentation in dark.
_DARK = {"figure.facecolor": "#1e2129", "axes.facecolor": "#1e2129"}
_THEMES: dict[str, Any] = {"light": "default", "dark": ["dark_background", _DARK]}
_SIZES: dict[Any, Any] = {"font.size": 11, "axes.titlesize": 12, "legend.fontsize": 11}
_STYLES: dict[str, dict[str, Any]] = {
    "float32": {"color": "#8a8f98", "ls": "-", "lw": 3.0, "label": "float32"},
    "float32-last-bits": {
        "color": "#c2858b",
        "ls": "-.",
        "lw": 1.5,
        "label": "float32, last bits flipped",
    },
    "ours": {"color": "#f57c00", "ls": "-", "lw": 1.7, "label": "flashquinox"},
    "flashoptim": {
        "color": "#2f9e8f",
        "ls": "--",
        "lw": 1.5,
        "label": "the paper's codec",
    },
    "bfloat16": {
        "color": "#a05ad0",
        "ls": ":",
        "lw": 2.0,
        "label": "bfloat16 weights",
    },
    "ours-16-bit-momentum": {
        "color": "#2b6cb0",
        "ls": "-.",
        "lw": 1.5,
        "label": "flashquinox, momentum in 16 bits",
    },
}


def plot_all(results: pathlib.Path, folder: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, Callable[[Any], Any] | None] = {
        "curves": _curves(results),
        "long": _long(results / "evidence/long"),
        "reconstruction": _reconstruction(results / "reconstruction-cpu.json"),
        "next-update": _next_update(results / "evidence/quality/open-loop.json"),
    }
    for name, draw in pictures.items():
        if draw is None:
            continue
        for theme, style in _THEMES.items():
            file = folder / f"evidence-{name}-{theme}.png"
            with plt.style.context(style), plt.rc_context(_SIZES):
                figure = draw(plt)
                figure.savefig(file, dpi=140)
                plt.close(figure)
            print(f"Wrote {file}.")


#
# Losses
#


def _curves(results: pathlib.Path) -> Callable[[Any], Any] | None:
    """A column for each optimizer; losses, and gaps of losses to float32."""
    gpt2 = gpt2_cells(results / "evidence/gpt2")
    rows: list[tuple[str, Cells, bool]] = []
    if gpt2:
        rows += [("GPT-2: loss, nats", gpt2, False), ("GPT-2: gap, nats", gpt2, True)]
    for model in ("vit", "resnet"):
        folder, title = results / "evidence/images", MODELS[model]
        # Of an optimizer that has both, the runs with clipped gradients.
        clipped = image_cells(folder, f"clipped-{model}")
        if cells := image_cells(folder, model) | clipped:
            rows.append((f"{title}: gap, nats", cells, True))
    return (lambda plt: _grid(plt, rows)) if rows else None


def _long(folder: pathlib.Path) -> Callable[[Any], Any] | None:
    cells = long_cells(folder, "change")
    if not cells:
        return None
    rows = [("loss, nats", cells, False), ("gap, nats", cells, True)]
    return lambda plt: _grid(plt, rows)


def _grid(plt: Any, rows: list[tuple[str, Cells, bool]]) -> Any:
    names = [x for x in OPTIMIZERS if any(x in cells for _, cells, _ in rows)]
    figure, grid = plt.subplots(
        len(rows),
        len(names),
        figsize=(max(5.2, 3.3 * len(names)), 2.3 * len(rows) + 0.7),
        layout="constrained",
        squeeze=False,
    )
    for line, (label, cells, as_gap) in zip(grid, rows, strict=True):
        for axes, name in zip(line, names, strict=True):
            if name not in cells:
                axes.set_visible(False)
                continue
            _panel(axes, cells[name], as_gap)
        line[0].set_ylabel(label)
    for axes, name in zip(grid[0], names, strict=True):
        axes.set_title(OPTIMIZERS[name])
    # Of each contender one line, in whichever panel it is.
    lines = {
        label: handle
        for axes in grid[0]
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    columns = len(lines) if len(names) > 1 else 2
    place = "outside upper center"
    figure.legend(lines.values(), lines, loc=place, ncols=columns, frameon=False)
    return figure


def _panel(axes: Any, of: dict[str, Any], as_gap: bool) -> None:
    reference = of[REFERENCE]
    peaks = []
    for contender, cell in of.items():
        style = _STYLES[contender]
        steps = _steps(cell)
        # Of the gap, the first tenth is the warm-up, and not of interest.
        first = len(steps) // 10 if as_gap else 0
        if not as_gap:
            mean = np.mean([*cell.curves.values()], axis=0)
            axes.plot(steps, mean, **style)
        elif contender != REFERENCE:
            mean, error = (x[first:] for x in curve_gap(cell, reference))
            axes.plot(steps[first:], mean, **style)
            band = {"color": style["color"], "alpha": 0.25, "lw": 0}
            axes.fill_between(steps[first:], mean - error, mean + error, **band)
            peaks.append(np.nanmax(np.abs(mean) + error))
    if as_gap:
        axes.axhline(0, color="gray", lw=0.8)
        # What is far off does not flatten the others.
        most = 2 * min(peaks, default=1.0)
        limit = min(max(peaks, default=1.0), max(4 * most, 1e-3))
        axes.set_ylim(-1.1 * limit, 1.1 * limit)
    if "epochs" in reference.setting["task"]:
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
    else:
        axes.set_xlabel("step")
    axes.spines[["top", "right"]].set_visible(False)


def _steps(cell: Any) -> np.ndarray:
    """The last step of each span, or the number of each epoch."""
    task = cell.setting["task"]
    spans = len(next(iter(cell.curves.values())))
    if "epochs" in task:
        return np.arange(1, spans + 1)
    return np.arange(1, spans + 1) * (task.get("chunk") or task["span"])


#
# Codecs
#


def _reconstruction(path: pathlib.Path) -> Callable[[Any], Any] | None:
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    styles: dict[str, dict[str, Any]] = {
        "bfloat16": {"color": "#a05ad0", "ls": ":"},
        "paper, 24 bits": {"color": "#2f9e8f", "ls": "-", "lw": 4, "alpha": 0.6},
        "ours, 24 bits": {"color": "#f57c00", "ls": "-", "lw": 1.3},
        "paper, 32 bits": {"color": "#2f9e8f", "ls": "--"},
        "ours, 32 bits": {"color": "#f57c00", "ls": "--"},
    }

    def draw(plt: Any) -> Any:
        figure, axes = plt.subplots(figsize=(8, 3.8), layout="constrained")
        for name, found in record["splits"].items():
            axes.plot(record["exponents"], found["largest"], label=name, **styles[name])
        axes.set_yscale("symlog", linthresh=1e-8, linscale=0.6)
        axes.set_ylim(-2e-9, 2e-2)
        axes.set_yticks([0, 1e-8, 1e-6, 1e-4, 1e-2])
        axes.set_xlabel("exponent of the float32 (-127: subnormal numbers)")
        axes.set_ylabel("largest relative error")
        figure.legend(loc="outside upper center", ncols=3, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        return figure

    return draw


def _next_update(path: pathlib.Path) -> Callable[[Any], Any] | None:
    if not path.exists():
        return None
    results = json.loads(path.read_text())["results"]
    shown = {
        "flashoptim": ("the paper's codec", "#2f9e8f"),
        "default": ("flashquinox", "#f57c00"),
        "default, m alone": ("its first moment alone", "#ffcc80"),
        "default, v alone": ("its second moment alone", "#8d6e63"),
    }

    def draw(plt: Any) -> Any:
        figure, grid = plt.subplots(
            1, len(results), figsize=(9, 3.6), layout="constrained", sharey=True
        )
        panels = zip(np.atleast_1d(grid), results.items(), strict=True)
        for axes, (setting, rows) in panels:
            tensors = list(rows[0]["error"])
            of = {row["codec"]: row for row in rows}
            width = 0.8 / len(shown)
            for place, (codec, (label, color)) in enumerate(shown.items()):
                at = np.arange(len(tensors)) + (place - (len(shown) - 1) / 2) * width
                values = [100 * x for x in of[codec]["error"].values()]
                axes.bar(at, values, width, color=color, label=label)
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.set_title(setting.replace("b2", "$\\beta_2$ ="))
            names = [x.replace(" ", "\n") for x in tensors]
            axes.set_xticks(np.arange(len(tensors)), names)
            axes.spines[["top", "right"]].set_visible(False)
        first = np.atleast_1d(grid)[0]
        first.set_ylabel("error of the next update, %")
        handles, labels = first.get_legend_handles_labels()
        place = "outside upper center"
        figure.legend(handles, labels, loc=place, ncols=4, frameon=False)
        return figure

    return draw
