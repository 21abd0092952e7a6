"""Interleaved timing, so that a busy machine slows all cases alike. Quote ratios within a round.

Every round runs each case once, in a random order. Bursts are timed by ``torch.utils.benchmark``,
which waits for CUDA and runs two calls that do not count: the first steps of a burst find cold
caches and the images of an earlier burst.
"""

from __future__ import annotations

import logging
import math
import random
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pandas as pd
import torch
from scipy.stats import quantile_test

from conadv.distributed.comm import Comm

logging.getLogger("torch.utils.cpp_extension").disabled = True  # it warns of compilers it misses
from torch.utils.benchmark import Timer  # noqa: E402

WARMUP = 2
"""Calls at the start of a burst that do not count (``Timer.timeit`` makes them)."""


@dataclass(frozen=True)
class Sample:
    """Mean seconds of a step on one rank, and of the phases within it.

    seconds is None on a rank that only serves others.
    """

    seconds: float | None
    phases: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """What to time, the name of the case that its ratio refers to, and facts for the JSON.

    Ranks: ``run`` is called on all ranks of the world in the same order; it may be collective.
    """

    run: Callable[[], Sample]
    yardstick: str
    labels: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A timed case, with a 95 % confidence interval of the ratio (:func:`median_interval`).

    ratio: the median over rounds of its time over the yardstick's in the same round. Times in ms;
    phases of learners, and of ranks that serve them, are medians over the rounds.
    """

    name: str
    median_ms: float
    min_ms: float
    yardstick: str
    ratio: float
    ratio_low: float
    ratio_high: float
    samples_ms: Sequence[float]
    phases_ms: Mapping[str, float]
    server_phases_ms: Mapping[str, float]
    labels: Mapping[str, Any]


def burst(step: Callable[[], object], count: int) -> Sample:
    """Mean seconds of ``count`` consecutive calls, and of the phases that they may return."""
    seen: list[object] = []
    names = {"seen": seen, "step": step}
    timer = Timer("seen.append(step())", globals=names, num_threads=torch.get_num_threads())
    seconds = timer.timeit(count).mean
    return Sample(seconds, mean(phases for phases in seen[-count:] if isinstance(phases, dict)))


def mean(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Mean seconds per phase; a phase that a part lacks took no time there."""
    means: dict[Any, Any] = pd.DataFrame([*parts]).fillna(0.0).mean().to_dict()
    return means


def interleave(
    runs: Mapping[str, Callable[[], Sample]], rounds: int, world: Comm
) -> dict[str, list[list[Sample]]]:
    """Run each case once per round; returns for each case and round the samples of all ranks.

    One round before them warms up. Ranks: collective; only rank 0 gets the samples.
    """
    results: dict[str, list[list[Sample]]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        order = list(runs)
        random.Random(number).shuffle(order)  # the same on every rank and machine
        for name in order:
            world.barrier()
            samples = world.gather_objects(runs[name]())
            if number:
                results[name].append(samples)
    return results


def measure(cases: Mapping[str, Case], rounds: int, world: Comm) -> list[Row]:
    """Time all cases. Ranks: collective; rank 0 gets the rows, the others an empty list."""
    results = interleave({name: case.run for name, case in cases.items()}, rounds, world)
    return [row(name, case, results) for name, case in cases.items()] if world.is_main else []


def row(name: str, case: Case, results: Mapping[str, Sequence[Sequence[Sample]]]) -> Row:
    """The row of a case. The time of a round is the slowest learner's, phases are their mean."""

    def seconds(of: str) -> list[float]:
        return [max(s.seconds for s in round_ if s.seconds is not None) for round_ in results[of]]

    def phases_ms(learning: bool) -> Any:
        ranks = [[s for s in r if (s.seconds is not None) == learning] for r in results[name]]
        found = pd.DataFrame([mean(s.phases for s in r if s.phases) for r in ranks]).fillna(0.0)
        return (1e3 * found.median()).to_dict()

    own = seconds(name)
    ratio = median_interval([a / b for a, b in zip(own, seconds(case.yardstick), strict=True)])
    return Row(
        name,
        1e3 * statistics.median(own),
        1e3 * min(own),
        case.yardstick,
        *ratio,
        [1e3 * each for each in own],
        phases_ms(True),
        phases_ms(False),
        case.labels,
    )


class Interval(NamedTuple):
    """A median and a 95 % confidence interval of it."""

    median: float
    low: float
    high: float


def median_interval(values: Sequence[float]) -> Interval:
    """The median between two order statistics; below 6 values, which cannot cover 95 %, the range.

    Needs independent values, of any distribution.
    Source: David and Nagaraja, Order Statistics, 3rd edition (2003), section 7.1;
    ``scipy.stats.quantile_test``.
    """
    ends = quantile_test(values, p=0.5).confidence_interval(0.95)
    low, high = ends if math.isfinite(ends[0]) else (min(values), max(values))
    return Interval(statistics.median(values), float(low), float(high))
