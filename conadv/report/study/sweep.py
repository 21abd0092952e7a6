"""A sweep folder (sweep.json and its runs) -> Study: pure reading, no drawing, no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conadv import documents
from conadv.config.schema import flatten
from conadv.errors import ConadvError, printable, unknown
from conadv.methods import METHODS
from conadv.report.load import RECORD, Run, load_run
from conadv.report.settings import part
from conadv.report.stats import Stat, stat
from conadv.safe_io import inside
from conadv.sweep.choose import at_edge, only_edges

SWEEP = "sweep.json"


@dataclass(frozen=True)
class Trial:
    """One setting that was tried: its mean validation accuracy over the tuning seeds, in [0, 1]; None if it failed."""

    settings: Mapping[str, Any]
    validation: tuple[float | None, ...]
    mean: float | None


@dataclass(frozen=True)
class Cell:
    """One arm at one point of the grid: its confirmation runs, one per seed, and how its settings were chosen.

    ``x`` is the value on the study's axis (a global batch size). ``line`` names the arm together with the values of
    any other axis, so that a line and an x name one cell. ``missing``: runs that are planned but have no record yet.
    ``diverged``: how many of the planned runs stopped by a loss or gradient that was not finite. ``at_edge``: the
    settings whose choice is at the edge of what was tried; ``only_edges``: those with two values, which have no inside.
    """

    arm: str
    line: str
    x: float
    settings: Mapping[str, Any]
    runs: tuple[Run, ...] = ()
    missing: tuple[str, ...] = ()
    trials: tuple[Trial, ...] = ()
    chosen: Mapping[str, Any] = field(default_factory=dict)
    at_edge: tuple[str, ...] = ()
    only_edges: tuple[str, ...] = ()
    diverged: int = 0

    @property
    def finished(self) -> tuple[Run, ...]:
        return tuple(run for run in self.runs if run.finished)

    @property
    def planned(self) -> int:
        return len(self.runs) + len(self.missing)

    @property
    def divergence(self) -> str:
        """In words, what stands in place of a mean; empty where no run diverged."""
        return f"{self.diverged} of {self.planned} diverged" if self.diverged else ""

    def values(self, metric: str = "test_accuracy") -> dict[int, float]:
        """seed -> a field of summary.json, for finished runs where it is a finite number."""
        found = {run.seed: (run.summary or {}).get(metric) for run in self.finished}
        return {
            seed: float(value)
            for seed, value in found.items()
            if isinstance(value, (int, float)) and math.isfinite(value)
        }

    def stat(self, metric: str = "test_accuracy") -> Stat | None:
        """Over the seeds; None where a run diverged, since the others alone would be the lucky ones."""
        return None if self.diverged else stat(self.values(metric))

    @property
    def gap(self) -> Stat | None:
        """Train accuracy minus test accuracy, over the seeds; None where a run diverged."""
        train, test = ({}, {}) if self.diverged else (self.values("train_accuracy"), self.values())
        return stat({seed: train[seed] - test[seed] for seed in train.keys() & test.keys()})

    @property
    def attacks(self) -> bool:
        """Whether the method makes its extra images with a gradient."""
        row = METHODS.get(str(self.runs[0].config.get("method"))) if self.runs else None
        return row is not None and "norm" in row.attack


@dataclass(frozen=True)
class Study:
    """A sweep as its report sees it. Tuning runs are in ``Cell.trials`` only, never among the results.

    ``lines``: the arms in the order of the spec, split where the grid has more axes than ``axis``.
    """

    path: Path
    name: str
    title: str
    axis: str
    cells: tuple[Cell, ...]
    baseline: str | None
    controls: tuple[str, ...]
    tune: documents.Tune | None = None
    failed: tuple[tuple[str, str], ...] = ()

    @property
    def lines(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(cell.line for cell in self.cells))

    @property
    def points(self) -> tuple[float, ...]:
        """The values of the axis, ascending."""
        return tuple(sorted({cell.x for cell in self.cells}))

    @property
    def largest(self) -> float:
        """The largest value of the axis at which the baseline was run, where the questions are decided."""
        own = [cell.x for cell in self.cells if cell.arm == self.baseline]
        return max(own or self.points)

    def at(self, x: float) -> list[Cell]:
        return [cell for cell in self.cells if cell.x == x]

    def tested(self, x: float) -> list[Cell]:
        """What is neither baseline nor control at ``x``."""
        return [
            cell
            for cell in self.at(x)
            if cell.arm != self.baseline and cell.arm not in self.controls
        ]

    def adversarial(self, x: float) -> list[Cell]:
        """The tested cells that attack; all tested ones where none does."""
        tested = self.tested(x)
        return [cell for cell in tested if cell.attacks] or tested

    def called(self, x: float) -> str:
        """What :meth:`adversarial` gives, in a word."""
        return "adversarial arms" if any(cell.attacks for cell in self.tested(x)) else "arms"

    def last(self, line: str) -> Cell:
        """The cell of a line with the largest x."""
        return max((cell for cell in self.cells if cell.line == line), key=lambda cell: cell.x)


def is_sweep(path: str | Path) -> bool:
    return (Path(path) / SWEEP).is_file()


def load_sweep(path: str | Path, baseline: str | None = None) -> Study:
    """Read a sweep folder, finished or still going. baseline: another arm than the spec's to take differences to.

    Cells without any record yet are left out. Raises ConadvError where there is no readable sweep.json, no run yet,
    and for an unknown baseline.
    """
    path = Path(path)
    document = documents.read_sweep(path / SWEEP)
    axis = document.axis
    names = _extra_axes(document.cells, axis)
    cells = [_cell(path, raw, document, names) for raw in document.cells]
    cells = [cell for cell in cells if cell.runs]
    if not cells:
        raise ConadvError(
            f"{printable(path)} has no confirmation run yet. Let `conadv sweep` go on, then report it."
        )
    arms = list(dict.fromkeys(cell.arm for cell in cells))
    if baseline is not None and baseline not in arms:
        raise unknown("baseline arm", baseline, arms)
    chosen = baseline or document.baseline
    name = document.name or path.name
    return Study(
        path=path,
        name=name,
        title=document.spec.title or name,
        axis=axis,
        cells=tuple(cells),
        baseline=chosen if chosen in arms else None,
        controls=tuple(arm for arm in document.controls if arm in arms and arm != chosen),
        tune=document.spec.tune,
        failed=tuple((item.run, item.error) for item in document.failed),
    )


def _extra_axes(cells: Sequence[documents.Cell], axis: str) -> list[str]:
    return list(dict.fromkeys(name for cell in cells for name in cell.settings if name != axis))


def _cell(
    folder: Path, raw: documents.Cell, document: documents.Sweep, names: Sequence[str]
) -> Cell:
    settings, wanted = raw.settings, raw.runs
    tried = [trial.settings for trial in _source(raw, document.cells).trials]
    diverged = {item.run for item in document.failed if item.diverged}
    there = {name: path for name in wanted if (path := inside(folder, name) / RECORD).is_file()}
    runs = [load_run(path.parent) for path in there.values()]
    extras = [part(name, settings[name]) for name in names if name in settings]
    return Cell(
        arm=raw.arm,
        line=", ".join([raw.arm, *extras]),
        x=_axis_value(settings, runs, document.axis),
        settings=settings,
        runs=tuple(sorted(runs, key=lambda run: run.seed)),
        missing=tuple(name for name in wanted if name not in there),
        trials=tuple(
            Trial(trial.settings, tuple(trial.validation), trial.mean) for trial in raw.trials
        ),
        chosen=raw.chosen,
        at_edge=tuple(at_edge(tried, raw.chosen)),
        only_edges=tuple(only_edges(tried)),
        diverged=sum(name in diverged for name in wanted),
    )


def _source(raw: documents.Cell, cells: Sequence[documents.Cell]) -> documents.Cell:
    """The cell whose trials decided the choice of ``raw``: itself, or that of the arm it was tuned on."""
    others = (cell for cell in cells if cell.arm == raw.tuned_on and cell.settings == raw.settings)
    return raw if raw.trials else next(others, raw)


def _axis_value(settings: Mapping[str, Any], runs: Sequence[Run], axis: str) -> float:
    """From the grid, or from the configuration of an arm whose own grid lacks the axis."""
    value = settings.get(axis)
    if value is None and runs:
        value = flatten(runs[0].config).get(axis)
    return float(value) if isinstance(value, (int, float)) else 0.0
