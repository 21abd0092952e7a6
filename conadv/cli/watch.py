"""``conadv watch``: a run, a sweep or a folder of runs as it goes. Reads only files."""

from __future__ import annotations

import stat
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import tyro
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from conadv.errors import ConadvError, printable
from conadv.safe_io import JSON_BYTES, LINE_BYTES, parse_json, read_text, refuse_links
from conadv.training.documents import read_sweep

DEPTH = 4
"""Levels of folders in which runs are looked for."""
STATES = ("running", "waiting", "silent", "failed", "stopped", "finished")
"""How a run may stand, in the order of the table."""
SLOW_PHASES = {
    "data": "use more --data.num-workers, smaller files or a faster disk",
    "wait": "ranks wait for the network or for each other, see conadv timeline",
    "receive": "use more attack ranks or a larger staleness",
}
"""Phases that should take next to no time, and what to do where they do."""
MEANS = {
    "skipped": "update(s) skipped, not finite: lower the lr or lengthen the warm-up",
    "late": "step(s) without adversarial images: attack ranks were late",
    "bad_image": "unreadable image file(s) left out: see conadv check",
    "broken": "line(s) of the record cannot be read",
}
"""What is counted in a record -> the warning."""
BLOCKS = "▁▂▃▄▅▆▇█"
Values = dict[str, Any]


@dataclass
class Args:
    """Show a run as it goes: progress, losses, accuracies, where the time goes, events, warnings.

    RUN may also be the folder of a sweep, or any folder of runs. Only files are read, so a run on
    another machine can be watched through a shared disk. Ends when the run has ended, or by Ctrl-C,
    which does nothing to the run. Output that is not a terminal gets one frame.
    """

    run: tyro.conf.Positional[Path]
    """Run directory, folder of a sweep, or folder of runs."""
    once: bool = False
    """Show one frame and end."""
    interval: float = 1.0
    """Seconds between looks."""


def number(values: Values, key: str) -> float | None:
    """The number below ``key``; None where a hostile or older file has something else there."""
    value = values.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    return value if abs(value) < 1e100 else None


def mapping(values: Values, key: str) -> Values:
    """The first entries of the mapping below ``key``, with printable names."""
    found = values.get(key)
    entries = list(found.items())[:12] if isinstance(found, dict) else []
    return {printable(name[:20]): value for name, value in entries}


def shown(values: Values, key: str, percent: bool = False) -> str:
    value = number(values, key)
    if value is None:
        return "-"
    return f"{100 * value:.2f} %" if percent else f"{value:.{10 if value == int(value) else 4}g}"


