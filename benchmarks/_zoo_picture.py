"""The picture of the page "Performance", of the figures of `benchmarks/zoo.py`."""

import pathlib
from typing import Any

from _zoo import ZOO
from _zoo_page import by_model, rate, Row, TITLES


def plot(records: list[dict[str, Any]], directory: pathlib.Path) -> None:
    """A bar for each model: AdamW's rate, as a share of the limit; and the rates of the
    others on the same scale."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    records = [record for record in records if record["kind"] == "gpu"]
    rows = [row for record in records for row in record["rows"] if "error" not in row]
    models = {k: x for k, x in by_model(rows, "contender").items() if "adamw" in x}
    if not models:
        return
    directory.mkdir(parents=True, exist_ok=True)
    for theme, style in _THEMES.items():
        file = directory / f"zoo-{theme}.png"
        with plt.style.context(style):
            figure, axes = plt.subplots(
                figsize=(9, 1.4 + 0.3 * len(models)), layout="constrained"
            )
            _draw(axes, models)
            axes.set_title(f"AdamW on one {records[0]['device']}\n\n", loc="left")
            figure.savefig(file, dpi=150)
            plt.close(figure)
        print(f"Wrote {file}.")


# The background is that of the documentation in dark.
_DARK = {"figure.facecolor": "#1e2129", "axes.facecolor": "#1e2129"}
_THEMES: dict[str, Any] = {"light": "default", "dark": ["dark_background", _DARK]}
_MARKERS = {
    "optax": ("o", "#1565c0"),
    "optax-bf16": ("s", "#7b1fa2"),
    "flashoptim": ("^", "#2e7d32"),
    "flashoptim-jax": ("v", "#c62828"),
}


def _draw(axes: Any, models: dict[str, dict[str, Row]]) -> None:
    ours = [some["adamw"] for some in models.values()]
    shares = [row["share of limit"] for row in ours]
    axes.barh(range(len(models)), shares, 0.66, color="#ffb300", label="flashquinox")
    for name, (marker, color) in _MARKERS.items():
        # Where our bar would end at their rate.
        ends = [
            (some["adamw"]["median"] / some[name]["median"] * share, place)
            for place, (some, share) in enumerate(
                zip(models.values(), shares, strict=True)
            )
            if name in some
        ]
        if ends:
            style = {"marker": marker, "color": color, "edgecolor": "white"}
            x, y = zip(*ends, strict=True)
            axes.scatter(x, y, 36, label=TITLES[name], zorder=3, lw=0.8, **style)
    for place, row in enumerate(ours):
        axes.text(1.03, place, rate(row), va="center", fontsize="small")
    axes.text(1.03, -1, "Gparam/s", va="center", fontsize="small")
    axes.set_yticks(range(len(models)), [ZOO[model].title for model in models])
    axes.set_ylim(len(models) - 0.5, -0.5)
    axes.set_xlim(0, 1.12)
    axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1], ["0", *"20% 40% 60% 80% 100%".split()])
    axes.axvline(1, color="gray", linestyle="--", linewidth=1)
    axes.set_xlabel("rate, as a share of what a copy of flashquinox's bytes allows")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.01),
        ncols=5,
        frameon=False,
        fontsize="small",
        handletextpad=0.3,
        columnspacing=1.2,
    )
