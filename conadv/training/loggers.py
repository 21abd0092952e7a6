"""TensorBoard and Weights & Biases: the numbers of the record under the same names, at the same steps."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from conadv.errors import ConadvError, install
from conadv.training.observer import Observer
from conadv.types import StepRecord


class _Logger(Observer, ABC):
    """Sends scalars to :meth:`log`; the base of both loggers, which open their files only when the run starts."""

    @abstractmethod
    def log(self, values: dict[str, float], step: int) -> None:
        """Send the numbers of one step."""

    def step(self, record: StepRecord) -> None:
        values = {"loss": record.loss, "lr": record.lr, "grad_norm": record.grad_norm}
        values |= {f"losses/{name}": value for name, value in record.losses.items()}
        if record.staleness is not None:
            values["staleness"] = record.staleness
        phases = {f"seconds/{name}": value for name, value in record.phases.items()}
        self.log({f"train/{name}": value for name, value in values.items()} | phases, record.step)

    def evaluation(self, step: int, split: str, loss: float, accuracy: float) -> None:
        group = "train_eval" if split == "train" else split  # "train/loss" is the loss of a step
        self.log({f"{group}/loss": loss, f"{group}/accuracy": accuracy}, step)


class TensorBoard(_Logger):
    """Event files in ``folder``. Raises ConadvError without the extra."""

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
        self._writer = self._open()

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WandB(_Logger):
    """Offline files in ``folder``, which ``wandb sync`` sends when its user wants that; only WANDB_MODE changes this.

    A resumed run begins a new file, from the step that it goes on with. Raises ConadvError without the extra.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConadvError(f"--wandb needs the extra: {install('wandb')}.") from error
        self._wandb, self._folder, self._config = wandb, folder, config
        self._run: Any = None

    def start(self, title: str, first_step: int, num_steps: int) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        # no links: those of a run directory are refused; no source, no console: the record has what is needed
        settings = self._wandb.Settings(
            symlink=False, console="off", silent=True, save_code=False, disable_git=True
        )
        self._run = self._wandb.init(
            project="conadv",
            name=title,
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
