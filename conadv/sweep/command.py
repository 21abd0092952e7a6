"""``conadv sweep``: run a spec, write sweep.json and the report."""

from __future__ import annotations

import functools
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from conadv.errors import ConadvError, printable
from conadv.sweep.cells import Plan, expand
from conadv.sweep.display import Workload, duration, for_terminal
from conadv.sweep.document import document, load_results
from conadv.sweep.estimate import relative_cost
from conadv.sweep.folder import SWEEP, Folder, clean, tidy
from conadv.sweep.pool import Job, cores, run_pool
from conadv.sweep.schedule import Schedule
from conadv.sweep.spec import load_spec
from conadv.training.observer import Silent


@dataclass
class SweepArgs:
    """A grid of runs by a spec: settings tuned on validation images, then confirmed on other seeds, then a report.

    The same command goes on where a sweep stopped, however it stopped.
    """

    spec: tyro.conf.Positional[Path]
    """The YAML file that says what is run (docs/sweep.md)."""
    out: Path | None = None
    """Folder for sweep.json, report.html and the runs (default: runs/NAME)."""
    jobs: int | None = None
    """Runs at a time, one thread each (default: one per core)."""
    dry_run: bool = False
    """Show what would be run, and run nothing."""
    quiet: bool = False
    """Show nothing but errors."""
    report: bool = True
    """Write the report at the end and show its table."""
    retry_failed: bool = False
    """Run again what failed before (from its newest checkpoint, or from the start if it diverged)."""
    keep_checkpoints: bool = False
    """Keep the checkpoints of finished runs (`conadv analyze` needs them)."""
    max_minutes: float | None = None
    """Begin no run after so many minutes; the same command goes on later."""
    shard: str | None = None
    """I/N: the I-th of N parts, for several machines. When all are done, the command without it writes the report."""
    data: Path | None = None
    """Folder of the images, in place of the spec's data.dir."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


def sweep(args: SweepArgs) -> None:
    """Run the sweep. Raises ConadvError for what is wrong with the spec, the options or OUT, before any run starts."""
    index, count = _check(args)
    spec = load_spec(args.spec)
    plan = expand(spec, args.data)
    folder = Folder(args.out or Path("runs") / spec.name)
    folder.check()
    file = SWEEP if count == 1 else f"sweep.shard-{index}-of-{count}.json"
    if args.dry_run:
        _show_plan(_schedule(plan, folder, plan.shard(index, count)))
        return
    with folder.locked(file):
        schedule = _schedule(
            plan, folder, plan.shard(index, count), args.retry_failed, args.max_minutes
        )
        schedule.changed = lambda: folder.write(file, document(schedule, args.spec.name))
        schedule.changed()
        _run(schedule, args)
    _finish(schedule, args, count)


def train_job(job: Job, observer: Silent, *, keep_checkpoints: bool, device: str) -> None:
    """Train one job in a worker: on from its checkpoint where an interrupted run left one, else from the start."""
    from conadv.engine.execution import Execution
    from conadv.training.checkpoint import steps
    from conadv.training.run_dir import RunDir
    from conadv.training.trainer import train

    run = RunDir(job.out)
    resume = run.config.is_file() and bool(steps(run.checkpoints))
    clean(job.out)
    execution = Execution(
        timeline_steps=0
    )  # spans are most of a record, and no sweep asks for them
    train(
        job.config,
        job.out,
        resume=resume,
        overwrite=not resume,
        device=device,
        observer=observer,
        execution=execution,
    )
    if not keep_checkpoints:
        tidy(job.out)


def _check(args: SweepArgs) -> tuple[int, int]:
    """The shard's number and how many there are."""
    if args.max_minutes is not None and not args.max_minutes >= 0:
        raise ConadvError(f"--max-minutes {args.max_minutes:g} must be 0 or more.")
    match = re.fullmatch(r"(\d+)/(\d+)", args.shard or "1/1")
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ConadvError(f"--shard {args.shard} must be I/N with I from 1 to N, such as 1/4.")
    return int(match[1]), int(match[2])


