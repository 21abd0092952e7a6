"""The figures: matplotlib Figure objects (no pyplot, no global state), and their SVG and PNG forms.

An arm has the same colour, marker and line style in every figure. Colours are those of Okabe and Ito, "Color universal
design" (2008), without yellow and black, which vanish on a light or a dark page. Ink is a placeholder that the SVG
turns into the page's own text colour, so that the figures work in light and dark.
"""

from __future__ import annotations

import html
import io
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from conadv.analysis import phases as phase_names
from conadv.report.compare import Arm, Comparison
from conadv.report.load import Column, Columns, Run
from conadv.report.table import duration

Scale = Callable[[Run], float]
"""run -> what one step is on the time axis: 1 step, or a fraction of an epoch."""

INK = phase_names.INK
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#888888")
MARKERS = ("o", "s", "^", "D", "v")
LINES = ("-", "--", ":", "-.")
WIDTH = 7.4  # inches: the width of the page's text column at 96 dots per inch
POINTS = 200  # a curve is averaged down to this many points

STYLE = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.13,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "path",
    "svg.hashsalt": "conadv",
}


@dataclass(frozen=True)
class Drawing:
    """A figure for the page: title, one line on how to read it, and the SVG element as text."""

    title: str
    how_to_read: str
    svg: str


@dataclass(frozen=True)
class Look:
    """How one arm is drawn, in every figure."""

    colour: str
    marker: str
    line: str


def looks(comparison: Comparison) -> list[Look]:
    """One look per arm, distinct up to 28 arms."""
    return [look(index) for index in range(len(comparison.arms))]


def look(index: int) -> Look:
    """The look of the arm with this number."""
    turn, i = divmod(index, len(COLOURS))
    return Look(COLOURS[i], MARKERS[turn % len(MARKERS)], LINES[turn % len(LINES)])


def draw_all(comparison: Comparison) -> list[Drawing]:
    """Every figure that the records have data for."""
    drawings = []
    for draw, title, how_to_read in _FIGURES:
        figure = draw(comparison)
        if figure is not None:
            drawings.append(Drawing(title, how_to_read, to_svg(figure, title)))
    return drawings


def to_svg(figure: Figure, title: str) -> str:
    """The figure as one ``<svg>`` element for HTML: no ids that clash, no comments, no outside reference."""
    buffer = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(
            buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1)


def to_png(figure: Figure, dpi: int = 130, background: str = "white") -> bytes:
    """The figure as PNG bytes, for documents that take no SVG."""
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format="png", dpi=dpi, facecolor=background)
    return buffer.getvalue()


@mpl.rc_context(STYLE)
def accuracy_dots(comparison: Comparison) -> Figure | None:
    """Test accuracy in percent: a dot per seed and a tick at the mean, one row per arm."""
    if not any(arm.metrics["test_accuracy"] for arm in comparison.arms):
        return None
    figure, axes = _rows_figure(comparison)
    for row, (arm, look) in enumerate(zip(comparison.arms, looks(comparison), strict=True)):
        value = arm.metrics["test_accuracy"]
        if value is None:
            continue
        numbers = [100 * number for number in value.values.values()]
        axes.plot(
            numbers,
            [row] * value.n,
            look.marker,
            color=look.colour,
            alpha=0.75,
            markersize=7,
            mew=0,
            clip_on=False,
        )
        axes.plot(
            [100 * value.mean] * 2, [row - 0.3, row + 0.3], color=INK, lw=2, solid_capstyle="butt"
        )
    base = comparison.baseline.metrics["test_accuracy"]
    if base is not None:
        axes.axvline(100 * base.mean, color=INK, lw=0.8, ls=(0, (4, 4)), alpha=0.6, zorder=0)
    axes.set_xlabel("test accuracy, %")
    axes.margins(x=0.06)
    return figure


