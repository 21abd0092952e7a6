"""How good a gradient at older or predicted weights is: against tau in each phase, and over the training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from conadv.report.figures import INK, STYLE, WIDTH, Look, look
from conadv.report.study import probes
from conadv.report.study.figures import save_if
from conadv.report.study.probes import CURRENT, MEASURES, NOISE, Measure
from conadv.report.study.sweep import Cell, Study

_SHADES = {"warm-up": 0.10, "peak": 0.03, "decay": 0.07}


def staleness_figure(
    study: Study, path: str | Path | None = None, line: str | None = None
) -> Figure | None:
    """Cosine, loss increase and prediction error against tau, a column per phase; bands from lowest to highest run.

    line: whose probes (the first line's that has any). path: also written there as PNG. None without probes.
    """
    cell = _probed_cell(study, line)
    return None if cell is None else save_if(_by_tau(cell), path)


def staleness_course_figure(
    study: Study, path: str | Path | None = None, line: str | None = None
) -> Figure | None:
    """The same over the training, a column for the smallest and one for the largest tau, the phases shaded."""
    cell = _probed_cell(study, line)
    return None if cell is None else save_if(_course(cell), path)


def _probed_cell(study: Study, line: str | None) -> Cell | None:
    found = [cell for cell in probes.probed(study.cells) if line in (None, cell.line)]
    return max(found, key=lambda cell: cell.x) if found else None


def _lagging(cell: Cell) -> list[tuple[str, Look]]:
    """The predictors that have a tau, each with its look."""
    names = [name for name in probes.predictors(cell) if name not in (CURRENT, NOISE)]
    return [(name, look(index)) for index, name in enumerate(names)]


@mpl.rc_context(STYLE)
def _by_tau(cell: Cell) -> Figure:
    phases = probes.phases(cell)
    figure = Figure(figsize=(WIDTH, 7.2), layout="constrained")
    grid = figure.subplots(len(MEASURES), len(phases), squeeze=False, sharex=True, sharey="row")
    for row, measure in zip(grid, MEASURES, strict=True):
        for axes, phase in zip(row, phases, strict=True):
            _tau_panel(axes, cell, measure, phase)
        row[0].set_ylabel(measure.title)
    for axes, phase in zip(grid[0], phases, strict=True):
        axes.set_title(phase)
    for axes in grid[-1]:
        axes.set_xlabel("tau, steps")
    _legend(figure, cell)
    return figure


def _tau_panel(axes: Any, cell: Cell, measure: Measure, phase: str) -> None:
    ticks = sorted({tau for name, _ in _lagging(cell) for tau in probes.taus(cell, name)})
    for name, style in _lagging(cell):
        pairs = [
            (tau, probes.average(cell, measure, name, tau, phase))
            for tau in probes.taus(cell, name)
        ]
        known = [(tau, point) for tau, point in pairs if point is not None]
        x = [ticks.index(tau) for tau, _ in known]
        axes.plot(
            x,
            [point.mean for _, point in known],
            style.line,
            marker=style.marker,
            color=style.colour,
            ms=5,
        )
        low, high = [point.low for _, point in known], [point.high for _, point in known]
        axes.fill_between(x, low, high, color=style.colour, alpha=0.15, lw=0)
    _references(axes, measure, probes.average(cell, measure, NOISE, 0, phase))
    axes.set_xticks(range(len(ticks)), [str(tau) for tau in ticks])
    axes.grid(axis="y")


def _references(axes: Any, measure: Measure, noise: probes.Point | None) -> None:
    """The best possible as a full line, random signs as a dotted one."""
    axes.axhline(0.0 if measure.field == "relative_error" else 1.0, color=INK, lw=0.9, alpha=0.7)
    if noise is not None:
        axes.axhline(noise.mean, color=INK, lw=1.3, ls=":", alpha=0.8)


@mpl.rc_context(STYLE)
def _course(cell: Cell) -> Figure:
    every = sorted({tau for name, _ in _lagging(cell) for tau in probes.taus(cell, name)}) or [0]
    chosen = sorted({every[0], every[-1]})
    figure = Figure(figsize=(WIDTH, 7.2), layout="constrained")
    grid = figure.subplots(len(MEASURES), len(chosen), squeeze=False, sharex=True, sharey="row")
    for row, measure in zip(grid, MEASURES, strict=True):
        for axes, tau in zip(row, chosen, strict=True):
            _course_panel(axes, cell, measure, tau)
        row[0].set_ylabel(measure.title)
    for axes, tau in zip(grid[0], chosen, strict=True):
        axes.set_title(f"tau = {tau}", pad=16)
        _name_phases(axes, cell)
    for axes in grid[-1]:
        axes.set_xlabel("share of the training done")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    _legend(figure, cell)
    return figure


def _course_panel(axes: Any, cell: Cell, measure: Measure, tau: int) -> None:
    for phase, start, end in probes.phase_spans(cell):
        axes.axvspan(start, end, color=INK, alpha=_SHADES.get(phase, 0.05), lw=0)
    for name, style in _lagging(cell):
        x, y = probes.course(cell, measure, name, tau)
        axes.plot(
            x,
            y,
            style.line,
            color=style.colour,
            lw=1.4,
            marker=style.marker,
            ms=3 if len(x) < 40 else 0,
        )
    x, y = probes.course(cell, measure, NOISE, 0)
    axes.plot(x, y, color=INK, lw=1.2, ls=":", alpha=0.8)
    _references(axes, measure, None)
    axes.set_xlim(0, 1)
    axes.grid(axis="y")


def _name_phases(axes: Any, cell: Cell) -> None:
    for phase, start, end in probes.phase_spans(cell):
        place = ((start + end) / 2, 1.0)
        axes.annotate(
            phase,
            place,
            (0, 3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            size=8,
        )


def _legend(figure: Figure, cell: Cell) -> None:
    lines: Sequence[tuple[str, Look]] = _lagging(cell)
    handles = [
        mpl.lines.Line2D([], [], color=style.colour, marker=style.marker, ls=style.line, ms=5)
        for _, style in lines
    ]
    names = [name for name, _ in lines] + ["current weights (sequential)"]
    handles.append(mpl.lines.Line2D([], [], color=INK, lw=0.9, alpha=0.7))
    if NOISE in probes.predictors(cell):
        handles.append(mpl.lines.Line2D([], [], color=INK, lw=1.3, ls=":"))
        names.append("random signs")
    figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)))
