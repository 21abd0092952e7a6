"""What a step's time went into, and which part of communication and attack was hidden behind other work.

All of it is read off one run's timeline: it says what ran beside what. It cannot say how much slower two things became
by running side by side; only the step time of a run without the attack can (``noise``, in the same benchmark).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from conadv.analysis import phases
from conadv.analysis.intervals import (
    Intervals,
    difference,
    intersection,
    length,
    lengths_by_group,
    union,
)
from conadv.analysis.timeline import Lane, Steps, Timeline
from conadv.training.record import BESIDE

Column = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Hidden:
    """How much of something lay beside other work.

    seconds: what it took, per step, the mean over ranks. exposed: what of it was beside nothing and so lengthened the
    step; with attack ranks it may be more than ``seconds``. beside: for each kind of work, the part beside it. delay:
    seconds per step that were only beside, or only waiting for, learners who were late. share: in [0, 1], 1 - exposed /
    seconds. by_rank: the share of each learner's own.
    """

    seconds: float
    exposed: float
    beside: dict[str, float]
    by_rank: dict[int, float]
    delay: float = 0.0

    @property
    def share(self) -> float:
        return _share(self.exposed, self.seconds)


def hidden_communication(timeline: Timeline) -> Hidden | None:
    """The part of the gradients' communication beside which the learner computed; None if there was none.

    Per learner, over the steady steps: C is the time in which gradients were on the network (:func:`on_network`), W the
    union of its phases other than "wait" and "receive". share = |C and W| / |C|. Moments in no phase count as exposed.
    ``delay`` is its time in "wait" outside C: for slower learners. Over learners: the sum of hidden over the sum of C.
    """
    busy = [name for name in _own_phases(timeline) if name not in phases.BLOCKED]
    gradients = on_network(timeline, timeline.steady)
    parts = {}
    for lane in timeline.of("learner"):
        made, sent = lane.only(timeline.steady), gradients[lane.rank]
        delay = length(difference(made.of("wait"), sent))
        parts[lane.rank] = _split(made, sent, {"work": lane.of(*busy)}, delay)
    return _pool(parts)


def hidden_attack(timeline: Timeline) -> Hidden | None:
    """The part of the attack that did not lengthen the learners' steps; None if nobody attacked.

    *Learners that attack themselves.* Per learner, over the steady steps: A is the union of its "attack" spans, C the
    time in which gradients were on the network (:func:`on_network`), G the union of "gradient". share = |A and (C or
    G)| / |A|. On one thread G never meets A, so this is the share of the attack during which gradients were on the
    network, and the thread would have waited for them otherwise; the exposed rest, |A without C|, is at least the time
    by which this rank would have come to its update earlier, had the attack taken no time and the network just as long.
    It is that time exactly without ``delay``: the part of A in which this learner's gradients were under way, but those
    of a slower one were not. Such a part counts as exposed, because the other may be slower by its own attack. On a
    single process all of the attack is exposed. On a second stream "beside the gradient" means the same device: it is
    no saving as such, because either may have slowed the other.

    *Attack ranks.* T is their "attack" time per step (the mean over them), E_i learner i's time per step in "receive",
    "send" and "attack". share = 1 - E / T with E the mean of E_i, not below 0. "send" counts because a learner that has
    to wait for its last weights to leave, on a slow link or behind a slow attack rank, waits there.
    """
    if timeline.of("attack"):
        return _on_attack_ranks(timeline)
    gradients = on_network(timeline, timeline.steady)
    parts = {}
    for lane in timeline.of("learner"):
        made = lane.only(timeline.steady)
        attack, beside = (
            made.of("attack"),
            {"network": gradients[lane.rank], "gradient": lane.of("gradient")},
        )
        delay = length(
            intersection(difference(attack, union(*beside.values())), lane.of("network"))
        )
        parts[lane.rank] = _split(made, attack, beside, delay)
    return _pool(parts)


def on_network(timeline: Timeline, steps: range | None = None) -> dict[int, Intervals]:
    """learner -> when gradients of these steps (all) were on the network: all had launched, the sum was not there.

    A rank's "network" span of a bucket begins with its own launch, but nothing can be summed before the last rank's. So
    here it begins with the latest launch of that bucket (the n-th of the step, in the order of launches, which is the
    same on all ranks) and ends with its completion on this rank. Depends on the clocks of different hosts agreeing.
    """
    spans, keys = {}, {}
    for lane in timeline.of("learner"):
        some = lane if steps is None else lane.only(steps)
        chosen = some.phase_n == "network"
        spans[lane.rank], keys[lane.rank] = some.span_n2[chosen], _numbered(some.step_n[chosen])
    if not spans:
        return {}
    bucket, place = np.unique(np.concatenate(list(keys.values())), return_inverse=True)
    latest = np.full(len(bucket), -np.inf)
    np.maximum.at(latest, place, np.concatenate(list(spans.values()))[:, 0])
    return {rank: _from(latest[np.searchsorted(bucket, keys[rank])], spans[rank]) for rank in spans}


def _numbered(step_n: Steps) -> Steps:
    """A key for each span, from its step and its number within the step; spans come in the order of their starts."""
    order = np.argsort(step_n, kind="stable")
    steps, first = np.unique(step_n[order], return_index=True)
    number = np.empty(len(step_n), dtype=np.int64)
    number[order] = np.arange(len(step_n)) - first[np.searchsorted(steps, step_n[order])]
    keys: Steps = step_n * 2**32 + number
    return keys


def _from(start: Column, spans: Intervals) -> Intervals:
    return np.stack([np.minimum(start, spans[:, 1]), spans[:, 1]], axis=1)


def _on_attack_ranks(timeline: Timeline) -> Hidden | None:
    seconds = float(
        np.mean([_per_step(lane.only(timeline.steady), "attack") for lane in timeline.of("attack")])
    )
    learners = [lane.only(timeline.steady) for lane in timeline.of("learner")]
    cost = {lane.rank: _per_step(lane, *phases.FOR_ATTACK) for lane in learners}
    if not seconds:
        return None
    exposed = float(np.mean(list(cost.values()) or [0.0]))
    beside = {"learners": max(seconds - exposed, 0.0)}
    return Hidden(
        seconds, exposed, beside, {rank: _share(value, seconds) for rank, value in cost.items()}
    )


def _per_step(lane: Lane, *names: str) -> float:
    """Mean seconds per step of the lane in these phases."""
    return length(lane.of(*names)) / max(len(np.unique(lane.step_n)), 1)


def _split(lane: Lane, what: Intervals, beside: dict[str, Intervals], delay: float) -> Hidden:
    """Per step of the lane; where two kinds of work overlap, the first of them counts."""
    steps = max(len(np.unique(lane.step_n)), 1)
    seconds, parts, rest = length(what), {}, what
    for name, work in beside.items():
        parts[name] = length(intersection(rest, work)) / steps
        rest = difference(rest, work)
    exposed = length(rest) / steps
    return Hidden(
        seconds / steps,
        exposed,
        parts,
        {lane.rank: _share(exposed, seconds / steps)},
        delay / steps,
    )


def _pool(parts: dict[int, Hidden]) -> Hidden | None:
    """The mean over ranks of seconds, so that the share is that of all seconds; ranks without any do not count."""
    some = [part for part in parts.values() if part.seconds > 0]
    if not some:
        return None
    return Hidden(
        seconds=float(np.mean([part.seconds for part in some])),
        exposed=float(np.mean([part.exposed for part in some])),
        beside={
            name: float(np.mean([part.beside[name] for part in some])) for name in some[0].beside
        },
        by_rank={rank: share for part in some for rank, share in part.by_rank.items()},
        delay=float(np.mean([part.delay for part in some])),
    )


def _share(exposed: float, seconds: float) -> float:
    return min(max(1 - exposed / seconds, 0.0), 1.0) if seconds > 0 else 0.0


@dataclass(frozen=True)
class PhaseRow:
    """One phase of one role. median: seconds per step; share: of the step's time, the mean over steps and ranks."""

    role: str
    phase: str
    median: float
    share: float


