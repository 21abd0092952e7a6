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

import tyro
from pydantic import Field
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from conadv.cli.format import duration
from conadv.cli.tables import fitted
from conadv.errors import ConadvError, printable
from conadv.safe_io import LINE_BYTES, Count, Document, Number, parse_json, refuse_links
from conadv.training.documents import read_sweep

DEPTH = 4
"""Levels of folders in which runs are looked for."""
STATES = ("running", "waiting", "silent", "failed", "stopped", "finished")
"""The states of a run, in the order of the table."""
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


@dataclass
class Args:
    """Show runs as they go: progress, losses, accuracies, where the time goes, events, warnings.

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


class Line(Document):
    """The fields of a record that are shown, of all types of lines."""

    type: str
    steps: Count = 0
    step: Count = 0
    loss: Number | None = None
    lr: Number | None = None
    seconds: Number | None = None
    phases: dict[str, Number | None] = Field({})
    skipped: str | None = None
    late: bool = False
    split: str = ""
    accuracy: Number | None = None


class RunState:
    """What a run directory says so far; :meth:`update` reads what it has gained since."""

    def __init__(self, path: Path, name: str = "") -> None:
        self.path, self.name = path, printable(name or path.resolve().name)
        self._start(0)

    def _start(self, inode: int) -> None:
        self.total = 0
        """Planned steps; 0 while unknown."""
        self.last = Line(type="")
        self.recent: deque[Line] = deque(maxlen=50)
        self.accuracies: dict[str, Line] = {}
        self.events: deque[str] = deque(maxlen=5)
        self.counts: Counter[str] = Counter()
        self.ended: str | None = None
        self._inode, self._offset = inode, 0

    def update(self) -> None:
        """Read on. Raises ConadvError for a record that cannot be read."""
        try:
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
                self._add(raw)
        if len(raw) > LINE_BYTES:
            raise OSError(f"a line of the record is longer than {LINE_BYTES:,} bytes")

    def _add(self, raw: bytes) -> None:
        try:
            line = Line.model_validate(parse_json(raw.decode()))
        except ValueError:  # not UTF-8, not JSON, or not what conadv writes
            line = Line(type="broken")
        kind = line.type
        self.counts[kind] += 1
        self.counts.update(name for name in ("skipped", "late") if getattr(line, name))
        if kind == "header":
            self.total = line.steps
        elif kind == "step":
            self.last = line
            self.recent.append(line)
        elif kind == "eval":
            self.accuracies[printable(line.split[:20])] = line
        if kind in ("step", "stop", "error", "resume"):
            self.ended = {"stop": "stopped", "error": "failed"}.get(kind)
        if kind in ("stop", "error", "resume", "bad_image") or line.skipped:
            self.events.append(printable(raw.decode()[:300].strip()))

    @property
    def done(self) -> int:
        return self.last.step + bool(self.recent)

    def state(self) -> str:
        """One of STATES."""
        if (self.path / "failed.json").is_file():
            return "failed"
        if (self.path / "summary.json").is_file() and not (self.path / "summary.json").is_symlink():
            return "finished"
        if self.ended is not None:
            return self.ended
        if self.age() > max(30.0, 10 * self.step_seconds()):
            return "silent"
        return "running" if self.recent else "waiting"

    def age(self) -> float:
        """Seconds since the run wrote something."""
        times = [0.0]
        for path in (self.path, self.path / "record.jsonl"):
            with suppress(OSError):
                times.append(path.lstat().st_mtime)
        return time.time() - max(times)

    def step_seconds(self) -> float:
        """Median of the recent steps; the first of a run allocates and is left out. 0: unknown."""
        known = [line.seconds or 0.0 for line in self.recent]
        return median(known[1:] or known or [0.0])

    def phase_shares(self) -> dict[str, float]:
        """Phase -> its share of the recent steps, the largest first."""
        sums: Counter[str] = Counter()
        for line in self.recent:
            sums.update({name: max(0.0, seconds or 0.0) for name, seconds in line.phases.items()})
        total = sum(sums.values()) or 1.0
        return {printable(name[:20]): each / total for name, each in sums.most_common(10)}

    def cells(self) -> dict[str, str]:
        """A row of the table."""
        test, seconds, state = self.accuracies.get("test"), self.step_seconds(), self.state()
        left = duration(seconds * max(0, self.total - self.done)) if state == "running" else ""
        return {
            "run": self.name.removeprefix("runs/"),
            "state": state,
            "step": f"{self.done}/{self.total or '?'}",
            "loss": "-" if self.last.loss is None else f"{self.last.loss:.4g}",
            "test": "-" if test is None else percent(test.accuracy),
            "lr": "-" if self.last.lr is None else f"{self.last.lr:.4g}",
            "step time": duration(seconds),
            "left": left,
        }

    def details(self) -> Iterator[Text]:
        """What is shown of a single run below its row."""
        for split, found in list(self.accuracies.items())[:6]:
            yield Text(f"{split} accuracy {percent(found.accuracy)} at step {found.step}")
        shares = self.phase_shares().items()
        yield Text("  ".join(f"{name} {percent(share)}" for name, share in shares))
        yield from (Text(event, "dim") for event in self.events)

    def warnings(self) -> Iterator[str]:
        """What a user may want to act on."""
        yield from (f"{self.counts[kind]} {MEANS[kind]}" for kind in MEANS if self.counts[kind])
        for name, share in self.phase_shares().items():
            if name in SLOW_PHASES and share > 0.25:
                yield f"{name} takes {100 * share:.0f} % of the time: {SLOW_PHASES[name]}"
        if self.state() == "silent":
            yield f"nothing new for {self.age():.0f} s: a long evaluation, or the process is gone"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


class View:
    """What is watched: one run, or all runs below a folder. Raises ConadvError where none is."""

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise ConadvError(
                f"{printable(path)} is not a folder. Give a run, or a folder of runs."
            )
        self.path, self.runs = path, dict[Path, RunState]()
        self.single = any((path / name).is_file() for name in ("config.yaml", "record.jsonl"))
        if self.single:
            refuse_links(path)
        elif not (path / "sweep.json").is_file() and not any(_below(path, DEPTH)):
            raise ConadvError(f"No run in {printable(path)}, nor in the folders below it.")

    def look(self) -> bool:
        """Read on; returns whether nothing more will come."""
        for path in [self.path] if self.single else _below(self.path, DEPTH):
            name = "" if self.single else str(path.relative_to(self.path))
            self.runs.setdefault(path, RunState(path, name)).update()
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

    def frame(self, console: Console, height: int) -> RenderableType:
        """Counts, a row for each run as far as there is room, and more about a single run."""
        runs = sorted(self.runs.values(), key=lambda run: (STATES.index(run.state()), run.age()))
        counts, planned = Counter(run.state() for run in runs), self.planned()
        of = "" if planned is None else f" of {planned}"
        head = f"{counts['finished'] + counts['failed']}{of} runs ended"
        head += "".join(f"  {state} {counts[state]}" for state in STATES if counts[state])
        room = max(1, height - 6)
        head += f"  (not shown: {len(runs) - room})" if len(runs) > room else ""
        rows = [run.cells() for run in runs[:room]]
        shown: list[RenderableType] = [] if self.single else [Text(head, "bold")]
        if rows:
            shown.append(fitted(rows, console, ("run", "state"), ("lr", "step time")))
        if self.single:
            shown += runs[0].details()
            shown += (Text(warning, "yellow") for warning in runs[0].warnings())
        return Group(*shown)


def _below(folder: Path, depth: int) -> Iterator[Path]:
    """Run directories in and below ``folder``; links are not followed."""
    if (folder / "config.yaml").is_file() or (folder / "failed.json").is_file():
        yield folder
    elif depth:
        with suppress(OSError):
            for child in sorted(folder.iterdir()):
                if child.is_dir() and not child.is_symlink():
                    yield from _below(child, depth - 1)


def command(args: Args) -> None:
    """Show frames until the last one."""
    if not args.interval > 0:
        raise ConadvError(f"--interval {args.interval:g} must be more than 0 seconds.")
    console, view = Console(highlight=False), View(args.run)
    over = view.look()
    if console.is_terminal and not args.once:
        with (
            suppress(KeyboardInterrupt),  # the usual way to end it
            Live(console=console, screen=True, auto_refresh=False) as live,
        ):
            while not over:
                live.update(view.frame(console, console.height), refresh=True)
                time.sleep(args.interval)
                over = view.look()
    height = console.height - 1 if console.is_terminal else 10**6
    console.print(view.frame(console, height))  # stays on the screen
