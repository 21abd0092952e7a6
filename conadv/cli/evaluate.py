"""``conadv eval``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from conadv.cli.options import say, set_threads, trust
from conadv.errors import printable


@dataclass
class Args:
    """Evaluate a run's newest checkpoint on its own data, clean and under PGD."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    best: bool = False
    """The checkpoint with the best validation accuracy instead (checkpoint.keep_best)."""
    data: Path | None = None
    """Where the data lie now, if they have moved, or other images of the same classes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    """CPU threads that torch uses."""
    model: str | None = None
    """Only for a run whose model is code of yours: repeat its module:function, to say that it may
    run.
    """


def command(args: Args) -> None:
    set_threads(args.threads)
    from conadv.training.run_dir import RunDir

    RunDir(args.run).open()
    trust(args.model)
    from conadv.distributed.environment import pick_device
    from conadv.training.results import measure
    from conadv.training.resume import load_run

    run = load_run(args.run, pick_device(args.device), best=args.best, data=args.data)
    for name, result in measure(run).items():
        if result is not None:
            accuracy = f"accuracy {100 * result.accuracy:6.2f} %"
            say(f"{name:<10}  {accuracy}  loss {result.loss:.4f}  images {result.images}")
    for bad in run.data.bad.values():
        say(printable(f"skipped an unreadable image: {bad['path']} ({bad['reason']})"))
