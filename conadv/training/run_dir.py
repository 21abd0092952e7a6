"""A run directory: where its files lie, whether a run may go there, and how it is read back."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from conadv import __version__
from conadv.config.files import dump_yaml, load_yaml, parse
from conadv.config.resolve import resolve
from conadv.config.schema import Config, differences, replace
from conadv.errors import ConadvError, printable
from conadv.safe_io import refuse_links, write_atomic
from conadv.training.lock import Lock
from conadv.training.record import read_header


class RunDir:
    """The files of one run (docs/record.md)."""

    def __init__(self, path: Path | str) -> None:
        self.path = path = Path(path)
        self.config = path / "config.yaml"
        self.record = path / "record.jsonl"
        self.summary = path / "summary.json"
        self.checkpoints = path / "checkpoints"
        self.weights = path / "model.safetensors"
        self.program = path / "model.pt2"
        self.onnx = path / "model.onnx"
        self.card = path / "model_card.md"
        self.tensorboard = path / "tensorboard"
        self.wandb = path / "wandb"
        self.timeline = path / "timeline"
        self.analysis = path / "analysis"
        self.analysis_file = path / "analysis.json"
        self.staleness = path / "staleness.png"
        self.launcher = path / ".launcher"
        self.lock = path / ".lock"

    def open(self) -> Config:
        """The run's config. Raises ConadvError if this is not a run directory, or not one of this
        version.
        """
        if not self.config.is_file():
            raise ConadvError(
                f"{printable(self.path)} is not a run directory: it has no config.yaml."
            )
        refuse_links(self.path)
        try:
            return load_yaml(self.config)
        except ConadvError as error:
            raise ConadvError(f"{error}{self._written_by()}") from error

    def check(self, config: Config, *, resume: bool, overwrite: bool) -> None:
        """Raise ConadvError if a run of ``config`` may not go here. Changes nothing."""
        if resume and overwrite:
            raise ConadvError("--resume continues a run, --overwrite deletes it: give one of them.")
        refuse_links(self.path)
        if resume:
            self._check_same(config)
            return
        whole = self.path.absolute()
        existing = next(path for path in (whole, *whole.parents) if path.exists())
        shown = printable(self.path)
        if not existing.is_dir():
            problem = f"{printable(existing)} is a file, not a folder:"
        elif not os.access(existing, os.W_OK):
            problem = f"{printable(existing)} cannot be written to:"
        elif self.config.exists() and not overwrite:
            problem = f"{shown} already holds a run: add --resume or --overwrite, or"
        elif not self.config.exists() and not self._is_empty():
            problem = f"{shown} is not empty and not a run of conadv:"
        else:
            return
        raise ConadvError(f"{problem} choose another --out.")

    def _is_empty(self) -> bool:
        """Whether nothing is here but the lock, and what a killed run had not finished writing."""
        names = [path.name for path in self.path.iterdir()] if self.path.is_dir() else []
        return all(name == ".lock" or (name[0] == "." and name.endswith(".tmp")) for name in names)

    def holds(self, config: Config) -> bool:
        """Whether a run of ``config`` has begun here."""
        return self.config.is_file() and not self.changes(config)

    def alone(self) -> Lock:
        """The lock of the one program that trains here."""
        shown = printable(self.path)
        refusal = (
            f"Another program is training in {shown}. Wait for its end, or choose another --out."
        )
        return Lock(self.lock, refusal)

    def claim(self, config: Config, lock: Lock) -> None:
        """Make the folder of a new run, and lock it if it was not there when ``lock`` was to be
        taken.

        Raises ConadvError if another program has begun a run here since :meth:`check`.
        """
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
        if lock.take():
            self.check(config, resume=False, overwrite=False)

    def start(self, config: Config) -> None:
        """Begin a new run; one that was here is deleted (:meth:`check` has allowed it)."""
        with self._writing():
            self._delete()
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomic(self.config, dump_yaml(config))
            self.mark()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConadvError(
                f"Cannot write the run directory {printable(self.path)}: {error}. Choose another "
                "--out."
            ) from error

    def _delete(self) -> None:
        """Remove what a run wrote, and nothing else."""
        folders = (self.checkpoints, self.tensorboard, self.wandb, self.timeline, self.analysis)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        results = (self.record, self.summary, self.analysis_file, self.staleness, self.weights)
        exports = (self.card, self.program, self.onnx)
        for file in (*results, *exports, self.launcher, self.config):  # the config last: see check
            file.unlink(missing_ok=True)

    def mark(self) -> None:
        """Note which launcher's processes write here from now on."""
        write_atomic(self.launcher, launcher() + "\n")

    def is_of_this_launcher(self) -> bool:
        """Whether the process that started this one also started the last one that wrote here."""
        try:
            return self.launcher.read_bytes().strip() == launcher().encode()
        except OSError:
            return False

    def without_weights(self) -> ConadvError:
        """The error where weights are wanted and there is no checkpoint."""
        return ConadvError(
            f"{printable(self.path)} holds no checkpoint, so there are no weights. A run writes "
            "one when it ends, and every --checkpoint.every-epochs; a sweep keeps those of "
            "finished runs with --keep-checkpoints. Train it again with: conadv train --config "
            "RUN/config.yaml --out RUN --overwrite"
        )

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_atomic(self.summary, json.dumps(summary, indent=2, allow_nan=False) + "\n")

    def changes(self, config: Config) -> list[str]:
        """The settings in which the run here differs from ``config``, but for where the data lies.

        Those of the record's header, which the run began with: config.yaml may have been edited
        since.
        """
        began = read_header(self.record).get("config")
        where = f"the header of {printable(self.record)}"
        return differences(_moved(parse(began, where) if began else self.open(), config), config)

    def _check_same(self, config: Config) -> None:
        self.open()
        if changed := self.changes(config):
            raise ConadvError(
                f"Cannot resume {printable(self.path)} with other settings than those that it "
                "began "
                "with:\n  "
                + "\n  ".join(changed)
                + "\nRepeat the run's own settings (conadv train "
                "--config RUN/config.yaml --out RUN --resume), or start a new run."
            )

    def _written_by(self) -> str:
        """A sentence that names another version which wrote this run; empty if nothing says so."""
        with suppress(ConadvError):
            if (version := read_header(self.record).get("version", __version__)) != __version__:
                return f" Version {printable(version)} of conadv wrote this run."
        return ""


def _moved(config: Config, to: Config) -> Config:
    """``config`` with the data where ``to`` has it: the same data may lie elsewhere now, and be
    there already.

    Whether changed data are accepted is a matter of this start alone.
    Resolved: a config of an earlier version may lack settings that this one has.
    """
    here = {f"data__{name}": getattr(to.data, name) for name in ("dir", "download", "changed")}
    moved: Config = replace(resolve(config), **here)
    return moved


def launcher() -> str:
    """The process that started this one, such as torchrun's agent, told from all others that this
    machine has had.
    """
    parent = os.getppid()
    try:
        stat = Path(f"/proc/{parent}/stat").read_bytes()
        begun = stat.rpartition(b")")[2].split()[19].decode()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (OSError, IndexError):  # not Linux
        begun = boot = "?"
    return f"{parent} {begun} {boot}"
