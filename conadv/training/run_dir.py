"""A run directory: where things lie, how it starts, and how it is read back."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conadv.config.schema import Config, differences, dump_yaml, load_yaml, parse, replace
from conadv.errors import ConadvError, printable
from conadv.safe_io import refuse_links
from conadv.training.lock import Lock
from conadv.training.record import read_lines, write_atomic


@dataclass(frozen=True)
class RunDir:
    """The files of one run (see docs/record.md)."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def record(self) -> Path:
        return self.path / "record.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def weights(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def program(self) -> Path:
        return self.path / "model.pt2"

    @property
    def onnx(self) -> Path:
        return self.path / "model.onnx"

    @property
    def card(self) -> Path:
        return self.path / "model_card.md"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def wandb(self) -> Path:
        return self.path / "wandb"

    @property
    def launcher(self) -> Path:
        return self.path / ".launcher"

    @property
    def lock(self) -> Path:
        return self.path / ".lock"

    @property
    def timeline(self) -> Path:
        return self.path / "timeline"

    @property
    def analysis(self) -> Path:
        return self.path / "analysis"

    @property
    def analysis_file(self) -> Path:
        return self.path / "analysis.json"

    @property
    def staleness(self) -> Path:
        return self.path / "staleness.png"

    def open(self) -> Config:
        """The run's config; ConadvError if this is no run directory."""
        if not self.config.is_file():
            raise ConadvError(
                f"{printable(self.path)} is not a run directory: it has no config.yaml."
            )
        refuse_links(self.path)
        return load_yaml(self.config)

    def check(self, config: Config, *, resume: bool, overwrite: bool) -> None:
        """Raise ConadvError if a run of ``config`` may not go here. Changes nothing."""
        if resume and overwrite:
            raise ConadvError("--resume continues a run, --overwrite deletes it: give one of them.")
        refuse_links(self.path)
        if resume:
            self._check_same(config)
        elif not (existing := self._nearest_parent()).is_dir():
            raise ConadvError(
                f"{printable(existing)} is a file, not a folder. Choose another --out."
            )
        elif not os.access(existing, os.W_OK):
            raise ConadvError(f"{printable(existing)} cannot be written to. Choose another --out.")
        elif self.config.exists() and not overwrite:
            raise ConadvError(
                f"{printable(self.path)} already holds a run. Add --resume or --overwrite, or choose another --out."
            )
        elif (
            not self.config.exists()
            and self.path.is_dir()
            and any(map(_is_not_ours, self.path.iterdir()))
        ):
            raise ConadvError(
                f"{printable(self.path)} is not empty and not a run of conadv. Choose another --out."
            )

    def holds(self, config: Config) -> bool:
        """Whether a run of ``config`` has begun here."""
        return self.config.is_file() and not self.changes(config)

    def alone(self) -> Lock:
        """What a program that trains here holds, so that it is the only one."""
        return Lock(
            self.lock,
            f"Another program is training in {self.path}. Wait for its end, or choose another --out.",
        )

    def claim(self, config: Config, lock: Lock) -> None:
        """Make the folder for a new run, and lock it now if it was not there when others were locked out.

        Raises ConadvError if another program has begun a run here since ``check``.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConadvError(
                f"Cannot write the run directory {printable(self.path)}: {error}. Choose another --out."
            ) from error
        if lock.take():
            self.check(config, resume=False, overwrite=False)

    def start(self, config: Config) -> None:
        """Begin a new run; a run that was there is deleted (``check`` has allowed it)."""
        try:
            self._delete()
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomic(self.config, dump_yaml(config))
            self.mark()
        except OSError as error:
            raise ConadvError(
                f"Cannot write the run directory {printable(self.path)}: {error}. Choose another --out."
            ) from error

    def mark(self) -> None:
        """Note which launcher's processes write here from now on."""
        write_atomic(self.launcher, launcher() + "\n")

    def is_of_this_launcher(self) -> bool:
        """Whether the process that started this one had also started the one that wrote here last."""
        try:
            return self.launcher.read_bytes().strip() == launcher().encode()
        except OSError:
            return False

    def without_weights(self) -> ConadvError:
        """What to say where weights are wanted and there is no checkpoint."""
        return ConadvError(
            f"{printable(self.path)} holds no checkpoint, so there are no weights. A run writes one when it ends, and "
            "every --checkpoint.every-epochs; a sweep keeps those of finished runs with --keep-checkpoints. Train it "
            "again with: conadv train --config RUN/config.yaml --out RUN --overwrite"
        )

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_atomic(self.summary, json.dumps(summary, indent=2, allow_nan=False) + "\n")

    def _nearest_parent(self) -> Path:
        """The run directory, or the nearest folder above it that exists."""
        return next(
            folder
            for folder in (self.path.absolute(), *self.path.absolute().parents)
            if folder.exists()
        )

    def _check_same(self, config: Config) -> None:
        if changed := self.changes(config):
            raise ConadvError(
                f"Cannot resume {printable(self.path)} with another config:\n  "
                + "\n  ".join(changed)
                + "\n"
                "Repeat the run's own settings (conadv train --config RUN/config.yaml --out RUN --resume), "
                "or start a new run."
            )

    def check_header(self, config: Config) -> None:
        """Raise ConadvError if the record began with other settings: somebody has changed config.yaml since."""
        header = next(line for line in read_lines(self.record) if line["type"] == "header")
        began = replace(
            parse(header.get("config") or {}, f"the header of {printable(self.record)}"),
            data__dir=config.data.dir,
            data__download=config.data.download,
        )
        if changed := differences(began, config):
            raise ConadvError(
                f"Cannot resume {printable(self.path)}: its config.yaml is not the one that the run began with:\n  "
                + "\n  ".join(changed)
                + "\nBring back these settings, or start a new run."
            )

    def changes(self, config: Config) -> list[str]:
        """The settings in which the run here differs from ``config``, but for where the data lies."""
        # the same data may lie elsewhere now, and be there already
        moved = replace(self.open(), data__dir=config.data.dir, data__download=config.data.download)
        return differences(moved, config)

    def _delete(self) -> None:
        """Remove what a run wrote, and nothing else."""
        for folder in (
            self.checkpoints,
            self.tensorboard,
            self.wandb,
            self.timeline,
            self.analysis,
        ):
            shutil.rmtree(folder, ignore_errors=True)
        results = (
            self.analysis_file,
            self.staleness,
            self.weights,
            self.card,
            self.program,
            self.onnx,
        )
        for file in (self.record, self.summary, *results, self.launcher, self.config):
            file.unlink(missing_ok=True)


def _is_not_ours(path: Path) -> bool:
    """Whether a file is anything but one that a killed run had not finished to write, or its lock."""
    return path.name != ".lock" and not (path.name.startswith(".") and path.name.endswith(".tmp"))


def launcher() -> str:
    """The process that started this one, such as torchrun's agent, told from all others that this machine has had."""
    parent = os.getppid()
    try:
        begun = (
            Path(f"/proc/{parent}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
        )
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except (OSError, IndexError):  # not Linux
        begun = boot = "?"
    return f"{parent} {begun} {boot}"
