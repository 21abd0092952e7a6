"""The choice among trials: on the validation images of the tuning seeds, and on nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from conadv.sweep.spec import Settings, number


@dataclass(frozen=True)
class Result:
    """What a sweep needs to know of a run that has ended. Accuracies in [0, 1].

    ``error``: what stopped it, None for a finished run. ``diverged``: it stopped by a loss or gradient that was not
    finite. ``seconds``: how long its steps took.
    """

    validation_accuracy: float | None = None
    validation_loss: float | None = None
    seconds: float = 0.0
    error: str | None = None
    diverged: bool = False


def choose(trials: Sequence[Sequence[Result | None]]) -> int | None:
    """Which trial is best: the highest mean validation accuracy over its runs; a trial with a diverged run is worst.

    ``trials[i]``: trial i's result on each tuning seed. Among equal means the lower mean validation loss decides (150
    images tell few accuracies apart), then the earlier trial. None while a run is missing, where a run failed by
    anything else than divergence (then the comparison would not be fair), and where every trial diverged.
    """
    if not all(
        result is not None and (result.error is None or result.diverged)
        for runs in trials
        for result in runs
    ):
        return None
    best = max(range(len(trials)), key=lambda index: (score(trials[index]), -index))
    return None if score(trials[best])[0] == -1.0 else best


def score(runs: Sequence[Result | None]) -> tuple[float, float]:
    """(mean validation accuracy, minus mean validation loss), (-1, 0) for what did not finish on every seed."""
    accuracies = [run.validation_accuracy if run else None for run in runs]
    losses = [run.validation_loss if run else None for run in runs]
    if any(value is None for value in accuracies + losses):
        return -1.0, 0.0
    return mean(value for value in accuracies if value is not None), -mean(
        v for v in losses if v is not None
    )


def at_edge(trials: Sequence[Settings], chosen: Mapping[str, Any]) -> list[str]:
    """Names of the settings whose best value is the smallest or largest number tried: the optimum may lie outside.

    A setting with fewer than three numbers has nothing but edges, and is never named: see :func:`only_edges`.
    """
    numbers = {name: numbers_tried(trials, name) for name in chosen}
    return [
        name
        for name, tried in numbers.items()
        if len(tried) > 2 and number(chosen[name]) in (min(tried), max(tried))
    ]


def only_edges(trials: Sequence[Settings]) -> list[str]:
    """Names of the settings of which two numbers were tried: the choice is at an edge whatever it is."""
    names = dict.fromkeys(name for trial in trials for name in trial)
    return [name for name in names if len(numbers_tried(trials, name)) == 2]


def numbers_tried(trials: Sequence[Settings], name: str) -> set[float]:
    """The numbers tried of one setting; empty where something else was tried too."""
    tried = [number(trial.get(name)) for trial in trials]
    return set() if None in tried else {value for value in tried if value is not None}
