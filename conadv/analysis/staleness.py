"""The lines of the staleness probe (docs/staleness.md) -> a table, and a picture of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from conadv.analysis.style import STYLE, titled

CURRENT, NOISE = "current", "noise"
PHASES = ("warm-up", "peak", "decay")
MARKERS = ("o", "s", "^", "D", "v", "P")
_VALUES = ["cosine", "loss_increase", "relative_error"]
_FIELDS = ["phase", "tau", "predictor", *_VALUES]
_PANELS = {
    "cosine": "cosine with the gradient at θ_t",
    "kept": "loss increase at θ_t, over that\nof the attack at θ_t",
    "relative_error": "distance of the prediction to θ_t,\nover that of θ_{t-tau}",
}


def table(lines: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """Means over the probes of a phase: a row per phase, tau and predictor of one run or several.

    ``lines``: record lines, of which other types are passed over. A probe's lines follow one
    another, "current" first; a probe that a killed run has cut off before its "noise" is left out.

    Columns: phase, tau, predictor, probes (how many), cosine, loss_increase, relative_error; kept,
    the mean loss increase over that of the attack at theta_t in the same probes; kept_over_noise,
    the same after the increase by random signs is taken off both. nan where there is nothing to
    take a mean of or to divide by. Sorted by phase in time, tau, and predictors in the record's
    order.
    """
    found = pd.DataFrame([line for line in lines if line["type"] == "probe"], columns=_FIELDS)
    probe = (found["predictor"] == CURRENT).cumsum()
    for name in (CURRENT, NOISE):
        of_probe = found[found["predictor"] == name].groupby(probe)["loss_increase"].first()
        found[name] = probe.map(of_probe)
    found = found.dropna(subset=[CURRENT, NOISE])
    for name, order in (("phase", PHASES), ("predictor", found["predictor"].unique())):
        found[name] = pd.Categorical(found[name], order, ordered=True)
    groups = found.groupby(["phase", "tau", "predictor"], observed=True)
    means = groups[[*_VALUES, CURRENT, NOISE]].mean().astype(float)
    means.insert(0, "probes", groups.size())
    gain, best, noise = means["loss_increase"], means.pop(CURRENT), means.pop(NOISE)
    means["kept"] = (gain / best).where(best > 0)
    means["kept_over_noise"] = ((gain - noise) / (best - noise)).where(best > noise)
    return means.reset_index().astype({"phase": str, "predictor": str})


def text(rows: pd.DataFrame) -> str:
    """The table for a terminal."""
    names = {"loss_increase": "loss +", "kept_over_noise": "over noise", "relative_error": "error"}
    shown = rows.rename(columns=names)
    return str(shown.to_string(index=False, na_rep="-", float_format="{:.3f}".format))


@mpl.rc_context(STYLE)
def draw(rows: pd.DataFrame, title: str) -> Figure:
    """A column per phase; cosine, kept loss increase and prediction error over tau, a line each."""
    present = list(rows["phase"].unique())
    figure = Figure(figsize=(10, 8.2), layout="constrained")
    grid = figure.subplots(3, len(present), sharex=True, sharey="row", squeeze=False)
    for column, phase in enumerate(present):
        here = rows[rows["phase"] == phase]
        for axes, value in zip(grid[:, column], _PANELS, strict=True):
            _panel(axes, here.set_index(["tau", "predictor"])[value])
        grid[0, column].set_title(f"{phase}, probes: {here['probes'].max()}")
        grid[-1, column].set_xlabel("tau")
    for axes, label in zip(grid[:, 0], _PANELS.values(), strict=True):
        axes.set_ylabel(label)
    handles, labels = grid[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=max(1, len(labels)))
    return titled(figure, title)


def _panel(axes: Axes, values: pd.Series) -> None:
    """One quantity by tau and predictor; random signs, which have no tau, as a dotted line."""
    lines = values[values.index.get_level_values("tau") > 0].unstack("predictor", sort=False)
    for number, name in enumerate(lines):
        line, marker = lines[name].dropna(), MARKERS[number % len(MARKERS)]
        axes.plot(line.index, line, label=name, marker=marker)
    if (0, NOISE) in values and pd.notna(values[0, NOISE]):
        axes.axhline(
            values[0, NOISE], color="#888888", linestyle=":", linewidth=1.2, label="random signs"
        )
    axes.axhline(1.0, color="#888888", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lines.index, map(str, lines.index))
    axes.grid(True)
