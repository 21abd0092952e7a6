"""``conadv sweep``: run a spec, write sweep.json and the report."""

from __future__ import annotations

import functools
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from conadv.cli.format import duration
from conadv.cli.options import say
from conadv.cli.watch import RunState
from conadv.errors import ConadvError, printable
from conadv.sweep.cells import Run, expand
from conadv.sweep.choose import Result
from conadv.sweep.folder import Folder
from conadv.sweep.pool import Ended, cores, run_pool, train_run
from conadv.sweep.schedule import Schedule, forecast
from conadv.sweep.spec import load_spec


@dataclass
class Args:
    """A grid of runs: settings tuned on validation images, confirmed on other seeds, reported.

    The same command continues where a sweep stopped, however it stopped.
    """

    spec: tyro.conf.Positional[Path]
    """The YAML file that says what is run (docs/sweep.md)."""
    out: Path | None = None
    """Folder for sweep.json, report.html and the runs (default: runs/NAME)."""
    jobs: int | None = None
    """Runs at a time, one thread each (default: one per core)."""
    dry_run: bool = False
    """Show what would be run, and how long the rest takes where runs have told it; run nothing."""
    quiet: bool = False
    """Show nothing but errors."""
    report: bool = True
    """Write the report at the end and show its table."""
    retry_failed: bool = False
    """Run again what failed before, from its newest checkpoint unless it diverged."""
    keep_checkpoints: bool = False
    """Keep the checkpoints of finished runs (`conadv analyze` needs them)."""
    data: Path | None = None
    """Folder of the images, in place of the spec's data.dir."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


def command(args: Args) -> None:
    """Run the sweep. Raises ConadvError for a wrong spec, option or OUT before any run starts."""
    spec = load_spec(args.spec)
    folder = Folder(args.out or Path("runs") / spec.name)
    schedule = Schedule(expand(spec, args.data), folder, args.spec.name)
    runs, workers = folder.out / "runs", args.jobs or cores()
    if args.dry_run:
        schedule.load()
        show_plan(schedule, workers)
        return
    with folder.lock() as lock:
        lock.take()
        schedule.load(forget_failed=args.retry_failed)
        schedule.save()
        keep = args.keep_checkpoints
        work = functools.partial(train_run, runs=runs, keep_checkpoints=keep, device=args.device)
        display = Display(runs, workers, args.quiet)
        try:
            with display.bars, closing(run_pool(schedule.next, work, workers)) as pool:
                for going, ended in pool:
                    for run, result in ended:
                        schedule.done(run, result)
                    display.show(going, ended, schedule.runs(), schedule.results)
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt("; the same command continues the sweep") from error
    if not args.quiet:
        show_troubles(schedule)
    if args.report:
        from conadv.cli.tables import show_report
        from conadv.report import write_sweep_report

        report = write_sweep_report(folder.out, command=f"conadv sweep {args.spec}")
        if not args.quiet:
            show_report(report, folder.out / "report.html")


class Display:
    """A line for each run that ended; on a terminal also a bar with the time left.

    ``folder``: where the run directories are, whose records tell how far runs are.
    """

    def __init__(self, folder: Path, workers: int, quiet: bool) -> None:
        self._folder, self._workers = folder, workers
        self._states: dict[str, tuple[RunState, float]] = {}
        console = Console(quiet=quiet, highlight=False)
        columns = (BarColumn(None), TextColumn("{task.percentage:3.0f} %  {task.description}"))
        hidden = quiet or not console.is_terminal
        self.bars = Progress(*columns, console=console, disable=hidden, expand=True)
        self._all = self.bars.add_task("", total=1.0)

    def show(
        self, going: list[Run], ended: Ended, runs: list[Run], results: dict[str, Result]
    ) -> None:
        """``runs``: all that there will be, ``results``: of those that ended."""
        shares = {run.name: self._share(run) for run in going}
        share, seconds = forecast(runs, results, shares, self._workers)
        count = f"{sum(run.name in results for run in runs)} of {len(runs)} runs"
        left = f"left {duration(seconds)}" if seconds else ""
        self.bars.update(self._all, description=f"{count} {left}", completed=share)
        for run, result in ended:
            error = (result.error or "").partition("\n")[0]
            how = f"failed: {error}" if error else f"{result.seconds:.1f} s"
            text = printable(f"{run.name}: {how}, {count} {left}".rstrip())
            self.bars.console.print(text, markup=False, soft_wrap=True)

    def _share(self, run: Run) -> tuple[float, float]:
        """(share done, seconds) of a run under way."""
        new = RunState(self._folder / run.name), time.monotonic()
        state, begun = self._states.setdefault(run.name, new)
        with suppress(ConadvError):  # an unreadable record stops its own run and nothing else
            state.update()
        if not state.total:  # it is loading its data
            self._states[run.name] = state, time.monotonic()
        return state.done / (state.total or 1), time.monotonic() - begun


def show_troubles(schedule: Schedule) -> None:
    """What of a finished sweep a user may want to act on."""
    failed = [result.diverged for result in schedule.results.values() if result.error is not None]
    if failed:
        count = f"{len(failed)} run(s) failed, {sum(failed)} of them diverged"
        say(f"{count}: see sweep.json. --retry-failed tries them again.")
    for index, cell in enumerate(schedule.plan.cells):
        if schedule.blocked(index):
            say(f"no choice for {cell.arm} at {cell.settings}: trials failed, or all diverged")


def show_plan(schedule: Schedule, workers: int) -> None:
    """How many runs each arm has, and the time left once runs have told it."""
    runs, plan = schedule.runs(), schedule.plan
    for arm in plan.spec.arms:
        cells = [cell for cell in plan.cells if cell.arm == arm]
        tuning = sum(len(trial.tuning) for cell in cells for trial in cell.trials)
        confirming = sum(len(cell.trials[0].confirming) for cell in cells)
        say(f"{arm}: {len(cells)} cell(s), {tuning} tuning and {confirming} confirming runs")
    done = sum(run.name in schedule.results for run in runs)
    say(f"{len(runs)} runs in all, {done} of them done; in {printable(schedule.folder.out)}")
    _, seconds = forecast(runs, schedule.results, {}, workers)
    if seconds is not None:
        say(f"about {duration(seconds)} left with --jobs {workers}")
