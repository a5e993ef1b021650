"""Differences between runs of the same seeds, with their uncertainty."""

import math
import statistics
from typing import NamedTuple

from scipy import stats


class Gap(NamedTuple):
    """The mean of paired differences.

    - `half_width`: of its 95 % interval, by Student's t; infinite for one seed.
    - `deviation`: the standard deviation of the differences.
    """

    mean: float
    half_width: float
    deviation: float
    seeds: int

    @staticmethod
    def of(differences: list[float]) -> "Gap":
        n = len(differences)
        if n < 2:
            return Gap(differences[0], math.inf, math.nan, n)
        deviation = statistics.stdev(differences)
        return Gap(
            statistics.fmean(differences), _half_width(deviation, n), deviation, n
        )

    def seeds_for(self, half_width: float) -> int | None:
        """How many seeds make the interval this narrow, if differences go on to deviate
        as they do. `None` for one seed, which does not tell."""
        if math.isnan(self.deviation):
            return None
        n = 2
        while _half_width(self.deviation, n) > half_width:
            n += 1
        return n


def _half_width(deviation: float, n: int) -> float:
    return float(stats.t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)
