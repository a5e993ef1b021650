"""The tables of the page "Performance", of the figures of `benchmarks/zoo.py`."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from _contenders import OTHERS
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


def page(records: list[dict[str, Any]]) -> dict[str, str]:
    """Markdown for each kind of device, of one or several runs on it."""
    sections = {}
    for kind, tables in (("gpu", _on_gpu), ("tpu", _on_tpus), ("cpu", _on_cpu)):
        some = [record for record in records if record["kind"] == kind]
        rows = [row for record in some for row in record["rows"]]
        others = [row for row in rows if _optimizer(row) in OTHERS]
        rows = [row for row in rows if _optimizer(row) not in OTHERS]
        if rows:
            sections[kind] = "\n\n".join(tables(some[0], rows))
        if others and kind != "tpu":
            sections[f"others, {kind}"] = _of_others(some[0], others)
    return sections


def _number(digits: int, of: Callable[[Row], float], row: Row) -> str:
    return f"{of(row):.{digits}f}"


def _optimizer(row: Row) -> str:
    return row["contender"].removeprefix("optax-")


def _of_others(record: dict[str, Any], rows: list[Row]) -> str:
    """Optimizers beside AdamW, each beside Optax's."""
    device = f"one {record['device']}, {_version(record)}"
    header = [device, "", "µs", "Optax, float32", "of its limit"]
    header += ["temporaries, bytes per parameter", "Optax's", "to make, s", "Optax's"]
    # Digits, and what they are of.
    cells: list[tuple[int, Callable[[Row], float]]] = [
        (0, lambda x: x["median"] * 1e6),
        (2, lambda x: x["temporary bytes"] / x["parameters"]),
        (1, lambda x: sum(x[f"{y} seconds"] for y in ("trace", "lower", "compile"))),
    ]
    lines = []
    for model, some in by_model(rows, "contender").items():
        for name in dict.fromkeys(map(_optimizer, some.values())):
            both = [some.get(name), some.get(f"optax-{name}")]
            times, spaces, seconds = (
                [_of(x, partial(_number, digits, of)) for x in both]
                for digits, of in cells
            )
            share = _of(both[0], lambda x: f"{x['share of limit']:.0%}")
            name = f"`{name}`"
            lines.append([ZOO[model].title, name, *times, share, *spaces, *seconds])
    return _table(header, lines)


def insert(sections: dict[str, str], text: str) -> str:
    """The page with these sections in the place of its own, which are between lines of
    `<!-- gpu -->` and `<!-- end of gpu -->`."""
    for kind, section in sections.items():
        before, start, rest = text.partition(f"<!-- {kind} -->\n")
        _, end, after = rest.partition(f"<!-- end of {kind} -->\n")
        if not end:
            raise ValueError(f"The page has no place for tables of {kind}.")
        text = f"{before}{start}\n{section}\n\n{end}{after}"
    return text


# Which models shall reach that share of the limit on a GPU, and how much of Optax's
# time a step may take on a CPU.
_LARGE, _LEAST_SHARE, _MOST_ON_CPUS = 20_000_000, 0.7, 3


def shortfalls(records: list[dict[str, Any]]) -> list[str]:
    """Where AdamW is slower than it should be, a line each."""
    found = []
    for record in records:
        kind = record["kind"]
        measure = "accessed bytes" if kind == "tpu" else "median"
        optax = {_place(x): x for x in record["rows"] if x["contender"] == "optax"}
        for row in record["rows"]:
            if row["contender"] != "adamw":
                continue
            name, theirs = " ".join(_place(row)), optax.get(_place(row), {})
            if measure not in row:
                found.append(f"{name}: {row['error']}")
                continue
            ratio = row[measure] / theirs.get(measure, math.inf)
            if ratio > (_MOST_ON_CPUS if kind == "cpu" else 1):
                found.append(f"{name}: {ratio:.2f} of Optax's {measure}")
            share = row.get("share of limit", 1)
            if kind == "gpu" and row["parameters"] > _LARGE and share < _LEAST_SHARE:
                found.append(f"{name}: {share:.0%} of the limit")
    return found


def _place(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in ("model", "chip") if name in row)


