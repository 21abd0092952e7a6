"""TensorBoard and Weights & Biases: the numbers of the record under the same names, at the same
steps.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conadv.errors import ConadvError, install
from conadv.training.observer import Observer
from conadv.training.record import read_lines
from conadv.types import StepRecord


class _Logger(Observer, ABC):
    """Sends scalars to :meth:`log`; the base of both loggers.

    What a killed run has logged may lack its last minutes, or have steps that a resumed run takes
    again. So a resume begins the log anew, and writes into it what the record has: every step once.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @abstractmethod
    def open(self, title: str) -> None:
        """Begin the log."""

    @abstractmethod
    def log(self, values: dict[str, float], step: int) -> None:
        """Send the numbers of one step."""

    @abstractmethod
    def clear(self) -> None:
        """Remove what the run has logged before."""

    def start(self, title: str, first_step: int, num_steps: int) -> None:
        if first_step:
            self.clear()
        self.open(title)

    def earlier(self, record: Path) -> None:
        for line in read_lines(record):
            if line["type"] == "step":
                self._log_step(line)
            elif line["type"] == "eval":
                self._log_evaluation(line)

    def step(self, record: StepRecord) -> None:
        self._log_step({**asdict(record), "staleness": record.staleness})

    def evaluation(self, step: int, split: str, loss: float, accuracy: float) -> None:
        self._log_evaluation({"step": step, "split": split, "loss": loss, "accuracy": accuracy})

    def _log_step(self, line: Mapping[str, Any]) -> None:
        names = ("loss", "lr", "grad_norm", "staleness")
        values = {f"train/{name}": line.get(name) for name in names}
        values |= {f"train/losses/{name}": value for name, value in line["losses"].items()}
        values |= {f"seconds/{name}": value for name, value in line["phases"].items()}
        self._send(values, line["step"])

    def _log_evaluation(self, line: Mapping[str, Any]) -> None:
        split = line.get("split")
        group = "train_eval" if split == "train" else split  # "train/loss" is the loss of a step
        self._send(
            {f"{group}/{name}": line.get(name) for name in ("loss", "accuracy")}, line["step"]
        )

    def _send(self, values: Mapping[str, Any], step: int) -> None:
        """Numbers only: a record has null for those that were not finite."""
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        self.log(numbers, step)


class TensorBoard(_Logger):
    """Event files in ``folder``. Raises ConadvError without the extra."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConadvError(
                f"--tensorboard needs the extra: {install('tensorboard')}."
            ) from error
        super().__init__(folder)
        self._make = SummaryWriter
        self._writer: Any = None

    def clear(self) -> None:
        for file in self._folder.glob("events.out.tfevents.*"):
            file.unlink()

    def open(self, title: str) -> None:
        self._writer = self._make(str(self._folder))

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WandB(_Logger):
    """Offline files in ``folder``, which ``wandb sync`` sends when its user wants that; only
    WANDB_MODE changes this.

    A resumed run keeps its id: a server that has some of its steps already takes only those that
    follow. Raises ConadvError without the extra.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConadvError(f"--wandb needs the extra: {install('wandb')}.") from error
        super().__init__(folder)
        self._wandb, self._config = wandb, config
        self._run: Any = None
        self._id = ""

    def start(self, title: str, first_step: int, num_steps: int) -> None:
        kept = ""
        with suppress(OSError, UnicodeDecodeError):
            kept = (self._folder / "id").read_text()
        known = first_step and re.fullmatch(r"[0-9a-f]{8}", kept)
        self._id = kept if known else secrets.token_hex(4)
        super().start(title, first_step, num_steps)

    def clear(self) -> None:
        shutil.rmtree(self._folder / "wandb", ignore_errors=True)  # wandb's own name for its files

    def open(self, title: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / "id").write_text(self._id)
        # no links: those of a run directory are refused; no source, no console: the record has what
        # is needed
        settings = self._wandb.Settings(
            symlink=False, console="off", silent=True, save_code=False, disable_git=True
        )
        self._run = self._wandb.init(
            project="conadv",
            name=title,
            id=self._id,
            resume="allow",
            dir=str(self._folder),
            config=self._config,
            mode=os.environ.get("WANDB_MODE", "offline"),
            settings=settings,
        )

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def finish(self) -> None:
        if self._run is not None:
            self._run.finish()
