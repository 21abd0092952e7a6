"""Sharpness of the trained models, from the analysis.json that `conadv analyze` leaves in a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from conadv.documents import Analysis, checked
from conadv.report.figures import INK, STYLE, WIDTH, wrap
from conadv.report.load import Line, Run
from conadv.report.stats import Stat, stat
from conadv.report.study.figures import legend, line_look, rows_axes, save_if
from conadv.report.study.sweep import Cell, Study
from conadv.safe_io import JSON_BYTES, parse_json, read_text

ANALYSIS = "analysis.json"


@dataclass(frozen=True)
class Measure:
    """One number of an analysis: its name for people and where it stands."""

    title: str
    keys: tuple[str | int, ...]


MEASURES = (
    Measure("training loss", ("loss",)),
    Measure("largest Hessian eigenvalue", ("hessian", "eigenvalues", 0)),
    Measure("Hessian trace", ("hessian", "trace")),
    Measure("SAM sharpness", ("sharpness", "sam", "value")),
    Measure("Keskar sharpness", ("sharpness", "keskar", "value")),
    Measure("robust accuracy", ("robust", "accuracy")),
)
_DRAWN = (1, 2, 3)


def analysis(run: Run) -> Line | None:
    """The run's analysis.json; None where there is none that can be read. Raises ConadvError for what is none."""
    path = run.path / ANALYSIS
    try:
        found: Line = parse_json(read_text(path, JSON_BYTES))
    except (OSError, ValueError):
        return None
    checked(Analysis, found, path, "Delete it, or replace it with: conadv analyze RUN --overwrite")
    return found


def measured(cell: Cell) -> dict[int, Line]:
    """seed -> analysis, for the finished runs that have one."""
    found = {run.seed: analysis(run) for run in cell.finished}
    return {seed: value for seed, value in found.items() if value is not None}


def value(document: Line, measure: Measure) -> float | None:
    found: Any = document
    for key in measure.keys:
        try:
            found = found[key]
        except (KeyError, IndexError, TypeError):  # a part that was switched off is null
            return None
    return float(found) if isinstance(found, (int, float)) and math.isfinite(found) else None


def statistic(cell: Cell, measure: Measure) -> Stat | None:
    numbers = {seed: value(document, measure) for seed, document in measured(cell).items()}
    return stat({seed: number for seed, number in numbers.items() if number is not None})


def sharpness_figure(study: Study, path: str | Path | None = None) -> Figure | None:
    """Sharpness at the largest batch of each arm, a dot per seed and a tick at the mean; the loss along a random
    direction below, mean over seeds.

    path: also written there as PNG. None where no run was analysed.
    """
    cells = [cell for line in study.lines if measured(cell := study.last(line))]
    return save_if(_draw(study, cells), path) if cells else None


@mpl.rc_context(STYLE)
def _draw(study: Study, cells: list[Cell]) -> Figure:
    shown = [MEASURES[i] for i in _DRAWN if any(statistic(cell, MEASURES[i]) for cell in cells)]
    curves = any(_landscape(cell, "test_loss") for cell in cells)
    heights = ([0.7 + 0.34 * len(cells)] if shown else []) + ([2.9] if curves else [])
    if not heights:
        heights, shown = [1.0], [MEASURES[0]]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.5 + 0.1 * len(cells)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part in parts:
        part.set_facecolor("none")
    if shown:
        _dots(parts[0], study, cells, shown)
    if curves:
        _landscapes(parts[-1], study, cells)
        legend(figure, study, [cell.line for cell in cells])
    return figure


def _dots(part: Any, study: Study, cells: list[Cell], shown: list[Measure]) -> None:
    panels = part.subplots(1, len(shown), squeeze=False, sharey=True)[0]
    for axes, measure in zip(panels, shown, strict=True):
        for row, cell in enumerate(cells):
            numbers, style = statistic(cell, measure), line_look(study, cell.line)
            if numbers is None:
                continue
            axes.plot(
                list(numbers.values.values()),
                [row] * numbers.n,
                style.marker,
                color=style.colour,
                alpha=0.7,
            )
            axes.plot([numbers.mean] * 2, [row - 0.3, row + 0.3], color=INK, lw=2)
        rows_axes(axes, [cell.line for cell in cells])
        _spread_out(axes)
        axes.set_title(wrap(measure.title, 16), fontsize=9)
        axes.margins(x=0.12)


def _spread_out(axes: Any) -> None:
    """A logarithmic axis where all is positive and some is tens of times the rest, which would be one dot otherwise."""
    drawn = np.concatenate([line.get_xdata() for line in axes.lines]) if axes.lines else np.ones(1)
    if drawn.min() > 0 and drawn.max() > 30 * drawn.min():
        axes.set_xscale("log")


def _landscapes(part: Any, study: Study, cells: list[Cell]) -> None:
    panels: list[tuple[str, Callable[[Cell], tuple[Any, Any] | None]]] = [
        ("training loss along a direction", lambda cell: _landscape(cell, "train_loss")),
        ("test loss along the same", lambda cell: _landscape(cell, "test_loss")),
    ]
    for axes, (title, read) in zip(part.subplots(1, 2, squeeze=False)[0], panels, strict=True):
        for cell in cells:
            found, style = read(cell), line_look(study, cell.line)
            if found is not None:
                axes.plot(*found, style.line, color=style.colour, lw=1.4)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("alpha, in filter norms")
        axes.grid(axis="y")


def _landscape(cell: Cell, field: str) -> tuple[Any, Any] | None:
    """(alphas, mean loss over the seeds that share the first one's alphas)."""
    found = [
        part
        for document in measured(cell).values()
        if isinstance(part := document.get("landscape_1d"), dict)
    ]
    same = [
        part for part in found if part.get("alphas") == found[0].get("alphas") and part.get(field)
    ]
    if not same:
        return None
    losses = np.array(
        [part[field] for part in same], dtype=float
    )  # null, which is NaN then, leaves a gap
    return np.array(same[0]["alphas"]), losses.mean(axis=0)