class RunState:
    """What a run directory says so far; :meth:`update` reads what it has gained since."""

    def __init__(self, path: Path, name: str = "") -> None:
        self.path, self.name = path, printable(name or path.resolve().name)
        self.summary: Values | None = None
        self._start(0)

    def _start(self, inode: int) -> None:
        self.header: Values = {}
        self.recent: deque[Values] = deque(maxlen=50)
        self.losses: list[float] = []
        self.evals: dict[str, Values] = {}
        self.events: deque[str] = deque(maxlen=5)
        self.counts: Counter[str] = Counter()
        self.ended: str | None = None
        self._inode, self._offset = inode, 0

    def update(self, *, summary_only: bool = False) -> None:
        """Read on. ``summary_only``: leave out the record of a finished run."""
        with suppress(OSError, ValueError, TypeError):
            file = self.path / "summary.json"
            if self.summary is None and not file.is_symlink():
                self.summary = dict(parse_json(read_text(file, JSON_BYTES)))
        try:
            if self.summary is None or not summary_only:
                self._read(self.path / "record.jsonl")
        except FileNotFoundError:
            return  # the run has not begun
        except OSError as error:
            raise ConadvError(f"Cannot read {printable(self.path)}: {error}.") from error

    def _read(self, record: Path) -> None:
        about = record.lstat()
        if not stat.S_ISREG(about.st_mode):  # a pipe waits for a writer, a link leads elsewhere
            return
        if about.st_ino != self._inode or about.st_size < self._offset:
            self._start(about.st_ino)  # a resumed run drops the steps that it does again
        with record.open("rb") as file:
            file.seek(self._offset)
            while (raw := file.readline(LINE_BYTES + 1)).endswith(b"\n"):
                self._offset += len(raw)
                self.add(raw)
        if len(raw) > LINE_BYTES:
            raise OSError(f"a line of the record is longer than {LINE_BYTES:,} bytes")

    def add(self, raw: bytes) -> None:
        """Take in one line of the record. What is not a line of a record is counted."""
        try:
            line = dict(parse_json(raw.decode()))
        except (ValueError, TypeError):
            line = {"type": "broken"}
        kind = str(line.get("type"))
        self.counts[kind] += 1
        if kind == "header":
            self.header = line
        elif kind == "step":
            self.recent.append(line)
            self.losses += [loss for loss in [number(line, "loss")] if loss is not None]
            self.counts.update(name for name in ("skipped", "late") if line.get(name))
        elif kind == "eval":
            self.evals[printable(str(line.get("split"))[:20])] = line
        if kind in ("step", "stop", "error", "resume"):
            self.ended = {"stop": "stopped", "error": "failed"}.get(kind)
        if kind in ("stop", "error", "resume", "bad_image") or line.get("skipped"):
            names = ("step", "skipped", "signal", "message", "path", "reason", "damaged")
            told = [f"{name} {line[name]}"[:200] for name in names if line.get(name)]
            self.events.append(printable("  ".join([kind, *told])))

    @property
    def last(self) -> Values:
        return self.recent[-1] if self.recent else {}

    @property
    def total(self) -> int:
        """Planned steps; 0 while unknown."""
        return int(number(self.summary or self.header, "steps") or 0)

    @property
    def done(self) -> int:
        step = number(self.last, "step")
        return self.total if self.summary else 0 if step is None else int(step) + 1

    def step_seconds(self) -> float:
        """Median of the recent steps; the first of a run allocates and is left out. 0: unknown."""
        known = [number(step, "seconds") or 0.0 for step in self.recent]
        return median(known[1:] or known) if known else 0.0

    def left(self) -> str:
        """The time that the steps to come take; empty unless the run is going."""
        seconds = self.step_seconds() * max(0, self.total - self.done)
        return duration(seconds) if self.state() == "running" else ""

    def phase_shares(self) -> dict[str, float]:
        """Phase -> its share of the recent steps, the largest first."""
        sums: Counter[str] = Counter()
        for phases in (mapping(step, "phases") for step in self.recent):
            sums.update({name: max(0.0, number(phases, name) or 0.0) for name in phases})
        total = sum(sums.values()) or 1.0
        return {name: seconds / total for name, seconds in sums.most_common(10)}

    def age(self) -> float:
        """Seconds since the run wrote something."""
        times = [0.0]
        for path in (self.path, self.path / "record.jsonl"):
            with suppress(OSError):
                times.append(path.lstat().st_mtime)
        return time.time() - max(times)

    def state(self) -> str:
        """One of STATES."""
        if (self.path / "failed.json").is_file():
            return "failed"
        if self.summary is not None or self.ended is not None:
            return self.ended if self.summary is None and self.ended else "finished"
        if self.age() > max(30.0, 10 * self.step_seconds()):
            return "silent"
        return "running" if self.recent else "waiting"

    def warnings(self) -> Iterator[str]:
        """What a user may want to act on."""
        yield from (f"{self.counts[kind]} {MEANS[kind]}" for kind in MEANS if self.counts[kind])
        for name, share in self.phase_shares().items():
            if name in SLOW_PHASES and share > 0.25:
                yield f"{name} takes {100 * share:.0f} % of the time: {SLOW_PHASES[name]}"
        if self.state() == "silent":
            yield f"nothing new for {self.age():.0f} s: a long evaluation, or the process is gone"

    def rows(self, columns: int) -> Iterator[tuple[str, str]]:
        """(label, value) of everything that is shown in numbers."""
        config = self.header.get("config")
        config = config if isinstance(config, dict) else {}
        names = (f"{key} {config.get(key, '-')}"[:40] for key in ("recipe", "method", "seed"))
        ranks = shown(self.header, "ranks")
        yield "run", printable("  ".join([self.name, *names, f"ranks {ranks}"]))
        share = f"{100 * self.done / self.total:.0f} %  " if self.total else ""
        progress = f"{self.done}/{self.total or '?'}  {share}epoch {shown(self.last, 'epoch')}"
        yield "step", f"{progress}  left {self.left() or '-'}"
        views = mapping(self.last, "losses")
        losses = "  ".join(f"{name} {shown(views, name)}" for name in views)
        yield "loss", f"{shown(self.last, 'loss')}  {losses}"
        yield "", curve(self.losses, columns)
        norm, staleness = shown(self.last, "grad_norm"), shown(self.last, "staleness")
        yield "lr", f"{shown(self.last, 'lr')}  gradient norm {norm}  staleness {staleness}"
        seconds = self.step_seconds()
        rate = (number(config, "global_batch_size") or 0) / (seconds or 1)
        yield "step time", f"{1000 * seconds:.4g} ms  {rate:,.0f} images/s"
        for split, found in list(self.evals.items())[:6]:
            yield split, f"{shown(found, 'accuracy', percent=True)}  at step {shown(found, 'step')}"
        shares = self.phase_shares().items()
        yield "phases", "  ".join(f"{name} {100 * part:.1f} %" for name, part in shares)


