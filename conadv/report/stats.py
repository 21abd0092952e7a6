"""Mean, spread and paired differences over seeds: pure functions of numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.special import stdtr, stdtrit  # type: ignore[import-untyped]


@dataclass(frozen=True)
class Stat:
    """One quantity over the seeds of an arm. ``std`` is the sample one (divisor n - 1), None for a single seed."""

    values: Mapping[int, float]
    n: int
    mean: float
    std: float | None
    min: float
    max: float
    median: float


@dataclass(frozen=True)
class Difference:
    """Arm minus baseline, seed by seed, with the 95 % Student-t interval of the mean (None below two pairs).

    ``p``: of the two-sided paired t-test that the interval belongs to; None as well where all pairs differ alike.
    """

    seeds: tuple[int, ...]
    n: int
    mean: float
    low: float | None
    high: float | None
    p: float | None = None

    @property
    def verdict(self) -> str:
        """higher | lower | not distinguishable (the interval contains 0) | no interval.

        Accuracies are counts: few seeds may differ by exactly the same amount by chance, which is no certainty.
        """
        if self.low is None or self.high is None:
            return "no interval"
        if self.low == self.high:
            return "not distinguishable"
        if self.low > 0:
            return "higher"
        return "lower" if self.high < 0 else "not distinguishable"


def stat(values: Mapping[int, float]) -> Stat | None:
    """Statistics of ``values`` (seed -> value); None without any."""
    if not values:
        return None
    numbers = list(values.values())
    std = statistics.stdev(numbers) if len(numbers) > 1 else None
    low, high, mean = min(numbers), max(numbers), statistics.fmean(numbers)
    return Stat(dict(values), len(numbers), mean, std, low, high, statistics.median(numbers))


def paired_difference(arm: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """mean(d) -+ t(0.975, n - 1) * s / sqrt(n) over d = arm - baseline at the common seeds; None without any.

    Student, "The probable error of a mean", Biometrika 6 (1908).
    """
    seeds = tuple(sorted(arm.keys() & baseline.keys()))
    if not seeds:
        return None
    differences = [arm[seed] - baseline[seed] for seed in seeds]
    n, mean = len(seeds), statistics.fmean(differences)
    if n < 2:
        return Difference(seeds, n, mean, None, None)
    error = statistics.stdev(differences) / math.sqrt(n)
    half = float(stdtrit(n - 1, 0.975)) * error
    p = 2 * float(stdtr(n - 1, -abs(mean) / error)) if error else None
    return Difference(seeds, n, mean, mean - half, mean + half, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p of each of m tests: max over j <= i of min(1, (m - j) p_(j)), the p sorted, j from 0.

    All that are below 0.05 may be called differences: the chance of even one false one among the m is below 5 %.
    Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statistics 6 (1979).
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted
