"""The figures of a study. A line (arm) has one colour and marker in all of them, those of conadv.report.figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from conadv.report.figures import INK, STYLE, WIDTH, Look, look, to_png, wrap
from conadv.report.settings import part
from conadv.report.study.cost import cost, unit
from conadv.report.study.sweep import Cell, Study

DPI = 160
_DODGE = 0.62  # share of the distance between two batches that a group of arms fills


def line_look(study: Study, line: str) -> Look:
    return look(study.lines.index(line))


def save(figure: Figure, path: str | Path) -> None:
    """Write ``figure`` as PNG on white, for pages that are shown in light and dark."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(to_png(figure, DPI))


def accuracy_figure(study: Study, path: str | Path | None = None) -> Figure | None:
    """Test accuracy against the axis: a faint dot per seed, mean and standard deviation per arm.

    path: also written there as PNG. None without any finished run, and then nothing is written.
    """
    return save_if(_accuracy(study), path)


def cost_figure(study: Study, path: str | Path | None = None) -> Figure | None:
    """Test accuracy against total gradient images, a panel per batch; the step line is the best for that cost or less.

    path: also written there as PNG. None where no run says what it cost.
    """
    return save_if(_cost(study), path)


def save_if(figure: Figure | None, path: str | Path | None) -> Figure | None:
    if figure is not None and path is not None:
        save(figure, path)
    return figure


@mpl.rc_context(STYLE)
def _accuracy(study: Study) -> Figure | None:
    if not any(cell.values() for cell in study.cells):
        return None
    if all(sum(cell.line == line for cell in study.cells) == 1 for line in study.lines):
        return _rows(study)
    figure = Figure(figsize=(WIDTH, 4.0 + 0.1 * len(study.lines)), layout="constrained")
    axes = figure.add_subplot()
    for number, line in enumerate(study.lines):
        shift = _DODGE * ((number + 0.5) / len(study.lines) - 0.5)
        cells = sorted((cell for cell in study.cells if cell.line == line), key=lambda cell: cell.x)
        _draw_line(axes, study, cells, shift)
    for middle in range(len(study.points) - 1):
        axes.axvline(middle + 0.5, color=INK, lw=0.6, alpha=0.18)
    axes.set_xticks(range(len(study.points)), [axis_value(study, x) for x in study.points])
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.5, len(study.points) - 0.5)
    axes.set_xlabel(axis_name(study))
    axes.set_ylabel("test accuracy, %")
    axes.grid(axis="y")
    legend(figure, study, study.lines)
    return figure


def _rows(study: Study) -> Figure:
    """Arms at one point each: a row per arm with its name beside it, and a line where the baseline's mean is."""
    figure = Figure(figsize=(WIDTH, 0.9 + 0.32 * len(study.lines)), layout="constrained")
    axes = figure.add_subplot()
    names = []
    for row, line in enumerate(study.lines):
        (cell,) = (cell for cell in study.cells if cell.line == line)
        style, value = line_look(study, line), cell.stat()
        names.append(
            wrap(line, 40) + (f" · {axis_value(study, cell.x)}" if len(study.points) > 1 else "")
        )
        seeds = [100 * v for v in cell.values().values()]
        axes.plot(
            seeds, [row] * len(seeds), style.marker, color=style.colour, alpha=0.35, ms=4, mew=0
        )
        if value is None:
            names[-1] += f"\n{cell.divergence}" if cell.diverged else ""
            continue
        _mean(axes, row, 100 * value.mean, 100 * (value.std or 0.0), style, across=True)
        if cell.arm == study.baseline:
            axes.axvline(100 * value.mean, color=INK, lw=0.9, ls=":", alpha=0.8, zorder=0)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names) - 0.5, -0.5)
    if len(study.points) == 1:
        axes.set_title(part(study.axis, axis_value(study, study.points[0])))
    axes.set_xlabel("test accuracy, %")
    axes.grid(axis="x")
    return figure


def _draw_line(axes: Any, study: Study, cells: Sequence[Cell], shift: float) -> None:
    style = line_look(study, cells[0].line)
    means: list[tuple[float, float]] = []
    for cell in cells:
        value, x = cell.stat(), study.points.index(cell.x) + shift
        seeds = [100 * v for v in cell.values().values()]
        axes.plot(
            [x] * len(seeds), seeds, style.marker, color=style.colour, alpha=0.35, ms=4, mew=0
        )
        if value is None:
            continue
        _mean(axes, x, 100 * value.mean, 100 * (value.std or 0.0), style)
        means.append((x, 100 * value.mean))
    if len(means) > 1:
        axes.plot(*zip(*means, strict=True), ls=style.line, color=style.colour, lw=1.0, alpha=0.7)


