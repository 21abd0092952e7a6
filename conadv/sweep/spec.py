"""The spec of a sweep: which arms, at which points of a grid, tuned how, confirmed on which seeds.

Plain YAML, checked before anything runs; settings carry their dotted config names. Nothing here imports torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from conadv.config.schema import Config, Section, flatten, read_fraction
from conadv.errors import ConadvError, printable, unknown
from conadv.safe_io import read_yaml

BATCH = "global_batch_size"
Settings = dict[str, Any]
"""Dotted config names and their values."""
Values = Annotated[list[Any], Field(min_length=1)]
Lists = dict[str, Values | dict[Any, Values]]
"""What to try: a list, or a list for each value of the axis."""
MAX_RUNS = 10_000
"""Runs of one sweep: all are planned, named and checked before the first, and a few lines can ask for billions."""


def _different(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(seeds)) < len(seeds):
        raise ValueError("a seed is named twice")
    return seeds


Seeds = Annotated[
    tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1), AfterValidator(_different)
]


class Arm(Section):
    """One line of the comparison: settings beside the base, and a grid or tuning lists in place of the sweep's."""

    settings: Settings = Field(default_factory=dict)
    grid: dict[str, Values] = Field(default_factory=dict)
    tune: Lists | None = None

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        """``{method: noise}`` is short for ``{settings: {method: noise}}``."""
        if value is None:
            return {}
        if isinstance(value, dict) and not value.keys() & cls.model_fields.keys():
            return {"settings": value}
        return value


class Tune(Section):
    """How each arm's settings are chosen at each point of the grid."""

    seeds: Seeds
    settings: Lists
    by: Literal["validation_accuracy"] = "validation_accuracy"
    tune_on: str | None = None
    """Tune this arm only; the others take its choice at the same point (but for those with a ``tune`` of their own)."""


class Confirm(Section):
    """The runs that are reported."""

    seeds: Seeds


class Spec(Section):
    """A sweep; see docs/sweep.md."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$")
    title: str | None = None
    recipe: str
    base: Settings = Field(default_factory=dict)
    arms: dict[str, Arm] = Field(min_length=1)
    baseline: str | None = None
    controls: tuple[str, ...] = ()
    grid: dict[str, Values] = Field(default_factory=dict)
    axis: str = BATCH
    """The setting that figures have on their x axis, and that lists by value go by."""
    tune: Tune | None = None
    confirm: Confirm

    def arm_grid(self, arm: str) -> dict[str, list[Any]]:
        return {**self.grid, **self.arms[arm].grid}

    def points(self, arm: str) -> list[Settings]:
        """The grid values of each of the arm's cells."""
        return product(self.arm_grid(arm))

    def tunes(self, arm: str) -> bool:
        """Whether the arm has trials of its own."""
        if self.tune is None:
            return False
        return self.tune.tune_on in (None, arm) or self.arms[arm].tune is not None

    def trials(self, arm: str, point: Settings) -> list[Settings]:
        """The settings to choose from for ``arm`` at ``point``; one empty choice where nothing is tuned."""
        return product(self._tried(arm, point))

    def num_runs(self, arm: str) -> int:
        """How many runs the arm may need, without making a list of them; above MAX_RUNS at least as many."""
        points = math.prod(map(len, self.arm_grid(arm).values()))
        if points > MAX_RUNS:
            return points
        seeds = len(self.confirm.seeds) + (
            len(self.tune.seeds) if self.tune and self.tunes(arm) else 0
        )
        trials = (
            math.prod(map(len, self._tried(arm, point).values())) for point in self.points(arm)
        )
        return seeds * sum(trials)

    def _tried(self, arm: str, point: Settings) -> dict[str, list[Any]]:
        """What to try of each tuned setting."""
        if self.tune is None:
            return {}
        source = arm if self.tunes(arm) else str(self.tune.tune_on)
        own = self.arms[source].tune
        lists = self.tune.settings if own is None else own
        return {name: self._at(values, name, source, point) for name, values in lists.items()}

    def _at(self, values: Any, name: str, arm: str, point: Settings) -> list[Any]:
        if not isinstance(values, dict):
            return list(values)
        if point.get(self.axis) not in list(
            values
        ):  # a value that is no key at all, such as a list, is not there either
            raise ConadvError(
                f"tune of arm {arm!r}: {name} has no list for {self.axis} {point.get(self.axis)}. "
                f"It has lists for: {', '.join(map(str, values))}."
            )
        return list(values[point[self.axis]])


def product(lists: Mapping[str, Iterable[Any]]) -> list[Settings]:
    """All combinations, the last name fastest; one empty combination of no lists."""
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


