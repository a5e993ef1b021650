"""Rows of `benchmarks/horizon.py`: elements that stop, that are small beside the
largest of their group, that return, and that shrink.

They share their runs: the elements of all these rows are in the arrays of one program.
"""

import functools
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from _elements import Contender, Elements, momentum, Run, run, stack
from _horizon_figures import at_most, Figure, named, Setup


# An element that stops does so after so many steps ...
_STOPS = 100
# ... and its drift is measured over so many.
_DRIFT = 5000
# Elements that return have no gradient for so many steps.
_ABSENT = 1000
_AFTER_RETURN = 100
# Of elements that are small, and of those that shrink to a thousandth.
_SMALL = 2000
_SHRINK = 1e-3
RATIOS = (100, 300, 1000, 3000, 100_000)
_LOG_UNIFORM = "1 to 1e-5, log-uniform"
_NOISY = "1 to 1e-5, log-uniform, noisy"


def _stopping(setup: Setup, group_size: int) -> dict[str, Elements]:
    """The first element of each group gets no gradient after a while. Groups are along
    the axis that they divide."""
    groups = 8 if setup.tiny else 64 * setup.seeds
    along = np.where(np.arange(group_size) == 0, setup.steps(_STOPS), 2**30)
    across = np.broadcast_to(along[:, None], (group_size, groups + 2))
    return {
        "last": Elements.of((groups, group_size), noise=1.0, stops=along),
        "first": Elements.of(across.shape, noise=1.0, stops=across),
    }


def constant(setup: Setup) -> dict[str, Elements]:
    """Groups of one large element and 31 small ones, and of elements of all sizes, with
    constant gradients."""
    rng = np.random.default_rng(0)
    groups = 2 * setup.seeds
    # Groups differ in size, which must not matter, and elements by up to a tenth.
    size = 2.0 ** rng.uniform(0, 8, (groups, 1))
    sections = {}
    for ratio in RATIOS:
        mean = rng.uniform(0.9, 1.1, (groups, 32)) / ratio
        mean[:, 0] = 1.0
        sections[f"1/{ratio}"] = Elements.of(mean.shape, mean=size * mean)
    groups = 8 * setup.seeds
    mean = 10.0 ** rng.uniform(-5, 0, (groups, 32))
    mean[:, 0] = 1.0
    sections[_LOG_UNIFORM] = Elements.of(mean.shape, mean=mean)
    return sections


def _small(setup: Setup) -> dict[str, Elements]:
    sections = constant(setup)
    mean = sections[_LOG_UNIFORM].mean
    noisy = Elements.of(mean.shape, mean=mean, noise=mean)
    return sections | {_NOISY: noisy}


def _returning(setup: Setup) -> dict[str, Elements]:
    """The first element of each group stops and returns, or shrinks; its gradients have
    a mean, so that there is a way to cover. Others have noise."""
    shape = (16 * setup.seeds, 32)
    first = np.arange(32) == 0
    stops = setup.steps(_STOPS)
    returning = partial(Elements.of, shape, mean=1.0 * first, noise=1.0)
    return {
        "returns": returning(
            stops=np.where(first, stops, 2**30),
            returns=np.where(first, stops + setup.steps(_ABSENT), 2**30),
        ),
        "shrinks": returning(
            decay=np.where(first, _SHRINK ** (1 / setup.steps(_SMALL)), 1.0)
        ),
    }


@functools.cache
def _matrices(
    setup: Setup, rule: str, b2: float, group_size: int
) -> tuple[dict[str, slice], dict[Contender, Run]]:
    """The runs of all elements that the chosen rows ask for, by each contender; and the
    rows of the sections in the array "last"."""
    of_32 = group_size == 32
    sections, steps = {}, set()
    arrays = {}
    if "stops" in setup.rows:
        arrays = _stopping(setup, group_size)
        sections["stops"] = arrays["last"]
        steps |= {_STOPS, _STOPS + _DRIFT}
    if of_32 and rule != "lion" and "small" in setup.rows:
        sections |= _small(setup)
        steps |= {_SMALL}
    if of_32 and rule != "lion" and "returns" in setup.rows:
        sections |= _returning(setup)
        absent = _STOPS + _ABSENT
        steps |= {_STOPS, absent, absent + _AFTER_RETURN, _SMALL}
    arrays["last"], rows = stack(sections)
    runs = {}
    for contender in setup.contenders:
        if not of_32 and not contender.compresses_moments:
            continue
        runs[contender] = run(
            contender.with_groups_of(group_size),
            rule,
            arrays,
            [setup.steps(step) for step in steps],
            b2=b2,
            chunk=setup.steps(100),
        )
    return rows, runs


def stops(setup: Setup) -> Iterator[Figure]:
    """The stall: an element whose gradient becomes zero, beside 31 that go on."""
    cases: list[tuple[str, float, int, float | None]] = [
        ("adamw", 0.95, 32, 3.0),
        ("adamw", 0.999, 32, 2.5),
        ("sgd", 0.0, 32, 18.0),
        ("lion", 0.99, 32, None),
        ("adamw", 0.95, 16, 3.0),
        ("adamw", 0.999, 16, 2.5),
        ("adamw", 0.95, 128, 3.0),
        ("adamw", 0.999, 128, 2.5),
    ]
    start, end = setup.steps(_STOPS), setup.steps(_STOPS + _DRIFT)
    for rule, b2, group_size, most in cases:
        rows, runs = _matrices(setup, rule, b2, group_size)
        stopped = {"last": (rows["stops"], 0), "first": (0, slice(None))}
        for array, here in stopped.items():
            title = named(rule, b2)
            case = f"{title}, groups of {group_size} along the {array} axis"
            if rule == "lion":
                # In float32, the sign of a momentum that decays is never zero.
                yield _momentum_left(case, array, here, runs)
                continue
            figure = Figure("stops", case, "drift, lr: mean", at_most(most))
            for contender, found in runs.items():
                drift = found.weights[end][array] - found.weights[start][array]
                figure.add(contender, np.abs(drift[here]))
            yield figure


