"""Spec -> cells -> trials -> runs. Pure: every run that may ever be needed is known, named and checked at the start."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import replace as with_fields
from pathlib import Path
from typing import Any

from conadv.config import recipes
from conadv.config.schema import Config, home, override, parse, replace, resolve
from conadv.errors import ConadvError
from conadv.sweep.spec import BATCH, Settings, Spec


@dataclass(frozen=True)
class Run:
    """One training: a folder name below OUT/runs, words for people, and the resolved config that decides its bits."""

    name: str
    label: str
    config: Config


@dataclass(frozen=True)
class Trial:
    """One choice of the tuned settings: the names of its runs on the tuning seeds, and on the confirmation seeds."""

    settings: Settings
    tuning: tuple[str, ...]
    confirming: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """One arm at one point of the grid. ``source``: the index of the cell whose choice among the trials it takes.

    That is its own index where it is tuned, another's with ``tune_on``, and None where there is nothing to choose.
    """

    arm: str
    settings: Settings
    trials: tuple[Trial, ...]
    source: int | None


@dataclass(frozen=True)
class Plan:
    """All cells, all runs by name, and each cell's group: cells of one group share runs or choices."""

    spec: Spec
    cells: tuple[Cell, ...]
    runs: dict[str, Run]
    groups: tuple[int, ...]

    def tuning(self, only: frozenset[int]) -> list[str]:
        """The tuning runs of the cells ``only``, by seed, point and trial: the arms of a seed run close together."""
        seeds = range(len(self.spec.tune.seeds) if self.spec.tune else 0)
        tuned = [
            self.cells[index] for index in self._by_point(only) if self.cells[index].source == index
        ]
        trials = range(max((len(cell.trials) for cell in tuned), default=0))
        points = list(dict.fromkeys(repr(cell.settings) for cell in tuned))
        names = [
            cell.trials[trial].tuning[seed]
            for seed in seeds
            for point in points
            for trial in trials
            for cell in tuned
            if repr(cell.settings) == point
        ]
        return list(dict.fromkeys(names))

    def confirming(self, only: frozenset[int]) -> list[tuple[int, int]]:
        """(seed's index, cell's index) of every confirmation run of the cells ``only``, in the same order."""
        return [
            (seed, index)
            for seed in range(len(self.spec.confirm.seeds))
            for index in self._by_point(only)
        ]

    def shard(self, index: int, count: int) -> frozenset[int]:
        """The cells of the ``index``-th of ``count`` shards, from 1. Every group is in exactly one."""
        order = list(dict.fromkeys(self.groups))
        return frozenset(
            i for i, group in enumerate(self.groups) if order.index(group) % count == index - 1
        )

    def _by_point(self, only: frozenset[int]) -> list[int]:
        points = list(dict.fromkeys(repr(cell.settings) for cell in self.cells))
        return sorted(
            only, key=lambda index: (points.index(repr(self.cells[index].settings)), index)
        )


def expand(spec: Spec, data_dir: Path | None = None) -> Plan:
    """The plan of a spec. ``data_dir`` replaces data.dir everywhere: the same images may lie elsewhere.

    Two runs with the same resolved config are one run. Raises ConadvError for settings that do not fit together, and
    for two arms that would get one folder.
    """
    expansion = _Expansion(spec, _base(spec, data_dir))
    cells = [expansion.cell(arm, point) for arm in spec.arms for point in spec.points(arm)]
    cells = [_with_source(spec, cell, cells) for cell in cells]
    return Plan(spec, tuple(cells), expansion.runs, tuple(_groups(cells)))


