"""sweep.json: what was planned, tried, chosen and done, for the report and for people (docs/sweep.md)."""

from __future__ import annotations

from typing import Any

from conadv import __version__
from conadv.config.schema import flatten
from conadv.sweep.cells import Cell, Plan
from conadv.sweep.choose import Result, at_edge
from conadv.sweep.folder import Folder
from conadv.sweep.schedule import Schedule
from conadv.sweep.spec import Settings

_Values = dict[str, Any]


def document(schedule: Schedule, spec_path: str) -> _Values:
    """The content of sweep.json: a pure function of the spec and the runs' results."""
    plan = schedule.plan
    made = list(dict.fromkeys(name for cell in plan.cells for name in _all_runs(cell)))
    return {
        "version": __version__,
        "name": plan.spec.name,
        "spec": plan.spec.model_dump(mode="json"),
        "spec_path": spec_path,
        "baseline": plan.spec.baseline,
        "controls": list(plan.spec.controls),
        "axis": plan.spec.axis,
        "cells": [_cell(schedule, index) for index in range(len(plan.cells))],
        "failed": [
            {
                "run": schedule.folder.relative(name),
                "error": result.error,
                "diverged": result.diverged,
            }
            for name in made
            if (result := schedule.results.get(name)) is not None and result.error is not None
        ],
    }


def _all_runs(cell: Cell) -> list[str]:
    return [name for trial in cell.trials for name in trial.tuning + trial.confirming]


def _cell(schedule: Schedule, index: int) -> _Values:
    plan, cell = schedule.plan, schedule.plan.cells[index]
    chosen = schedule.choice(index)
    trial = None if chosen is None else cell.trials[chosen]
    own = cell.source == index
    return {
        "arm": cell.arm,
        "settings": _plain(plan, cell, 0, cell.settings),
        "trials": [_trial(schedule, cell, number) for number in range(len(cell.trials))]
        if own
        else [],
        "tuned_on": None if cell.source is None else plan.cells[cell.source].arm,
        "chosen": {}
        if chosen is None or trial is None
        else _plain(plan, cell, chosen, trial.settings),
        "at_edge": []
        if trial is None
        else at_edge([each.settings for each in cell.trials], trial.settings),
        "runs": []
        if trial is None
        else [schedule.folder.relative(name) for name in trial.confirming],
        "seeds": list(plan.spec.confirm.seeds),
    }


def _trial(schedule: Schedule, cell: Cell, number: int) -> _Values:
    trial = cell.trials[number]
    results = [schedule.results.get(name) for name in trial.tuning]
    validation = [result.validation_accuracy if result else None for result in results]
    return {
        "settings": _plain(schedule.plan, cell, number, trial.settings),
        "runs": [schedule.folder.relative(name) for name in trial.tuning],
        "validation": validation,
        "mean": _mean(validation),
        "validation_loss": [result.validation_loss if result else None for result in results],
    }


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _plain(plan: Plan, cell: Cell, trial: int, settings: Settings) -> Settings:
    """The settings with the values that the config has: 0.0078 for "2/255"."""
    config = plan.runs[cell.trials[trial].confirming[0]].config
    flat = flatten(config.model_dump(mode="json"))
    return {name: flat[name] for name in settings}


def load_results(plan: Plan, folder: Folder) -> dict[str, Result]:
    """What every run of the plan has come to so far, whichever shard made it."""
    found = {
        name: folder.result(run) for name, run in plan.runs.items() if folder.path(name).is_dir()
    }
    return {name: result for name, result in found.items() if result is not None}
