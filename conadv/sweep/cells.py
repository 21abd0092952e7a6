"""Spec -> cells -> trials -> runs. Every run that may be needed is checked at the start."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from conadv.config import recipes
from conadv.config.files import home, parse
from conadv.config.overrides import override
from conadv.config.resolve import resolve
from conadv.config.schema import Config, flatten, replace
from conadv.errors import ConadvError, unknown
from conadv.methods import METHODS
from conadv.sweep.spec import Settings, Spec


@dataclass(frozen=True)
class Run:
    """One training: the name of its folder, which tells arm and settings, and its config."""

    name: str
    config: Config

    @cached_property
    def cost(self) -> float:
        return relative_cost(self.config)


@dataclass(frozen=True)
class Trial:
    """One choice of the tuned settings, and the names of its runs, one per seed."""

    settings: Settings
    tuning: tuple[str, ...]
    confirming: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """One arm at one point of the grid.

    ``source``: the index of the cell whose trials choose for this one: its own, another's with
    ``tune_on``, or None where nothing is tuned.
    """

    arm: str
    settings: Settings
    trials: tuple[Trial, ...]
    source: int | None


@dataclass(frozen=True)
class Plan:
    """All cells, and all runs by name."""

    spec: Spec
    cells: tuple[Cell, ...]
    runs: dict[str, Run]

    @cached_property
    def order(self) -> list[tuple[int, int, str, int, int, str]]:
        """(phase, seed, point, trial, cell, name) of every run that may be needed, as they go.

        Phase 0 is tuning, 1 confirming. Arms of a seed run close together, so that a slow hour of
        the machine does not hit one of them only. The integers are indices.
        """
        return sorted(
            (phase, seed, repr(cell.settings), number, index, name)
            for index, cell in enumerate(self.cells)
            for number, trial in enumerate(cell.trials)
            for phase, names in enumerate((trial.tuning, trial.confirming))
            for seed, name in enumerate(names)
        )


def expand(spec: Spec, data_dir: Path | None = None) -> Plan:
    """The plan of a spec. ``data_dir`` replaces data.dir: the same images may lie elsewhere.

    Two runs with the same resolved config are one run.
    Raises ConadvError for settings that do not fit together, and for two arms that would share a
    folder.
    """
    base = _base(spec, data_dir)
    runs: dict[str, Run] = {}
    names: dict[str, str] = {}  # by config

    def run(arm: str, point: Settings, trial: Settings, seed: int) -> str:
        made = _run(base, spec, arm, point, trial, seed)
        key = made.config.model_dump_json()
        if key not in names and made.name in runs:
            raise ConadvError(
                f"{arm!r} shares the folder runs/{made.name} with another arm. Rename one."
            )
        name = names.setdefault(key, made.name)
        runs.setdefault(name, made)
        return name

    places = [(arm, point) for arm in spec.arms for point in spec.points(arm)]
    cells = []
    for arm, point in places:
        seeds, chooses = (spec.tuning_seeds(arm), spec.confirm.seeds), spec.source(arm)
        trials = [
            Trial(each, *(tuple(run(arm, point, each, seed) for seed in some) for some in seeds))
            for each in spec.trials(arm, point)
        ]
        source = None if chooses is None else places.index((chooses, point))
        cells.append(Cell(arm, point, tuple(trials), source))
    plan = Plan(spec, tuple(cells), runs)
    for phase, *_, name in plan.order:
        if phase == 0 and runs[name].config.data.validation_images is None:
            raise ConadvError(f"{name}: nothing to choose by. Give data.validation_images.")
    return plan


def _base(spec: Spec, data_dir: Path | None) -> Config:
    """The recipe with the spec's base settings: what every arm starts from."""
    recipe = recipes.get(spec.recipe)
    # the base may set up an attack that only some of the arms use
    given = {name for name in spec.base if not name.startswith("attack.")}
    base = override(recipe, _edited(recipe, spec.base, "base"), given)
    folder = data_dir or base.data.dir
    if folder is not None:
        base = replace(base, data__dir=home(folder).absolute())
    return base


def _run(base: Config, spec: Spec, arm: str, point: Settings, trial: Settings, seed: int) -> Run:
    short = {"global_batch_size": "batch"}
    words = [
        f"{short.get(k, k.rpartition('.')[2].replace('_', ' '))} {_text(v)}"
        for k, v in {**point, **trial}.items()
    ]
    label = ", ".join([arm, *words])
    settings = {**spec.arms[arm].settings, **point, **trial}
    # a grid over an attack's setting may hold for arms without an attack
    given = {name for name in settings if not (name in point and name.startswith("attack."))}
    try:
        edited = _edited(base, {**settings, "seed": seed}, arm)
        config = resolve(override(base, edited, given))
    except ConadvError as error:
        raise ConadvError(f"{label}: {error}") from error
    if config.micro_batch_size == "auto":
        raise ConadvError(
            f"{label}: micro_batch_size auto depends on the machine and changes what batch norm "
            "sees, so runs could not be compared. Give a number."
        )
    return Run(f"{_slug(label)}-seed{seed}", config)


def _edited(base: Config, settings: Settings, where: str) -> Config:
    values = base.model_dump()
    for name, value in settings.items():
        section, _, last = name.rpartition(".")
        place = values.get(section) if section else values
        if not isinstance(place, dict):
            raise ConadvError(f"{where}: {unknown('setting', name, flatten(values))}")
        place[last] = value
    return parse(values, where)


def _text(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text.replace("e+", "e") if isinstance(value, float) else text  # a slug loses the sign


def _slug(label: str) -> str:
    kept = "".join(c if c.isalnum() or c in "._" else " " for c in label.lower())
    return "-".join(kept.split()).strip(".")


def relative_cost(config: Config) -> float:
    """Roughly how long a run takes beside others on the same network: images x gradients.

    The gradient of a view counts 1, an input gradient (forward and half of backward) two thirds.
    A step costs about 60 images' worth of work besides (8x8 images, ResNet-8, one core).
    """
    method, attack = METHODS[config.method], config.attack
    share = attack.share if "share" in method.attack else 1.0
    gradients = 1.0 + (config.data.aug_view is not None) + (config.method == "sam")
    gradients += share if "adv_weight" in method.settings and config.mix != "replace" else 0.0
    gradients += 0.67 * attack.num_steps * share if "num_steps" in method.attack else 0.0
    if config.epochs is not None:
        images = config.epochs * (config.data.train_images or 1000)
    else:
        images = (config.steps or 0) * config.global_batch_size
    return images * gradients * (1 + 60 / config.global_batch_size)
