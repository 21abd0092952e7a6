"""Read run directories (docs/record.md), whether finished, still going or killed in mid-line."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from conadv.config.schema import flatten
from conadv.errors import ConadvError, printable
from conadv.report.settings import Settings, effective
from conadv.safe_io import JSON_BYTES, checked, parse_json, read_text, read_yaml, refuse_links
from conadv.training import documents
from conadv.training.record import read_lines

RECORD = "record.jsonl"
Line = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run directory.

    ``settings``: the flat settings that had an effect, equal for the runs of one arm. ``steps`` and
    ``evals`` (test split): a row per line of the record, a float column per numeric field, nested
    ones with dotted names such as ``losses.clean``; NaN where a line lacks the field. ``summary``
    is None for an unfinished run. ``probes``: lines of the staleness probe. ``status``: "finished",
    or how far the run came and what stopped it.
    """

    path: Path
    config: Line
    settings: Settings
    header: Line
    steps: pd.DataFrame
    evals: pd.DataFrame
    summary: Line | None
    probes: list[Line]
    status: str

    @property
    def seed(self) -> int:
        return int(self.config.get("seed", 0))


def find_runs(paths: Iterable[str | Path]) -> list[Path]:
    """Every run directory at and below ``paths``, each once, in the order given and then by name.

    Nothing below a run is searched and links are not followed.
    Raises ConadvError for a path that does not exist and for a folder without a run.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        runs = []
        for folder, inner, files in os.walk(path):
            runs += [Path(folder)] * (RECORD in files)
            inner[:] = [] if RECORD in files else sorted(inner)
        if not runs:
            raise ConadvError(f"No run in {printable(path)}: no folder there holds a {RECORD}.")
        for run in runs:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def load_run(path: str | Path) -> Run:
    """Read one run directory. Raises ConadvError if it is not a run; an incomplete run is fine."""
    path = Path(path)
    if not (path / RECORD).is_file():
        raise ConadvError(f"{printable(path)} is not a run: it holds no {RECORD} (docs/record.md).")
    refuse_links(path)
    lines = read_lines(path / RECORD)
    header = next((line for line in lines if line["type"] == "header"), {})
    config, summary = _read_config(path, header), _read_summary(path / "summary.json")
    steps = _columns(line for line in lines if line["type"] == "step")
    tests = (None, "test")
    evals = [line for line in lines if line["type"] == "eval" and line.get("split") in tests]
    status = f"unfinished: {len(steps)} of {header.get('steps', '?')} steps"
    if lines and lines[-1]["type"] == "error":
        status += f"; stopped by: {lines[-1].get('message')}"
    settings = effective(config, int((summary or header).get("ranks") or 1))
    probes = documents.probes(lines, path / RECORD)
    status = status if summary is None else "finished"
    return Run(path, config, settings, header, steps, _columns(evals), summary, probes, status)


def _read_config(path: Path, header: Line) -> Line:
    """config.yaml, or the header's copy; not validated, so that older runs stay readable."""
    with suppress(ConadvError):
        header = {"config": read_yaml(path / "config.yaml")}
    found = header.get("config")
    if not isinstance(found, dict) or not isinstance(found.get("method"), str):
        raise ConadvError(f"{printable(path)} holds no configuration of a run. Leave it out.")
    if type(found.get("seed", 0)) is not int:
        raise ConadvError(f"{printable(path)} has a seed that is not a whole number. Leave it out.")
    return found


def _read_summary(path: Path) -> Line | None:
    """None for a missing or unreadable file; ConadvError for values that are out of range."""
    try:
        value = parse_json(read_text(path, JSON_BYTES))
    except (OSError, ValueError):
        return None
    checked(documents.Summary, value, path, "Leave the run out.")
    return dict(value)


def _columns(lines: Iterable[Line]) -> pd.DataFrame:
    numbers = [
        {printable(k): v for k, v in flatten(line).items() if type(v) in (int, float)}
        for line in lines
    ]
    return pd.DataFrame(numbers).astype(float)
