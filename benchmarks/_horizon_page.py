"""The table on the page "How it works", of the figures of `benchmarks/horizon.py`."""

from typing import NamedTuple

from _horizon_figures import Figure


class _Line(NamedTuple):
    text: str
    row: str
    case: str
    # How it begins.
    measure: str


_LINES = [
    _Line(
        "an element that stops, $\\beta_2 = 0.95$: drift",
        "stops",
        "AdamW, b2 0.95, groups of 32 along the last axis",
        "drift",
    ),
    _Line(
        "the same, $\\beta_2 = 0.999$",
        "stops",
        "AdamW, b2 0.999, groups of 32 along the last axis",
        "drift",
    ),
    _Line(
        "the same, SGD with momentum",
        "stops",
        "SGD, momentum 0.9, groups of 32 along the last axis",
        "drift",
    ),
    _Line("a pruned network: loss", "pruned", "Adam, b2 0.95", "loss"),
    _Line("its weights at zero: drift", "pruned", "Adam, b2 0.95", "drift"),
    _Line(
        "rows of vanished tokens: drift",
        "vanished",
        "Adam, b2 0.95, groups along the vocabulary",
        "drift",
    ),
    *(
        _Line(
            f"an element of {name} of its group's largest: share of the way",
            "small",
            f"AdamW, b2 0.95, {name}",
            "share",
        )
        for name in ("1/100", "1/1000", "1/100000")
    ),
    _Line(
        "the same, all sizes in a group: largest $\\lvert u \\rvert$",
        "small",
        "AdamW, b2 0.95, 1 to 1e-5, log-uniform",
        "largest",
    ),
    _Line(
        "100,000 steps, sizes over three decades: mean $\\lvert w \\rvert$",
        "long",
        "AdamW, b2 0.999, constant",
        "mean",
    ),
    _Line(
        "the same of SGD, an element of 1/1000: share of the way",
        "long",
        "SGD, momentum 0.9, 1/1000",
        "share",
    ),
]


def page_table(figures: list[Figure], names: dict[str, str]) -> str:
    """Markdown. `names` are the contenders, and what their columns are called."""
    rows = [["", *names.values()], ["---", *("---:" for _ in names)]]
    for line in _LINES:
        for figure in figures:
            if (figure.row, figure.case) != (line.row, line.case):
                continue
            if figure.measure.startswith(line.measure):
                values = map(figure.values.get, names)
                rows.append([line.text, *map(_cell, values)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
