"""How the benchmarks measure time."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Timing:
    """Repeated runs, in seconds for a step."""

    median: float
    smallest: float
    largest: float

    @staticmethod
    def of(seconds: list[float]) -> "Timing":
        return Timing(statistics.median(seconds), min(seconds), max(seconds))


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long to measure."""

    repeats: int
    # Of one repeat.
    seconds: float

    def measure(self, run: Callable[[int], float], steps: int = 1) -> Timing:
        """Of what runs a number of times and gives the seconds it took, with so many
        steps in a run."""
        run(1)
        times = max(1, min(1000, round(3 * self.seconds / run(3))))
        per_step = [run(times) / (times * steps) for _ in range(self.repeats)]
        return Timing.of(per_step)


# In one compiled program. A loop of an unknown number would ask the host after each.
_STEPS_IN_LOOP = 10


def time_loop(
    plan: Plan, step: Callable[..., Any], carry: Any, *operands: Any
) -> tuple[Timing, Any]:
    """The timing of `carry = step(carry, *operands)` in a loop, and the last carry, in
    whose place all of them are."""

    @partial(jax.jit, donate_argnums=0)
    def loop(carry: Any, *operands: Any) -> Any:
        body = lambda _, carry: step(carry, *operands)
        return jax.lax.fori_loop(0, _STEPS_IN_LOOP, body, carry)

    def run(loops: int) -> float:
        nonlocal carry
        start = time.perf_counter()
        for _ in range(loops):
            carry = loop(carry, *operands)
        jax.block_until_ready(carry)
        return time.perf_counter() - start

    return plan.measure(run, _STEPS_IN_LOOP), carry