def _mean(
    axes: Any,
    x: float,
    mean: float,
    spread: float,
    style: Look,
    across: bool = False,
    size: float = 8,
) -> None:
    """A mean with its spread, upwards or ``across``."""
    place, bar = ((mean, x), "xerr") if across else ((x, mean), "yerr")
    look_of_it = {
        "fmt": style.marker,
        "color": style.colour,
        "ms": size,
        "mec": INK,
        "mew": 0.8,
        "elinewidth": 0.2 * size,
    }
    axes.errorbar(*place, **{bar: spread or None}, **look_of_it)


@mpl.rc_context(STYLE)
def _cost(study: Study) -> Figure | None:
    counts = {x: sum(_placed(cell) is not None for cell in study.at(x)) for x in study.points}
    points = [x for x in study.points if counts[x] > 1] or [x for x in study.points if counts[x]]
    if not points:
        return None
    columns = min(len(points), 3)
    rows = -(-len(points) // columns)
    figure = Figure(
        figsize=(WIDTH, 0.8 + 2.6 * rows + 0.1 * len(study.lines)), layout="constrained"
    )
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in grid[len(points) :]:
        spare.set_axis_off()
    for axes, x in zip(grid, points, strict=False):
        _cost_panel(axes, study, [place for cell in study.at(x) if (place := _placed(cell))])
        axes.set_title(part(study.axis, axis_value(study, x)))
    drawn = {cell.line for x in points for cell in study.at(x)}
    legend(figure, study, [line for line in study.lines if line in drawn])
    return figure


def _placed(cell: Cell) -> tuple[Cell, float, float, float] | None:
    """(cell, total gradient images, accuracy and its spread in percent)."""
    value, total = cell.stat(), cost(cell).total
    return (
        None
        if value is None or total is None
        else (cell, total, 100 * value.mean, 100 * (value.std or 0.0))
    )


def _cost_panel(
    axes: Any, study: Study, places: Sequence[tuple[Cell, float, float, float]]
) -> None:
    size, word = unit(study)
    places = [(cell, total / size, mean, spread) for cell, total, mean, spread in places]
    totals = sorted({total for _, total, _, _ in places})
    best = [max(mean for _, total, mean, _ in places if total <= limit) for limit in totals]
    right = totals[-1] * 1.16
    for (cell, total, mean, spread), size in zip(
        places, _sizes([p[1] for p in places]), strict=True
    ):
        _mean(axes, total, mean, spread, line_look(study, cell.line), size=size)
    axes.step(
        [*totals, right],
        [*best, best[-1]],
        where="post",
        color=INK,
        lw=0.8,
        ls=(0, (4, 3)),
        alpha=0.6,
    )
    axes.set_xlim(0, right)
    axes.set_xlabel(
        f"gradient images of the\nwhole training, {word}"
    )  # three panels stand side by side
    axes.set_ylabel("test accuracy, %")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.grid()


def _sizes(totals: Sequence[float]) -> list[float]:
    """A marker's size for each cost, in points: where several cost nearly the same, the later are smaller.

    All stand at their true costs, and would hide one another where their accuracies are close too.
    """
    before = [
        sum(abs(other - here) <= 0.03 * here for other in totals[:at])
        for at, here in enumerate(totals)
    ]
    return [max(10.0 - 1.5 * number, 4.0) for number in before]


def axis_name(study: Study) -> str:
    """The axis in words, e.g. "global batch size, images"."""
    words = study.axis.rpartition(".")[2].replace("_", " ")
    return f"{words}, images" if study.axis == "global_batch_size" else words


def axis_value(study: Study, x: float) -> str:
    return f"{x:,.0f}" if float(x).is_integer() else f"{x:g}"


def legend(figure: Figure, study: Study, lines: Iterable[str]) -> None:
    """Marker, colour and name of each line, below the panels."""
    names = list(lines)
    styles = [line_look(study, line) for line in names]
    handles = [
        mpl.lines.Line2D(
            [], [], color=style.colour, marker=style.marker, ls=style.line, ms=7, mec=INK, mew=0.6
        )
        for style in styles
    ]
    figure.legend(
        handles,
        [wrap(name, 44) for name in names],
        loc="outside lower center",
        ncols=min(2, len(names)),
    )


def rows_axes(axes: Any, names: Sequence[str]) -> None:
    """One labelled row per name, the first on top."""
    axes.set_yticks(range(len(names)), [wrap(name, 26) for name in names])
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
