"""A row of `benchmarks/horizon.py`: 100,000 steps."""

from collections.abc import Iterator
from functools import partial

import numpy as np
from _elements import Contender, Elements, Run, run, stack
from _horizon_figures import Figure, named, Setup
from _horizon_groups import constant, RATIOS


_LONG = 100_000


def long(setup: Setup) -> Iterator[Figure]:
    """100,000 steps of AdamW, with gradients over three decades in each group; and of
    SGD with constant gradients, after which a bias of rounding shows."""
    # In a tiny run, a hundredth of the steps.
    total = _LONG // 100 if setup.tiny else _LONG
    yield from _long_of_adamw(setup, total)
    yield from _long_of_sgd(setup, total)


def _long_run(
    setup: Setup, rule: str, elements: Elements, total: int
) -> dict[Contender, Run]:
    return {
        contender: run(
            contender,
            rule,
            {"w": elements},
            [total],
            learning_rate=1e-4,
            chunk=total // 100,
        )
        for contender in setup.contenders
    }


def _long_of_sgd(setup: Setup, total: int) -> Iterator[Figure]:
    elements, rows = stack(constant(setup))
    runs = _long_run(setup, "sgd", elements, total)
    exact = runs[setup.reference].weights[total]["w"]
    reach = {f"1/{ratio}": _unbiased(ratio, total) for ratio in RATIOS}
    for name, here in rows.items():
        case = f"{named('sgd', 0.0)}, {name}"
        figure = Figure("long", case, "share of the way: median", reach.get(name))
        for contender, found in runs.items():
            shares = (found.weights[total]["w"] / exact)[here, 1:]
            figure.put(contender, np.median(shares), shares)
        yield figure


def _unbiased(ratio: float, steps: int) -> tuple[float, float] | None:
    """The share of the way that SGD may cover where rounding is unbiased, of an element
    with this share of its group's largest gradient. `None` if it may be anything.

    In gradients of the largest, momenta are 10 / ratio, and codes near zero are
    10 / 256 apart: p = 256 / ratio codes. Rounding by independent thresholds to 0 or 1,
    if p is less than 1, adds an error of variance p (1 - p) codes squared in each step,
    and that moves the weight by 9 times as much before it has decayed. The bound is
    twice the standard deviation of the sum, and 3 %.
    """
    code = 10 / 256
    p = min(0.5, 256 / ratio)
    deviation = 9 * code * np.sqrt(steps * p * (1 - p)) / (10 / ratio * steps)
    bound = 0.03 + 2 * float(deviation)
    return (1 - bound, 1 + bound) if bound < 0.5 else None


def _long_of_adamw(setup: Setup, total: int) -> Iterator[Figure]:
    shape = (2 * setup.seeds, 32)
    normal = np.random.default_rng(0).standard_normal(shape)
    of = partial(Elements.of, shape, mean=normal * np.logspace(-3, 0, 32))
    absent = partial(of, stops=total // 100)
    elements, rows = stack(
        {
            "constant": of(),
            "stops at 1,000": absent(),
            "stops at 1,000, returns at 90,000": absent(returns=total // 10 * 9 + 1),
            "shrinks by 0.999": of(decay=0.999),
            "alternates": of(alternates=True),
            "spike at 50,000": of(spike=total // 2),
        }
    )
    runs = _long_run(setup, "adamw", elements, total)
    for name, here in rows.items():
        reach = (9.5, 10.5) if name == "constant" else None
        figure = Figure("long", f"AdamW, b2 0.999, {name}", "mean |w|", reach)
        peak = Figure("long", f"AdamW, b2 0.999, {name}", "largest |u|", None)
        for contender, found in runs.items():
            figure.add(contender, np.abs(found.weights[total]["w"][here]) * 1e-4)
            peak.put(contender, np.max(found.largest[total]["w"][here]))
        yield from (figure, peak)
