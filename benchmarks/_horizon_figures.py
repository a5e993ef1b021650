"""What the rows of `benchmarks/horizon.py` yield, and what they are given."""

import dataclasses
from typing import Any

import numpy as np
from _elements import Contender


@dataclasses.dataclass
class Figure:
    """One line of the table: a number for each contender."""

    row: str
    case: str
    measure: str
    # The smallest and the largest number that are good enough, if any are named.
    reach: tuple[float, float] | None
    values: dict[str, float] = dataclasses.field(default_factory=dict)
    # Of elements or seeds, where the value is a median or a mean.
    ranges: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)

    def is_met(self, contender: str) -> bool | None:
        if self.reach is None or contender not in self.values:
            return None
        low, high = self.reach
        return low <= self.values[contender] <= high

    def record(self) -> dict[str, Any]:
        """For JSON, which has no NaN."""
        judged = {
            name: x for name in self.values if (x := self.is_met(name)) is not None
        }
        return {
            **dataclasses.asdict(self),
            "values": {name: _finite(x) for name, x in self.values.items()},
            "ranges": {name: [*map(_finite, x)] for name, x in self.ranges.items()},
            "met": judged,
        }

    @staticmethod
    def of_record(record: dict[str, Any]) -> "Figure":
        reach = record["reach"]
        return Figure(
            record["row"],
            record["case"],
            record["measure"],
            None if reach is None else tuple(reach),
            {name: float(x) for name, x in record["values"].items()},
            {k: (float(x), float(y)) for k, (x, y) in record["ranges"].items()},
        )

    def add(self, contender: Contender, values: np.ndarray) -> "Figure":
        """The mean of these, and their range."""
        return self.put(contender, np.mean(values), values)

    def put(
        self, contender: Contender, value: Any, values: np.ndarray | None = None
    ) -> "Figure":
        self.values[contender.name] = float(value)
        if values is not None:
            self.ranges[contender.name] = (float(np.min(values)), float(np.max(values)))
        return self


def _finite(x: float) -> float | str:
    return x if np.isfinite(x) else str(x)


def at_most(most: float | None) -> tuple[float, float] | None:
    return None if most is None else (0.0, most)


@dataclasses.dataclass(frozen=True)
class Setup:
    """Optax comes first among the contenders: the others are compared with it."""

    contenders: tuple[Contender, ...]
    seeds: int
    tiny: bool
    rows: frozenset[str]

    def steps(self, number: int) -> int:
        """So many steps, or a tenth of them."""
        return number // 10 if self.tiny else number

    @property
    def reference(self) -> Contender:
        return self.contenders[0]


def named(rule: str, b2: float) -> str:
    return {
        "adamw": f"AdamW, b2 {b2}",
        "sgd": "SGD, momentum 0.9",
        "lion": f"Lion, b2 {b2}",
    }[rule]