def _momentum_left(
    case: str, array: str, here: Any, runs: dict[Contender, Run]
) -> Figure:
    figure = Figure("stops", case, "momentum left, of the largest", None)
    for contender, found in runs.items():
        left = np.abs(np.asarray(momentum(contender, found.state)[array]))
        figure.put(contender, np.mean(left[here]) / np.max(left))
    return figure


def small(setup: Setup) -> Iterator[Figure]:
    """The cliff: elements far below the largest of their group, with gradients that are
    constant, but for the noisy ones."""
    names = [f"1/{ratio}" for ratio in RATIOS] + [_LOG_UNIFORM, _NOISY]
    end = setup.steps(_SMALL)
    for b2 in (0.95, 0.999):
        rows, runs = _matrices(setup, "adamw", b2, 32)
        for name in names:
            here = rows[name], slice(1, None)
            case = f"{named('adamw', b2)}, {name}"
            noisy = name == _NOISY
            share = Figure("small", case, "share of the way: median", (0.97, 1.03))
            # The exact one's is larger than 1 where there is noise.
            largest = Figure(
                "small", case, "largest |u|", None if noisy else (0.0, 1.2)
            )
            exact = runs[setup.reference].weights[end]["last"][here]
            for contender, found in runs.items():
                shares = found.weights[end]["last"][here] / exact
                share.put(contender, np.median(shares), shares)
                update = found.largest_until(end, "last")[here]
                largest.put(contender, np.max(update))
            yield from (share, largest)
    yield from _small_of_sgd(setup, names[:-1])


# What unbiased rounding may leave: an error e of one step in the momentum decays by 0.9
# in a step, so that it moves the weight by 9 e lr in all. The momentum of the largest
# is 10 of its gradients, and its group has 254 codes: those near zero are 10 / 256
# apart. An error of rounding by independent thresholds has a standard deviation of at
# most half of that. So that of the sum over 2,000 steps is, in gradients of the
# largest, 9 * 10 / 256 * sqrt(2000) / 2.
_SGD_DEVIATION = 8.0


def _small_of_sgd(setup: Setup, names: list[str]) -> Iterator[Figure]:
    """The way of SGD is as long as gradients are large. So deviations, and updates, are
    in those of a gradient as large as the largest of the group."""
    rows, runs = _matrices(setup, "sgd", 0.0, 32)
    end = setup.steps(_SMALL)
    for name in names:
        case = f"{named('sgd', 0.0)}, {name}"
        share = Figure("small", case, "share of the way: median", None)
        bias = Figure(
            "small", case, "|deviation|, lr x largest g: mean", (0.0, _SGD_DEVIATION)
        )
        # The momentum is 10 times the gradient: spikes would be above.
        largest = Figure("small", case, "largest |u|, of largest g", (0.0, 12.0))
        exact = runs[setup.reference].weights[end]["last"][rows[name]]
        # The way of the largest is 10 times its gradient in each step, at the end.
        unit = runs[setup.reference].largest_until(end, "last")[rows[name]] / 10
        unit = np.max(unit, axis=1, keepdims=True)
        for contender, found in runs.items():
            way = found.weights[end]["last"][rows[name]]
            shares = (way / exact)[:, 1:]
            share.put(contender, np.median(shares), shares)
            deviation = np.abs((way - exact) / unit)[:, 1:]
            bias.add(contender, deviation)
            update = found.largest_until(end, "last")[rows[name]] / unit
            largest.put(contender, np.max(update))
        yield from (share, bias, largest)


def returns(setup: Setup) -> Iterator[Figure]:
    """Elements that get gradients again after 1,000 steps without, and elements whose
    gradients shrink to a thousandth in 2,000 steps."""
    stopped = setup.steps(_STOPS)
    start = stopped + setup.steps(_ABSENT)
    end = start + setup.steps(_AFTER_RETURN)
    last = setup.steps(_SMALL)
    for rule, b2 in (("adamw", 0.95), ("adamw", 0.999), ("sgd", 0.0)):
        rows, runs = _matrices(setup, rule, b2, 32)
        title = named(rule, b2)
        back = Figure(
            "returns", f"{title}, returns", "way of 100 steps, lr: mean", None
        )
        peak = Figure("returns", f"{title}, returns", "largest |u| in these", None)
        shrunk = Figure("returns", f"{title}, shrinks", "way, lr: mean", None)
        shrunk_peak = Figure("returns", f"{title}, shrinks", "largest |u|", None)
        for contender, found in runs.items():
            here = rows["returns"], 0
            weights = {k: w["last"] for k, w in found.weights.items()}
            back.add(contender, np.abs((weights[end] - weights[start])[here]))
            peak.put(contender, np.max(found.largest[end]["last"][here]))
            here = rows["shrinks"], 0
            shrunk.add(contender, np.abs(weights[last][here]))
            update = found.largest_until(last, "last")[here]
            shrunk_peak.put(contender, np.max(update))
        yield from (back, peak, shrunk, shrunk_peak)
