"""The demo: one network, one data set, one question. What does a full batch lose, and what wins it back?

Seven arms on scikit-learn's digits, several seeds each, a few runs at a time, each an ordinary run directory.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conadv.config import recipes
from conadv.config.schema import Config, replace
from conadv.errors import ConadvError, printable
from conadv.sweep.display import Workload, for_terminal
from conadv.sweep.pool import Job, Outcome, cores, run_pool
from conadv.training.observer import Silent

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


def demo(args: DemoArgs) -> None:
    """Run all arms, write the report, show the table. Raises ConadvError for impossible arguments."""
    from conadv.report import show, write_report

    jobs = list(plan(args.out, args.seeds, args.epochs))
    run_all(jobs, args.jobs or min(8, cores()), args.quiet)
    command = f"conadv demo --seeds {args.seeds}" + (
        f" --epochs {args.epochs:g}" if args.epochs else ""
    )
    summary = write_report(
        [job.out for job in jobs],
        args.out / "report.html",
        names={str(job.out): job.arm for job in jobs},
        baseline=BASELINE,
        title="conadv demo: 8x8 digits at the full batch",
        command=command,
    )
    show(summary)
    sys.stdout.write(f"report: {printable(args.out / 'report.html')}\n")


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
    source = _Listed(jobs)
    run_pool(source, _train, workers, for_terminal(Workload(source.waiting, workers), quiet))


class _Listed:
    """A source of jobs for the pool: one after the other, and every one must go well."""

    def __init__(self, jobs: list[Job]) -> None:
        self._jobs = list(reversed(jobs))

    def next(self) -> Job | None:
        return self._jobs.pop() if self._jobs else None

    def done(self, job: Job, outcome: Outcome) -> None:
        if outcome.error is not None:
            raise ConadvError(
                f"{job.label}: {outcome.error}" + (f"\n{outcome.trace}" if outcome.trace else "")
            )

    def waiting(self) -> list[Config]:
        return [job.config for job in self._jobs]


def _train(job: Job, observer: Silent) -> None:
    from conadv.training.trainer import train

    train(job.config, job.out, overwrite=True, observer=observer)


def _slug(arm: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in arm.lower()).split())
