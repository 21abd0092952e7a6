"""Pictures of a loss landscape."""

from __future__ import annotations

import io
import math
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from conadv.analysis.phases import INK

LEAST = 1e-6  # a loss below has no place on a logarithmic scale
TRAIN, TEST = "#0072B2", "#D55E00"
_RC = {
    "font.size": 9.5,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


@mpl.rc_context(_RC)
def line_figure(found: dict[str, Any], title: str) -> Figure:
    """Loss and accuracy, train and test, over alpha: ``landscape_1d`` of analysis.json. None leaves a gap."""
    figure = Figure(figsize=(7.4, 3.2), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for split, colour, style in (("train", TRAIN, "-"), ("test", TEST, "--")):
        loss.plot(
            found["alphas"], _numbers(found[f"{split}_loss"]), style, color=colour, label=split
        )
        percent = 100 * _numbers(found[f"{split}_accuracy"])
        accuracy.plot(found["alphas"], percent, style, color=colour, label=split)
    for axes, name in ((loss, "cross-entropy"), (accuracy, "accuracy, %")):
        axes.set(xlabel="distance from the weights, in filter lengths", ylabel=name)
        axes.grid(True)
        axes.axvline(0, color=INK, lw=0.8, ls=":")
    loss.set_yscale("log", nonpositive="mask")
    loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    loss.yaxis.set_major_formatter("{x:g}")
    loss.yaxis.set_minor_formatter(NullFormatter())
    accuracy.set_ylim(0, 102)
    loss.legend()
    return _titled(figure, title)


@mpl.rc_context(_RC)
def plane_figure(found: dict[str, Any], title: str) -> Figure:
    """Lines of equal training loss on a logarithmic scale: ``landscape_2d`` of analysis.json."""
    figure = Figure(figsize=(5.4, 4.6), layout="constrained")
    axes = figure.subplots()
    loss = np.ma.masked_invalid([_numbers(row) for row in found["loss"]]).clip(LEAST, None)
    levels = _levels(loss)
    norm = mpl.colors.LogNorm(levels[0], levels[-1])
    place = (found["alphas"], found["betas"], loss)
    filled = axes.contourf(*place, levels=levels, norm=norm, cmap="viridis_r")
    lines = axes.contour(*place, levels=levels[::2], colors=INK, linewidths=0.5)
    axes.clabel(lines, fmt=lambda value: f"{value:.2g}", fontsize=7.5)
    axes.plot(0, 0, "o", color="white", markeredgecolor=INK, markersize=5)
    axes.set(
        xlabel="direction 1, in filter lengths",
        ylabel="direction 2, in filter lengths",
        aspect="equal",
    )
    ticks = levels[:: max(1, len(levels) // 6)]
    bar = figure.colorbar(
        filled, label="training cross-entropy", ticks=ticks, format=lambda value, _: f"{value:.2g}"
    )
    bar.minorticks_off()
    return _titled(figure, title)


def _numbers(values: list[float | None]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([math.nan if value is None else value for value in values])


def _levels(loss: Any) -> Any:
    """Levels between the smallest and the largest loss, evenly on a logarithmic scale, wide enough to draw."""
    low, high = 0.999 * float(loss.min()), 1.001 * float(loss.max())
    return np.geomspace(low, max(high, 1.01 * low), 16)


def _titled(figure: Figure, title: str) -> Figure:
    figure.suptitle(title.replace("$", r"\$"), x=0.01, ha="left", fontsize=10, fontweight="bold")
    return figure


def to_png(figure: Figure, dpi: int = 130) -> bytes:
    """The figure as PNG bytes."""
    buffer = io.BytesIO()
    with mpl.rc_context(_RC):
        figure.savefig(
            buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None}
        )
    return buffer.getvalue()