def curve(values: list[float], columns: int) -> str:
    """The largest value of each column, from the first to the last."""
    stride = max(1, -(-len(values) // columns))
    heights = [max(values[i : i + stride]) for i in range(0, len(values), stride)]
    top = max([*heights, 1e-30])
    return "".join(BLOCKS[max(0, round(7 * height / top))] for height in heights)


def duration(seconds: float) -> str:
    """h:mm:ss, or days and hours."""
    whole = round(seconds)
    if whole >= 86400:
        return f"{whole // 86400} d {whole % 86400 // 3600} h"
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


def detail(run: RunState, width: int) -> RenderableType:
    """One frame of one run. Values wrap where it is narrow; labels are cut."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True, max_width=10, overflow="ellipsis")
    table.add_column(overflow="fold")
    table.add_row("state", run.state())
    for label, value in run.rows(max(1, width - 12)):
        table.add_row(label, Text(value))
    for warning in run.warnings():
        table.add_row("!", Text(warning, "yellow"))
    for event in run.events:
        table.add_row("", Text(event, "dim"))
    return table


def overview(runs: list[RunState], planned: int | None, width: int, height: int) -> RenderableType:
    """One frame of many runs: counts, and a line for each run as far as there is room."""
    counts = Counter(run.state() for run in runs)
    of = "" if planned is None else f" of {planned}"
    head = Text(f"{counts['finished'] + counts['failed']}{of} runs ended", "bold")
    head.append("".join(f"  {state} {counts[state]}" for state in STATES if counts[state]))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    names = ("run", "state", "step", "loss", "test", "left")
    for name in names:
        table.add_column(name, no_wrap=True, justify="left" if name in names[:2] else "right")
    ordered = sorted(runs, key=lambda run: (STATES.index(run.state()), run.age()))
    room = max(1, height - 4)
    rows = [cells(run) for run in ordered[:room]]
    # the names get what the numbers leave; what tells runs apart stands at both ends of a name
    taken = sum(max(map(len, column)) + 2 for column in zip(names[1:], *rows, strict=True))
    half = max(2, (width - taken - 4) // 2)
    for run, row in zip(ordered, rows, strict=False):
        name = run.name.removeprefix("runs/")
        short = name if len(name) <= 2 * half + 2 else f"{name[:half]}..{name[-half:]}"
        bad = row[0] in ("silent", "failed", "stopped")
        table.add_row(Text(short), *row, style="red" if bad else "")
    more = [Text(f"and {len(runs) - room} more", "dim")] if len(runs) > room else []
    return Group(head, table, *more)


def cells(run: RunState) -> tuple[str, ...]:
    """State, step, loss, test accuracy and time left of one run, as text."""
    if run.summary is not None:
        loss = shown(run.summary, "train_loss")
        test = shown(run.summary, "test_accuracy", percent=True)
    else:
        loss = shown(run.last, "loss")
        test = shown(run.evals.get("test", {}), "accuracy", percent=True)
    return run.state(), f"{run.done}/{run.total or '?'}", loss, test, run.left()


class View:
    """What is watched: one run, or all runs below a folder. Raises ConadvError where none is."""

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise ConadvError(
                f"{printable(path)} is not a folder. Give a run, or a folder of runs."
            )
        self.path = path
        self.single = any((path / name).is_file() for name in ("config.yaml", "record.jsonl"))
        self.runs: dict[Path, RunState] = {}
        if self.single:
            refuse_links(path)
        elif not (path / "sweep.json").is_file() and not any(_below(path, DEPTH)):
            raise ConadvError(f"No run in {printable(path)}, nor in the folders below it.")

    def look(self) -> bool:
        """Read on; returns whether nothing more will come."""
        for path in [self.path] if self.single else _below(self.path, DEPTH):
            name = "" if self.single else str(path.relative_to(self.path))
            self.runs.setdefault(path, RunState(path, name)).update(summary_only=not self.single)
        states = [run.state() for run in self.runs.values()]
        ended = sum(state in ("finished", "failed", "stopped") for state in states)
        return 0 < len(states) == ended and ended >= (self.planned() or 0)

    def planned(self) -> int | None:
        """How many runs a sweep will have made; None without a sweep.json."""
        path = self.path / "sweep.json"
        if self.single or not path.is_file() or path.is_symlink():
            return None
        cells = read_sweep(path).cells
        known = {name for cell in cells for trial in cell.trials for name in trial.runs}
        known |= {name for cell in cells for name in cell.runs}
        return len(known) + sum(len(cell.seeds) for cell in cells if not cell.runs)

    def frame(self, width: int, height: int) -> RenderableType:
        runs = list(self.runs.values())
        if self.single:
            return detail(runs[0], width)
        return overview(runs, self.planned(), width, height)


def _below(folder: Path, depth: int) -> Iterator[Path]:
    """Run directories in and below ``folder``; links are not followed."""
    if (folder / "config.yaml").is_file() or (folder / "failed.json").is_file():
        yield folder
    elif depth:
        with suppress(OSError):
            for child in sorted(folder.iterdir()):
                if child.is_dir() and not child.is_symlink():
                    yield from _below(child, depth - 1)


def command(args: Args, console: Console | None = None) -> None:
    """Show frames until the last one."""
    if not args.interval > 0:
        raise ConadvError(f"--interval {args.interval:g} must be more than 0 seconds.")
    console = console or Console(highlight=False)
    view = View(args.run)
    over = view.look()
    if console.is_terminal and not args.once:
        with (
            suppress(KeyboardInterrupt),  # the usual way to end it
            Live(console=console, screen=True, auto_refresh=False) as live,
        ):
            while not over:
                live.update(view.frame(console.width, console.height), refresh=True)
                time.sleep(args.interval)
                over = view.look()
    height = console.height - 1 if console.is_terminal else 10**6
    console.print(view.frame(console.width, height))  # stays on the screen
