"""Steps of optimizers on the leaves of a model, measured on the present device."""

import dataclasses
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
from _command_line import in_few_words
from _contenders import Ready
from _models import count, Shapes
from _timing import Plan, Timing


Row = dict[str, Any]

# Of parameters. Below, a step is launches, and calls from Python are measured too.
_SMALL = 2_000_000

HEADER = (
    f"{'':31}{'Gparam/s':>9}{'µs':>11}{'a call':>9}{'limit':>8}{'temp':>7}"
    f"{'trace':>7}{'lower':>7}{'compile':>9}"
)


def on_gpu() -> bool:
    return jax.devices()[0].platform == "gpu"


def measure_model(
    shapes: Shapes,
    contenders: dict[str, Any],
    plan: Plan,
    bytes_per_second: float,
    compared: Collection[str],
) -> list[Row]:
    """A row of each contender: of what has a method `ready`, from the shapes. Programs
    of those that are `compared` are made one after the other, so that we know how long
    each took; all others together, in less time."""
    parameters, names = count(shapes), list(contenders)
    rows: dict[str, Row] = {name: {"contender": name} for name in names}
    together = _how_many_fit(parameters)
    for start in range(0, len(names), together):
        some = {name: contenders[name] for name in names[start : start + together]}
        steps = _steps_in_program(parameters)
        _take_turns(shapes, some, compared, steps, plan, rows)
    if parameters < _SMALL and on_gpu():
        for name in names:
            rows[name]["call"] = {}
        calls = {name: row["call"] for name, row in rows.items()}
        _take_turns(shapes, contenders, compared, 1, plan, calls)
    for row in rows.values():
        if "median" in row:
            fastest = row["moved bytes"] / bytes_per_second
            row["share of limit"] = fastest / row["median"]
    return list(rows.values())


def _take_turns(
    shapes: Shapes,
    contenders: dict[str, Any],
    compared: Collection[str],
    steps: int,
    plan: Plan,
    rows: dict[str, Row],
) -> None:
    """Fills in the rows of contenders that are in memory at the same time."""
    ready: dict[str, Ready] = {}
    times: dict[str, int] = {}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}

    def attempt(name: str, action: Callable[[str], None]) -> None:
        # Whatever stops a contender is its result, out of memory above all.
        try:
            action(name)
        except Exception as error:
            rows[name]["error"] = in_few_words(error)
            if name in ready:
                ready.pop(name).close()

    def prepare(name: str) -> None:
        alone = name in compared
        ready[name] = contenders[name](shapes=shapes).ready(steps, alone)
        rows[name] |= ready[name].facts

    def calibrate(name: str) -> None:
        times[name] = plan.times(ready[name].run)

    def repeat(name: str) -> None:
        run, count, steps = ready[name].run, times[name], ready[name].steps
        # The dispatch of the first call, of a thousand arrays, takes up to half as long
        # as the steps of its loop. That of others is hidden behind the one before: so
        # what they add is timed.
        alone = run(1) if steps > 1 else 0.0
        taken = run(count + 1) - alone if steps > 1 else run(count)
        seconds[name].append(taken / (count * steps))

    def finish(name: str) -> None:
        rows[name]["finite"] = ready[name].is_finite()
        rows[name] |= dataclasses.asdict(Timing.of(seconds[name]))
        ready.pop(name).close()

    for name in contenders:
        if name in compared:
            attempt(name, prepare)
    with ThreadPoolExecutor() as pool:
        others = [name for name in contenders if name not in compared]
        list(pool.map(partial(attempt, action=prepare), others))
    for name in list(ready):
        attempt(name, calibrate)
    for _ in range(plan.repeats):
        for name in list(ready):
            attempt(name, repeat)
    for name in list(ready):
        attempt(name, finish)


def _how_many_fit(parameters: int) -> int:
    """Contenders, into three quarters of what JAX may allocate: Optax in float32 takes
    16 bytes for a parameter."""
    stats = jax.devices()[0].memory_stats() or {}
    return max(1, int(stats.get("bytes_limit", 16e9) * 0.75 / (16 * parameters)))


def _steps_in_program(parameters: int) -> int:
    """On GPUs, as many as take about 0.2 seconds: much longer than a call from Python,
    of a thousand arrays, which differs by milliseconds where other programs run."""
    return min(2000, max(20, 4 * 10**10 // parameters)) if on_gpu() else 1


def line(row: Row) -> str:
    start = f"{row['model']:>15}  {row['contender']:14}"
    if "error" in row:
        return start + row["error"]
    parameters, call = row["parameters"], row.get("call", {}).get("median")
    temporary = row.get("temporary bytes")
    making = [row.get(f"{what} seconds") for what in ("trace", "lower", "compile")]
    trace, lowering, compilation = making
    return (
        f"{start}{parameters / row['median'] / 1e9:9.2f}{row['median'] * 1e6:11.1f}"
        f"{_cell(call, 1e6, 1):>9}{row['share of limit']:8.1%}"
        f"{_cell(temporary, 1 / parameters, 2):>7}"
        f"{_cell(trace, 1, 2):>7}{_cell(lowering, 1, 2):>7}"
        f"{_cell(compilation, 1, 2):>9}"
        f"{'' if row['finite'] else '  NOT FINITE'}"
    )


def _cell(value: float | None, factor: float, digits: int) -> str:
    return "-" if value is None else f"{value * factor:.{digits}f}"
