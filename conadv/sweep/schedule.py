"""Which run is next: tuning first, and a cell's confirmation as soon as its choice is made."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from conadv.config.schema import Config
from conadv.sweep.cells import Cell, Plan
from conadv.sweep.choose import Result, choose
from conadv.sweep.folder import Folder
from conadv.sweep.pool import Job, Outcome


@dataclass
class Schedule:
    """A source of jobs for the pool. ``only``: the cells of this shard; ``results``: of all runs that have ended.

    ``deadline``: after it (on ``time.monotonic()``) no run begins. ``changed`` is called after every outcome.
    """

    plan: Plan
    folder: Folder
    only: frozenset[int]
    results: dict[str, Result]
    deadline: float = float("inf")
    changed: Callable[[], None] = lambda: None
    _running: set[str] = field(default_factory=set)
    _choices: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._tuning, self._confirming = (
            self.plan.tuning(self.only),
            self.plan.confirming(self.only),
        )

    def next(self) -> Job | None:
        if time.monotonic() >= self.deadline:
            return None
        name = next(self._ready(), None)
        if name is None:
            return None
        self._running.add(name)
        run = self.plan.runs[name]
        return Job(run.label, run.config, self.folder.path(name))

    def done(self, job: Job, outcome: Outcome) -> None:
        name = job.out.name
        self._running.discard(name)
        if outcome.error is not None:
            self.folder.fail(name, outcome.error, outcome.diverged, outcome.trace)
        result = self.folder.result(self.plan.runs[name])
        assert result is not None, f"{name} ended without a summary"
        self.results[name] = result
        self.changed()

    def choice(self, index: int) -> int | None:
        """The number of the trial that the cell's source chose; None while it has none."""
        source = self.plan.cells[index].source
        if source is None:
            return 0
        if source not in self._choices:
            best = choose(self.trials(self.plan.cells[source]))
            if best is None:
                return None
            self._choices[source] = best
        return self._choices[source]

    def trials(self, cell: Cell) -> list[list[Result | None]]:
        """The result of each of the cell's trials on each tuning seed."""
        return [[self.results.get(name) for name in trial.tuning] for trial in cell.trials]

    def blocked(self, index: int) -> bool:
        """Whether the cell's tuning has ended without a choice."""
        source = self.plan.cells[index].source
        if source is None or self.choice(index) is not None:
            return False
        return all(
            result is not None for runs in self.trials(self.plan.cells[source]) for result in runs
        )

    def waiting(self) -> list[Config]:
        """The configs of all runs to come; of the first trial where the choice is open."""
        return [self.plan.runs[name].config for name in self.names() if self._is_new(name)]

    def names(self) -> list[str]:
        """All runs that this sweep will have made in the end, as far as that is known."""
        names = list(self._tuning)
        for seed, index in self._confirming:
            if not self.blocked(index):
                names.append(
                    self.plan.cells[index].trials[self.choice(index) or 0].confirming[seed]
                )
        return list(dict.fromkeys(names))

    def _ready(self) -> Iterator[str]:
        yield from filter(self._is_new, self._tuning)
        for seed, index in self._confirming:
            chosen = self.choice(index)
            if chosen is not None and self._is_new(
                name := self.plan.cells[index].trials[chosen].confirming[seed]
            ):
                yield name

    def _is_new(self, name: str) -> bool:
        return name not in self.results and name not in self._running
