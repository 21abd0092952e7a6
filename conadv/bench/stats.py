"""The median of a few repeats, and how far it can be trusted."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A median and a confidence interval of the median that the values are drawn from; ``coverage`` of 0..1."""

    median: float
    low: float
    high: float
    coverage: float


def median_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """The interval between the l-th smallest and the l-th largest value, by counting alone.

    It misses the true median only if fewer than l values fall on one side of it, which for independent values happens
    with probability 2 sum_{i<l} C(n, i) / 2^n, whatever their distribution. l is the largest that covers ``level``;
    fewer than 6 values cannot cover 95 %: then l = 1 and ``coverage`` says what is reached.

    Source: David and Nagaraja, Order Statistics, 3rd edition (2003), section 7.1.
    """
    ordered = sorted(values)
    n = len(ordered)
    assert n
    place, coverage = 1, _coverage(n, 1)
    while 2 * (place + 1) <= n and _coverage(n, place + 1) >= level:
        place, coverage = place + 1, _coverage(n, place + 1)
    return Interval(statistics.median(ordered), ordered[place - 1], ordered[n - place], coverage)


def _coverage(n: int, place: int) -> float:
    return max(0.0, 1 - sum(math.comb(n, i) for i in range(place)) * 0.5 ** (n - 1))
