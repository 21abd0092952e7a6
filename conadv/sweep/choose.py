"""The choice among trials: by the validation images of the tuning seeds, and by nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any


@dataclass(frozen=True)
class Result:
    """What a sweep needs to know of a run that has ended. Accuracies in [0, 1].

    ``seconds``: by the clock, or of its steps where it ended in an earlier sweep. ``error``: what
    stopped it (a traceback follows if that was unexpected), None for a finished run. ``diverged``:
    a loss or gradient that was not finite stopped it.
    """

    validation_accuracy: float | None = None
    validation_loss: float | None = None
    seconds: float = 0.0
    error: str | None = None
    diverged: bool = False


_WORST = (-1.0, 0.0)


def choose(trials: Sequence[Sequence[Result | None]]) -> int | None:
    """The index of the best trial. ``trials[i]``: trial i's result on each tuning seed.

    The highest mean validation accuracy wins. Few images tell few accuracies apart, so the lower
    mean validation loss breaks ties, then the earlier trial. A diverged run makes its trial the
    worst. None while a run is missing, after a failure of another kind (the comparison would be
    unfair), and where every trial diverged.
    """
    for result in (result for runs in trials for result in runs):
        if result is None or (result.error is not None and not result.diverged):
            return None
    scores = [_score(runs) for runs in trials]
    best = scores.index(max(scores))
    return None if scores[best] == _WORST else best


def _score(runs: Sequence[Result | None]) -> tuple[float, float]:
    """(mean validation accuracy, minus mean validation loss)."""
    accuracies = [run.validation_accuracy for run in runs if run]
    losses = [run.validation_loss for run in runs if run]
    if None in accuracies or None in losses:
        return _WORST
    return mean(a for a in accuracies if a is not None), -mean(v for v in losses if v is not None)


def at_edge(trials: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any]) -> list[str]:
    """Settings whose chosen value is the smallest or largest tried: the optimum may lie outside.

    A setting with fewer than three numbers has nothing but edges: see :func:`only_edges`.
    """
    tried = {name: _numbers(trials, name) for name in chosen}
    return [
        name
        for name, found in tried.items()
        if len(found) > 2 and chosen[name] in (min(found), max(found))
    ]


def only_edges(trials: Sequence[Mapping[str, Any]]) -> list[str]:
    """Settings of which two numbers were tried, so that the choice is always at an edge."""
    names = dict.fromkeys(name for trial in trials for name in trial)
    return [name for name in names if len(_numbers(trials, name)) == 2]


def _numbers(trials: Sequence[Mapping[str, Any]], name: str) -> set[float]:
    """The numbers tried of one setting; empty where something else was tried too."""
    tried = [trial.get(name) for trial in trials]
    numbers = [v for v in tried if isinstance(v, (int, float)) and not isinstance(v, bool)]
    return set(numbers) if len(numbers) == len(tried) else set()
