"""A timeline -> a picture: a bar for what each rank does, a thinner one for its network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from conadv.analysis import phases
from conadv.analysis.shares import hidden_attack, on_network
from conadv.analysis.style import GREY, STYLE, titled
from conadv.analysis.timeline import Timeline, extents
from conadv.analysis.trace import TRACKS, tracks
from conadv.errors import ConadvError
from conadv.training.record import BESIDE

WIDTH = 6.2  # inches: the text can be read where all of it is 400 pixels wide
MOST = 12  # ranks in one picture
_NAMES = {"network": "all-reduce of gradients", "transfer": "weights and images"}


@dataclass(frozen=True)
class _Row:
    """A track of a rank: its name, spans (in ms), upper edge and height; y grows downwards."""

    name: str
    track: str
    spans: pd.DataFrame
    y: float
    height: float


def window(timeline: Timeline, count: int = 3) -> range:
    """``count`` consecutive steady steps of the first rank whose time is nearest to the median."""
    steps = extents(timeline.within(timeline.steady)).reset_index()
    steps = steps[steps["rank"] == steps["rank"].min()]
    if steps.empty:
        return timeline.steps
    count = min(count, len(steps))
    seconds = steps["end"].shift(1 - count) - steps["start"]
    first = int(steps.loc[(seconds - seconds.median()).abs().idxmin(), "step"])
    return range(first, first + count)


def shown(timeline: Timeline) -> list[int]:
    """The ranks that are drawn: all, or ``MOST`` of them, evenly spaced, with both ends."""
    ranks = sorted({*timeline.ranks("learner"), *timeline.ranks("attack")})
    places = np.linspace(0, len(ranks) - 1, min(len(ranks), MOST)).round()
    return [ranks[int(place)] for place in places]


@mpl.rc_context(STYLE)
def picture(timeline: Timeline, steps: range, caption: str = "") -> Figure:
    """What the shown ranks do in the time of ``steps``, which the first rank with spans defines.

    Its title says which share of the attack was hidden. The background is transparent.
    Raises ConadvError if no rank has spans in these steps.
    """
    known, clock = timeline.steps, extents(timeline.within(steps)).reset_index()
    if clock.empty:
        raise ConadvError(
            f"No spans in steps {steps.start} to {steps.stop - 1}. "
            f"Choose --steps {known.start}:{known.stop} or a part of it."
        )
    clock = clock[clock["rank"] == clock["rank"].min()]
    begin, end = float(clock["start"].min()), float(clock["end"].max())
    rows = _rows(timeline, begin, end)
    bottom = rows[-1].y + rows[-1].height
    figure = Figure(figsize=(WIDTH, 1.35 + 0.32 * bottom), layout="constrained")
    axes = figure.add_subplot()
    for row in rows:
        for name, times in row.spans.groupby("phase"):
            bars = list(zip(times["start"], times["end"] - times["start"], strict=True))
            axes.broken_barh(bars, (row.y, row.height), **phases.style(name))
    _label(axes, rows)
    for step, start in zip(clock["step"], 1e3 * (clock["start"] - begin), strict=True):
        axes.axvline(start, color=GREY, lw=0.8, ls=(0, (4, 3)), zorder=0)
        axes.annotate(
            f"step {step}", (start, 1), (2, 2), ("data", "axes fraction"), "offset points"
        )
    axes.set(xlim=(0, 1e3 * (end - begin)), ylim=(bottom + 0.15, -0.1))
    axes.set_xlabel(f"ms   {caption}".replace("$", r"\$"), loc="left")
    drawn = {name for row in rows for name in row.spans["phase"]}
    handles = [
        Patch(label=_NAMES.get(name, name), **phases.style(name))
        for name in sorted(drawn, key=phases.rank)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return titled(figure, headline(timeline), 12.5)


def headline(timeline: Timeline) -> str:
    """Which share of the attack was hidden, in words."""
    hidden = hidden_attack(timeline)
    if hidden is None:
        return "No attack"
    work = "the learners' work" if timeline.ranks("attack") else "the all-reduce"
    behind = f" behind {work}" if hidden.share >= 0.005 else ""
    return f"{100 * hidden.share:.0f} % of the attack hidden{behind}"


def _rows(timeline: Timeline, begin: float, end: float) -> list[_Row]:
    """The tracks of each shown rank, top to bottom, with their spans between two moments, in ms.

    Gradients are drawn from when all learners had launched them: before that, the network waits.
    """
    spans = timeline.spans.copy()
    spans.update(on_network(spans)["start"])
    rows, y = [], 0.0
    for rank in shown(timeline):
        lane = spans[spans["rank"] == rank]
        lane = lane.assign(track=tracks(lane))
        lane[["start", "end"]] = 1e3 * (lane[["start", "end"]].clip(begin, end) - begin)
        lane["seen"] = lane["end"] - lane["start"] > end - begin  # a thousandth of the width
        for track in [track for track in TRACKS if track in set(lane["track"])]:
            attacks = ", attacks" if lane["role"].iloc[0] == "attack" else ""
            name = {"compute": f"rank {rank}{attacks}", "network": "all-reduce"}.get(track, track)
            height = 0.45 if track in BESIDE else 1.0
            rows.append(_Row(name, track, lane[(lane["track"] == track) & lane["seen"]], y, height))
            y += height + 0.08
        y += 0.4
    return rows


def _label(axes: Axes, rows: list[_Row]) -> None:
    axes.set_yticks([row.y + row.height / 2 for row in rows], [row.name for row in rows])
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        look: dict[str, Any] = {"weight": "bold"} if row.track == "compute" else {"size": 8.5}
        label.set(**look)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
