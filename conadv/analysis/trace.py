"""A timeline -> the Trace Event Format (JSON object form) that chrome://tracing and ui.perfetto.dev open.

A process per rank. Complete events ("X") of one thread must nest, so what overlaps lies on threads of its own: one for
what the process does, one for an attack on a second stream, and as many for the network as messages overlap.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import itemgetter
from typing import Any

import numpy as np

from conadv.analysis.intervals import intersection
from conadv.analysis.phases import BLOCKED
from conadv.analysis.timeline import Lane, Timeline
from conadv.training.record import BESIDE

Event = dict[str, Any]
Place = tuple[str, int]
"""(track, number): a row of a track on which no two spans overlap."""

MICROSECONDS = 1e6
TRACKS = ("compute", "attack stream", *BESIDE)


def trace(timeline: Timeline) -> dict[str, Any]:
    """The trace: metadata events first, then spans by start, in whole microseconds from the earliest span on."""
    origin = min(float(lane.span_n2[:, 0].min()) for lane in timeline.lanes)
    names: list[Event] = []
    events: list[Event] = []
    taken = 0  # viewers may take thread ids for unique, whatever the process
    for lane in timeline.lanes:
        places = rows(lane)
        order = sorted(set(places), key=lambda place: (TRACKS.index(place[0]), place[1]))
        threads = {place: taken + number for number, place in enumerate(order, 1)}
        taken += len(threads)
        events += _spans(lane, places, threads, origin, timeline.staleness)
        names += _names(lane, threads)
    events.sort(
        key=itemgetter("ts")
    )  # stable: of those that start together, a rank's longest stays first
    return {
        "traceEvents": names + events,
        "displayTimeUnit": "ms",
        "otherData": {"origin_seconds": origin, "clock": "rank 0's, 0 where the run's loop began"},
    }


def tracks(lane: Lane) -> list[str]:
    """The track of each of the n spans: "compute", "attack stream", "network" or "transfer".

    An attack has a track of its own where it runs beside the gradient, which one thread cannot do.
    """
    names = lane.phase_n.tolist()
    apart = len(intersection(lane.of("attack"), lane.of("gradient"))) > 0
    return [
        name if name in BESIDE else "attack stream" if apart and name == "attack" else "compute"
        for name in names
    ]


def rows(lane: Lane) -> list[Place]:
    """The place of each of the n spans: the first row of its track that is free."""
    taken: dict[str, list[float]] = {}
    found = []
    starts, ends = lane.span_n2.T.tolist()
    for track, start, end in zip(tracks(lane), starts, ends, strict=True):
        used = taken.setdefault(track, [])
        number = 0
        while number < len(used) and used[number] > start:
            number += 1
        used[number : number + 1] = [end]
        found.append((track, number))
    return found


def _spans(
    lane: Lane,
    places: list[Place],
    threads: dict[Place, int],
    origin: float,
    staleness: dict[int, int],
) -> Iterator[Event]:
    micro = np.rint((lane.span_n2 - origin) * MICROSECONDS).astype(np.int64)
    args = {step: {"step": step} for step in np.unique(lane.step_n).tolist()}
    for step in args.keys() & staleness.keys():
        args[step]["staleness"] = staleness[step]
    starts, durations = micro[:, 0].tolist(), (micro[:, 1] - micro[:, 0]).tolist()
    for name, start, duration, step, place in zip(
        lane.phase_n.tolist(), starts, durations, lane.step_n.tolist(), places, strict=True
    ):
        yield {
            "name": name,
            "cat": _category(name),
            "ph": "X",
            "ts": start,
            "dur": duration,
            "pid": lane.rank + 1,  # viewers take process 0 for the idle one
            "tid": threads[place],
            "args": args[step],
        }


def _category(name: str) -> str:
    return "network" if name in BESIDE else "blocked" if name in BLOCKED else "work"


def _names(lane: Lane, threads: dict[Place, int]) -> Iterator[Event]:
    pid = lane.rank + 1
    role = "learner" if lane.role == "learner" else "attack rank"
    yield {
        "name": "process_name",
        "ph": "M",
        "pid": pid,
        "args": {"name": f"rank {lane.rank} ({role})"},
    }
    yield {"name": "process_sort_index", "ph": "M", "pid": pid, "args": {"sort_index": lane.rank}}
    for order, ((track, number), tid) in enumerate(threads.items()):
        name = track if number == 0 else f"{track} {number + 1}"
        yield {"name": "thread_name", "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}
        yield {
            "name": "thread_sort_index",
            "ph": "M",
            "pid": pid,
            "tid": tid,
            "args": {"sort_index": order},
        }
