"""One frame of many runs: a sweep, or any folder of runs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from conadv.safe_io import JSON_BYTES, parse_json, read_text
from conadv.training.documents import read_sweep
from conadv.watch.follow import ends
from conadv.watch.state import State, number, text
from conadv.watch.view import COLOURS, Shown, duration, status

ORDER = ("running", "waiting", "silent", "failed", "stopped", "finished")
DEPTH = 4
"""Folders below the one that is watched in which runs are looked for."""


@dataclass(frozen=True)
class Seen:
    """A run of a folder: its name there, how it stands, and the accuracy that its summary, or the record, names."""

    name: str
    status: str
    state: State
    accuracy: float | None
    seconds: float | None
    changed: float


@dataclass
class Runs:
    """The runs below ``folder``. What has ended is read once."""

    folder: Path
    _ended: dict[Path, tuple[float, Seen]] = field(default_factory=dict)

    def look(self) -> list[Seen]:
        """All runs as they are now: those that go first, then the newest first."""
        seen = [self._see(path) for path in _runs(self.folder, DEPTH)]
        return sorted(seen, key=lambda run: (ORDER.index(run.status), -run.changed))

    def planned(self) -> int | None:
        """How many runs a sweep will have made; None without a sweep.json. Raises ConadvError where that is broken."""
        path = self.folder / "sweep.json"
        if not path.is_file() or path.is_symlink():
            return None
        cells = read_sweep(path).cells
        known = {name for cell in cells for trial in cell.trials for name in trial.runs}
        known |= {name for cell in cells for name in cell.runs}
        return len(known) + sum(len(cell.seeds) for cell in cells if not cell.runs)

    def _see(self, path: Path) -> Seen:
        changed = _changed(path)
        if path in self._ended and self._ended[path][0] == changed:
            return self._ended[path][1]
        seen = _look_at(path, str(path.relative_to(self.folder)), changed)
        if seen.status in ("finished", "failed"):
            self._ended[path] = (changed, seen)
        return seen


def _runs(folder: Path, depth: int) -> Iterator[Path]:
    """Run directories below ``folder``; links are not followed."""
    if (folder / "config.yaml").is_file() or (folder / "failed.json").is_file():
        yield folder
    elif depth:
        try:
            children = sorted(
                child for child in folder.iterdir() if child.is_dir() and not child.is_symlink()
            )
        except OSError:
            return
        for child in children:
            yield from _runs(child, depth - 1)


def _changed(path: Path) -> float:
    """When any of the files that say how a run stands was written last."""
    times = [0.0]
    for name in ("config.yaml", "record.jsonl", "summary.json", "failed.json"):
        try:
            times.append((path / name).lstat().st_mtime)
        except OSError:
            continue
    return max(times)


def _look_at(path: Path, name: str, changed: float) -> Seen:
    state = State()
    record = path / "record.jsonl"
    for line in [] if record.is_symlink() else ends(record):
        state.add(line)
    summary, failure = _object(path / "summary.json"), _object(path / "failed.json")
    if failure is not None:
        state.ended = "failed"
    now = status(Shown(name, state, time.time() - changed, summary is not None and failure is None))
    accuracy = number((summary or {}).get("test_accuracy"))
    if accuracy is None and "test" in state.evals:
        accuracy = state.evals["test"][1]
    return Seen(
        text(name, 120), now, state, accuracy, number((summary or {}).get("seconds")), changed
    )


def _object(path: Path) -> dict[str, Any] | None:
    """A JSON object; None without one."""
    try:
        found = None if path.is_symlink() else parse_json(read_text(path, JSON_BYTES))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def frame(
    name: str, runs: list[Seen], planned: int | None, width: int, height: int
) -> RenderableType:
    """Counts, and a line for each run as far as ``height`` goes."""
    counts = {kind: sum(run.status == kind for run in runs) for kind in ORDER}
    head = Text(no_wrap=True, overflow="ellipsis")
    head.append(text(name, 60), style="bold")
    of = f" of {planned}" if planned is not None else ""
    head.append(f"  {counts['finished'] + counts['failed']}{of} runs ended")
    for kind, count in counts.items():
        if count:
            head.append(f"  {kind} {count}", style=COLOURS.get(kind, "bold red"))
    room = max(1, height - 6)
    more = [Text(f"and {len(runs) - room} more", style="dim")] if len(runs) > room else []
    return Group(head, _table(runs[:room], width), *more)


def _table(runs: list[Seen], width: int) -> Table:
    table = Table(
        box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, header_style="bold", expand=True
    )
    table.add_column("run", no_wrap=True, overflow="ellipsis", ratio=1)
    names = ["state", "step", "loss", "test", "left"]
    for column in names:
        table.add_column(column, no_wrap=True, justify="left" if column == "state" else "right")
    for run in runs:
        table.add_row(Text(_shortened(run.name, max(16, width - 57)), no_wrap=True), *_cells(run))
    return table


def _shortened(name: str, width: int) -> str:
    """With the middle left out where it is too long: what tells runs apart stands at both ends."""
    name = name.removeprefix("runs/")
    half = (width - 3) // 2
    return name if len(name) <= width else f"{name[: width - 3 - half]}...{name[-half:]}"


def _cells(run: Seen) -> list[Text]:
    state = run.state
    loss = state.last.loss if state.last is not None else None
    left = state.seconds_left() if run.status == "running" else None
    took = "" if run.seconds is None else f"took {duration(run.seconds)}"
    cells = [
        f"{state.done}/{state.total or '?'}",
        "-" if loss is None else f"{loss:.4g}",
        "-" if run.accuracy is None else f"{100 * run.accuracy:.2f} %",
        took if left is None else duration(left),
    ]
    return [Text(run.status, style=COLOURS.get(run.status, "bold red")), *map(Text, cells)]


def is_over(runs: list[Seen], planned: int | None) -> bool:
    """Whether nothing more is going to come: every run has ended, and as many as were planned are there."""
    ended = sum(run.status in ("finished", "failed", "stopped") for run in runs)
    return bool(runs) and ended == len(runs) and (planned is None or ended >= planned)
