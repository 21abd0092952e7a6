"""The demo: one network, one data set, one question. What does a full batch lose, and what wins it
back?

Seven arms on scikit-learn's digits, several seeds each, a few runs at a time, each an ordinary run
directory.
"""

from __future__ import annotations

import functools
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conadv.cli.sweep import Display
from conadv.config import recipes
from conadv.config.schema import replace
from conadv.errors import ConadvError
from conadv.sweep.cells import Run
from conadv.sweep.choose import Result
from conadv.sweep.pool import cores, run_pool

BASELINE = "full batch, LARS"

# The small batch has an optimizer of its own; all full-batch arms share the learning rate that was
# chosen for the baseline (results/digits_lr), which favours the baseline.
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
class Args:
    """Train the digits network at a small batch and at the full batch with every method, and
    compare.
    """

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


def command(args: Args) -> None:
    """Run all arms, write the report, show the table."""
    from conadv.cli.tables import show_report
    from conadv.report import write_report

    runs = plan(args.seeds, args.epochs)
    workers = args.jobs or min(8, cores())
    _run_all([run for _, run in runs], args.out, workers, args.quiet)
    command = f"conadv demo --seeds {args.seeds}"
    command += f" --epochs {args.epochs:g}" if args.epochs else ""
    report = write_report(
        [args.out / run.name for _, run in runs],
        args.out / "report.html",
        names={str(args.out / run.name): arm for arm, run in runs},
        baseline=BASELINE,
        title="conadv demo: 8x8 digits at the full batch",
        command=command,
    )
    show_report(report, args.out / "report.html")


def plan(seeds: int, epochs: float | None = None) -> list[tuple[str, Run]]:
    """(arm, run), seed by seed, so that a slow moment of the machine does not hit one arm only."""
    runs = []
    for seed in range(seeds):
        for arm, changes in ARMS.items():
            config = replace(recipes.get("digits"), seed=seed, **changes)
            if epochs is not None:
                warmup = config.schedule.warmup_epochs * epochs / (config.epochs or epochs)
                config = replace(config, epochs=epochs, schedule__warmup_epochs=warmup)
            runs.append((arm, Run(f"{_slug(arm)}-seed{seed}", config)))
    return runs


def _run_all(runs: list[Run], out: Path, workers: int, quiet: bool) -> None:
    """Train every run; the first error stops the rest."""
    display, results, waiting = Display(out, workers, quiet), dict[str, Result](), iter(runs)
    pool = run_pool(lambda: next(waiting, None), functools.partial(_train, out), workers)
    with display.bars, closing(pool):
        for going, ended in pool:
            results |= {run.name: result for run, result in ended}
            display.show(going, ended, runs, results)
            for run, result in ended:
                if result.error is not None:
                    raise ConadvError(f"{run.name}: {result.error}")


def _train(out: Path, run: Run) -> None:
    from conadv.training.loop import train

    train(run.config, out / run.name, overwrite=True)


def _slug(arm: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in arm.lower()).split())
