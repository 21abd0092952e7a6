"""A sweep folder (sweep.json and its runs) -> Study: pure reading, no drawing, no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...config import flatten
from ...errors import ConadvError, unknown
from ...methods import METHODS
from ...untrusted import JSON_BYTES, inside, parse_json, read_text
from ..load import RECORD, Line, Run, load_run
from ..settings import part
from ..stats import Stat, stat

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
    """

    arm: str
    line: str
    x: float
    settings: Mapping[str, Any]
    runs: tuple[Run, ...] = ()
    missing: tuple[str, ...] = ()
    trials: tuple[Trial, ...] = ()
    chosen: Mapping[str, Any] = field(default_factory=dict)
    at_edge: bool = False

    @property
    def finished(self) -> tuple[Run, ...]:
        return tuple(run for run in self.runs if run.finished)

    @property
    def planned(self) -> int:
        return len(self.runs) + len(self.missing)

    def values(self, metric: str = "test_accuracy") -> dict[int, float]:
        """seed -> a field of summary.json, for finished runs where it is a finite number."""
        found = {run.seed: (run.summary or {}).get(metric) for run in self.finished}
        return {
            seed: float(value)
            for seed, value in found.items()
            if isinstance(value, (int, float)) and math.isfinite(value)
        }

    def stat(self, metric: str = "test_accuracy") -> Stat | None:
        return stat(self.values(metric))

    @property
    def gap(self) -> Stat | None:
        """Train accuracy minus test accuracy, over the seeds."""
        train, test = self.values("train_accuracy"), self.values()
        return stat({seed: train[seed] - test[seed] for seed in train.keys() & test.keys()})

    @property
    def attacks(self) -> bool:
        """Whether the method makes its extra images with a gradient."""
        row = METHODS.get(str(self.runs[0].config.get("method"))) if self.runs else None
        return row is not None and "attack" in row.settings


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
    spec: Mapping[str, Any]
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
        return [cell for cell in self.at(x) if cell.arm != self.baseline and cell.arm not in self.controls]

    def adversarial(self, x: float) -> list[Cell]:
        """The tested cells that attack; all tested ones where none does."""
        tested = self.tested(x)
        return [cell for cell in tested if cell.attacks] or tested

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
    document = _read(path / SWEEP)
    axis = str(document.get("axis") or "global_batch_size")
    names = _extra_axes(document["cells"], axis)
    cells = [_cell(path, raw, axis, names) for raw in document["cells"]]
    cells = [cell for cell in cells if cell.runs]
    if not cells:
        raise ConadvError(f"{path} has no confirmation run yet. Let `conadv sweep` go on, then report it.")
    arms = list(dict.fromkeys(cell.arm for cell in cells))
    if baseline is not None and baseline not in arms:
        raise unknown("baseline arm", baseline, arms)
    chosen = baseline or document.get("baseline")
    spec = document.get("spec") or {}
    return Study(
        path=path,
        name=str(document.get("name") or path.name),
        title=str(spec.get("title") or document.get("name") or path.name),
        axis=axis,
        cells=tuple(cells),
        baseline=chosen if chosen in arms else None,
        controls=tuple(arm for arm in document.get("controls") or () if arm in arms and arm != chosen),
        spec=spec,
        failed=tuple((str(item.get("run")), str(item.get("error"))) for item in document.get("failed") or ()),
    )


def _read(path: Path) -> Line:
    try:
        document = parse_json(read_text(path, JSON_BYTES))
    except (OSError, ValueError) as error:
        raise ConadvError(f"{path} is not a readable sweep: {error}. Run `conadv sweep` again to go on.") from error
    if not isinstance(document, dict) or not isinstance(document.get("cells"), list):
        raise ConadvError(f"{path} is not a sweep: it has no list of cells. Leave it out.")
    return document


def _extra_axes(cells: Sequence[Line], axis: str) -> list[str]:
    return list(dict.fromkeys(name for cell in cells for name in cell.get("settings") or {} if name != axis))


def _cell(folder: Path, raw: Line, axis: str, names: Sequence[str]) -> Cell:
    settings = dict(raw.get("settings") or {})
    wanted = [str(run) for run in raw.get("runs") or ()]
    there = {name: path for name in wanted if (path := inside(folder, name) / RECORD).is_file()}
    runs = [load_run(path.parent) for path in there.values()]
    extras = [part(name, settings[name]) for name in names if name in settings]
    return Cell(
        arm=str(raw["arm"]),
        line=", ".join([str(raw["arm"]), *extras]),
        x=_axis_value(settings, runs, axis),
        settings=settings,
        runs=tuple(sorted(runs, key=lambda run: run.seed)),
        missing=tuple(name for name in wanted if name not in there),
        trials=tuple(_trial(trial) for trial in raw.get("trials") or ()),
        chosen=dict(raw.get("chosen") or {}),
        at_edge=bool(raw.get("at_edge")),
    )


def _axis_value(settings: Mapping[str, Any], runs: Sequence[Run], axis: str) -> float:
    """From the grid, or from the configuration of an arm whose own grid lacks the axis."""
    value = settings.get(axis)
    if value is None and runs:
        value = flatten(runs[0].config).get(axis)
    return float(value) if isinstance(value, (int, float)) else 0.0


def _trial(raw: Line) -> Trial:
    values = tuple(float(v) if isinstance(v, (int, float)) else None for v in raw.get("validation") or ())
    mean = raw.get("mean")
    return Trial(dict(raw.get("settings") or {}), values, float(mean) if isinstance(mean, (int, float)) else None)
