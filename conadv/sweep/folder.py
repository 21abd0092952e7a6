"""The folder of a sweep: OUT/sweep.json and one ordinary run directory per run below OUT/runs.

What has been done is read from the run directories alone, so that a sweep may be killed at any moment, and copied.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conadv.documents import Summary, checked
from conadv.errors import ConadvError, printable
from conadv.safe_io import JSON_BYTES, parse_json, read_text, refuse_links
from conadv.sweep.cells import Run
from conadv.sweep.choose import Result
from conadv.training.record import write_atomic
from conadv.training.run_dir import RunDir

try:
    import fcntl
except ImportError:  # not a POSIX system: nobody watches over two sweeps in one folder
    fcntl = None  # type: ignore[assignment]

SWEEP = "sweep.json"
_FAILED = "failed.json"


class Folder:
    """OUT of a sweep."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def path(self, name: str) -> Path:
        return self.out / "runs" / name

    def check(self) -> None:
        """Raise ConadvError for a link in OUT: its runs would be written, or read, elsewhere. OUT itself may be one."""
        refuse_links(self.out)

    def relative(self, name: str) -> str:
        """As sweep.json writes it."""
        return f"runs/{name}"

    def result(self, run: Run) -> Result | None:
        """What ``run`` came to; None if it has not ended. Raises ConadvError where its folder holds another run."""
        directory = RunDir(self.path(run.name))
        refuse_links(directory.path)
        if directory.config.is_file() and (changed := directory.changes(run.config)):
            raise ConadvError(
                f"{printable(directory.path)} holds a run with other settings than the spec gives it:\n  "
                + "\n  ".join(changed)
                + "\nGive a changed spec another --out, or delete that folder."
            )
        if (directory.path / _FAILED).is_file():
            failure = _read(directory.path / _FAILED)
            return Result(error=str(failure.get("error")), diverged=bool(failure.get("diverged")))
        if not (directory.config.is_file() and directory.summary.is_file()):
            return None
        summary = checked(
            Summary, _read(directory.summary), directory.summary, _remedy(directory.path)
        )
        return Result(summary.validation_accuracy, summary.validation_loss, summary.seconds or 0.0)

    def fail(self, name: str, error: str, diverged: bool, trace: str = "") -> None:
        """Record why a run failed. ``trace``: the traceback of an error that conadv does not know, beside it.

        The checkpoints of a diverged run go: they lead to the same end.
        """
        self.path(name).mkdir(parents=True, exist_ok=True)
        content = {
            "error": error,
            "diverged": diverged,
            **({"traceback": trace.splitlines()} if trace else {}),
        }
        write_atomic(self.path(name) / _FAILED, json.dumps(content, indent=1) + "\n")
        if diverged:
            tidy(self.path(name))

    def forget_failure(self, name: str) -> None:
        """So that the run is tried again, from its newest checkpoint where it has one."""
        (self.path(name) / _FAILED).unlink(missing_ok=True)

    def write(self, file: str, document: dict[str, Any]) -> None:
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            write_atomic(self.out / file, json.dumps(document, indent=1, allow_nan=False) + "\n")
        except OSError as error:
            raise ConadvError(
                f"Cannot write {printable(self.out / file)}: {error}. Choose another --out."
            ) from error

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """One sweep at a time: two would write over each other's runs. The system lifts the lock of a killed one."""
        if fcntl is None:
            yield
            return
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            # no link is followed and nothing is cut off: the folder may be somebody else's
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
            file = os.fdopen(os.open(self.out / f".{name}.lock", flags, 0o666), "rb+", buffering=0)
        except OSError as error:
            raise ConadvError(
                f"Cannot write to {printable(self.out)}: {error}. Choose another --out."
            ) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ConadvError(
                    f"Another sweep is at work in {printable(self.out)}. Wait for it, choose another --out, or share "
                    "the work by "
                    "--shard."
                ) from error
            yield


def clean(path: Path) -> None:
    """Make the folder of a run that is to start from nothing ready: a kill may have left half-written hidden files."""
    if path.is_dir() and not RunDir(path).config.exists():
        for file in path.glob(".*"):
            file.unlink()


def tidy(path: Path) -> None:
    """Keep of a finished run what a reader needs: no checkpoints, nothing about the process that made it."""
    shutil.rmtree(RunDir(path).checkpoints, ignore_errors=True)
    RunDir(path).launcher.unlink(missing_ok=True)


def _remedy(run: Path) -> str:
    return f"Delete {run} to run it again."


def _read(path: Path) -> dict[str, Any]:
    try:
        values = parse_json(read_text(path, JSON_BYTES))
    except (OSError, ValueError) as error:
        raise ConadvError(
            f"Cannot read {printable(path)}: {error}. {_remedy(path.parent)}"
        ) from error
    if not isinstance(values, dict):
        raise ConadvError(f"{printable(path)} is not a mapping. {_remedy(path.parent)}")
    return values
