"""Sharpness of the trained models, from the analysis.json that `conadv analyze` leaves in a run."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from conadv.config.schema import flatten
from conadv.report.comparison import Arm, Comparison
from conadv.report.figure_style import draw_rows, panels, wrap
from conadv.report.load import Run
from conadv.safe_io import read_document
from conadv.training.documents import Analysis

MEASURES = {
    "loss": "training loss",
    "hessian.eigenvalues": "largest Hessian eigenvalue",
    "hessian.trace": "Hessian trace",
    "sharpness.sam.value": "SAM sharpness",
    "sharpness.keskar.value": "Keskar sharpness",
    "robust.accuracy": "robust accuracy",
}


def analysis(run: Run) -> dict[str, Any]:
    """What is read of a run's analysis.json; empty without one. Raises ConadvError."""
    path, remedy = run.path / "analysis.json", "Delete it, or: conadv analyze RUN --overwrite"
    return read_document(Analysis, path, remedy).model_dump() if path.exists() else {}


def measured(arm: Arm) -> pd.DataFrame:
    """A row per analysed run, a column per measure; NaN for a part that was switched off."""
    found = {run.seed: flatten(analysis(run)) for run in arm.runs if run.summary}
    rows = {seed: values for seed, values in found.items() if values}
    frame = pd.DataFrame.from_dict(rows, orient="index").reindex(columns=[*MEASURES])
    if len(frame):
        frame["hessian.eigenvalues"] = frame["hessian.eigenvalues"].str[0]
    return frame.astype(float).rename(columns=MEASURES)


def draw_sharpness(comparison: Comparison) -> Figure | None:
    """A row per arm at its largest batch, a panel per measure."""
    found = {name: measured(arm) for name, arm in comparison.latest.items()}
    arms = [arm for arm in comparison.latest.values() if len(found[arm.name])]
    names = [
        n
        for n in [*MEASURES.values()][1:4]
        if any(found[arm.name][n].notna().any() for arm in arms)
    ]
    if not names:
        return None
    figure, grid = panels(len(names), len(names), 1.1 + 0.32 * len(arms), sharey=True)
    for axes, name in zip(grid, names, strict=True):
        values = {arm: found[arm.name][name].dropna() for arm in arms}
        draw_rows(axes, comparison, values)
        axes.set_title(wrap(name, 16))
        if axes.dataLim.x0 > 0 and axes.dataLim.x1 > 30 * axes.dataLim.x0:
            axes.set_xscale("log")  # otherwise all but the sharpest would be one dot
    return figure