class _Expansion:
    """The runs so far, and the name that each config has."""

    def __init__(self, spec: Spec, base: Config) -> None:
        self._spec, self._base = spec, base
        self._names: dict[str, str] = {}
        self.runs: dict[str, Run] = {}

    def cell(self, arm: str, point: Settings) -> Cell:
        spec = self._spec
        tune_seeds = spec.tune.seeds if spec.tune and spec.tunes(arm) else ()
        trials = [
            Trial(
                settings,
                tuple(self._run(arm, point, settings, seed, tuning=True) for seed in tune_seeds),
                tuple(self._run(arm, point, settings, seed) for seed in spec.confirm.seeds),
            )
            for settings in spec.trials(arm, point)
        ]
        return Cell(arm, point, tuple(trials), None)

    def _run(
        self, arm: str, point: Settings, trial: Settings, seed: int, tuning: bool = False
    ) -> str:
        label = _label(arm, {**point, **trial})
        try:
            config = _config(self._base, self._spec, arm, point, trial, seed)
        except ConadvError as error:
            raise ConadvError(f"{label}: {error}") from error
        if config.micro_batch_size == "auto":
            raise ConadvError(
                f"{label}: micro_batch_size auto depends on the machine and changes what batch norm sees, so that runs "
                "could not be compared. Give a number."
            )
        if tuning and config.data.validation_images is None:
            raise ConadvError(
                f"{label}: tuning needs images to choose by. Give data.validation_images in base."
            )
        key, name = config.model_dump_json(), f"{_slug(label)}-seed{seed}"
        if key not in self._names and name in self.runs:
            raise ConadvError(
                f"{label!r} and {self.runs[name].label!r} would both be in runs/{name}. Rename one of the arms."
            )
        known = self._names.setdefault(key, name)
        self.runs.setdefault(known, Run(known, label, config))
        return known


def _base(spec: Spec, data_dir: Path | None) -> Config:
    """The recipe with the spec's base settings: what every arm starts from."""
    recipe = recipes.get(spec.recipe)
    given = {
        name for name in spec.base if not name.startswith("attack.")
    }  # vanilla arms may stand beside attacks
    base = override(recipe, _edited(recipe, spec.base, "base"), given)
    folder = data_dir or base.data.dir
    if folder is not None:
        base = replace(base, data__dir=home(folder).absolute())
    return base


def _config(
    base: Config, spec: Spec, arm: str, point: Settings, trial: Settings, seed: int
) -> Config:
    settings = {**spec.arms[arm].settings, **point, **trial}
    given = {name for name in settings if not (name in point and name.startswith("attack."))}
    edited = _edited(base, {**settings, "seed": seed}, arm)
    return resolve(override(base, edited, given))


def _edited(base: Config, settings: Settings, where: str) -> Config:
    values = base.model_dump()
    for name, value in settings.items():
        *sections, last = name.split(".")
        section = values
        for part in sections:
            section = section[part]
        section[last] = value
    return parse(values, where)


def _with_source(spec: Spec, cell: Cell, cells: list[Cell]) -> Cell:
    """The cell with the index of the one that it takes its choice from."""
    if spec.tune is None:
        return cell
    arm = cell.arm if spec.tunes(cell.arm) else spec.tune.tune_on
    for index, other in enumerate(cells):
        if other.arm == arm and other.settings == cell.settings:
            return with_fields(cell, source=index)
    raise ConadvError(
        f"arm {cell.arm!r} at {cell.settings}: {arm!r} is tuned for it (tune_on) but has no cell there. Give {arm!r} "
        f"the same grid, or {cell.arm!r} a tune of its own."
    )


def _groups(cells: list[Cell]) -> list[int]:
    """For each cell the lowest index among the cells that it shares runs or a choice with, directly or not."""
    groups = list(range(len(cells)))
    owners: dict[str, int] = {}
    for index, cell in enumerate(cells):
        names = [name for trial in cell.trials for name in trial.tuning + trial.confirming]
        linked = {owners.setdefault(name, index) for name in names} | {
            index if cell.source is None else cell.source
        }
        joined = {groups[other] for other in linked | {index}}
        groups = [min(joined) if group in joined else group for group in groups]
    return groups


def _label(arm: str, settings: Settings) -> str:
    return ", ".join([arm, *(f"{_short(name)} {_text(value)}" for name, value in settings.items())])


def _short(name: str) -> str:
    return "batch" if name == BATCH else name.rpartition(".")[2].replace("_", " ")


def _text(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return (
        text.replace("e+", "e") if isinstance(value, float) else text
    )  # a folder name keeps no sign


def _slug(label: str) -> str:
    return "-".join(
        "".join(c if c.isalnum() or c in "._" else " " for c in label.lower()).split()
    ).strip(".")
