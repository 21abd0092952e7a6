"""The record of a run, record.jsonl: one JSON object per line, appended as the run goes."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from conadv import safe_io
from conadv.errors import ConadvError, printable
from conadv.safe_io import write_atomic
from conadv.training.documents import NEEDED, RecordLine

BESIDE = ("network", "transfer")
"""Spans of the network, which run beside a process's own phases."""


class Record:
    """Appends to ``record.jsonl``, each line in one piece: a reader sees whole steps while the run
    goes on.

    Without a path nothing is written: the record of a rank other than the first.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file = None if path is None else path.open("ab", buffering=0)

    def write(self, kind: str, **values: Any) -> None:
        """Append one line of type ``kind``. Values must be finite: the record is standard JSON.

        Raises ConadvError, and leaves the record as it was, where there is no space for the line.
        """
        if self._file is None:
            return
        line = (json.dumps({"type": kind, **values}, allow_nan=False) + "\n").encode()
        end = self._file.seek(0, os.SEEK_END)
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError(f"only {written} of {len(line)} bytes could be written")
        except OSError as error:
            self._file.truncate(end)  # half a line would make the lines after it unreadable
            raise ConadvError(
                f"Cannot write the record {printable(self._path)}: {error}. Free some space, and "
                "go on with --resume."
            ) from error

    def sync(self) -> None:
        """Force what was written to disk. Raises ConadvError if that fails."""
        if self._file is None:
            return
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise ConadvError(
                f"Cannot write the record {printable(self._path)}: {error}."
            ) from error

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a record; a last line that a killed run left unfinished is dropped.

    Raises ConadvError that names the first line without a ``type``, or with fields that are not
    those of its type.
    """
    return list(_read(path))


def read_header(path: Path) -> dict[str, Any]:
    """The first line of a record, which says how the run began; empty where there is none."""
    first = next(_read(path), {}) if path.is_file() else {}
    return first if first.get("type") == "header" else {}


def _read(path: Path) -> Iterator[dict[str, Any]]:
    try:
        for number, raw in safe_io.read_lines(path):
            try:
                yield _parsed(raw)
            except ValueError as error:
                if raw.endswith(b"\n"):
                    raise ConadvError(
                        f"{printable(path)}, line {number} is not JSON of a record: "
                        f"{printable(error)[:300]}"
                    ) from error
    except OSError as error:
        raise ConadvError(f"Cannot read the record {printable(path)}: {error}") from error


def _parsed(raw: bytes) -> dict[str, Any]:
    """One line. Raises ValueError."""
    line = safe_io.parse_json(raw.decode("utf-8"))
    if not isinstance(line, dict) or not isinstance(line.get("type"), str):
        raise ValueError("not an object with a type")
    kind = line["type"]
    if kind in NEEDED:
        if missing := [name for name in NEEDED[kind] if name not in line]:
            raise ValueError(f"in {kind} {missing[0]} is missing")
        try:
            RecordLine.model_validate(line)
        except ValidationError as error:
            raise ValueError(f"in {kind} {safe_io.first_problem(error)}") from error
    return line


def check_steps(lines: list[dict[str, Any]], path: Path, step: int) -> None:
    """Raise ConadvError unless a run can go on at ``step`` from these lines of the record ``path``.

    It needs the header, and each step before once.
    """
    whole = (
        line for line in lines if line["type"] == "step" and {"phases", "losses"} <= line.keys()
    )
    seen = Counter(line["step"] for line in whole)
    problems = [] if any(line["type"] == "header" for line in lines) else ["it has no header"]
    if missing := [n for n in range(step) if not seen[n]]:
        problems.append(f"it lacks step(s) {', '.join(map(str, missing[:5]))}")
    if extra := [n for n, count in seen.items() if n < step and (count > 1 or n < 0)]:
        problems.append(f"it has more than one line of step(s) {', '.join(map(str, extra[:5]))}")
    if problems:
        raise ConadvError(
            f"Cannot resume at step {step} with the record {printable(path)}: "
            f"{'; '.join(problems)}. "
            "Bring back the record of this run, or start the run again in another folder."
        )


def finite(value: float) -> float | None:
    """``value`` as a record can hold it: null for what is infinite or NaN."""
    return value if math.isfinite(value) else None


def truncate(path: Path, lines: list[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    """Drop what a run that is resumed at ``step`` writes again, and return the lines that stay.

    Dropped are steps from ``step`` on, later evaluations and the final one. Atomic.
    """
    # after a change of data a run has other steps than its header says
    planned = [
        line["steps"] for line in lines if line["type"] in ("header", "resume") and "steps" in line
    ]
    last = planned[-1] if planned else 0
    newest = dict.fromkeys(("step", "probe", "resume", "timeline", "bad_image"), step - 1)
    newest |= {"eval": min(step, last - 1), "stop": step, "attack_loss": step, "error": -1}
    kept = [
        line for line in lines if line["type"] not in newest or line["step"] <= newest[line["type"]]
    ]
    write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept))
    return kept