def _schedule(
    plan: Plan,
    folder: Folder,
    only: frozenset[int],
    retry: bool = False,
    max_minutes: float | None = None,
) -> Schedule:
    results = load_results(plan, folder)
    schedule = Schedule(plan, folder, only, results)
    if retry:
        for name in [
            name for name in schedule.names() if name in results and results[name].error is not None
        ]:
            folder.forget_failure(name)
            del results[name]
        schedule = Schedule(plan, folder, only, results)
    if max_minutes is not None:
        schedule.deadline = time.monotonic() + 60 * max_minutes
    return schedule


def _run(schedule: Schedule, args: SweepArgs) -> None:
    workers = args.jobs or cores()
    work = Workload(schedule.waiting, workers)
    for name in schedule.names():
        if (result := schedule.results.get(name)) is not None:
            work.done += 1
            work.seconds += result.seconds
            if result.error is None:
                work.estimate.finished(schedule.plan.runs[name].config, result.seconds)
    train = functools.partial(train_job, keep_checkpoints=args.keep_checkpoints, device=args.device)
    try:
        run_pool(schedule, train, workers, for_terminal(work, args.quiet))
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt("; the same command goes on where the sweep stopped") from error


def _finish(schedule: Schedule, args: SweepArgs, shards: int) -> None:
    say = (lambda text: None) if args.quiet else _say
    failed = [
        name
        for name, result in schedule.results.items()
        if result.error is not None and not result.diverged
    ]
    diverged = [name for name, result in schedule.results.items() if result.diverged]
    if diverged:
        say(f"{len(diverged)} run(s) diverged; as trials they count as worst.")
    if failed:
        say(
            f"{len(failed)} run(s) failed, see sweep.json; --retry-failed tries again. First: {failed[0]}"
        )
    for index in sorted(schedule.only):
        if schedule.blocked(index):
            cell = schedule.plan.cells[index]
            say(f"no choice for {cell.arm} at {cell.settings}: trials failed, or all diverged")
    if waiting := len(schedule.waiting()):
        say(f"time is up: {waiting} run(s) are left; the same command goes on with them.")
    elif shards > 1:
        say(
            "this shard is done; when all are, the same command without --shard writes sweep.json and the report."
        )
    elif args.report:
        _report(schedule, args)


def _report(schedule: Schedule, args: SweepArgs) -> None:
    from conadv.report import show_study, write_sweep_report

    out = schedule.folder.out
    summary = write_sweep_report(out, command=f"conadv sweep {args.spec}")
    if not args.quiet:
        show_study(summary)
        _say(f"report: {printable(out / 'report.html')}")


def _show_plan(schedule: Schedule) -> None:
    plan = schedule.plan
    costs: dict[str, float] = {}
    for index in schedule.only:
        cell = plan.cells[index]
        trial = cell.trials[schedule.choice(index) or 0]
        tuning = [name for each in cell.trials for name in each.tuning]
        cost = sum(relative_cost(plan.runs[name].config) for name in [*tuning, *trial.confirming])
        costs[cell.arm] = costs.get(cell.arm, 0.0) + cost
    for arm, cost in costs.items():
        cells = [
            plan.cells[index] for index in sorted(schedule.only) if plan.cells[index].arm == arm
        ]
        trials = " + ".join(str(sum(len(trial.tuning) for trial in cell.trials)) for cell in cells)
        confirming = sum(len(cell.trials[0].confirming) for cell in cells)
        _say(
            f"{arm}: {len(cells)} cell(s), tuning runs {trials}, confirmation runs {confirming}, "
            f"{100 * cost / sum(costs.values()):.0f} % of the time"
        )
    names = schedule.names()
    done = [schedule.results[name] for name in names if name in schedule.results]
    took = f" in {duration(sum(result.seconds for result in done))} of computing" if done else ""
    _say(
        f"{len(names)} runs in all, {len(done)} of them done{took}; in {printable(schedule.folder.out)}"
    )


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