@mpl.rc_context(STYLE)
def curves(comparison: Comparison) -> Figure | None:
    """Test accuracy and the loss of every view over training: mean over seeds, band from the lowest to the highest."""
    unit, scale = _time_axis(comparison.runs)
    views = dict.fromkeys(name for run in comparison.runs for name in run.nested("losses"))
    panels: list[tuple[str, Callable[[Run], tuple[Column, Column]]]] = []
    if any(len(_accuracy_curve(run, scale)[0]) > 1 for run in comparison.runs):
        panels.append(("test accuracy, %", partial(_accuracy_curve, scale=scale)))
    for view in views:
        panels.append((f"training loss, {view} view", partial(_loss_curve, view=view, scale=scale)))
    if not panels:
        return None
    figure, grid = _panels(len(panels))
    for axes, (title, curve) in zip(grid, panels, strict=False):
        _draw_curves(axes, comparison, curve)
        axes.set_title(title)
        axes.set_xlabel(unit)
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        _log_if_wide(axes) if "loss" in title else _show_second_half(axes)
    _legend(figure, comparison)
    return figure


@mpl.rc_context(STYLE)
def step_times(comparison: Comparison) -> Figure | None:
    """Median time of a step in milliseconds, split by the phases' shares of all steps but the first."""
    phases = [_phase_seconds(arm) for arm in comparison.arms]
    names = dict.fromkeys(name for seconds in phases for name in seconds)
    if not names:
        return None
    figure, axes = _rows_figure(comparison)
    left = np.zeros(len(phases))
    for name in sorted(names, key=phase_names.rank):
        widths = np.array([1e3 * seconds.get(name, 0.0) for seconds in phases])
        axes.barh(
            range(len(phases)),
            widths,
            left=left,
            height=0.62,
            label=name,
            **phase_names.style(name),
        )
        left += widths
    for row, (total, look) in enumerate(zip(left, looks(comparison), strict=True)):
        axes.plot(
            -0.013,
            row,
            look.marker,
            color=look.colour,
            transform=axes.get_yaxis_transform(),
            clip_on=False,
        )
        axes.annotate(
            duration(total / 1e3), (total, row), (5, 0), textcoords="offset points", va="center"
        )
    axes.grid(visible=False)
    axes.tick_params(axis="y", pad=12)
    axes.set_xlabel("median time of a step, ms")
    axes.set_xlim(0, 1.14 * left.max() or 1.0)
    figure.legend(loc="outside lower center", ncols=len(names))
    return figure


@mpl.rc_context(STYLE)
def lr_schedule(comparison: Comparison) -> Figure | None:
    """The learning rate as recorded, once for all arms that share it."""
    unit, scale = _time_axis(comparison.runs)
    longest = [max(arm.runs, key=lambda run: run.steps_done) for arm in comparison.arms]
    drawn = {
        i: (run.steps["step"] * scale(run), run.steps["lr"])
        for i, run in enumerate(longest)
        if "lr" in run.steps
    }
    groups: list[list[int]] = []
    for index, curve in drawn.items():
        group = next((group for group in groups if _same_curve(drawn[group[0]], curve)), None)
        groups.append([index]) if group is None else group.append(index)
    if not groups:
        return None
    figure = Figure(figsize=(WIDTH, 2.6 + 0.2 * len(groups)), layout="constrained")
    axes = figure.add_subplot()
    for members in groups:
        look = looks(comparison)[members[0]]
        text = _members_text(
            [comparison.arms[index].label for index in members], len(comparison.arms)
        )
        colour = look.colour if len(members) == 1 else INK
        axes.plot(*drawn[members[0]], color=colour, ls=look.line, lw=1.8, label=text)
    axes.set_xlabel(unit)
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y")
    figure.legend(loc="outside lower center", fontsize=9)
    return figure


@mpl.rc_context(STYLE)
def staleness(comparison: Comparison) -> Figure | None:
    """Share of steps at every measured staleness (filled, with its percentage) beside the configured one (ring)."""
    chosen = [
        (arm, look)
        for arm, look in zip(comparison.arms, looks(comparison), strict=True)
        if arm.staleness
    ]
    if not chosen:
        return None
    figure, axes = _rows_figure(comparison, [arm for arm, _ in chosen])
    for row, (arm, look) in enumerate(chosen):
        assert arm.staleness is not None
        total = sum(arm.staleness.measured.values())
        for value, count in arm.staleness.measured.items():
            axes.scatter(value, row, s=20 + 90 * count / total, color=look.colour, lw=0, zorder=3)
            axes.annotate(
                f"{_share(count, total)}",
                (value, row),
                (11, 0),
                textcoords="offset points",
                va="center",
            )
        if arm.staleness.configured is not None:
            axes.scatter(
                arm.staleness.configured, row, s=210, facecolor="none", edgecolor=INK, lw=1.3
            )
    left, right = axes.get_xlim()
    axes.set_xlim(min(left, -0.3), right + 0.25 * (right - left))  # room for the last annotation
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("staleness: step minus the weight version of its adversarial batch, steps")
    return figure


