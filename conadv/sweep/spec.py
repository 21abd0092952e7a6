"""The spec of a sweep: which arms, at which points of a grid, tuned how, confirmed on which seeds.

Plain YAML, checked before anything runs; settings carry their dotted config names. Imports no
torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from conadv.config.schema import Section
from conadv.errors import ConadvError, printable, unknown
from conadv.safe_io import first_problem, read_yaml

MAX_RUNS = 10_000
"""Runs of one sweep. All are planned before the first; a few lines can ask for billions."""
Settings = dict[str, Any]
"""Dotted config names and their values."""


def _different(values: Any) -> Any:
    if len(set(map(repr, values))) < len(values):
        raise ValueError("a value is given twice")
    return values


Values = Annotated[list[Any], Field(min_length=1), AfterValidator(_different)]
Seed = Annotated[int, Field(ge=0)]
Seeds = Annotated[tuple[Seed, ...], Field(min_length=1), AfterValidator(_different)]
Tried = dict[str, Values | dict[Any, Values]]
"""What to try of each setting: a list, or a list for each value of the axis."""


class Arm(Section):
    """One line of the comparison: settings on top of the base; its own grid or tuning lists."""

    settings: Settings = Field({})
    grid: dict[str, Values] = Field({})
    tune: Tried | None = None

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        """``{method: noise}`` is short for ``{settings: {method: noise}}``."""
        if isinstance(value, dict) and not value.keys() & cls.model_fields.keys():
            return {"settings": value}
        return {} if value is None else value


class Tune(Section):
    """How each arm's settings are chosen at each point of the grid.

    ``tune_on``: only this arm has trials. The other arms take its choice at the same point, unless
    they have a ``tune`` of their own.
    """

    seeds: Seeds
    settings: Tried
    by: Literal["validation_accuracy"] = "validation_accuracy"
    tune_on: str | None = None


class Confirm(Section):
    """The runs that are reported."""

    seeds: Seeds


class Spec(Section):
    """A sweep; see docs/sweep.md. ``axis``: the setting on the x axis of the figures."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$")
    title: str | None = None
    recipe: str
    base: Settings = Field({})
    arms: dict[str, Arm] = Field(min_length=1)
    baseline: str | None = None
    controls: tuple[str, ...] = ()
    grid: dict[str, Values] = Field({})
    axis: str = "global_batch_size"
    tune: Tune | None = None
    confirm: Confirm

    @model_validator(mode="after")
    def _check(self) -> Spec:
        problems = (self._bad_arms, self._bad_settings, self._bad_trials)
        for problem in itertools.chain.from_iterable(find() for find in problems):
            raise ConadvError(problem)
        return self

    def points(self, arm: str) -> Iterator[Settings]:
        """The grid values of each of the arm's cells."""
        return _product({**self.grid, **self.arms[arm].grid})

    def source(self, arm: str) -> str | None:
        """The arm whose trials choose the settings of ``arm``; None where nothing is tuned."""
        if self.tune is None:
            return None
        shared = self.tune.tune_on is not None and self.arms[arm].tune is None
        return self.tune.tune_on if shared else arm

    def tuning_seeds(self, arm: str) -> Seeds:
        """Those of the arm's own trials; empty where it has none."""
        return self.tune.seeds if self.tune and self.source(arm) == arm else ()

    def trials(self, arm: str, point: Settings) -> Iterator[Settings]:
        """What ``arm`` chooses from at ``point``; one empty choice where nothing is tuned."""
        return _product(self._tried(arm, point))

    def _tried(self, arm: str, point: Settings) -> dict[str, list[Any]]:
        where, found = point.get(self.axis), {}
        for name, values in self._tuned(self.source(arm) or arm).items():
            lists = values.items() if isinstance(values, dict) else [(where, values)]
            if not (own := [listed for key, listed in lists if key == where]):
                raise ConadvError(f"tune: {name} has no list for {self.axis} {where}. Give one.")
            found[name] = own[0]
        return found

    def _tuned(self, arm: str) -> Tried:
        """The lists of an arm, by value of the axis."""
        own = self.arms[arm].tune
        return own if own is not None else self.tune.settings if self.tune else {}

    def _bad_arms(self) -> Iterator[str]:
        named = [("baseline", self.baseline), *(("control", name) for name in self.controls)]
        named += [("tune_on", self.tune.tune_on)] if self.tune else []
        for kind, name in named:
            if name is not None and name not in self.arms:
                yield str(unknown(f"{kind} arm", name, self.arms))
        if self.tune is None and any(arm.tune is not None for arm in self.arms.values()):
            yield "An arm has a tune but the sweep has none. Give tune.seeds."
        if self.grid and self.axis not in self.grid:
            yield f"axis {self.axis!r} is not in the grid. Name one of {[*self.grid]}."
        # results on the seeds that chose the settings are too good
        for seed in set(self.tune.seeds if self.tune else ()) & set(self.confirm.seeds):
            yield f"Seed {seed} is in tune.seeds and in confirm.seeds. Confirm on other seeds."

    def _bad_settings(self) -> Iterator[str]:
        """Each setting is given in one place. Whether it exists, cells.expand finds."""
        for name, arm in self.arms.items():
            grid = {**self.grid, **arm.grid}
            places = {"settings": arm.settings, "grid": grid, "tune": self._tuned(name)}
            for (first, left), (second, right) in itertools.combinations(places.items(), 2):
                for both in left.keys() & right.keys():
                    yield f"arms.{name}: {both} is in {first} and in {second}. Give it once."
            for values in (self.base, *places.values()):
                for reserved in values.keys() & {"seed", "recipe"}:
                    yield (
                        f"{reserved} cannot be a setting. Give tune.seeds, confirm.seeds, and the "
                        "recipe at the top."
                    )

    def _bad_trials(self) -> Iterator[str]:
        """Not too many runs, and equally many trials everywhere: more trials alone would win."""
        runs, counts = 0, dict[int, str]()
        for arm in self.arms:
            tuning = len(self.tuning_seeds(arm))
            for point in self.points(arm):
                source = self.source(arm) or arm
                if source != arm and point not in self.points(source):
                    yield f"arm {arm!r} at {point}: {source!r} of tune_on has no cell there."
                trials = math.prod(map(len, self._tried(arm, point).values()))
                runs += trials * (tuning + len(self.confirm.seeds))
                if runs > MAX_RUNS:
                    yield f"More than {MAX_RUNS:,} runs (cells x trials x seeds). Divide the sweep."
                if tuning:
                    counts.setdefault(trials, f"arm {arm!r} at {point}")
        if len(counts) > 1:
            (few, one), (many, other) = min(counts.items()), max(counts.items())
            yield f"Unequal trials: {one} has {few}, {other} has {many}. Give all arms as many."


def _product(lists: Mapping[str, Sequence[Any]]) -> Iterator[Settings]:
    """All combinations, the last name fastest; one empty combination of no lists."""
    for values in itertools.product(*lists.values()):
        yield dict(zip(lists, values, strict=True))


def load_spec(path: Path) -> Spec:
    """Read and check a spec. Raises ConadvError that names the file and the wrong entry."""
    return parse_spec(read_yaml(path, "spec", number_keys=True), printable(path))


def parse_spec(values: Any, where: str = "spec") -> Spec:
    """A checked Spec from plain values; cells.expand checks that the settings fit together."""
    try:
        return Spec.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "extra_forbidden":
            keys = [key for kind in (Spec, Arm, Tune, Confirm) for key in kind.model_fields]
            raise ConadvError(f"{where}: {unknown('key', str(first['loc'][-1]), keys)}") from error
        raise ConadvError(f"{where}: {first_problem(error)}") from error
