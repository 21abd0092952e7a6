"""The staleness probe of a cell's runs: what each predictor's gradient is worth at the weights of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from conadv.report.load import Line
from conadv.report.study.sweep import Cell

PHASES = ("warm-up", "peak", "decay")
CURRENT, NOISE = "current", "noise"
KNOWN = (CURRENT, "stale", "momentum", "last-update", NOISE)


@dataclass(frozen=True)
class Measure:
    """One quantity of the probe. ``field`` of the line, or its ratio to the current weights' value."""

    field: str
    title: str
    relative: bool = False


MEASURES = (
    Measure("cosine", "cosine to the gradient\nat the current weights"),
    Measure("loss_increase", "loss increase, share of\nthe sequential attack's", relative=True),
    Measure("relative_error", "prediction error, share of\nthe weights' movement"),
)


@dataclass(frozen=True)
class Point:
    """A mean over the runs of a cell with the lowest and highest run."""

    mean: float
    low: float
    high: float


def predictors(cell: Cell) -> tuple[str, ...]:
    found = dict.fromkeys(str(line.get("predictor")) for run in cell.runs for line in run.probes)
    return tuple(
        sorted(found, key=lambda name: KNOWN.index(name) if name in KNOWN else len(KNOWN) - 1.5)
    )


def taus(cell: Cell, predictor: str) -> tuple[int, ...]:
    return tuple(
        sorted(
            {
                int(line["tau"])
                for run in cell.runs
                for line in run.probes
                if line.get("predictor") == predictor
            }
        )
    )


def phases(cell: Cell) -> tuple[str, ...]:
    found = dict.fromkeys(str(line.get("phase")) for run in cell.runs for line in run.probes)
    return tuple(
        sorted(found, key=lambda name: PHASES.index(name) if name in PHASES else len(PHASES))
    )


def average(
    cell: Cell, measure: Measure, predictor: str, tau: int, phase: str | None = None
) -> Point | None:
    """Mean over the steps of a phase (all without), then over runs. None where nothing was measured.

    A relative measure is the ratio of the two means, not the mean of ratios: single steps may have an increase near 0.
    """
    means = [_run_mean(run.probes, measure, predictor, tau, phase) for run in cell.runs]
    known = [value for value in means if value is not None]
    return Point(float(np.mean(known)), min(known), max(known)) if known else None


def _run_mean(
    lines: Iterable[Line], measure: Measure, predictor: str, tau: int, phase: str | None
) -> float | None:
    chosen = [line for line in lines if phase is None or line.get("phase") == phase]
    own = _by_step(
        chosen,
        measure.field,
        lambda line: line.get("predictor") == predictor and line.get("tau") == tau,
    )
    if not measure.relative:
        return float(np.mean(list(own.values()))) if own else None
    current = _by_step(chosen, measure.field, lambda line: line.get("predictor") == CURRENT)
    common = own.keys() & current.keys()
    whole = sum(current[step] for step in common)
    return sum(own[step] for step in common) / whole if common and whole > 0 else None


def _by_step(lines: Iterable[Line], field: str, wanted: Callable[[Line], bool]) -> dict[int, float]:
    values = {int(line["step"]): line.get(field) for line in lines if wanted(line)}
    return {
        s: float(v) for s, v in values.items() if isinstance(v, (int, float)) and math.isfinite(v)
    }


def course(
    cell: Cell, measure: Measure, predictor: str, tau: int
) -> tuple[list[float], list[float]]:
    """(share of the training done, mean over runs) at every probed step; a relative measure is a ratio of means."""
    total = _total_steps(cell)
    own, current = (
        _values(cell, measure.field, predictor, tau),
        _values(cell, measure.field, CURRENT, 0),
    )
    pairs: list[tuple[float, float]] = []
    for step, values in sorted(own.items()):
        whole = float(np.mean(current.get(step, [0.0]))) if measure.relative else 1.0
        if whole > 0:
            pairs.append((step / total, float(np.mean(values)) / whole))
    return [x for x, _ in pairs], [y for _, y in pairs]


def _values(cell: Cell, field: str, predictor: str, tau: int) -> dict[int, list[float]]:
    """step -> one value per run."""
    found: dict[int, list[float]] = {}
    for run in cell.runs:
        one = _by_step(
            run.probes,
            field,
            lambda line: line.get("predictor") == predictor and line.get("tau") == tau,
        )
        for step, value in one.items():
            found.setdefault(step, []).append(value)
    return found


def phase_spans(cell: Cell) -> list[tuple[str, float, float]]:
    """(phase, start, end) as shares of the training; a phase ends halfway to the next one's first probed step."""
    steps: dict[int, str] = {
        int(line["step"]): str(line.get("phase"))
        for run in cell.runs
        for line in run.probes
        if line.get("phase")
    }
    total = _total_steps(cell)
    spans: list[tuple[str, float, float]] = []
    for step, phase in sorted(steps.items()):
        if spans and spans[-1][0] == phase:
            spans[-1] = (phase, spans[-1][1], step / total)
        else:
            start = (spans[-1][2] + step / total) / 2 if spans else 0.0
            if spans:
                spans[-1] = (spans[-1][0], spans[-1][1], start)
            spans.append((phase, start, step / total))
    return [*spans[:-1], (spans[-1][0], spans[-1][1], 1.0)] if spans else []


def _total_steps(cell: Cell) -> int:
    planned: Sequence[int] = [int(run.header.get("steps") or 0) for run in cell.runs]
    return max(
        max(planned, default=0), *(int(line["step"]) for run in cell.runs for line in run.probes), 1
    )


def probed(cells: Iterable[Cell]) -> list[Cell]:
    return [cell for cell in cells if any(run.probes for run in cell.runs)]
