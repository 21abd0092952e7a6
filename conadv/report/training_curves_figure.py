"""Test accuracy, the loss of every view and the learning rate over the training."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from conadv.report.comparison import Comparison
from conadv.report.figure_style import legend, look, panels
from conadv.report.load import Run

STRETCHES = 100  # of the planned steps; losses are averaged over each
TITLES = {"accuracy": "test accuracy, %", "lr": "learning rate"}


def draw_curves(comparison: Comparison) -> Figure | None:
    """Means over seeds, bands from the lowest to the highest; each arm at its largest batch."""
    arms = list(comparison.latest.values())
    runs = [run for arm in arms for run in arm.runs]
    columns = ["accuracy"] if any(len(run.evals) > 1 for run in runs) else []
    losses = dict.fromkeys(name for run in runs for name in run.steps if name.startswith("losses."))
    columns += [*losses, *(["lr"] if any("lr" in run.steps for run in runs) else [])]
    if not columns:
        return None
    figure, grid = panels(len(columns), 2, 0.9 + 2.3 * -(-len(columns) // 2))
    for axes, column in zip(grid, columns, strict=True):
        for arm in arms:
            curves = pd.DataFrame({run.seed: curve(run, column) for run in arm.runs})
            color = look(comparison, arm)["color"]
            axes.plot(curves.mean(axis=1), lw=1.5, color=color)
            band = (curves.index, curves.min(axis=1), curves.max(axis=1))
            axes.fill_between(*band, alpha=0.15, lw=0, color=color)
        view = f"training loss, {column.partition('.')[2]} view"
        axes.set(title=TITLES.get(column, view), xlabel="share of the training, %")
    legend(figure, comparison, arms)
    return figure


def curve(run: Run, column: str) -> pd.Series:
    """Values by the share of the planned steps in percent; means over stretches of steps."""
    lines, scale = (run.evals, 100) if column == "accuracy" else (run.steps, 1)
    if column not in lines:
        return pd.Series(dtype=float)
    planned = run.header.get("steps") or len(run.steps)
    done = lines["step"] + (column != "accuracy")  # an evaluation names the updates made
    return scale * lines[column].groupby(np.ceil(STRETCHES * done / planned)).mean()
