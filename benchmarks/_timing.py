"""How the benchmarks measure time."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
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


@dataclasses.dataclass
class Calls:
    """`carry = function(carry, *operands)`, so often, each in the place of the carry
    before it."""

    function: Callable[..., Any]
    carry: Any
    operands: Sequence[Any]
    clock: Callable[[], float] = time.perf_counter

    def run(self, calls: int) -> float:
        """Seconds of so many."""
        start = self.clock()
        for _ in range(calls):
            self.carry = self.function(self.carry, *self.operands)
        jax.block_until_ready(self.carry)
        return self.clock() - start


# In one compiled program. A loop of an unknown number would ask the host after each.
STEPS_IN_LOOP = 10


def time_loop(
    plan: Plan, step: Callable[..., Any], carry: Any, *operands: Any
) -> tuple[Timing, Any]:
    """The timing of `carry = step(carry, *operands)` in a loop, and the last carry, in
    whose place all of them are."""

    loop = jax.jit(looped(step, STEPS_IN_LOOP), donate_argnums=0)

    calls = Calls(loop, carry, operands)
    return plan.measure(calls.run, STEPS_IN_LOOP), calls.carry


def looped(step: Callable[..., Any], steps: int) -> Callable[..., Any]:
    """`carry = step(carry, *operands)`, so many times."""

    def loop(carry: Any, *operands: Any) -> Any:
        body = lambda _, carry: step(carry, *operands)
        return jax.lax.fori_loop(0, steps, body, carry)

    return loop


class Program(Calls):
    """`carry = function(carry, *operands)`, compiled, and how long it runs.

    - `facts`: what it needs beside its arguments; and how long it took to make it, if
        nothing else was made in that time.
    """

    def __init__(self, function: Callable[..., Any], *structs: Any, alone: bool):
        """`structs` are the shapes and dtypes of the carry and the operands."""
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
        compiled = lowered.compile()
        seconds_to_compile = time.perf_counter() - start
        memory: Any = compiled.memory_analysis()
        self.facts: dict[str, float] = {
            "temporary bytes": memory.temp_size_in_bytes,
            "aliased bytes": memory.alias_size_in_bytes,
        }
        if alone:
            self.facts["trace seconds"] = times[1] - times[0]
            self.facts["lower seconds"] = times[2] - times[1]
            self.facts["trace and lower seconds"] = times[2] - times[0]
            self.facts["compile seconds"] = seconds_to_compile
        super().__init__(compiled, carry=None, operands=())

    def close(self) -> None:
        self.carry, self.operands = None, ()
