"""The tables on the page "Numerics", of the figures of `benchmarks/quality.py`."""

from collections.abc import Iterable, Sequence
from typing import Any


# Of the open loop: which rows, and what they are called there.
_PARTS = {
    "flashoptim": '`"flashoptim"`',
    "default": '**`"flashquinox"`**',
    "default, vectors too": "vectors in 8 bits too",
    "default, v alone": "$r$ exact",
    "default, m alone": "$v$ exact",
    "default, m alone to nearest": "$v$ exact, $r$ to nearest",
    "m to nearest": "$r$ to nearest",
    "m by softsign": "$r$ by softsign",
    "m not relative": "$m$ in place of $r$, by softsign",
    "m not relative, nearest": "the same, to nearest",
    "v to nearest": "$v$ to nearest",
    "v with the coarsest step": "$v$ with the coarsest step everywhere",
    "default, TPU arithmetic": "with the arithmetic of a [TPU](tpu.md)",
}
_CURVES = {
    "m linear": "$r$, linear",
    "m softsign": "$r$, softsign",
    "m learned": "**$r$, learned**",
    "m sqrt": "$r$, square root",
    "m log": '$r$, `"log"`',
    "m default": "$r$, linear, as by default",
    "v linear": "$v$, linear",
    "v sqrt": "$v$, linear in $\\sqrt v$",
    "v softsign of sqrt": "$v$, softsign of $\\sqrt v$",
    "v learned": "**$v$, learned**",
    "v fourth root": "$v$, fourth root",
    "v log": '$v$, `"log"`',
    "v default": "$v$, fitted logarithm (the default)",
}
_LOOPS = {
    "float32 AdamW": "float32 AdamW",
    "float32 moments": '`"float32"`',
    "flashoptim": '`"flashoptim"`',
    "default": '**`"flashquinox"`**',
}

_Rows = list[dict[str, Any]]


def page_tables(found: Sequence[dict[str, Any]]) -> str:
    """Markdown, of what --json has written, in one or several runs of one kind."""
    arguments = found[0]["arguments"]
    results = {name: rows for one in found for name, rows in one["results"].items()}
    if arguments.get("closed_loop"):
        return _closed_loop(results)
    if arguments.get("curves"):
        return _curves(results)
    return "\n\n".join(_open_loop(name, rows) for name, rows in results.items())


def _open_loop(name: str, rows: _Rows) -> str:
    shown = list(rows[0]["error"])
    lines = [
        [f"$\\beta_2 = {name.split()[-1]}$", *shown, "ratio", "worst", "sum"],
        ["---", *["---:"] * (len(shown) + 3)],
    ]
    for row in _known(rows, _PARTS):
        low, high = row["sum of v"]
        lines.append(
            [
                _PARTS[row["codec"]],
                *(f"{error:.3f}" for error in row["error"].values()),
                f"{row['largest ratio']:.2f}",
                _largest(row["worst"]),
                f"{low:.2f} to {high:.2f}",
            ]
        )
    return _markdown(lines)


def _curves(results: dict[str, _Rows]) -> str:
    header, columns = [""], []
    for name, rows in results.items():
        b2, by_codec = name.split()[-1], {row["codec"]: row for row in rows}
        columns.append(by_codec)
        first, *others = rows[0]["error"]
        header += [f"$\\beta_2 = {b2}$: {first}", *others]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for codec, text in _CURVES.items():
        if codec in columns[0]:
            errors = [x for by in columns for x in by[codec]["error"].values()]
            lines.append([text, *(f"{error:.4f}" for error in errors)])
    return _markdown(lines)


def _closed_loop(results: dict[str, _Rows]) -> str:
    header, columns = [""], []
    for name, rows in results.items():
        rate, b2 = (x.split()[-1] for x in name.split(","))
        header += [f"lr {rate}, $\\beta_2 = {b2}$", ""]
        columns.append({row["codec"]: row for row in rows})
    lines = [
        header,
        ["---", *["---:"] * (len(header) - 1)],
        ["", *["gap", "$\\lvert u \\rvert$"] * len(columns)],
    ]
    for codec, text in _LOOPS.items():
        if codec not in columns[0]:
            continue
        cells = [text]
        for by in columns:
            row, gap = by[codec], "0"
            if codec != "float32 AdamW":
                gap = f"{row['gap']:+.4f} ± {row['standard error']:.4f}"
            peaks = (row[f"largest |u|, {which} seed"] for which in ("median", "worst"))
            cells += [gap, " / ".join(map(_largest, peaks))]
        lines.append(cells)
    return _markdown(lines)


def _known(rows: _Rows, names: Iterable[str]) -> _Rows:
    """In the order of the names."""
    by_codec = {row["codec"]: row for row in rows}
    return [by_codec[name] for name in names if name in by_codec]


def _largest(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def _markdown(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
