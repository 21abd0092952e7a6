"""Paired differences over seeds with their intervals, and Holm's correction."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.special import stdtr, stdtrit


class Difference(NamedTuple):
    """Arm minus reference over ``n`` common seeds, with the 95 % Student-t interval of the mean.

    ``low`` and ``high`` are None below two pairs. ``p`` is that of the two-sided paired t-test;
    None as well where all pairs differ by the same amount.
    """

    n: int
    mean: float
    low: float | None = None
    high: float | None = None
    p: float | None = None


def paired_difference(arm: pd.Series, reference: pd.Series) -> Difference | None:
    """mean(d) -+ t(0.975, n - 1) * s / sqrt(n) of d = arm - reference, both indexed by seed.

    None without a common seed. Student, "The probable error of a mean", Biometrika 6 (1908).
    """
    differences = (arm - reference).dropna().tolist()
    if len(differences) < 2:
        return Difference(1, differences[0]) if differences else None
    n, mean = len(differences), statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(n)
    half = float(stdtrit(n - 1, 0.975)) * error
    p = 2 * float(stdtr(n - 1, -abs(mean) / error)) if error else None
    return Difference(n, mean, mean - half, mean + half, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p of each of m tests: max over j <= i of min(1, (m - j) p_(j)), p sorted, j >= 0.

    Calling every test with an adjusted p below 0.05 a difference keeps the chance of even one false
    one below 5 %. Holm, "A simple sequentially rejective multiple test procedure", Scand. J.
    Statistics 6 (1979).
    """
    p, order = np.array(p_values), np.argsort(p_values)
    adjusted = np.empty(len(p))
    adjusted[order] = np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order]).clip(max=1)
    return [float(p) for p in adjusted]
