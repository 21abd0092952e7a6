"""The folder of a sweep: OUT/sweep.json and one ordinary run directory per run below OUT/runs.

What has been done is read from the run directories alone, so a sweep may be killed at any moment.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from conadv.errors import ConadvError, printable
from conadv.safe_io import Document, read_document, refuse_links, write_atomic
from conadv.sweep.cells import Run
from conadv.sweep.choose import Result
from conadv.training.documents import Summary
from conadv.training.lock import Lock
from conadv.training.run_dir import RunDir


class Failed(Document):
    """failed.json of a run: what stopped it."""

    error: str
    diverged: bool = False


@dataclass(frozen=True)
class Folder:
    """OUT of a sweep."""

    out: Path

    def run_dir(self, name: str) -> RunDir:
        return RunDir(self.out / "runs" / name)

    def failed(self, name: str) -> Path:
        return self.run_dir(name).path / "failed.json"

    def lock(self) -> Lock:
        """Two sweeps in one folder would write over each other's runs."""
        self.out.mkdir(parents=True, exist_ok=True)
        busy = f"Another sweep is at work in {printable(self.out)}."
        return Lock(self.out / ".sweep.json.lock", f"{busy} Wait, or choose another --out.")

    def result(self, run: Run) -> Result | None:
        """What ``run`` has come to; None if it has not ended.

        Raises ConadvError where its folder holds a link (it would be written, or read, elsewhere)
        or a run with other settings.
        """
        directory, failed = self.run_dir(run.name), self.failed(run.name)
        refuse_links(directory.path)
        remedy = f"Delete {printable(directory.path)} to run it again."
        if directory.config.is_file() and (changed := directory.changes(run.config)):
            raise ConadvError(
                f"{printable(directory.path)} holds a run with other settings than the spec:\n  "
                + "\n  ".join(changed)
                + "\nChoose another --out for a changed spec, or delete that folder."
            )
        if failed.is_file():
            failure = read_document(Failed, failed, remedy)
            return Result(error=failure.error, diverged=failure.diverged)
        if not (directory.config.is_file() and directory.summary.is_file()):
            return None
        summary = read_document(Summary, directory.summary, remedy)
        seconds = summary.seconds or 0.0
        return Result(summary.validation_accuracy, summary.validation_loss, seconds)

    def fail(self, name: str, error: str, diverged: bool) -> None:
        """Record why a run failed. Checkpoints of a diverged one would lead to the same end."""
        self.run_dir(name).path.mkdir(parents=True, exist_ok=True)
        write_atomic(self.failed(name), json.dumps({"error": error, "diverged": diverged}) + "\n")
        if diverged:
            tidy(self.run_dir(name))


def tidy(run: RunDir) -> None:
    """Keep of a finished run what a reader needs: no checkpoints, nothing about its process."""
    shutil.rmtree(run.checkpoints, ignore_errors=True)
    run.launcher.unlink(missing_ok=True)
