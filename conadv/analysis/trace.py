"""A timeline -> the Trace Event Format (JSON) that ui.perfetto.dev and chrome://tracing open.

A process per rank. Complete events ("X") of one thread must nest, so what overlaps lies on threads
of its own: one for what the process does, one for an attack on a second stream, and as many for the
network as messages overlap.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from conadv.analysis.shares import BLOCKED, overlap
from conadv.analysis.timeline import Timeline
from conadv.training.record import BESIDE

Event = dict[str, Any]

MICROSECONDS = 1e6
TRACKS = ("compute", "attack stream", *BESIDE)


def trace(timeline: Timeline) -> dict[str, Any]:
    """Metadata, then spans by start, in whole microseconds from the earliest one."""
    origin = float(timeline.spans["start"].min())
    names: list[Event] = []
    events: list[Event] = []
    taken = 0  # thread ids are unique: viewers may ignore the process
    for rank, lane in timeline.spans.groupby("rank"):
        pid = rank + 1  # viewers take process 0 for the idle one
        role = "learner" if lane["role"].iloc[0] == "learner" else "attack rank"
        names += _names("process", f"rank {rank} ({role})", rank, pid=pid)
        places = list(zip(tracks(lane), rows(lane), strict=True))
        used = sorted(set(places), key=lambda place: (TRACKS.index(place[0]), place[1]))
        threads = {place: taken + number for number, place in enumerate(used, 1)}
        taken += len(threads)
        for order, ((track, row), tid) in enumerate(threads.items()):
            names += _names(
                "thread", f"{track} {row + 1}" if row else track, order, pid=pid, tid=tid
            )
        micro = np.rint((lane[["start", "end"]].to_numpy() - origin) * MICROSECONDS).astype(int)
        columns = lane["phase"], lane["step"], micro.tolist(), places
        for name, step, (start, end), place in zip(*columns, strict=True):
            kind = "network" if name in BESIDE else "blocked" if name in BLOCKED else "work"
            args = {"step": step}
            if step in timeline.staleness:
                args["staleness"] = timeline.staleness[step]
            time = {"ts": start, "dur": end - start, "pid": pid, "tid": threads[place]}
            events.append({"name": name, "cat": kind, "ph": "X", **time, "args": args})
    events.sort(
        key=lambda event: event["ts"]
    )  # stable: a rank's longest stays before what it holds
    return {
        "traceEvents": names + events,
        "displayTimeUnit": "ms",
        "otherData": {"origin_seconds": origin, "clock": "rank 0's, 0 where the run's loop began"},
    }


def tracks(lane: pd.DataFrame) -> list[str]:
    """The track of each span of one rank: "compute", "attack stream", "network" or "transfer".

    An attack has a track of its own where it runs beside the gradient, which one thread cannot do.
    """
    times = lane[["start", "end"]].to_numpy()
    attack, gradient = (times[lane["phase"] == name] for name in ("attack", "gradient"))
    known = dict(zip(BESIDE, BESIDE, strict=True))
    if overlap(attack, gradient) > 1 / MICROSECONDS:
        known["attack"] = "attack stream"
    return [known.get(name, "compute") for name in lane["phase"]]


def rows(lane: pd.DataFrame) -> list[int]:
    """For each span of one rank the first row of its track that is free, from 0."""
    ends: dict[str, list[float]] = {}
    found = []
    for track, start, end in zip(tracks(lane), lane["start"], lane["end"], strict=True):
        used = ends.setdefault(track, [])
        row = next((row for row, last in enumerate(used) if last <= start), len(used))
        used[row : row + 1] = [end]
        found.append(row)
    return found


def _names(what: str, name: str, order: int, **place: int) -> list[Event]:
    event = {"ph": "M", **place}
    return [
        {**event, "name": f"{what}_name", "args": {"name": name}},
        {**event, "name": f"{what}_sort_index", "args": {"sort_index": order}},
    ]
