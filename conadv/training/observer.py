"""Those who watch a run: what they are told, and several of them as one."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # types imports torch, which no help text needs
    from conadv.types import StepRecord


class Observer:
    """Is told everything that a run does, in order; this one shows nothing.

    Observers only show; they never change what is computed. ``split`` is one of the record's:
    "train", "test", "robust" or "validation".
    """

    def message(self, text: str) -> None: ...

    def loading(self, what: str, done: int, total: int) -> None: ...

    def start(self, title: str, first_step: int, num_steps: int) -> None: ...

    def earlier(self, record: Path) -> None:
        """After the start of a resumed run: its record so far."""

    def step(self, record: StepRecord) -> None: ...

    def evaluation(self, step: int, split: str, loss: float, accuracy: float) -> None: ...

    def finish(self) -> None: ...


class Guarded(Observer):
    """Observers that may fail: a closed pipe or a full disk under their output never ends a run.

    After its first OSError an observer is told nothing more, and stderr says so. What the program
    prints at the end still fails, when everything is saved.
    """

    def __init__(self, *observers: Observer) -> None:
        self._observers = list(observers)

    def _tell(self, name: str, *values: object) -> None:
        for observer in list(self._observers):
            try:
                getattr(observer, name)(*values)
            except OSError as error:
                self._observers.remove(observer)
                with suppress(OSError):
                    sys.stderr.write(
                        f"conadv: progress is no longer shown ({error}); training goes on.\n"
                    )

    def message(self, text: str) -> None:
        self._tell("message", text)

    def loading(self, what: str, done: int, total: int) -> None:
        self._tell("loading", what, done, total)

    def start(self, title: str, first_step: int, num_steps: int) -> None:
        self._tell("start", title, first_step, num_steps)

    def earlier(self, record: Path) -> None:
        self._tell("earlier", record)

    def step(self, record: StepRecord) -> None:
        self._tell("step", record)

    def evaluation(self, step: int, split: str, loss: float, accuracy: float) -> None:
        self._tell("evaluation", step, split, loss, accuracy)

    def finish(self) -> None:
        self._tell("finish")