def number(value: object) -> float | None:
    """The value of a number or a fraction such as "2/255"; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return None
    try:
        return read_fraction(value) if isinstance(value, str) else float(value)
    except (ValueError, OverflowError):
        return None


def load_spec(path: Path) -> Spec:
    """Read and check a spec; a ConadvError names the file and what is wrong in it."""
    values = read_yaml(path, "spec", number_keys=True)
    if not isinstance(values, dict):
        raise ConadvError(
            f"The spec {printable(path)} is not a mapping. See docs/sweep.md for an example."
        )
    return parse_spec(values, str(path))


def parse_spec(values: dict[str, Any], where: str = "spec") -> Spec:
    """A checked Spec from plain values. Raises ConadvError; whether the settings fit together, cells.expand finds."""
    try:
        spec = Spec.model_validate(values)
    except ValidationError as error:
        raise _explain(error, where) from error
    try:
        _check_arms(spec)
        _check_names(spec)
        _check_seeds(spec)
        _check_size(spec)
        _check_trials(spec)
    except ConadvError as error:
        raise ConadvError(f"{where}: {error}") from error
    return spec


def _explain(error: ValidationError, where: str) -> ConadvError:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        owners: dict[str, type[Section]] = {"arms": Arm, "tune": Tune, "confirm": Confirm}
        owner = owners.get(path[0], Spec) if len(path) > 1 else Spec
        hint = (
            " (an arm's settings go below `settings` beside `grid` and `tune`)"
            if owner is Arm
            else ""
        )
        return ConadvError(
            f"{where}: {'.'.join(path)}: {unknown('key', path[-1], owner.model_fields)}{hint}"
        )
    return ConadvError(f"{where}: {'.'.join(path)}: {first['msg']}.")


def _check_arms(spec: Spec) -> None:
    named = [("baseline", spec.baseline), *(("control", name) for name in spec.controls)]
    named += [("tune_on", spec.tune.tune_on)] if spec.tune else []
    for kind, name in named:
        if name is not None and name not in spec.arms:
            raise unknown(f"{kind} arm", name, spec.arms)
    if spec.tune is None and any(arm.tune is not None for arm in spec.arms.values()):
        raise ConadvError(
            "An arm has a tune, but the sweep has none: the seeds to tune on are missing."
        )
    if spec.grid and spec.axis not in spec.grid:
        raise ConadvError(
            f"axis {spec.axis!r} is not in the grid ({', '.join(spec.grid)}). Name one of these."
        )


def _check_names(spec: Spec) -> None:
    """Every setting exists, and no value has two owners."""
    known = flatten(Config().model_dump()).keys() - {"recipe"}
    tuned = set(spec.tune.settings) if spec.tune else set()
    places = {"base": set(spec.base), "grid": set(spec.grid), "tune.settings": tuned}
    for name, arm in spec.arms.items():
        places |= {f"arms.{name}": set(arm.settings), f"arms.{name}.grid": set(arm.grid)}
        places |= {f"arms.{name}.tune": set(arm.tune or ())}
        if both := set(arm.settings) & set(spec.arm_grid(name)):
            raise ConadvError(
                f"arms.{name}: {min(both)} is in its settings and in its grid. Give it once."
            )
        if both := set(spec.arm_grid(name)) & set(tuned if arm.tune is None else arm.tune):
            raise ConadvError(
                f"arms.{name}: {min(both)} is in the grid and tuned. It can be one of them."
            )
        if both := set(arm.settings) & set(tuned if arm.tune is None else arm.tune):
            raise ConadvError(
                f"arms.{name}: {min(both)} is in its settings and tuned. It can be one of them."
            )
    for place, names in places.items():
        for setting in sorted(names):
            if setting == "seed":
                raise ConadvError(f"{place}: seeds stand below tune.seeds and confirm.seeds.")
            if setting not in known:
                raise ConadvError(f"{place}: {unknown('setting', setting, known)}")


def _check_seeds(spec: Spec) -> None:
    shared = set(spec.tune.seeds if spec.tune else ()) & set(spec.confirm.seeds)
    if shared:
        raise ConadvError(
            f"Seed {min(shared)} is in tune.seeds and in confirm.seeds: a result on the seeds that chose the settings "
            "would be too good. Use other seeds to confirm."
        )


def _check_size(spec: Spec) -> None:
    """Before any combination is made."""
    total = 0
    for arm in spec.arms:
        total += spec.num_runs(arm)
        if total > MAX_RUNS:
            raise ConadvError(
                f"More than {MAX_RUNS:,} runs, up to arm {arm[:80]!r} {total:,}: cells x trials x seeds. "
                "Divide the sweep into several, or try fewer values."
            )


def _check_trials(spec: Spec) -> None:
    """The same number of different trials everywhere: more trials alone would win."""
    counts: dict[int, str] = {}
    for arm in spec.arms:
        for point in spec.points(arm):
            trials = spec.trials(arm, point)
            where = f"arm {arm!r} at {point}" if point else f"arm {arm!r}"
            if len({repr(trial) for trial in trials}) < len(trials):
                raise ConadvError(f"{where}: the same trial stands twice.")
            if spec.tunes(arm):
                counts.setdefault(len(trials), where)
    if len(counts) > 1:
        (few, one), (many, other) = min(counts.items()), max(counts.items())
        raise ConadvError(
            f"Unequal trials: {one} has {few}, {other} has {many}. Give every arm at every point as many, "
            "or the comparison favours the one that tried more."
        )
