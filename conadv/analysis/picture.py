"""A timeline -> a picture: a row for what each rank does, and thinner ones for what the network does beside it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from conadv.analysis import phases
from conadv.analysis.intervals import NOTHING, Intervals, difference, union
from conadv.analysis.shares import on_network
from conadv.analysis.timeline import Lane, Timeline
from conadv.analysis.trace import TRACKS, tracks
from conadv.errors import ConadvError
from conadv.training.record import BESIDE

WIDTH = 10.0  # inches
DPI = 130
MOST = 12  # ranks in one picture
STEPS = 4  # steps in one picture
_HEIGHTS = {"compute": 1.0, "attack stream": 1.0, "network": 0.42, "transfer": 0.42}
_INSIDE, _APART = (
    0.10,
    0.55,
)  # gaps between the rows of a rank and between ranks, in heights of a row
_LABELS = {
    "network": "network: gradients",
    phases.LATE: "waits for a slower rank",
    "transfer": "network: weights, images",
}
_RC = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.edgecolor": phases.INK,
    "axes.labelcolor": phases.INK,
    "text.color": phases.INK,
    "xtick.color": phases.INK,
    "ytick.color": phases.INK,
    "hatch.linewidth": 0.8,
}


@dataclass(frozen=True)
class _Row:
    """One row: the track of a lane, its upper edge and height; y grows downwards."""

    lane: Lane
    track: str
    y: float
    height: float


def window(timeline: Timeline, count: int = STEPS) -> range:
    """``count`` steps that are typical: their time is nearest to the median of all such stretches.

    Of equals those nearest to the middle. Taken from the steady steps of the first rank.
    """
    lane = timeline.lanes[0].only(timeline.steady)
    steps, extent = lane.extents()
    whole = np.flatnonzero(steps[count - 1 :] - steps[: len(steps) - count + 1] == count - 1)
    if not len(whole):
        return range(int(steps[0]), int(steps[-1]) + 1) if len(steps) else timeline.steps
    seconds = np.round(extent[whole + count - 1, 1] - extent[whole, 0], 6)
    from_median, from_middle = (
        np.abs(seconds - np.median(seconds)),
        np.abs(np.arange(len(whole)) - len(whole) // 2),
    )
    first = int(steps[whole[np.lexsort((from_middle, np.round(from_median, 6)))[0]]])
    return range(first, first + count)


def shown(timeline: Timeline, most: int = MOST) -> list[Lane]:
    """The ranks that are drawn: all, or ``most`` of them, evenly spaced, attack ranks by their part."""
    if len(timeline.lanes) <= most:
        return list(timeline.lanes)
    attack = timeline.of("attack")
    some = (
        min(len(attack), max(1, round(most * len(attack) / len(timeline.lanes)))) if attack else 0
    )
    chosen = [*_evenly(timeline.of("learner"), most - some), *_evenly(attack, some)]
    return sorted(chosen, key=lambda lane: lane.rank)


def _evenly(lanes: Sequence[Lane], count: int) -> list[Lane]:
    if count >= len(lanes):
        return list(lanes)
    return [lanes[round(i * (len(lanes) - 1) / max(count - 1, 1))] for i in range(count)]


@mpl.rc_context(_RC)
def picture(timeline: Timeline, steps: range, title: str = "") -> Figure:
    """The time of ``steps`` (by the first rank that has spans in them) with whatever the shown ranks do in it.

    Raises ConadvError if no rank has spans in these steps.
    """
    begin, end = _limits(timeline, steps)
    rows = _rows(shown(timeline))
    bottom = rows[-1].y + rows[-1].height
    unit = 0.34 if len(rows) <= 12 else 0.24
    figure = Figure(figsize=(WIDTH, 1.45 + unit * bottom), layout="constrained")
    axes = figure.add_subplot()
    gradients = on_network(timeline)
    drawn = {
        name
        for row in rows
        for name in _draw(axes, row, begin, end, gradients.get(row.lane.rank, NOTHING))
    }
    _label_rows(axes, rows)
    _label_steps(axes, timeline, begin, end)
    axes.set_xlim(0.0, 1e3 * (end - begin))
    axes.set_ylim(bottom + 0.15, -0.15)
    axes.set_xlabel(f"ms, from the start of step {steps.start}" + _left_out(timeline))
    figure.suptitle(title.replace("$", r"\$"), x=0.01, ha="left", fontsize=10.5, fontweight="bold")
    names = sorted(drawn, key=lambda name: (phases.rank(name), name))
    handles = [Patch(label=_LABELS.get(name, name), **phases.style(name)) for name in names]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=_columns(len(names)), frameon=False
    )
    return figure


def _columns(entries: int) -> int:
    """As many legend entries side by side as fit, rows of about the same length."""
    return -(-entries // -(-entries // 7)) if entries else 1


def to_png(figure: Figure, dpi: int = DPI) -> bytes:
    """The figure as PNG bytes."""
    buffer = io.BytesIO()
    with mpl.rc_context(_RC):
        figure.savefig(
            buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None}
        )
    return buffer.getvalue()


def _limits(timeline: Timeline, steps: range) -> tuple[float, float]:
    for lane in timeline.lanes:
        _, extent = lane.only(steps).extents()
        if len(extent):
            return float(extent[:, 0].min()), float(extent[:, 1].max())
    known = timeline.steps
    raise ConadvError(
        f"No spans in steps {steps.start} to {steps.stop - 1}: the record has them for steps {known.start} to "
        f"{known.stop - 1}. Choose --steps {known.start}:{known.stop} or a part of it."
    )


def _rows(lanes: Sequence[Lane]) -> list[_Row]:
    """The tracks that each rank has, from top to bottom."""
    rows = []
    y = 0.0
    for lane in lanes:
        used = set(tracks(lane))
        for track in (track for track in TRACKS if track in used):
            rows.append(_Row(lane, track, y, _HEIGHTS[track]))
            y += _HEIGHTS[track] + _INSIDE
        y += _APART - _INSIDE
    return rows


def _draw(axes: Any, row: _Row, begin: float, end: float, gradients: Intervals) -> set[str]:
    """Draw the spans of a row between two moments; returns the phases of which something can be seen.

    gradients: when all learners' gradients were on the network.
    """
    on_row = np.array([track == row.track for track in tracks(row.lane)])
    found = {
        str(name): row.lane.span_n2[on_row & (row.lane.phase_n == name)]
        for name in set(row.lane.phase_n[on_row])
    }
    if row.track == "network":
        found = {phases.LATE: difference(found["network"], gradients), "network": gradients}
    drawn = set()
    for name, spans in found.items():
        seen = np.clip(spans, begin, end) - begin
        least = (end - begin) / 3000  # half a pixel: of less, only the edge would show
        seen = seen[seen[:, 1] - seen[:, 0] > least]
        if len(seen):
            drawn.add(name)
            _draw_bars(axes, 1e3 * seen, row, name)
    if row.lane.role == "attack":
        _label_attacks(axes, row, begin, end)
    return drawn


def _draw_bars(axes: Any, bars: Intervals, row: _Row, name: str) -> None:
    """Bars of one phase. Messages that overlap are drawn as one bar, with a white line where one of them ends."""
    joined = union(bars)
    place = (row.y, row.height)
    axes.broken_barh(
        np.stack([joined[:, 0], np.diff(joined)[:, 0]], axis=1).tolist(),
        place,
        **phases.style(name),
    )
    if name in BESIDE:
        inner = np.setdiff1d(bars[:, 1], joined[:, 1])
        axes.vlines(inner, row.y + 0.04, row.y + row.height - 0.04, color="white", lw=0.8)


def _label_attacks(axes: Any, row: _Row, begin: float, end: float) -> None:
    """On the bars of an attack rank that have room for it: the step that the images are for."""
    mine = (
        row.lane.phase_n == "attack"
        if row.track == "compute"
        else np.zeros(len(row.lane.phase_n), dtype=bool)
    )
    for (start, last), step in zip(
        row.lane.span_n2[mine].tolist(), row.lane.step_n[mine].tolist(), strict=True
    ):
        left, right = max(start, begin), min(last, end)
        if right - left > 0.07 * (end - begin):
            box = {"facecolor": "white", "edgecolor": "none", "boxstyle": "round,pad=0.15"}
            axes.text(
                1e3 * ((left + right) / 2 - begin),
                row.y + row.height / 2,
                f"for {step}",
                ha="center",
                va="center",
                fontsize=8,
                bbox=box,
            )


def _label_rows(axes: Any, rows: Sequence[_Row]) -> None:
    names = [_row_name(row) for row in rows]
    axes.set_yticks([row.y + row.height / 2 for row in rows], names)
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if row.track == "compute" else "normal")
        label.set_fontsize(9.5 if row.track == "compute" else 8)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _row_name(row: _Row) -> str:
    if row.track != "compute":
        return row.track
    return f"rank {row.lane.rank}, " + ("learner" if row.lane.role == "learner" else "attacks")


def _label_steps(axes: Any, timeline: Timeline, begin: float, end: float) -> None:
    """A dashed line where a step of the first rank begins, its number above."""
    steps, extent = timeline.lanes[0].extents()
    for step, start in zip(steps.tolist(), extent[:, 0].tolist(), strict=True):
        if begin <= start < end:
            x = 1e3 * (start - begin)
            axes.axvline(x, color=phases.INK, lw=0.8, ls=(0, (4, 3)), alpha=0.55, zorder=0)
            axes.annotate(
                f"step {step}",
                (x, 1.0),
                (2, 2),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                fontsize=8.5,
            )


def _left_out(timeline: Timeline) -> str:
    drawn = len(shown(timeline))
    return (
        f"   ({drawn} of {len(timeline.lanes)} ranks; the trace has all)"
        if drawn < len(timeline.lanes)
        else ""
    )