def _same_curve(a: tuple[Column, Column], b: tuple[Column, Column]) -> bool:
    """Equal to within one percent of the peak: another number of steps per epoch is the same schedule."""
    grid = np.linspace(0, max(a[0][-1], b[0][-1]), POINTS)
    ya, yb = np.interp(grid, *a), np.interp(grid, *b)
    return bool(np.max(np.abs(ya - yb)) <= 0.01 * max(ya.max(), yb.max()))


def _share(count: int, total: int) -> str:
    share = 100 * count / total
    return (
        "all steps"
        if count == total
        else "< 1 %"
        if share < 1
        else "> 99 %"
        if share > 99
        else f"{share:.0f} %"
    )


def _rows_figure(comparison: Comparison, arms: Sequence[Arm] | None = None) -> tuple[Figure, Any]:
    """A horizontal plot with one labelled row per arm, the first on top."""
    arms = comparison.arms if arms is None else arms
    names = [wrap(arm.label, 30) for arm in arms]
    lines = sum(1.0 + 0.45 * name.count("\n") for name in names)
    figure = Figure(figsize=(WIDTH, 0.95 + 0.36 * lines), layout="constrained")
    axes = figure.add_subplot()
    axes.set_yticks(range(len(arms)), names)
    axes.set_ylim(len(arms) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="x")
    return figure, axes


def _panels(count: int) -> tuple[Figure, list[Any]]:
    lines, columns = (count + 1) // 2, min(count, 2)
    figure = Figure(figsize=(WIDTH, 0.9 + 2.4 * lines), layout="constrained")
    grid = list(figure.subplots(lines, columns, squeeze=False).flat)
    for spare in grid[count:]:
        spare.set_axis_off()
    for axes in grid[:count]:
        axes.grid(axis="y")
    return figure, grid


def _draw_curves(
    axes: Any, comparison: Comparison, curve: Callable[[Run], tuple[Column, Column]]
) -> None:
    for arm, look in zip(comparison.arms, looks(comparison), strict=True):
        pairs = [pair for pair in map(curve, arm.runs) if len(pair[0])]
        if not pairs:
            continue
        x = max((pair[0] for pair in pairs), key=len)
        table = np.full((len(pairs), len(x)), np.nan)
        for row, (_, y) in enumerate(pairs):
            table[row, : len(y)] = y
        known = ~np.isnan(table).all(axis=0)
        x, table = x[known], table[:, known]
        axes.plot(x, np.nanmean(table, axis=0), look.line, color=look.colour, lw=1.5)
        if len(pairs) > 1:
            axes.fill_between(
                x,
                np.nanmin(table, axis=0),
                np.nanmax(table, axis=0),
                color=look.colour,
                alpha=0.15,
                lw=0,
            )


def _accuracy_curve(run: Run, scale: Scale) -> tuple[Column, Column]:
    steps, accuracy = run.evals.get("step", np.empty(0)), run.evals.get("accuracy", np.empty(0))
    return steps * scale(run), 100 * accuracy


