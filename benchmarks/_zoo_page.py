"""The tables and the picture of the page "Performance", of the figures of
`benchmarks/zoo.py`."""

import pathlib
from collections.abc import Callable
from typing import Any

from _zoo import ZOO


Row = dict[str, Any]

TITLES = {
    "adamw": "**AdamW**",
    "lion": "Lion",
    "float32": "AdamW, float32 weights",
    "optax": "Optax, float32",
    "optax-bf16": "Optax, no master weights",
    "flashoptim": "FlashOptim",
    "flashoptim-jax": "flashoptim-jax",
}
# Below, a rate says little: a step is launches.
_SMALL = 2_000_000


def page(records: list[dict[str, Any]]) -> str:
    """Markdown, of one or several runs on each kind of device."""
    parts = []
    for kind, table in (("gpu", _on_gpu), ("tpu", _on_tpus), ("cpu", _on_cpu)):
        some = [record for record in records if record["kind"] == kind]
        rows = [row for record in some for row in record["rows"]]
        if rows:
            parts += table(some[0], rows)
    return "\n\n".join(parts)


def _table(header: list[str], lines: list[list[str]]) -> str:
    # Columns that are empty are left out.
    used = [
        i for i in range(len(header)) if i == 0 or any(line[i] != "-" for line in lines)
    ]
    rule = ["---"] + ["---:"] * (len(header) - 1)
    rows = [[row[i] for i in used] for row in [header, rule, *lines]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _by_model(rows: list[Row], column: str) -> dict[str, dict[str, Row]]:
    """Rows of each model, by that column, in the order of the zoo."""
    found: dict[str, dict[str, Row]] = {name: {} for name in ZOO}
    for row in rows:
        found[row["model"]][row[column]] = row
    return {name: some for name, some in found.items() if some}


def _of(row: Row | None, cell: Callable[[Row], str]) -> str:
    if row is None:
        return "-"
    try:
        return "failed" if "error" in row else cell(row)
    except KeyError:
        # What a contender does not tell.
        return "-"


def _ratio(some: dict[str, Row], *names: str) -> str:
    """Of AdamW, to Optax in float32."""

    def cell(row: Row) -> str:
        ours, theirs = (sum(x[name] for name in names) for x in (row, some["optax"]))
        return f"{ours / theirs:.1f}"

    return _of(some.get("adamw"), cell)


def _size(some: dict[str, Row]) -> list[str]:
    row = next(iter(some.values()))
    millions = row["parameters"] / 1e6
    size = f"{millions:.3g} M" if millions < 1000 else f"{millions / 1000:.3g} B"
    return [size, str(row["leaves"])]


def _version(record: dict[str, Any]) -> str:
    return f"jax {record['versions']['jax']}"


#
# GPUs
#


def _rate(row: Row) -> str:
    if row["parameters"] < _SMALL:
        return f"{row['median'] * 1e6:.1f} µs"
    return f"{row['parameters'] / row['median'] / 1e9:.3g}"


def _on_gpu(record: dict[str, Any], rows: list[Row]) -> list[str]:
    share = lambda row: f"{row['share of limit']:.0%}"
    lines, calls = [], []
    for model, some in _by_model(rows, "contender").items():
        line = [ZOO[model].title, *_size(some)]
        for name in TITLES:
            line.append(_of(some.get(name), _rate))
            if name in ("adamw", "lion", "float32"):
                line.append(_of(some.get(name), share))
        ratios = [_ratio(some, f"{what} seconds") for what in ("trace", "compile")]
        lines.append(line + ratios)
        call = lambda row: f"{row['call']['median'] * 1e6:.0f}"
        in_calls = [_of(some.get(name), call) for name in TITLES]
        if in_calls.count("-") < len(in_calls):
            calls.append([ZOO[model].title, *in_calls])
    columns = []
    for name, title in TITLES.items():
        columns.append(title)
        if name in ("adamw", "lion", "float32"):
            columns.append("of its limit")
    header = [
        f"one {record['device']}, {_version(record)}; Gparam/s",
        *("parameters", "leaves", *columns, "trace", "compile"),
    ]
    parts = [_table(header, lines)]
    if calls:
        parts.append(_table(["one call a step; µs", *TITLES.values()], calls))
    return parts


#
# TPUs
#


def _on_tpus(record: dict[str, Any], rows: list[Row]) -> list[str]:
    def per_parameter(name: str) -> Callable[[Row], str]:
        return lambda row: f"{row[name] / row['parameters']:.4g}"

    accessed, temporary = map(per_parameter, ("accessed bytes", "temporary bytes"))
    chips = list(dict.fromkeys(row["chip"] for row in rows))
    ours = _by_model([x for x in rows if x["contender"] == "adamw"], "chip")
    optax = _by_model([x for x in rows if x["contender"] == "optax"], "chip")
    lines = []
    for model, some in ours.items():
        good = [row for row in some.values() if "error" not in row]
        # The worst generation.
        worst = lambda key, good=good: max(good, key=key, default=None)
        kernels = worst(lambda row: -row["parameters in kernels"])
        lines.append(
            [
                ZOO[model].title,
                *_size(some),
                *(_of(some.get(chip), accessed) for chip in chips),
                _of(worst(lambda row: row["temporary bytes"]), temporary),
                _of(kernels, _in_kernels),
                _of(worst(lambda x: x["fusions"]), lambda x: str(x["fusions"])),
                _of(worst(lambda x: x["copies"]), lambda x: str(x["copies"])),
                *(_of(optax.get(model, {}).get(chip), accessed) for chip in chips[:1]),
            ]
        )
    header = [
        f"AdamW, {_version(record)}; bytes accessed per parameter",
        *("parameters", "leaves", *chips, "temporaries", "leaves in kernels"),
        *("fusions", "copies", f"Optax, float32, on {chips[0]}"),
    ]
    return [_table(header, lines)]


def _in_kernels(row: Row) -> str:
    share = row["parameters in kernels"] / row["parameters"]
    return f"{row['leaves in kernels']} ({share:.2%})"


#
# CPUs
#


def _on_cpu(record: dict[str, Any], rows: list[Row]) -> list[str]:
    temporary = lambda row: f"{row['temporary bytes'] / row['parameters']:.2f}"
    making = lambda row: f"{row['trace seconds'] + row['compile seconds']:.2f}"
    lines = [
        [
            ZOO[model].title,
            *_size(some),
            *(_of(some.get(x), _milliseconds) for x in ("adamw", "optax")),
            _ratio(some, "median"),
            *(_of(some.get(x), temporary) for x in ("adamw", "optax")),
            *(_of(some.get(x), making) for x in ("adamw", "optax")),
            _ratio(some, "trace seconds", "compile seconds"),
        ]
        for model, some in _by_model(rows, "contender").items()
    ]
    header = [
        f"one {record['device']}, {_version(record)}",
        *("parameters", "leaves", "AdamW: ms", "Optax, float32: ms", "ratio"),
        *("temporaries, bytes per parameter", "Optax"),
        *("trace and compile: s", "Optax: s", "ratio"),
    ]
    return [_table(header, lines)]


def _milliseconds(row: Row) -> str:
    return f"{row['median'] * 1e3:.3g}"


#
# The picture
#


def plot(records: list[dict[str, Any]], directory: pathlib.Path) -> None:
    """A bar for each model: AdamW's rate, as a share of the limit; and the rates of the
    others on the same scale."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    records = [record for record in records if record["kind"] == "gpu"]
    rows = [row for record in records for row in record["rows"] if "error" not in row]
    models = {k: x for k, x in _by_model(rows, "contender").items() if "adamw" in x}
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
        axes.text(1.03, place, _rate(row), va="center", fontsize="small")
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