def _table(header: list[str], lines: list[list[str]]) -> str:
    # Columns that are empty are left out.
    used = [
        i for i in range(len(header)) if i == 0 or any(line[i] != "-" for line in lines)
    ]
    rule = ["---"] + ["---:"] * (len(header) - 1)
    rows = [[row[i] for i in used] for row in [header, rule, *lines]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def by_model(rows: list[Row], column: str) -> dict[str, dict[str, Row]]:
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


# In the theme of the reader.
_PICTURE = "\n".join(
    "![Rates of AdamW's steps, as shares of the limit, beside those of others]"
    f"(_static/zoo-{theme}.png#only-{theme})"
    for theme in ("light", "dark")
)


def rate(row: Row) -> str:
    if row["parameters"] < _SMALL:
        return f"{row['median'] * 1e6:.1f} µs"
    return f"{row['parameters'] / row['median'] / 1e9:.3g}"


def _on_gpu(record: dict[str, Any], rows: list[Row]) -> list[str]:
    share = lambda row: f"{row['share of limit']:.0%}"
    lines, making, calls = [], [], []
    models = by_model(rows, "contender")
    for model, some in models.items():
        title, *size = ZOO[model].title, *_size(some)
        line = [title, *size]
        for name in TITLES:
            line.append(_of(some.get(name), rate))
            if name in ("adamw", "lion", "float32"):
                line.append(_of(some.get(name), share))
        lines.append(line)
        making.append([title, *size, *(_ratio(some, f"{x} seconds") for x in _MAKING)])
        call = lambda row: f"{row['call']['median'] * 1e6:.0f}"
        calls.append([title, *(_of(some.get(name), call) for name in TITLES)])
    columns = []
    for name, title in TITLES.items():
        columns.append(title)
        if name in ("adamw", "lion", "float32"):
            columns.append("of its limit")
    device = f"one {record['device']}, {_version(record)}"
    rates = [f"{device}; Gparam/s", "parameters", "leaves", *columns]
    parts = [*_in_short(models), _PICTURE, _table(rates, lines)]
    ratios = "AdamW's seconds over those of Optax in float32"
    for labels, titles, some in (
        ([ratios, "parameters", "leaves"], _MAKING, making),
        (["one call a step; µs"], TITLES.values(), calls),
    ):
        measured = [line for line in some if set(line[len(labels) :]) != {"-"}]
        if measured:
            parts.append(_table([*labels, *titles], measured))
    return parts


# Earlier runs did not tell the first two apart.
_MAKING = "trace", "lower", "trace and lower", "compile"


def _in_short(models: dict[str, dict[str, Row]]) -> list[str]:
    """A sentence on the large models that were measured beside Optax, if there are."""
    pairs = [
        (some["adamw"], some["optax"])
        for some in models.values()
        if {"adamw", "optax"} <= some.keys() and some["adamw"]["parameters"] > _LARGE
    ]
    if not pairs:
        return []
    rates = [x["parameters"] / x["median"] / 1e9 for x, _ in pairs]
    shares = [x["share of limit"] for x, _ in pairs]
    times = [theirs["median"] / ours["median"] for ours, theirs in pairs]
    return [
        f"In models of more than {_LARGE // 10**6} million parameters, AdamW updates "
        f"**{min(rates):.0f} to {max(rates):.0f} billion parameters a second**: "
        f"{min(shares):.0%} to {max(shares):.0%} of the limit, and {min(times):.1f} to "
        f"{max(times):.1f} times the rate of Optax in float32."
    ]


#
# TPUs
#


def _on_tpus(record: dict[str, Any], rows: list[Row]) -> list[str]:
    def per_parameter(name: str) -> Callable[[Row], str]:
        return lambda row: f"{row[name] / row['parameters']:.4g}"

    accessed, temporary = map(per_parameter, ("accessed bytes", "temporary bytes"))
    chips = list(dict.fromkeys(row["chip"] for row in rows))
    ours = by_model([x for x in rows if x["contender"] == "adamw"], "chip")
    optax = by_model([x for x in rows if x["contender"] == "optax"], "chip")
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
    parts = "trace and lower seconds", "compile seconds"
    making = lambda row: f"{sum([row[name] for name in parts]):.2f}"
    lines = [
        [
            ZOO[model].title,
            *_size(some),
            *(_of(some.get(x), _milliseconds) for x in ("adamw", "optax")),
            _ratio(some, "median"),
            *(_of(some.get(x), temporary) for x in ("adamw", "optax")),
            *(_of(some.get(x), making) for x in ("adamw", "optax")),
            _ratio(some, *parts),
        ]
        for model, some in by_model(rows, "contender").items()
    ]
    header = [
        f"a CPU of {record['cores']} cores, {_version(record)}",
        *("parameters", "leaves", "AdamW: ms", "Optax, float32: ms", "ratio"),
        *("temporaries, bytes per parameter", "Optax"),
        *("trace and compile: s", "Optax: s", "ratio"),
    ]
    return [_table(header, lines)]


def _milliseconds(row: Row) -> str:
    return f"{row['median'] * 1e3:.3g}"
