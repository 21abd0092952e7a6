"""A plan as a figure: images per second and overhead over devices."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from conadv.plan.rows import Plan, Row
from conadv.plan.table import describe
from conadv.report.figures import COLOURS, LINES, MARKERS

_RC = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


def draw(plan: Plan, path: Path) -> None:
    """Write the figure for the plan's first global batch as PNG (or whatever the name's ending says)."""
    batch = plan.rows[0].global_batch
    rows = [row for row in plan.rows if row.global_batch == batch]
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(_RC):
        figure = Figure(figsize=(10, 4.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        methods = list(dict.fromkeys(row.method for row in rows))
        for number, method in enumerate(methods):
            _lines(left, right, [row for row in rows if row.method == method], number)
        _throughput_axes(left, rows)
        _overhead_axes(right, rows)
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
        figure.suptitle(
            f"global batch {batch:,}; {describe(plan.planner.profile)}",
            fontsize=8.5,
            x=0.01,
            ha="left",
        )
        figure.savefig(path, dpi=150)


def _lines(left: Axes, right: Axes, rows: list[Row], number: int) -> None:
    """One method in both panels; filled markers are within what was measured, empty ones beyond."""
    colour, line = COLOURS[number % len(COLOURS)], LINES[number % len(LINES)]
    marker = MARKERS[number % len(MARKERS)]
    x = [row.devices for row in rows]
    for axes, y in (
        (left, [row.prediction.images_per_second for row in rows]),
        (right, [row.overhead for row in rows]),
    ):
        axes.plot(x, y, label=rows[0].method, color=colour, linestyle=line, linewidth=1.4)
        axes.plot(x, y, marker, markersize=5, color=colour, markerfacecolor="white")
        inside = [(a, b) for a, b, row in zip(x, y, rows, strict=True) if not row.extrapolated]
        axes.plot(
            *(zip(*inside, strict=True) if inside else ([], [])), marker, markersize=5, color=colour
        )


def _device_axis(axes: Axes, rows: list[Row]) -> None:
    counts = sorted({row.devices for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(
        counts, [f"{count}" for count in counts], fontsize=9.5 if len(counts) < 9 else 7.5
    )
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("devices")
    axes.grid(True)


def _throughput_axes(axes: Axes, rows: list[Row]) -> None:
    axes.set_title("Images per second (clean images)")
    _device_axis(axes, rows)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    first = max(
        (row for row in rows if row.devices == rows[0].devices),
        key=lambda r: r.prediction.images_per_second,
    )
    ends = [rows[0].devices, max(row.devices for row in rows)]
    slope = first.prediction.images_per_second / first.devices
    axes.plot(
        ends,
        [slope * count for count in ends],
        color="#888888",
        linewidth=0.8,
        label="in proportion to devices",
    )


def _overhead_axes(axes: Axes, rows: list[Row]) -> None:
    axes.set_title("Overhead: step time over that of noise")
    _device_axis(axes, rows)
    axes.axhline(1.0, color="#888888", linewidth=0.8)
    axes.set_xlabel("devices (empty marker: beyond what was measured)")
