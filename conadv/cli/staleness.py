"""``conadv staleness RUN...``: what the staleness probe measured, as tables and pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from conadv.cli.options import say
from conadv.errors import ConadvError, printable
from conadv.training.documents import probes
from conadv.training.record import read_lines
from conadv.training.run_dir import RunDir


@dataclass
class Args:
    """Show what stale and predicted weights are worth to the attack, measured by
    --probe.every-epochs.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories; each gets its staleness.png."""


def command(args: Args) -> None:
    """Print each run's table and write its picture. Raises ConadvError for a run without probe
    lines.
    """
    if not args.runs:
        raise ConadvError("Name at least one run directory: conadv staleness RUN...")
    runs = list(map(RunDir, args.runs))
    read = [(run, _lines(run)) for run in runs]  # all before the first write
    from conadv.analysis.staleness import draw, table, text
    from conadv.analysis.style import to_png

    for run, lines in read:
        rows = table(lines)
        if rows.empty:
            raise ConadvError(
                f"{printable(run.record)} has no complete probe, from 'current' to 'noise'. "
                "Let the run go on: --resume."
            )
        image = to_png(draw(rows, _title(run, lines)))
        run.staleness.write_bytes(image)
        say(f"{printable(run.path)}\n{text(rows)}\npicture: {printable(run.staleness)}")


def _lines(run: RunDir) -> list[dict[str, Any]]:
    if not run.record.is_file():
        raise ConadvError(f"{printable(run.path)} is not a run: it holds no {run.record.name}.")
    lines = probes(read_lines(run.record), run.record)
    if not lines:
        raise ConadvError(
            f"{printable(run.path)} has no probe lines in its record. "
            "Train with --probe.every-epochs N to measure staleness."
        )
    return lines


def _title(run: RunDir, lines: list[dict[str, Any]]) -> str:
    """What was probed, e.g. "conadv tau=1, lars lr 3, batch 898, eps 0.2, 256 training images"."""
    config, probe = run.open(), lines[0]
    name = config.method + (f" tau={config.staleness}" if config.staleness else "")
    name += " + look-ahead" if config.lookahead else ""
    return (
        f"{name}, {config.optim.name} lr {config.optim.lr:g}, batch {config.global_batch_size:,}, "
        f"eps {probe['eps']:.4g}, {probe['images']} training images"
    )
