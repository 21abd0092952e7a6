"""What a step's time went into, and which part of communication and attack other work hid.

All of it is read off one run's timeline: it says what ran beside what. It cannot say how much
slower two things became by running side by side; only the step time of a run without the attack
can.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from conadv.analysis import phases
from conadv.analysis.timeline import Timeline, extents
from conadv.training.record import BESIDE

Intervals = npt.NDArray[np.float64]
"""(n, 2): rows of (start, end) in seconds, in any order; they may overlap."""

BLOCKED = ("receive", "wait")
"""Phases in which a process does nothing but wait for another one."""

NEGLIGIBLE = 1e-3  # of a step: an "attack" phase in which nothing was attacked


@dataclass(frozen=True)
class Hidden:
    """How much of something lay beside other work.

    seconds: what it took per step, the mean over ranks. exposed: the part that lay beside nothing
    and so lengthened the step; with attack ranks it may be more than ``seconds``. beside: for each
    kind of work, the part beside it. delay: seconds per step beside, or waiting for, slower
    learners only. by_rank: each learner's own share.
    """

    seconds: float
    exposed: float
    beside: dict[str, float]
    by_rank: dict[int, float]
    delay: float = 0.0

    @property
    def share(self) -> float:
        """In [0, 1]: 1 - exposed / seconds."""
        return min(max(1 - self.exposed / self.seconds, 0.0), 1.0)


def covered(*sets: Intervals) -> float:
    """Seconds in at least one interval of the sets; where intervals overlap they count once."""
    spans = np.concatenate(sets)
    spans = spans[np.argsort(spans[:, 0])]
    start, end = spans.T
    # each interval adds what reaches beyond all that began before it
    before = np.maximum.accumulate(np.append(-np.inf, end))[:-1]
    return float(np.maximum(end - np.maximum(start, before), 0.0).sum())


def overlap(a: Intervals, *others: Intervals) -> float:
    """Seconds of ``a`` beside at least one interval of the others."""
    return max(covered(a) + covered(*others) - covered(a, *others), 0.0)


def hidden_communication(timeline: Timeline) -> Hidden | None:
    """The part of the gradients' communication beside which the learner computed; None without any.

    Per learner, over the steady steps: C is the time in which gradients were on the network
    (:func:`on_network`), W the union of its phases other than "wait" and "receive".
    share = |C and W| / |C|. ``delay`` is its time in "wait" outside C: for slower learners.
    Learners are pooled: the sum of hidden over the sum of C.
    """
    steady = timeline.within(timeline.steady)
    gradients = on_network(steady)
    busy = set(timeline.spans["phase"]) - {*BLOCKED, *BESIDE}
    rows = {}
    for rank in timeline.ranks("learner"):
        sent, waits = _of(gradients, rank, "network"), _of(steady, rank, "wait")
        work = overlap(sent, _of(timeline.spans, rank, *busy))
        delay = covered(waits) - overlap(waits, sent)
        rows[rank] = {"seconds": covered(sent), "delay": delay, "work": work}
    return _pooled(rows, steady)


def hidden_attack(timeline: Timeline) -> Hidden | None:
    """The part of the attack that did not lengthen the learners' steps; None if nobody attacked.

    *Learners that attack themselves.* Per learner, over the steady steps: A is the union of its
    "attack" spans, C the time in which gradients were on the network (:func:`on_network`), G the
    union of "gradient". share = |A and (C or G)| / |A|. On one thread G never meets A, and the
    thread would have waited for C otherwise; the exposed rest bounds from above by how much this
    rank would have come to its update earlier without an attack. It is a bound because of
    ``delay``: the part of A in which only a slower learner's gradients were missing. On a second
    stream G is the same device, where either may slow the other.

    *Attack ranks.* T is their mean "attack" time per step, E the learners' mean time per step in
    "receive", "send" and "attack": share = 1 - E / T, not below 0. "send" counts because a learner
    waits there for its last weights to leave.
    """
    steady = timeline.within(timeline.steady)
    if timeline.ranks("attack"):
        return _on_attack_ranks(timeline, steady)
    gradients, rows = on_network(steady), {}
    for rank in timeline.ranks("learner"):
        attack, sent = _of(steady, rank, "attack"), _of(gradients, rank, "network")
        gradient, launched = (_of(timeline.spans, rank, name) for name in ("gradient", "network"))
        network, both = overlap(attack, sent), overlap(attack, sent, gradient)
        delay = overlap(attack, sent, gradient, launched) - both
        rows[rank] = {"seconds": covered(attack), "delay": delay}
        rows[rank] |= {"network": network, "gradient": max(both - network, 0.0)}
    found, steps = _pooled(rows, steady), extents(steady)
    whole = float((steps["end"] - steps["start"]).mean())
    return found if found and found.seconds > NEGLIGIBLE * whole else None


def on_network(spans: pd.DataFrame) -> pd.DataFrame:
    """The learners' "network" spans, cut to when all learners had launched that bucket.

    A rank's own span begins with its own launch, but nothing can be summed before the last rank's.
    So here it begins with the latest launch of that bucket (the n-th of the step; buckets leave in
    the same order on all ranks). Depends on the clocks of different hosts agreeing.
    """
    sent = spans[(spans["phase"] == "network") & (spans["role"] == "learner")]
    bucket = sent.groupby(["rank", "step"]).cumcount()
    latest = sent.groupby([sent["step"], bucket])["start"].transform("max")
    return sent.assign(start=np.minimum(latest, sent["end"]))


def summary(timeline: Timeline) -> pd.DataFrame:
    """What the steady steps' time went into: rows (role, phase), columns ``median``, ``share``.

    median: seconds per step, where overlapping spans count once. share: of the step's time, the
    mean over steps and ranks. The row "step" is from the first own span's start to the last one's
    end. "network" and "transfer" run beside the step; on CUDA with a second stream own phases
    overlap too, and shares add up to more than 1.
    """
    steady = timeline.within(timeline.steady)
    steps = extents(steady)
    seconds = _covered_by(steady, ["role", "rank", "step", "phase"]).unstack(fill_value=0.0)
    seconds = seconds.reindex(steps.index, fill_value=0.0)
    seconds["step"] = steps["end"] - steps["start"]
    shares = seconds.div(seconds["step"], axis=0)
    table = pd.DataFrame(
        {
            "median": seconds.groupby("role").median().stack(),
            "share": shares.groupby("role").mean().stack(),
        }
    )
    there = steady.groupby(["role", "phase"]).size().unstack(fill_value=0) > 0
    there["step"] = True
    order = sorted(seconds, key=lambda name: (name in BESIDE, name == "step", phases.rank(name)))
    roles = [role for role in ("learner", "attack") if role in there.index]
    return table.loc[[(role, name) for role in roles for name in order if there.loc[role, name]]]


def _covered_by(spans: pd.DataFrame, keys: list[str]) -> pd.Series:
    """:func:`covered` of the spans of each group."""
    ordered = spans.sort_values([*keys, "start"])
    group = [ordered[key] for key in keys]
    before = ordered.groupby(keys)["end"].cummax().groupby(group).shift(fill_value=-np.inf)
    more = (ordered["end"] - np.maximum(ordered["start"], before)).clip(lower=0.0)
    return more.groupby(group).sum()


def _of(spans: pd.DataFrame, rank: int, *names: str) -> Intervals:
    mine = spans[(spans["rank"] == rank) & spans["phase"].isin(names)]
    found: Intervals = mine[["start", "end"]].to_numpy(dtype=np.float64)
    return found


def _on_attack_ranks(timeline: Timeline, steady: pd.DataFrame) -> Hidden | None:
    def per_step(role: str, *names: str) -> pd.Series:
        mine = steady[steady["role"] == role].groupby("rank")
        return pd.Series(
            {rank: covered(_of(of, rank, *names)) / of["step"].nunique() for rank, of in mine},
            dtype=float,
        )

    seconds = float(per_step("attack", "attack").mean())
    cost = per_step("learner", "attack", "receive", "send")
    exposed = float(cost.mean()) if len(cost) else 0.0
    if not seconds > 0:
        return None
    by_rank = (1 - cost / seconds).clip(0, 1).to_dict()
    return Hidden(seconds, exposed, {"learners' work": max(seconds - exposed, 0.0)}, by_rank)


def _pooled(rows: dict[int, dict[str, float]], spans: pd.DataFrame) -> Hidden | None:
    """Means per step over the ranks that have any. All of a row but seconds, delay is beside."""
    table = pd.DataFrame.from_dict(rows, orient="index", dtype=float)
    table = table.div(spans.groupby("rank")["step"].nunique(), axis=0)
    table = table[table["seconds"] > 0] if rows else table
    if table.empty:
        return None
    beside = table.drop(columns=["seconds", "delay"])
    exposed = (table["seconds"] - beside.sum(axis=1)).clip(lower=0.0)
    by_rank = (1 - exposed / table["seconds"]).clip(0, 1).to_dict()
    seconds, delay = (float(table[name].mean()) for name in ("seconds", "delay"))
    return Hidden(seconds, float(exposed.mean()), beside.mean().to_dict(), by_rank, delay)
