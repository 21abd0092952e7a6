"""What a pool of runs shows while it goes: bars with the time left on a terminal, a line per run elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from conadv.config.schema import Config
from conadv.errors import printable
from conadv.sweep.estimate import Estimate


@dataclass
class Going:
    """A run that has begun."""

    label: str
    config: Config
    begin: float
    share: float = 0.0


@dataclass
class Workload:
    """How much there is. ``waiting`` gives the configs of the runs that have not begun, as far as they are known.

    ``done``: runs that have ended, whenever that was, and ``seconds`` what they took together.
    """

    waiting: Callable[[], list[Config]]
    workers: int
    estimate: Estimate = field(default_factory=Estimate)
    done: int = 0
    seconds: float = 0.0
    going: dict[int, Going] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Runs in all."""
        return self.done + len(self.going) + len(self.waiting())

    def left(self) -> float:
        """Seconds until all are done."""
        return self.estimate.left(
            self.waiting(), ((run.config, run.share) for run in self.going.values()), self.workers
        )

    def share(self) -> float:
        """Of the whole work that is done, by time."""
        going = sum(self.estimate.seconds(run.config) * run.share for run in self.going.values())
        rest = sum(
            self.estimate.seconds(run.config) * (1 - run.share) for run in self.going.values()
        )
        waiting = sum(map(self.estimate.seconds, self.waiting()))
        done = self.seconds + going
        return done / (done + rest + waiting) if done + rest + waiting else 1.0


class Display:
    """Keeps count, and shows nothing: the base of the others."""

    def __init__(self, work: Workload) -> None:
        self.work = work

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None: ...

    def started(self, number: int, label: str, config: Config) -> None:
        self.work.going[number] = Going(label, config, time.monotonic())

    def advance(self, shares: dict[int, float]) -> None:
        for number, share in shares.items():
            if run := self.work.going.get(number):
                run.share = share
                self.work.estimate.going(run.config, share, time.monotonic() - run.begin)

    def finished(self, number: int, seconds: float, error: str | None) -> None:
        run = self.work.going.pop(number)
        self.work.done += 1
        self.work.seconds += seconds
        if error is None:
            self.work.estimate.finished(run.config, seconds)
        self.ended(run, seconds, error)

    def ended(self, run: Going, seconds: float, error: str | None) -> None: ...


class Lines(Display):
    """One line per finished run, for output that is no terminal."""

    def ended(self, run: Going, seconds: float, error: str | None) -> None:
        work = self.work
        known = (
            work.estimate.known and work.done < work.total
        )  # a run that failed at once tells nothing
        left = f", about {duration(work.left())} left" if known else ""
        how = f"failed: {error.splitlines()[0]}" if error else f"{seconds:.1f} s"
        sys.stdout.write(printable(f"[{work.done}/{work.total}] {run.label}: {how}{left}") + "\n")
        sys.stdout.flush()


class Bars(Display):
    """A bar for everything with the time left, and one for each run that is going."""

    def __enter__(self) -> Bars:
        from rich.progress import (
            BarColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
        )
        self._bars = Progress(*columns, TextColumn("{task.fields[left]}"))
        self._all = self._bars.add_task("", total=1.0, left="")
        self._tasks: dict[int, Any] = {}
        self._bars.start()
        self._update()
        return self

    def __exit__(self, *_: object) -> None:
        self._update()
        self._bars.stop()

    def advance(self, shares: dict[int, float]) -> None:
        super().advance(shares)
        for number, share in shares.items():
            if number in self._tasks:
                self._bars.update(self._tasks[number], completed=share)
        self._update()

    def started(self, number: int, label: str, config: Config) -> None:
        super().started(number, label, config)
        self._tasks[number] = self._bars.add_task(f"  {_plain(label)}", total=1.0, left="")

    def ended(self, run: Going, seconds: float, error: str | None) -> None:
        for number in self._tasks.keys() - self.work.going.keys():
            self._bars.remove_task(self._tasks.pop(number))
        if error:
            self._bars.console.print(
                printable(f"{run.label}: failed: {error.splitlines()[0]}"),
                markup=False,
                highlight=False,
            )
        self._update()

    def _update(self) -> None:
        work = self.work
        left = (
            f"left {duration(work.left())}"
            if work.estimate.known and work.done < work.total
            else ""
        )
        self._bars.update(
            self._all,
            description=f"[bold]{work.done} of {work.total} runs",
            completed=work.share(),
            left=left,
        )


def for_terminal(work: Workload, quiet: bool) -> Display:
    """Bars on a terminal, lines elsewhere, nothing when quiet."""
    if quiet:
        return Display(work)
    return Bars(work) if sys.stdout.isatty() else Lines(work)


def duration(seconds: float) -> str:
    """e.g. 45 s, 12 min, 3 h 05 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _plain(text: str) -> str:
    return text.replace("[", "\\[")
