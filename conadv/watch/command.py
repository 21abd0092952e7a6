"""``conadv watch RUN``."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console, RenderableType
from rich.live import Live

from conadv.errors import ConadvError, printable
from conadv.safe_io import refuse_links
from conadv.watch import many, view
from conadv.watch.follow import Follower
from conadv.watch.state import State


@dataclass
class WatchArgs:
    """Show a run as it goes: progress, losses, accuracies, learning rate, where the time goes, events, warnings.

    RUN may also be the folder of a sweep, or any folder of runs. Reads files only, so that it can watch a run on
    another machine through a shared disk. Ends when the run has ended, or by Ctrl-C, which does nothing to the run.
    Where the output is no terminal it shows one frame.
    """

    run: tyro.conf.Positional[Path]
    """Run directory, folder of a sweep, or folder of runs."""
    once: bool = False
    """Show one frame and end."""
    interval: float = 1.0
    """Seconds between looks."""


Look = Callable[[int, int], tuple[RenderableType, bool]]
"""(width, height) -> one frame, and whether it is the last."""


def command(args: WatchArgs, console: Console | None = None) -> None:
    """Watch. Raises ConadvError for a folder without any run."""
    if not args.interval > 0:
        raise ConadvError(f"--interval {args.interval:g} must be more than 0 seconds.")
    console = console or Console(highlight=False)
    look = one_run(args.run, console) if is_run(args.run) else folder(args.run)
    if args.once or not console.is_terminal:
        console.print(
            look(console.width, 10**6 if not console.is_terminal else console.height - 1)[0]
        )
        return
    with suppress(KeyboardInterrupt):  # the usual way to end it
        _live(look, args.interval, console)
    console.print(look(console.width, console.height - 1)[0])  # the last frame stays on the screen


def _live(look: Look, interval: float, console: Console) -> None:
    """Draw until the last frame."""
    with Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as live:
        over = False
        while not over:
            shown, over = look(console.width, console.height)
            live.update(shown, refresh=True)
            if not over:
                time.sleep(interval)


def is_run(path: Path) -> bool:
    """Whether ``path`` is one run. Raises ConadvError where there is nothing to watch."""
    if not path.is_dir():
        raise ConadvError(
            f"{printable(path)} is no folder. Give a run directory, or a folder of runs."
        )
    if (path / "config.yaml").is_file() or (path / "record.jsonl").is_file():
        return True
    if not (path / "sweep.json").is_file() and not many.Runs(path).look():
        raise ConadvError(
            f"No run in {printable(path)}: neither it nor a folder below it holds a config.yaml."
        )
    return False


def one_run(path: Path, console: Console) -> Look:
    """Frames of one run."""
    refuse_links(path)
    record = path / "record.jsonl"
    follower, state, restarts = Follower(record), State(), 0
    ascii_only = not (console.encoding or "").lower().startswith("utf")

    def look(width: int, height: int) -> tuple[RenderableType, bool]:
        nonlocal state, restarts
        for line in follower.lines():
            if follower.restarts != restarts:
                state, restarts = State(), follower.restarts
            state.add(line)
        finished = (path / "summary.json").is_file()
        shown = view.Shown(path.resolve().name, state, _age(record), finished, follower.broken)
        over = finished or state.ended is not None
        return view.frame(shown, width, height, ascii_only=ascii_only), over

    return look


def _age(path: Path) -> float | None:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return None


def folder(path: Path) -> Look:
    """Frames of a folder of runs."""
    runs = many.Runs(path)

    def look(width: int, height: int) -> tuple[RenderableType, bool]:
        seen, planned = runs.look(), runs.planned()
        return many.frame(path.resolve().name, seen, planned, width, height), many.is_over(
            seen, planned
        )

    return look
