"""Interleaved timing: every round runs each case once, in a new random order, so that a busy machine slows all alike.

A row shows a case's median and best time over the rounds, and the median ratio to its yardstick within a round with a
confidence interval (conadv.bench.stats). Quote the ratios; absolute times say something about one machine on one day.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from conadv.bench.stats import median_interval

if TYPE_CHECKING:
    import torch

    from conadv.distributed.comm import Comm

WARMUP_ROUNDS = 2


@dataclass(frozen=True)
class Sample:
    """Seconds of one step on one rank (None on a rank that only serves others), and of the phases within it."""

    seconds: float | None
    phases: Mapping[str, float] = field(default_factory=dict)


def nothing() -> None:
    """The end of a case that leaves nothing open."""


@dataclass(frozen=True)
class Case:
    """Something to time, the case that its ratio refers to, and what else a reader of the JSON must know about it.

    ``end`` is called after the last round. Ranks: ``run`` and ``end`` are called on all ranks of the world in the same
    order; they may be collective.
    """

    run: Callable[[], Sample]
    yardstick: str
    labels: Mapping[str, Any] = field(default_factory=dict)
    end: Callable[[], object] = nothing


@dataclass(frozen=True)
class Row:
    """The timing of one case in milliseconds, and its ratio to the yardstick within each round.

    ``ratio_low`` to ``ratio_high`` covers the true median ratio with probability ``coverage``. ``phases_ms`` are
    medians over the rounds of the mean over learners, ``server_phases_ms`` those over ranks that serve them.
    """

    name: str
    median_ms: float
    min_ms: float
    yardstick: str
    ratio: float
    ratio_low: float
    ratio_high: float
    coverage: float
    samples_ms: Sequence[float]
    phases_ms: Mapping[str, float]
    server_phases_ms: Mapping[str, float]
    labels: Mapping[str, Any]


@dataclass(frozen=True)
class Measured:
    """One round of one case: the slowest rank's seconds, the mean phases of learners and of those that serve them."""

    seconds: float
    phases: Mapping[str, float]
    server_phases: Mapping[str, float]


def timed(call: Callable[[], Any], device: torch.device) -> Callable[[], Sample]:
    """A case's ``run`` that times one call, with the device idle before and after."""

    def run() -> Sample:
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        return Sample(time.perf_counter() - start)

    return run


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def order(names: Iterable[str], seed: int, number: int) -> list[str]:
    """The order of the cases in round ``number``: random, and the same on every rank and machine."""
    shuffled = list(names)
    random.Random(f"{seed}/{number}").shuffle(shuffled)
    return shuffled


def measure(
    cases: Mapping[str, Case],
    rounds: int,
    *,
    seconds: float = 0.0,
    seed: int = 0,
    warmup: int = WARMUP_ROUNDS,
    world: Comm | None = None,
) -> list[Row]:
    """Time all cases, interleaved, in ``rounds`` rounds and more until ``seconds`` are spent.

    ``warmup`` rounds before them are thrown away. Ranks: collective over ``world``; the time of a case in a round is
    the slowest rank's. Rank 0 gets the rows, the others an empty list.
    """
    results: dict[str, list[Measured]] = {name: [] for name in cases}
    number, begin = 0, time.monotonic()
    while number < warmup + rounds or _more(begin, seconds, world):
        for name in order(cases, seed, number):
            _meet(world)
            sample = cases[name].run()
            samples = [sample] if world is None else world.gather_objects(sample)
            if samples and number >= warmup:
                results[name].append(combine(samples))
        number += 1
        if number == warmup:
            begin = time.monotonic()
    for case in cases.values():
        case.end()
    if world is not None and not world.is_main:
        return []
    return [row(name, case, results) for name, case in cases.items()]


def _meet(world: Comm | None) -> None:
    """Nobody begins with the next case while another is still at the last one."""
    if world is not None and world.ranks > 1:
        import torch

        world.all_reduce(torch.zeros(1, device=world.device))


def _more(begin: float, seconds: float, world: Comm | None) -> bool:
    """Whether there is time for another round; rank 0's clock decides for all."""
    if not seconds:
        return False
    go_on = time.monotonic() - begin < seconds
    return go_on if world is None else world.broadcast_object(go_on)


def combine(samples: Sequence[Sample]) -> Measured:
    """One round of one case from the samples of all ranks; those of idle ranks (no seconds, no phases) do not count."""
    learners = [sample for sample in samples if sample.seconds is not None]
    servers = [sample for sample in samples if sample.seconds is None and sample.phases]
    slowest = max(sample.seconds or 0.0 for sample in learners)
    return Measured(
        slowest, _mean([s.phases for s in learners]), _mean([s.phases for s in servers])
    )


def _mean(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.fmean(part.get(name, 0.0) for part in parts) for name in _names(parts)}


def _median_ms(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {
        name: 1e3 * statistics.median(part.get(name, 0.0) for part in parts)
        for name in _names(parts)
    }


def _names(parts: Sequence[Mapping[str, float]]) -> list[str]:
    return list(dict.fromkeys(name for part in parts for name in part))


def row(name: str, case: Case, results: Mapping[str, Sequence[Measured]]) -> Row:
    """The row of one case; ``results`` has one entry per round for every case."""
    mine = [result.seconds for result in results[name]]
    theirs = [result.seconds for result in results[case.yardstick]]
    ratio = median_interval([a / b for a, b in zip(mine, theirs, strict=True)])
    return Row(
        name=name,
        median_ms=1e3 * statistics.median(mine),
        min_ms=1e3 * min(mine),
        yardstick=case.yardstick,
        ratio=ratio.median,
        ratio_low=ratio.low,
        ratio_high=ratio.high,
        coverage=ratio.coverage,
        samples_ms=[1e3 * seconds for seconds in mine],
        phases_ms=_median_ms([result.phases for result in results[name]]),
        server_phases_ms=_median_ms([result.server_phases for result in results[name]]),
        labels=case.labels,
    )
