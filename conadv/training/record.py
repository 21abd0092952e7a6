"""The record of a run: one JSON object per line, appended as the run goes."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from conadv import __version__, safe_io
from conadv.errors import ConadvError, printable

BESIDE = ("network", "transfer")
"""Spans of the network, which run beside a process's own phases."""


class Record:
    """Appends to ``record.jsonl``, each line in one piece: a reader sees whole steps while the run goes on.

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
                f"Cannot write the record {printable(self._path)}: {error}. Free some space, and go on with --resume."
            ) from error

    def sync(self) -> None:
        """Have what was written on disk, and not only on its way there. Raises ConadvError if that fails."""
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

    Raises ConadvError, naming the line, for what is not JSON with a ``type`` and with the fields that it needs.
    """
    lines = []
    try:
        for number, raw in safe_io.read_lines(path):
            try:
                lines.append(_checked(safe_io.parse_json(raw.decode("utf-8"))))
            except ValueError as error:  # UnicodeDecodeError is one
                if raw.endswith(b"\n"):
                    problem = printable(error)[:300]
                    raise ConadvError(
                        f"{printable(path)}, line {number} is not JSON of a record: {problem}"
                    ) from error
    except OSError as error:
        raise ConadvError(f"Cannot read the record {printable(path)}: {error}") from error
    return lines


_COUNTED = (
    "step",
    "eval",
    "resume",
    "timeline",
    "bad_image",
    "attack_loss",
    "error",
    "probe",
    "stop",
)
_LARGEST = 2**53
"""Whole numbers up to here are numbers in every reader."""


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _number(value: object) -> bool:
    return isinstance(value, float) or _whole(value)


def _number_or_null(value: object) -> bool:
    return value is None or _number(value)


def _text(value: object) -> bool:
    return isinstance(value, str)


def _numbers(value: object) -> bool:
    return isinstance(value, dict) and all(map(_number, value.values()))


def _numbers_or_nulls(value: object) -> bool:
    return isinstance(value, dict) and all(map(_number_or_null, value.values()))


_FIELDS: dict[str, dict[str, Callable[[object], bool]]] = {
    "header": {"steps": _whole},
    "step": {
        "phases": _numbers,
        "losses": _numbers_or_nulls,
        "seconds": _number,
        "loss": _number_or_null,
    },
    "eval": {
        "split": _text,
        "loss": _number_or_null,
        "accuracy": _number_or_null,
        "images": _whole,
    },
    "timeline": {"rank": _whole, "role": _text},
    "bad_image": {"path": _text, "reason": _text},
    "attack_loss": {"rank": _whole, "attack_rank": _whole, "reason": _text},
    "error": {"message": _text},
}
"""What fields are, where a line has them."""
_NEEDED = {"bad_image": ("path",)}


def _checked(line: Any) -> dict[str, Any]:
    """ValueError for a line that no reader could use."""
    if not isinstance(line, dict) or not isinstance(line.get("type"), str):
        raise ValueError("no object with a type")
    kind = line["type"]
    if kind in _COUNTED and not _whole(line.get("step")):
        raise ValueError(f"{kind} without a whole number as step")
    for name, fits in _FIELDS.get(kind, {}).items():
        if (name in line or name in _NEEDED.get(kind, ())) and not fits(line.get(name)):
            raise ValueError(f"{kind} with {name} = {str(line.get(name))[:60]}")
    return line


def check_steps(path: Path, step: int) -> None:
    """Raise ConadvError unless a record has its header and each step before ``step`` once: a run goes on from that."""
    lines = read_lines(path)
    seen = Counter(
        line["step"]
        for line in lines
        if line["type"] == "step" and {"phases", "losses"} <= line.keys()
    )
    problems = [] if any(line["type"] == "header" for line in lines) else ["it has no header"]
    if missing := [n for n in range(step) if not seen[n]]:
        problems.append(f"it lacks {_listed(missing)}")
    if extra := sorted(n for n, count in seen.items() if n < step and (count > 1 or n < 0)):
        problems.append(f"it has more than one line of {_listed(extra)}")
    if problems:
        raise ConadvError(
            f"Cannot resume at step {step} with the record {printable(path)}: {'; '.join(problems)}. Bring back the "
            "record of this run, or start the run again in another folder."
        )


def _listed(steps: list[int]) -> str:
    """The first few of some steps."""
    return f"step(s) {', '.join(map(str, steps[:5]))}" + (
        f" and {len(steps) - 5} more" if len(steps) > 5 else ""
    )


def finite(value: float) -> float | None:
    """``value`` as a record can hold it: null for what is infinite or NaN."""
    return value if math.isfinite(value) else None


def truncate(path: Path, step: int) -> None:
    """Drop what a resumed run will write again: steps from ``step`` on, later evaluations, the final one. Atomic."""
    lines = read_lines(path)
    last = max((line.get("steps", 0) for line in lines if line["type"] == "header"), default=0)

    def stays(line: dict[str, Any]) -> bool:
        limit = dict.fromkeys(("step", "probe", "resume", "timeline", "bad_image"), step - 1)
        limit |= {"eval": min(step, last - 1), "stop": step, "attack_loss": step, "error": -1}
        return line["type"] not in limit or line["step"] <= limit[line["type"]]

    kept = [json.dumps(line) + "\n" for line in lines if stays(line)]
    write_atomic(path, "".join(kept))


def write_atomic(path: Path, text: str) -> None:
    """Replace a file as a whole: a reader or a crash sees the old or the new content, never half of it.

    What UTF-8 cannot hold (bytes of an odd file name) is written as escapes.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(
        missing_ok=True
    )  # of a run that was killed, or a link that would lead elsewhere
    with temporary.open("x", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def versions() -> dict[str, str]:
    """What ran: Python and the packages that decide numbers."""
    found = {"python": platform.python_version(), "conadv": __version__}
    for package in ("torch", "torchvision", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def machine(device: str, threads: int) -> dict[str, Any]:
    """Where it ran: enough to judge a timing, nothing that names a host or user."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "device": device,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def git_state() -> dict[str, Any] | None:
    """Commit and dirty flag of the source tree that this package runs from; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *args], capture_output=True, text=True, timeout=10
        ).stdout

    try:
        return {
            "commit": git("rev-parse", "HEAD").strip(),
            "dirty": bool(git("status", "--porcelain").strip()),
        }
    except (OSError, subprocess.TimeoutExpired):
        return None


def now() -> str:
    """UTC time in ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
