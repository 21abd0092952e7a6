"""What a run shows while it goes: live on a terminal, plain lines elsewhere, TensorBoard, or nothing."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from conadv.errors import ConadvError, install, printable, printable_lines
from conadv.types import StepRecord

_GROUPS = {"train": "train_eval"}  # "train/loss" is the loss of a step


class Observer(Protocol):
    """Hears of everything that a run does, in order. Observers only show; they never change what is computed.

    ``evaluation``: ``split`` is one of the record's, "train", "test", "robust" or "validation".
    """

    def message(self, text: str) -> None: ...
    def loading(self, what: str, done: int, total: int) -> None: ...
    def start(self, title: str, first_step: int, num_steps: int) -> None: ...
    def step(self, record: StepRecord) -> None: ...
    def evaluation(self, step: int, split: str, loss: float, accuracy: float) -> None: ...
    def finish(self) -> None: ...


class Silent:
    """Shows nothing; the base of the other observers."""

    def message(self, text: str) -> None: ...

    def loading(self, what: str, done: int, total: int) -> None: ...

    def start(self, title: str, first_step: int, num_steps: int) -> None: ...

    def step(self, record: StepRecord) -> None: ...

    def evaluation(self, step: int, split: str, loss: float, accuracy: float) -> None: ...

    def finish(self) -> None: ...


class Plain(Silent):
    """Lines of text, at most one every ``every`` seconds besides evaluations: for files and job logs."""

    def __init__(self, every: float = 10.0) -> None:
        self._every = every
        self._next = 0.0
        self._begin = 0.0
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
            f"step {done}/{self._total}  epoch {record.epoch}  loss {record.loss:.4f}  lr {record.lr:.4g}  "
            f"left {left:.0f} s"
        )

    def evaluation(self, step: int, split: str, loss: float, accuracy: float) -> None:
        self.message(
            f"step {step}/{self._total}  {split} loss {loss:.4f}  {split} accuracy {100 * accuracy:.2f} %"
        )


class Live(Silent):
    """A progress bar with loss, test accuracy and time left."""

    def __init__(self) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )
        from rich.progress import TimeRemainingColumn as Left

        self._bar = Progress(
            TextColumn(
                "{task.description}", style="bold", markup=False
            ),  # a recipe's name may hold brackets
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            Left(),
            TextColumn("loss {task.fields[loss]}  test {task.fields[test]}"),
            refresh_per_second=1,  # a refresh holds the interpreter for some milliseconds, which the steps would feel
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


class TensorBoard(Silent):
    """Scalars under the names of the record."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConadvError(
                f"--tensorboard needs the extra: {install('tensorboard')}."
            ) from error
        self._open = lambda: SummaryWriter(str(folder))
        self._writer: Any = None

    def start(self, title: str, first_step: int, num_steps: int) -> None:
        self._writer = self._open()  # not before the run has its folder

    def step(self, record: StepRecord) -> None:
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record.step)

    def evaluation(self, step: int, split: str, loss: float, accuracy: float) -> None:
        for name, value in evaluation_scalars(split, loss, accuracy).items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WandB(Silent):
    """Scalars in Weights & Biases, under the same names as in TensorBoard; a step is a step of the record.

    Offline: everything lies in ``folder``, and ``wandb sync`` sends it when its user wants that. Only the environment
    variable WANDB_MODE changes this. A resumed run begins a new file, from the step that it goes on with.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConadvError(f"--wandb needs the extra: {install('wandb')}.") from error
        self._wandb, self._folder, self._config = wandb, folder, config
        self._run: Any = None

    def start(self, title: str, first_step: int, num_steps: int) -> None:
        """Not before the run has its folder."""
        wandb = self._wandb
        self._folder.mkdir(parents=True, exist_ok=True)
        mode = os.environ.get("WANDB_MODE", "offline")
        # no links: those of a run directory are refused; no source, no console: the record has what is needed
        settings = wandb.Settings(
            symlink=False, console="off", silent=True, save_code=False, disable_git=True
        )
        self._run = wandb.init(
            project="conadv",
            name=title,
            dir=str(self._folder),
            config=self._config,
            mode=mode,
            settings=settings,
        )

    def step(self, record: StepRecord) -> None:
        self._run.log(scalars(record), step=record.step)

    def evaluation(self, step: int, split: str, loss: float, accuracy: float) -> None:
        self._run.log(evaluation_scalars(split, loss, accuracy), step=step)

    def finish(self) -> None:
        if self._run is not None:
            self._run.finish()


def scalars(record: StepRecord) -> dict[str, float]:
    """A step's numbers by the record's names, below "train/" and "seconds/": for loggers of other makers."""
    values = {"train/loss": record.loss, "train/lr": record.lr, "train/grad_norm": record.grad_norm}
    values |= {f"train/losses/{name}": value for name, value in record.losses.items()}
    values |= {f"seconds/{name}": value for name, value in record.phases.items()}
    if record.staleness is not None:
        values["train/staleness"] = record.staleness
    return values


def evaluation_scalars(split: str, loss: float, accuracy: float) -> dict[str, float]:
    return {
        f"{_GROUPS.get(split, split)}/loss": loss,
        f"{_GROUPS.get(split, split)}/accuracy": accuracy,
    }


class Guarded(Silent):
    """An observer that may fail: a closed pipe or a full disk under its output never ends a run.

    After its first OSError it hears of nothing any more, and stderr says so. What the program prints at the end still
    fails, when everything is saved.
    """

    def __init__(self, observer: Observer) -> None:
        self._observer: Observer | None = observer

    def _try(self, call: Callable[[Observer], None]) -> None:
        if self._observer is None:
            return
        try:
            call(self._observer)
        except OSError as error:
            self._observer = None
            with suppress(OSError):
                sys.stderr.write(
                    f"conadv: progress is not shown any more ({error}); training goes on.\n"
                )

    def message(self, text: str) -> None:
        self._try(lambda observer: observer.message(text))

    def loading(self, what: str, done: int, total: int) -> None:
        self._try(lambda observer: observer.loading(what, done, total))

    def start(self, title: str, first_step: int, num_steps: int) -> None:
        self._try(lambda observer: observer.start(title, first_step, num_steps))

    def step(self, record: StepRecord) -> None:
        self._try(lambda observer: observer.step(record))

    def evaluation(self, step: int, split: str, loss: float, accuracy: float) -> None:
        self._try(lambda observer: observer.evaluation(step, split, loss, accuracy))

    def finish(self) -> None:
        self._try(lambda observer: observer.finish())


class Together(Silent):
    """Several observers as one; one that fails is left out from then on."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = [Guarded(observer) for observer in observers]

    def message(self, text: str) -> None:
        for observer in self._observers:
            observer.message(text)

    def loading(self, what: str, done: int, total: int) -> None:
        for observer in self._observers:
            observer.loading(what, done, total)

    def start(self, title: str, first_step: int, num_steps: int) -> None:
        for observer in self._observers:
            observer.start(title, first_step, num_steps)

    def step(self, record: StepRecord) -> None:
        for observer in self._observers:
            observer.step(record)

    def evaluation(self, step: int, split: str, loss: float, accuracy: float) -> None:
        for observer in self._observers:
            observer.evaluation(step, split, loss, accuracy)

    def finish(self) -> None:
        for observer in self._observers:
            observer.finish()


def for_terminal(quiet: bool) -> Observer:
    """Live on a terminal, plain lines elsewhere, nothing when quiet."""
    if quiet:
        return Silent()
    return Live() if sys.stdout.isatty() else Plain()
