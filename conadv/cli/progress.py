"""How a run shows itself: live on a terminal, plain lines elsewhere, or not at all."""

from __future__ import annotations

import sys
import time
from typing import Any

from conadv.errors import printable, printable_lines
from conadv.training.observer import Observer
from conadv.types import StepRecord


class Plain(Observer):
    """Lines of text, at most one every ``every`` seconds besides evaluations: for files and job
    logs.
    """

    def __init__(self, every: float = 10.0) -> None:
        self._every = every
        self._next = self._begin = 0.0
        self._first = self._total = 0

    def message(self, text: str) -> None:
        sys.stdout.write(printable_lines(text) + "\n")
        sys.stdout.flush()

    def loading(self, what: str, done: int, total: int) -> None:
        if done == total:
            self.message(f"{what}: {total} images")

    def start(self, title: str, first_step: int, num_steps: int) -> None:
        self._first, self._total, self._begin = first_step, num_steps, time.monotonic()
        self.message(f"{title}: steps {first_step} to {num_steps}")

    def step(self, record: StepRecord) -> None:
        now = time.monotonic()
        done = record.step + 1
        if now < self._next and done < self._total:
            return
        self._next = now + self._every
        left = (now - self._begin) / max(done - self._first, 1) * (self._total - done)
        self.message(
            f"step {done}/{self._total}  epoch {record.epoch}  loss {record.loss:.4f}  "
            f"lr {record.lr:.4g}  left {left:.0f} s"
        )

    def evaluation(self, step: int, split: str, loss: float, accuracy: float) -> None:
        values = f"{split} loss {loss:.4f}  {split} accuracy {100 * accuracy:.2f} %"
        self.message(f"step {step}/{self._total}  {values}")


class Live(Observer):
    """A progress bar with loss, test accuracy and time left."""

    def __init__(self) -> None:
        from rich import progress, table

        name = table.Column(ratio=1, no_wrap=True, overflow="ellipsis")  # cut, so that no number is
        self._bar = progress.Progress(
            # a recipe's name may hold brackets
            progress.TextColumn("{task.description}", "bold", markup=False, table_column=name),
            progress.BarColumn(10),
            progress.MofNCompleteColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
            progress.TextColumn("loss {task.fields[loss]}  test {task.fields[test]}"),
            refresh_per_second=1,  # a refresh holds the interpreter for some milliseconds
            expand=True,
        )
        self._task: Any = None
        self._loading: dict[str, Any] = {}

    def loading(self, what: str, done: int, total: int) -> None:
        if what not in self._loading:
            self._loading[what] = self._bar.add_task(what, total=total, loss="-", test="-")
            self._bar.start()
        self._bar.update(self._loading[what], completed=done, visible=done < total)

    def message(self, text: str) -> None:
        self._bar.console.print(printable_lines(text), markup=False, highlight=False)

    def start(self, title: str, first_step: int, num_steps: int) -> None:
        self._task = self._bar.add_task(
            printable(title), total=num_steps, completed=first_step, loss="-", test="-"
        )
        self._bar.start()

    def step(self, record: StepRecord) -> None:
        self._bar.update(self._task, advance=1, loss=f"{record.loss:.3f}")

    def evaluation(self, step: int, split: str, loss: float, accuracy: float) -> None:
        if split == "test":
            self._bar.update(self._task, test=f"{100 * accuracy:.2f} %")

    def finish(self) -> None:
        self._bar.stop()


def for_terminal(quiet: bool) -> Observer:
    """Live on a terminal, plain lines elsewhere, nothing when quiet."""
    if quiet:
        return Observer()
    return Live() if sys.stdout.isatty() else Plain()
