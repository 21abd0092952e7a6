"""What all figures share: a colour and marker per arm, rows of arms, SVG for a page."""

from __future__ import annotations

import html
import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from conadv.analysis.style import COLOURS, GREY
from conadv.analysis.style import STYLE as BASE
from conadv.errors import printable
from conadv.report.comparison import Arm, Comparison

MARKERS = "os^Dv"
WIDTH = 6.6  # inches; narrow, so that text is still readable on a phone
STYLE = BASE | {"font.size": 10.5, "axes.titlesize": 10.5, "axes.titleweight": "bold"}
STYLE |= {"axes.titlelocation": "left", "axes.grid": True, "svg.hashsalt": "conadv"}
STYLE["text.parse_math"] = False  # names may hold dollar signs


def look(comparison: Comparison, arm: Arm) -> dict[str, Any]:
    """Colour and marker of an arm's name in every figure."""
    turn, index = divmod(list(comparison.latest).index(arm.name), len(COLOURS))
    return {"color": COLOURS[index], "marker": MARKERS[turn % len(MARKERS)]}


def panels(count: int, columns: int, height: float, **options: Any) -> tuple[Figure, list[Any]]:
    """A figure with ``count`` axes, row by row."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    grid = figure.subplots(-(-count // columns), columns, squeeze=False, **options).flatten()
    for spare in grid[count:]:
        spare.set_axis_off()
    return figure, list(grid[:count])


def draw_rows(axes: Any, comparison: Comparison, values: Mapping[Arm, pd.Series]) -> None:
    """A row per arm: a faint mark per seed, the mean with one standard deviation to both sides."""
    for row, (arm, own) in enumerate(values.items()):
        style = look(comparison, arm)
        axes.plot(own, [row] * len(own), ls="", ms=4, mew=0, alpha=0.4, **style)
        if len(own) and not arm.diverged:
            axes.errorbar(own.mean(), row, xerr=own.std(), mec=GREY, mew=0.8, ms=7, **style)
    names = [f"{arm.name} ({arm.divergence})" if arm.diverged else arm.name for arm in values]
    axes.set_yticks(range(len(names)), [wrap(name, 28) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")


def legend(figure: Figure, comparison: Comparison, arms: Sequence[Arm]) -> None:
    """Colour, marker and name of each arm, below the panels."""
    handles = [mpl.lines.Line2D([], [], **look(comparison, arm)) for arm in arms]
    names = [wrap(arm.name, 36) for arm in arms]
    figure.legend(handles, names, loc="outside lower center", ncols=min(2, len(arms)))


def wrap(text: str, width: int) -> str:
    return textwrap.fill(printable(text), width, break_on_hyphens=False)


def to_svg(figure: Figure, title: str) -> str:
    """One ``<svg>`` element for a page, in the page's text colour, without ids of its groups."""
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
    )
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(GREY, "currentColor")
    text = re.sub(r'<!--.*?-->\s*|(?<=<g) id="[^"]*"', "", text, flags=re.DOTALL)
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1)
