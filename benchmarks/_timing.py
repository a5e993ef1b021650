"""How the benchmarks measure time."""

import dataclasses
import statistics
import time
from collections.abc import Callable
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
        times = self.times(run)
        per_step = [run(times) / (times * steps) for _ in range(self.repeats)]
        return Timing.of(per_step)

    def times(self, run: Callable[[int], float]) -> int:
        """How often to run in one repeat."""
        run(1)
        return max(1, min(1000, round(3 * self.seconds / run(3))))


# In one compiled program. A loop of an unknown number would ask the host after each.
STEPS_IN_LOOP = 10


def time_loop(
    plan: Plan, step: Callable[..., Any], carry: Any, *operands: Any
) -> tuple[Timing, Any]:
    """The timing of `carry = step(carry, *operands)` in a loop, and the last carry, in
    whose place all of them are."""

    loop = jax.jit(looped(step, STEPS_IN_LOOP), donate_argnums=0)

    def run(loops: int) -> float:
        nonlocal carry
        start = time.perf_counter()
        for _ in range(loops):
            carry = loop(carry, *operands)
        jax.block_until_ready(carry)
        return time.perf_counter() - start

    return plan.measure(run, STEPS_IN_LOOP), carry


def looped(step: Callable[..., Any], steps: int) -> Callable[..., Any]:
    """`carry = step(carry, *operands)`, so many times."""

    def loop(carry: Any, *operands: Any) -> Any:
        body = lambda _, carry: step(carry, *operands)
        return jax.lax.fori_loop(0, steps, body, carry)

    return loop


class Program:
    """`carry = function(carry, operand)`, compiled, and how long it runs.

    - `facts`: what it needs beside its arguments; and how long it took to make it, if
        nothing else was made in that time.
    """

    def __init__(self, function: Callable[..., Any], *structs: Any, alone: bool):
        """`structs` are the shapes and dtypes of the carry and the operand."""
        if alone:
            # Nothing is traced that was traced for another program.
            jax.clear_caches()
        # Tracing and lowering take one thread.
        times = [time.thread_time()]
        traced = jax.jit(function, donate_argnums=0).trace(*structs)
        times.append(time.thread_time())
        lowered = traced.lower()
        times.append(time.thread_time())
        start = time.perf_counter()
        self._compiled = lowered.compile()
        seconds_to_compile = time.perf_counter() - start
        memory: Any = self._compiled.memory_analysis()
        self.facts: dict[str, float] = {
            "temporary bytes": memory.temp_size_in_bytes,
            "aliased bytes": memory.alias_size_in_bytes,
        }
        if alone:
            self.facts["trace seconds"] = times[1] - times[0]
            self.facts["lower seconds"] = times[2] - times[1]
            self.facts["trace and lower seconds"] = times[2] - times[0]
            self.facts["compile seconds"] = seconds_to_compile
        self.carry: Any = None
        self.operand: Any = None

    def run(self, calls: int) -> float:
        """Seconds of so many calls, each in the place of the carry before it."""
        start = time.perf_counter()
        for _ in range(calls):
            self.carry = self._compiled(self.carry, self.operand)
        jax.block_until_ready(self.carry)
        return time.perf_counter() - start

    def close(self) -> None:
        self.carry = self.operand = None
