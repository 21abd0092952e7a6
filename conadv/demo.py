"""The demo: one network, one data set, one question. What does a full batch lose, and what wins it back?

Seven arms on scikit-learn's digits, several seeds each, a few runs at a time, each an ordinary run directory.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import queue
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import recipes
from .allocator import keep_freed_memory
from .config import Config, replace
from .errors import ConadvError
from .progress import Silent
from .types import StepRecord

BASELINE = "full batch, LARS"

# The small batch has an optimizer of its own; all full-batch arms share the learning rate that was chosen for the
# baseline (benchmarks/digits_lr.py), which favours the baseline.
ARMS: dict[str, dict[str, Any]] = {
    "small batch 32, SGD": {
        "global_batch_size": 32,
        "optim__name": "sgd",
        "optim__lr": 0.2,
        "schedule__warmup_epochs": 2,
    },
    BASELINE: {},
    "+ second clean view": {"method": "multiview"},
    "+ random-sign noise": {"method": "noise"},
    "+ sequential attack": {"method": "disadv"},
    "+ ConAdv, tau = 1": {"method": "conadv", "staleness": 1},
    "+ ConAdv, tau = 1, look-ahead": {"method": "conadv", "staleness": 1, "lookahead": True},
}


@dataclass
class DemoArgs:
    """Train the digits network at a small batch and at the full batch with every method, and compare."""

    out: Path = Path("runs/demo")
    """Folder for the runs, report.html, report.md and summary.json."""
    seeds: int = 4
    """Seeds per arm, from 0."""
    jobs: int | None = None
    """Runs at a time, one thread each (default: one per core, at most 8)."""
    epochs: float | None = None
    """Epochs of every run (default: the recipe's 80)."""
    quiet: bool = False
    """Show the final table only."""


@dataclass(frozen=True)
class Job:
    """One run of the demo."""

    arm: str
    config: Config
    out: Path


def demo(args: DemoArgs) -> None:
    """Run all arms, write the report, show the table. Raises ConadvError for impossible arguments."""
    if args.seeds < 1 or (args.jobs is not None and args.jobs < 1):
        raise ConadvError("--seeds and --jobs must be 1 or more.")
    from .report import show, write_report

    jobs = list(plan(args.out, args.seeds, args.epochs))
    run_all(jobs, args.jobs or min(8, _cores()), args.quiet)
    command = f"conadv demo --seeds {args.seeds}" + (f" --epochs {args.epochs:g}" if args.epochs else "")
    summary = write_report(
        [job.out for job in jobs],
        args.out / "report.html",
        names={str(job.out): job.arm for job in jobs},
        baseline=BASELINE,
        title="conadv demo: 8x8 digits at the full batch",
        command=command,
    )
    show(summary)
    sys.stdout.write(f"report: {args.out / 'report.html'}\n")


def plan(out: Path, seeds: int, epochs: float | None = None) -> Iterator[Job]:
    """All runs, seed by seed, so that a slow moment of the machine does not hit one arm only."""
    for seed in range(seeds):
        for arm, changes in ARMS.items():
            config = replace(recipes.get("digits"), seed=seed, **changes)
            if epochs is not None:
                warmup = config.schedule.warmup_epochs * epochs / (config.epochs or epochs)
                config = replace(config, epochs=epochs, schedule__warmup_epochs=warmup)
            yield Job(arm, config, out / f"{_slug(arm)}-seed{seed}")


def run_all(jobs: list[Job], workers: int, quiet: bool) -> None:
    """Train every job in ``workers`` processes of one thread each; the first error stops the rest."""
    context = mp.get_context("spawn")
    reports: Any = context.Manager().Queue()
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        running: dict[Future[None], int] = {
            pool.submit(_train, job, number, reports): number for number, job in enumerate(jobs)
        }
        with _display(jobs, quiet) as show:
            try:
                while running:
                    done, _ = wait(running, timeout=0.25, return_when=FIRST_COMPLETED)
                    show.advance(_drain(reports))
                    for future in done:
                        show.finished(running.pop(future))
                        future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _start_worker() -> None:
    import torch

    torch.set_num_threads(1)
    keep_freed_memory()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed demo must not leave its workers training on."""
    parent = mp.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _train(job: Job, number: int, reports: Any) -> None:
    from .trainer import train

    train(job.config, job.out, overwrite=True, observer=_Reporter(number, reports))


class _Reporter(Silent):
    """Tells the parent process how far a run is."""

    def __init__(self, number: int, reports: Any) -> None:
        self._number, self._reports = number, reports

    def start(self, title: str, first_step: int, num_steps: int) -> None:
        self._every = max(1, num_steps // 40)
        self._total = num_steps

    def step(self, record: StepRecord) -> None:
        if record.step % self._every == 0:
            self._reports.put((self._number, record.step / self._total))


def _drain(reports: Any) -> dict[int, float]:
    """The latest share done of each run that reported."""
    latest: dict[int, float] = {}
    while True:
        try:
            number, share = reports.get_nowait()
        except queue.Empty:
            return latest
        latest[number] = share


class _Lines:
    """One line per finished run, for output that is no terminal."""

    def __init__(self, jobs: list[Job], quiet: bool) -> None:
        self._jobs, self._quiet, self._count = jobs, quiet, 0

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None: ...

    def advance(self, shares: dict[int, float]) -> None: ...

    def finished(self, number: int) -> None:
        self._count += 1
        if not self._quiet:
            job = self._jobs[number]
            sys.stdout.write(f"[{self._count}/{len(self._jobs)}] {job.arm}, seed {job.config.seed}\n")
            sys.stdout.flush()


class _Bars(_Lines):
    """A bar for the whole demo with time left, and one for each run that is going."""

    def __enter__(self) -> _Bars:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Left

        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        self._bars = Progress(*columns, TextColumn("left"), Left(elapsed_when_finished=False))
        self._all = self._bars.add_task(f"[bold]{len(self._jobs)} runs", total=sum(map(_weight, self._jobs)))
        self._tasks: dict[int, Any] = {}
        self._shares: dict[int, float] = {}
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def advance(self, shares: dict[int, float]) -> None:
        for number, share in shares.items():
            if number not in self._tasks:
                job = self._jobs[number]
                self._tasks[number] = self._bars.add_task(f"  {job.arm}, seed {job.config.seed}", total=1.0)
            self._bars.update(self._tasks[number], completed=share)
        self._update(shares)

    def finished(self, number: int) -> None:
        if number in self._tasks:
            self._bars.remove_task(self._tasks[number])
        self._update({number: 1.0})

    def _update(self, shares: dict[int, float]) -> None:
        self._shares |= shares
        self._bars.update(self._all, completed=sum(_weight(self._jobs[n]) * s for n, s in self._shares.items()))


def _weight(job: Job) -> float:
    """Roughly how long a run takes beside the others: forward-backward passes, attacks at two thirds."""
    views = 1.0 if job.config.method == "vanilla" else 2.0
    attack = 0.67 if job.config.method in ("disadv", "conadv") else 0.0
    small = 1.6 if job.config.global_batch_size < 64 else 1.0
    return (views + attack) * small


def _display(jobs: list[Job], quiet: bool) -> _Lines:
    return _Bars(jobs, quiet) if sys.stdout.isatty() and not quiet else _Lines(jobs, quiet)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _slug(arm: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in arm.lower()).split())