def _loss_curve(run: Run, view: str, scale: Scale) -> tuple[Column, Column]:
    """Means of equal stretches of steps. The stretch follows the planned length, so that seeds share their x."""
    losses = run.nested("losses").get(view, np.empty(0))
    stretch = -(-max(int(run.header.get("steps") or 0), len(losses)) // POINTS) or 1
    starts = np.arange(0, len(losses), stretch)
    if not len(starts):
        return np.empty(0), np.empty(0)
    counts = np.diff(np.append(starts, len(losses)))
    return (run.steps["step"][starts] + 1) * scale(run), np.add.reduceat(losses, starts) / counts


def _time_axis(runs: Iterable[Run]) -> tuple[str, Scale]:
    """Epochs if every run that trained shows how many steps an epoch has, else steps."""
    lengths = {run.path: _steps_per_epoch(run.steps) for run in runs if run.steps_done}
    if not lengths or None in lengths.values():
        return "step", lambda run: 1.0
    return "epoch", lambda run: 1.0 / (lengths.get(run.path) or 1)


def _steps_per_epoch(steps: Columns) -> int | None:
    if "epoch" not in steps or not (later := np.flatnonzero(steps["epoch"] >= 1)).size:
        return None
    return int(steps["step"][later[0]]) or None


def _show_second_half(axes: Any) -> None:
    """Cut off the climb: the axis starts at the lowest value of the second half of the time."""
    middle = np.mean(axes.get_xlim())
    late = np.concatenate(
        [line.get_ydata()[line.get_xdata() >= middle] for line in axes.lines] or [np.empty(0)]
    )
    if late.size and late.max() > late.min():
        margin = 0.1 * (late.max() - late.min())
        axes.set_ylim(late.min() - margin, late.max() + margin)


def _log_if_wide(axes: Any) -> None:
    """A logarithmic axis where the curves span more than a factor of 20."""
    values = np.concatenate([line.get_ydata() for line in axes.lines] or [np.ones(1)])
    if np.nanmin(values) > 0 and np.nanmax(values) > 20 * np.nanmin(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, comparison: Comparison) -> None:
    pairs = list(zip(comparison.arms, looks(comparison), strict=True))
    handles = [mpl.lines.Line2D([], [], color=look.colour, ls=look.line, lw=2) for _, look in pairs]
    names = [wrap(arm.label, 44) for arm, _ in pairs]
    figure.legend(handles, names, loc="outside lower center", ncols=2 if len(pairs) > 1 else 1)


def _phase_seconds(arm: Arm) -> dict[str, float]:
    """Phase -> seconds of a median step of the arm, from its finished runs."""
    total = arm.median("step_seconds")
    sums: dict[str, float] = {}
    for run in arm.finished:
        for name, column in run.nested("phases").items():
            sums[name] = sums.get(name, 0.0) + float(np.nansum(column[1:]))
    whole = sum(sums.values())
    return {name: total * value / whole for name, value in sums.items()} if total and whole else {}


def _members_text(names: Sequence[str], of: int) -> str:
    if len(names) == of:
        return "all arms" if of > 1 else wrap(names[0], 80)
    return wrap("; ".join(names), 90)


def wrap(text: str, width: int) -> str:
    """Printable, broken into lines, and with no dollar sign that would start a formula."""
    plain = "".join(character if character.isprintable() else " " for character in text)
    return "\n".join(textwrap.wrap(plain, width) or [" "]).replace("$", r"\$")


CURVES = (
    "Test accuracy is that of the clean route at every evaluation, a loss that of one view in training, as a mean over "
    "stretches of steps. Lines are means over the seeds that came that far, bands reach from the lowest to the highest "
    "seed; unfinished runs are drawn as far as they came. The accuracy axis leaves out the climb of the first half."
)
_FIGURES: tuple[tuple[Callable[[Comparison], Figure | None], str, str], ...] = (
    (
        accuracy_dots,
        "Test accuracy",
        "One dot per seed, the tick is their mean, the dashed line the baseline's mean. The intervals in the table say "
        "which differences stand out from the spread.",
    ),
    (
        curves,
        "Training",
        CURVES,
    ),
    (
        step_times,
        "Step time",
        "A bar is the median time of a step; its parts are the phases' shares. Hatched is what the attack adds to the "
        "step.",
    ),
    (
        lr_schedule,
        "Learning rate",
        "As recorded at every step: the arms were treated alike if they share one line.",
    ),
    (
        staleness,
        "Measured staleness",
        "How old the weights were that made the adversarial images, as recorded at every step. Filled dots inside the "
        "ring: what was configured is what happened.",
    ),
)
