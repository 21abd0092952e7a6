"""Which run is next: tuning first, and a cell's confirmation as soon as its choice is made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import conadv
from conadv.config.schema import flatten
from conadv.safe_io import refuse_links, write_atomic
from conadv.sweep.cells import Cell, Plan, Run
from conadv.sweep.choose import Result, at_edge, choose
from conadv.sweep.folder import Folder
from conadv.sweep.spec import Settings


@dataclass
class Schedule:
    """What has been done and what is next; sweep.json is rewritten after every run.

    ``results``: of all runs that have ended, by name. ``spec_file``: its name in sweep.json.
    """

    plan: Plan
    folder: Folder
    spec_file: str
    results: dict[str, Result] = field(default_factory=dict)
    _started: set[str] = field(default_factory=set)

    def load(self, forget_failed: bool = False) -> None:
        """Read what has been done from the folder; ``forget_failed``: to be tried again."""
        refuse_links(self.folder.out)
        for name, run in self.plan.runs.items():
            result = self.folder.result(run) if self.folder.run_dir(name).path.is_dir() else None
            if forget_failed and result is not None and result.error is not None:
                self.folder.failed(name).unlink()
            elif result is not None:
                self.results[name] = result

    def next(self) -> Run | None:
        for name in self._names(guess=False):
            if name not in self.results and name not in self._started:
                self._started.add(name)
                return self.plan.runs[name]
        return None

    def done(self, run: Run, result: Result) -> None:
        """Take in the result of a run that the pool has made."""
        if result.error is not None:
            self.folder.fail(run.name, result.error, result.diverged)
        elif (found := self.folder.result(run)) is not None:
            result = replace(found, seconds=result.seconds)
        self.results[run.name] = result
        self.save()

    def save(self) -> None:
        text = json.dumps(self.document(), indent=1, allow_nan=False) + "\n"
        write_atomic(self.folder.out / "sweep.json", text)

    def runs(self) -> list[Run]:
        """All runs that the sweep will make, by the first trial where none is chosen yet."""
        return [self.plan.runs[name] for name in dict.fromkeys(self._names(guess=True))]

    def choice(self, index: int) -> int | None:
        """The number of the trial chosen for the cell; None before the choice."""
        source = self.plan.cells[index].source
        return 0 if source is None else choose(self._trials(source))

    def blocked(self, index: int) -> bool:
        """Whether the tuning of the cell has ended without a choice."""
        source = self.plan.cells[index].source
        if source is None or self.choice(index) is not None:
            return False
        return all(result is not None for runs in self._trials(source) for result in runs)

    def _trials(self, source: int) -> list[list[Result | None]]:
        trials = self.plan.cells[source].trials
        return [[self.results.get(name) for name in trial.tuning] for trial in trials]

    def _names(self, guess: bool) -> Iterator[str]:
        """Tuning runs, then the confirmation runs of chosen trials; ``guess``: of open ones too."""
        choices = [self.choice(index) for index in range(len(self.plan.cells))]
        for index, choice in enumerate(choices):
            if choice is None and guess and not self.blocked(index):
                choices[index] = 0
        for phase, _, _, trial, index, name in self.plan.order:
            if phase == 0 or trial == choices[index]:
                yield name

    def document(self) -> dict[str, Any]:
        """The content of sweep.json (docs/sweep.md): what was planned, tried, chosen and done."""
        spec = self.plan.spec
        ended = {name: self.results[name] for name in self.plan.runs if name in self.results}
        return {
            "version": conadv.__version__,
            "name": spec.name,
            "spec": spec.model_dump(mode="json"),
            "spec_path": self.spec_file,
            "baseline": spec.baseline,
            "controls": list(spec.controls),
            "axis": spec.axis,
            "cells": [self._cell(index, cell) for index, cell in enumerate(self.plan.cells)],
            "failed": [
                # without a traceback
                {"run": f"runs/{n}", "error": r.error.split("\n")[0], "diverged": r.diverged}
                for n, r in ended.items()
                if r.error is not None
            ],
        }

    def _cell(self, index: int, cell: Cell) -> dict[str, Any]:
        tried = [self._plain(trial.confirming[0], trial.settings) for trial in cell.trials]
        chosen = self.choice(index)
        best = {} if chosen is None else tried[chosen]
        runs = () if chosen is None else cell.trials[chosen].confirming
        own = zip(tried, cell.trials, strict=True) if cell.source == index else ()
        return {
            "arm": cell.arm,
            "settings": self._plain(cell.trials[0].confirming[0], cell.settings),
            "trials": [self._trial(settings, trial.tuning) for settings, trial in own],
            "tuned_on": None if cell.source is None else self.plan.cells[cell.source].arm,
            "chosen": best,
            "at_edge": at_edge(tried, best),
            "runs": [f"runs/{name}" for name in runs],
            "seeds": list(self.plan.spec.confirm.seeds),
        }

    def _trial(self, settings: Settings, runs: tuple[str, ...]) -> dict[str, Any]:
        results = [self.results.get(name, Result()) for name in runs]
        validation = [result.validation_accuracy for result in results]
        known = [value for value in validation if value is not None]
        return {
            "settings": settings,
            "runs": [f"runs/{name}" for name in runs],
            "validation": validation,
            "mean": sum(known) / len(known) if len(known) == len(validation) else None,
            "validation_loss": [result.validation_loss for result in results],
        }

    def _plain(self, run: str, settings: Settings) -> Settings:
        """The settings with the values that the config of ``run`` has: 0.0078 for "2/255"."""
        flat = flatten(self.plan.runs[run].config.model_dump(mode="json"))
        return {name: flat[name] for name in settings}


Progress = Mapping[str, tuple[float, float]]
"""(share done, seconds) of runs under way."""


def forecast(
    runs: list[Run], results: Mapping[str, Result], going: Progress, workers: int
) -> tuple[float, float | None]:
    """(share that is done, seconds left), by the costs of ``runs`` and the speed so far.

    No speed is known before a run has advanced; a failed one tells none.
    """
    known = {name: (1.0, result.seconds) for name, result in results.items()}
    told = {name for name in known if results[name].error is None} | going.keys()
    known |= going
    left = [run.cost * (1 - known.get(run.name, (0.0, 0.0))[0]) for run in runs]
    cost = sum(run.cost * known[run.name][0] for run in runs if run.name in told)
    seconds = sum(known[run.name][1] for run in runs if run.name in told)
    work = max(sum(left) / workers, max(left))
    return 1 - sum(left) / sum(run.cost for run in runs), work * seconds / cost if cost else None