@dataclass(frozen=True)
class StepRow:
    """The steps of one role. median: seconds from the first own span's start to the last one's end.

    between: median seconds from there to the next step's start (writing the record, evaluation, checkpoints).
    """

    role: str
    ranks: int
    steps: int
    median: float
    between: float
    phases: tuple[PhaseRow, ...]


def summary(timeline: Timeline) -> list[StepRow]:
    """What the steady steps' time went into, per role.

    A phase's time in a step is the length of the union of its spans. A process's own phases follow each other, so that
    their shares and the rest (nothing of the step, such as the program between phases) are the step; "network" and
    "transfer" run beside them. On CUDA with a second stream the phases overlap, and shares add up to more.
    """
    return [
        _step_row(role, lanes, timeline.steady)
        for role in ("learner", "attack")
        if (lanes := timeline.of(role))
    ]


def _step_row(role: str, lanes: Sequence[Lane], steady: range) -> StepRow:
    tables = [_seconds(lane.only(steady)) for lane in lanes]
    whole = np.concatenate([extent[:, 1] - extent[:, 0] for _, extent, _ in tables])
    between = np.concatenate([_gaps(steps, extent) for steps, extent, _ in tables])
    names = sorted(
        {name for _, _, seconds in tables for name in seconds},
        key=lambda name: (phases.rank(name), name),
    )
    rows = []
    for name in names:
        column = np.concatenate(
            [seconds.get(name, np.zeros(len(steps))) for steps, _, seconds in tables]
        )
        share = np.divide(column, whole, out=np.zeros_like(whole), where=whole > 0)
        rows.append(
            PhaseRow(role, name, _median(column), float(np.mean(share)) if len(share) else 0.0)
        )
    return StepRow(
        role,
        len(lanes),
        max(len(t[0]) for t in tables),
        _median(whole),
        _median(between),
        tuple(rows),
    )


def _seconds(lane: Lane) -> tuple[Steps, Intervals, dict[str, Column]]:
    """The lane's steps, their extents, and seconds per step of each phase."""
    steps, extent = lane.extents()
    found = {}
    for name in np.unique(lane.phase_n):
        chosen = (lane.phase_n == name) & np.isin(lane.step_n, steps)
        place = np.searchsorted(steps, lane.step_n[chosen])
        found[str(name)] = lengths_by_group(lane.span_n2[chosen], place, len(steps))
    return steps, extent, found


def _gaps(steps: Steps, extent: Intervals) -> Column:
    gaps: Column = np.maximum(extent[1:, 0] - extent[:-1, 1], 0.0)[np.diff(steps) == 1]
    return gaps


def _median(values: Column) -> float:
    return float(np.median(values)) if len(values) else 0.0


def _own_phases(timeline: Timeline) -> set[str]:
    return {str(name) for lane in timeline.lanes for name in np.unique(lane.phase_n)} - set(BESIDE)
