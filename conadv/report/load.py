"""Read run directories (docs/record.md) as they are: finished, still going, or killed in the middle of a line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from conadv import documents
from conadv.config.schema import flatten
from conadv.errors import ConadvError, printable
from conadv.safe_io import JSON_BYTES, parse_json, read_text, read_yaml, refuse_links
from conadv.training.record import read_lines

RECORD, CONFIG, SUMMARY = "record.jsonl", "config.yaml", "summary.json"

Column = npt.NDArray[np.float64]
Columns = dict[str, Column]
Line = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run directory.

    ``steps`` and ``evals`` (test split) hold one float64 array per field, nested fields with dotted names such as
    ``losses.clean`` and ``phases.attack``; NaN where a line has null or lacks the field. ``summary`` is None for a
    run that is not finished; ``stopped_by`` is the message of the error that ended it, if the record has one.
    ``problems`` says in words what could not be read. ``label`` is the folder's name. ``probes`` are the lines of the
    staleness probe as they are.
    """

    path: Path
    config: Line
    header: Line
    steps: Columns
    evals: Columns
    resumed_at: tuple[int, ...]
    summary: Line | None
    label: str
    stopped_by: str | None = None
    problems: tuple[str, ...] = ()
    probes: tuple[Line, ...] = ()

    @property
    def finished(self) -> bool:
        return self.summary is not None

    @property
    def seed(self) -> int:
        return int(self.config.get("seed", 0))

    @property
    def ranks(self) -> int:
        return int((self.summary or {}).get("ranks") or self.header.get("ranks") or 1)

    @property
    def started(self) -> str:
        """ISO 8601 in UTC, so that text order is time order; empty where the header is missing."""
        return str(self.header.get("time") or "")

    @property
    def steps_done(self) -> int:
        return int(self.steps["step"][-1]) + 1 if "step" in self.steps else 0

    def nested(self, prefix: str) -> Columns:
        """The columns of one nested field, e.g. ``nested("phases")`` -> {"data": ..., "attack": ...}."""
        dot = prefix + "."
        return {
            name[len(dot) :]: column for name, column in self.steps.items() if name.startswith(dot)
        }


def find_runs(paths: Iterable[str | Path]) -> list[Path]:
    """Every run directory among ``paths`` and below them, each once, in the order given and then by name.

    A run is a folder that holds ``record.jsonl``; nothing below a run is searched and links are not followed.
    Raises ConadvError for a path that does not exist and for a folder without any run.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise ConadvError(
                f"No run at {printable(path)}: it is not a folder. Give run folders, or folders that contain runs."
            )
        runs = list(_search(path))
        if not runs:
            raise ConadvError(
                f"No run in {printable(path)}: neither it nor a folder below it holds a {RECORD}."
            )
        for run in runs:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def _search(folder: Path) -> Iterator[Path]:
    if (folder / RECORD).is_file():
        yield folder
        return
    for child in sorted(folder.iterdir()):
        if child.is_dir() and not child.is_symlink():
            yield from _search(child)


def load_run(path: str | Path) -> Run:
    """Read one run directory. Raises ConadvError, naming it, if it is no run; an incomplete run is no error."""
    path = Path(path)
    if not (path / RECORD).is_file():
        raise ConadvError(
            f"{printable(path)} is not a run: it holds no {RECORD}. See docs/record.md for what a run holds."
        )
    refuse_links(path)
    problems: list[str] = []
    lines = _read_lines(path)
    header = next((line for line in lines if line["type"] == "header"), {})
    evals = [
        line for line in lines if line["type"] == "eval" and line.get("split", "test") == "test"
    ]
    summary = _read_summary(path / SUMMARY, problems)
    return Run(
        path=path,
        config=_read_config(path, header, problems),
        header=header,
        steps=_columns(line for line in lines if line["type"] == "step"),
        evals=_columns(evals),
        resumed_at=tuple(
            int(line["step"]) for line in lines if line["type"] == "resume" and "step" in line
        ),
        summary=summary,
        label=path.resolve().name,
        stopped_by=_last_error(lines),
        problems=tuple(problems),
        probes=tuple(documents.probes(lines, path / RECORD)),
    )


def _read_lines(path: Path) -> list[Line]:
    """The record's complete lines; a line cut off at the end is what a killed run leaves and no error."""
    lines = read_lines(path / RECORD)
    if not all(isinstance(line, dict) and "type" in line for line in lines):
        raise ConadvError(
            f"{printable(path)} is not a run: the lines of its {RECORD} are no conadv record. Leave it out."
        )
    return lines


def _last_error(lines: list[Line]) -> str | None:
    """The message of the error that the record ends with; None after a resume or a normal end."""
    last = lines[-1] if lines else {}
    return str(last.get("message")) if last.get("type") == "error" else None


def _read_config(path: Path, header: Line, problems: list[str]) -> Line:
    """config.yaml, or the header's copy of it. Not checked against this version: old runs stay readable."""
    try:
        config = read_yaml(path / CONFIG)
    except ConadvError:
        config = None
        problems.append(f"{CONFIG} is missing or unreadable")
    for candidate in (config, header.get("config")):
        if isinstance(candidate, dict) and _is_config(candidate):
            return candidate
    raise ConadvError(
        f"{printable(path)} is not a run that can be reported: neither its {CONFIG} nor the header of its {RECORD} "
        "holds a "
        "conadv configuration. Leave it out."
    )


def _is_config(values: Line) -> bool:
    return isinstance(values.get("method"), str) and isinstance(values.get("seed", 0), int)


def _read_summary(path: Path, problems: list[str]) -> Line | None:
    if not path.exists():
        return None
    try:
        value = parse_json(read_text(path, JSON_BYTES))
    except (OSError, ValueError):
        value = None
    if not isinstance(value, dict):
        problems.append(f"{SUMMARY} is unreadable")
        return None
    documents.checked(documents.Summary, value, path, "Leave the run out.")
    return value


def _columns(lines: Iterable[Line]) -> Columns:
    rows = [flatten(line) for line in lines]
    names = dict.fromkeys(name for row in rows for name, value in row.items() if _is_number(value))
    return {name: np.array([_number(row.get(name)) for row in rows]) for name in names}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(value: Any) -> float:
    return float(value) if _is_number(value) else float("nan")
