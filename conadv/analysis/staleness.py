"""The lines of the staleness probe (docs/staleness.md) -> a table, and a picture of it."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import fsum
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Line = dict[str, Any]
PHASES = ("warm-up", "peak", "decay")
CURRENT, NOISE = "current", "noise"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
WIDTH, DPI = 10.0, 130
_RC = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Row:
    """Means over the probes of one phase for one predictor and tau.

    ``kept``: the mean loss increase over that of the attack at theta_t in the same probes. ``kept_over_noise``: the
    same after the increase by random signs is taken off both. None where there is nothing to take a mean of or to
    divide by.
    """

    phase: str
    tau: int
    predictor: str
    probes: int
    cosine: float | None
    loss_increase: float
    kept: float | None
    kept_over_noise: float | None
    relative_error: float | None


def table(lines: Iterable[Line]) -> list[Row]:
    """Rows for every phase, tau and predictor among the probe lines of one run or of several.

    ``lines``: record lines, of which those of other types are passed over. A probe's lines follow one another,
    "current" first, as they are written.
    Sorted by phase in time, tau, and predictors in the order of the record.
    """
    found: dict[tuple[str, int, str], list[tuple[Line, Line, Line]]] = {}
    for probe in _probes(lines):
        named = {line["predictor"]: line for line in probe}
        for line in probe:
            key = (line["phase"], line["tau"], line["predictor"])
            found.setdefault(key, []).append((line, named[CURRENT], named[NOISE]))
    order = {name: i for i, name in enumerate(dict.fromkeys(name for _, _, name in found))}
    keys = sorted(found, key=lambda key: (PHASES.index(key[0]), key[1], order[key[2]]))
    return [_row(*key, found[key]) for key in keys]


def _probes(lines: Iterable[Line]) -> list[list[Line]]:
    """The lines of each probe: one begins with "current". One that a killed run has not written as far as its
    "noise" is left out: there is nothing to compare it with.
    """
    probes: list[list[Line]] = []
    for line in lines:
        if line["type"] == "probe":
            if line["predictor"] == CURRENT or not probes:
                probes.append([])
            probes[-1].append(line)
    return [probe for probe in probes if {CURRENT, NOISE} <= {line["predictor"] for line in probe}]


def _row(phase: str, tau: int, predictor: str, found: Sequence[tuple[Line, Line, Line]]) -> Row:
    own, best, noise = ([lines[i]["loss_increase"] for lines in found] for i in range(3))
    return Row(
        phase,
        tau,
        predictor,
        len(found),
        _mean(line["cosine"] for line, _, _ in found),
        fsum(own) / len(own),
        _ratio(fsum(own), fsum(best)),
        _ratio(fsum(own) - fsum(noise), fsum(best) - fsum(noise)),
        _mean(line["relative_error"] for line, _, _ in found),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return fsum(there) / len(there) if there else None


def _ratio(a: float, b: float) -> float | None:
    return a / b if b > 0 else None


def text(rows: Sequence[Row]) -> list[str]:
    """The table for a terminal, a header first."""
    widths = (8, 4, max([9, *(len(row.predictor) for row in rows)]))
    heads = ("probes", "cosine", "loss +", "kept", "over noise", "error")
    lines = [
        f"{'phase':<{widths[0]}}{'tau':>{widths[1]}}  {'predictor':<{widths[2]}}" + _cells(heads)
    ]
    for row in rows:
        values = (row.cosine, row.loss_increase, row.kept, row.kept_over_noise, row.relative_error)
        cells = [str(row.probes), *("-" if value is None else f"{value:.3f}" for value in values)]
        name = f"{row.phase:<{widths[0]}}{row.tau or '':>{widths[1]}}  {row.predictor:<{widths[2]}}"
        lines.append(name + _cells(cells))
    return lines


def _cells(cells: Sequence[str]) -> str:
    return "".join(f"{cell:>12}" for cell in cells)


Value = Callable[[Row], float | None]
_PANELS: tuple[tuple[str, Value], ...] = (
    ("cosine with the gradient at θ_t", lambda row: row.cosine),
    ("loss increase at θ_t, over that\nof the attack at θ_t", lambda row: row.kept),
    ("distance of the prediction to θ_t,\nover that of θ_{t-tau}", lambda row: row.relative_error),
)


def draw(rows: Sequence[Row], title: str) -> Figure:
    """A column for each phase; cosine, kept loss increase and prediction error over tau, a line for each predictor."""
    present = [phase for phase in PHASES if any(row.phase == phase for row in rows)]
    names = list(dict.fromkeys(row.predictor for row in rows if row.tau))
    with mpl.rc_context(_RC):
        figure = Figure(figsize=(WIDTH, 8.2), layout="constrained")
        grid = figure.subplots(len(_PANELS), len(present), sharex=True, sharey="row", squeeze=False)
        for column, phase in enumerate(present):
            here = [row for row in rows if row.phase == phase]
            probes = max(row.probes for row in here)
            for line, (_, value) in enumerate(_PANELS):
                _panel(grid[line][column], here, names, value)
            grid[0][column].set_title(f"{phase} ({probes} probe{'s' * (probes > 1)})")
            grid[-1][column].set_xlabel("tau")
        for line, (label, _) in enumerate(_PANELS):
            grid[line][0].set_ylabel(label)
        handles, labels = grid[1][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=max(1, len(labels)))
        figure.suptitle(title, fontsize=10)
    return figure


def _panel(axes: Axes, rows: Sequence[Row], names: Sequence[str], value: Value) -> None:
    for number, name in enumerate(names):
        points = [
            (row.tau, y) for row in rows if row.predictor == name and (y := value(row)) is not None
        ]
        axes.plot(
            [tau for tau, _ in points],
            [y for _, y in points],
            label=name,
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            linewidth=1.4,
            markersize=5,
        )
    noise = next((value(row) for row in rows if row.predictor == NOISE), None)
    if noise is not None:
        axes.axhline(noise, color="#888888", linestyle=":", linewidth=1.2, label="random signs")
    axes.axhline(1.0, color="#888888", linewidth=0.8)
    taus = sorted({row.tau for row in rows if row.tau})
    axes.set_xscale("log", base=2)
    axes.set_xticks(taus, [str(tau) for tau in taus])
    axes.grid(True)


def to_png(figure: Figure) -> bytes:
    """The figure as PNG."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI)
    return stream.getvalue()
