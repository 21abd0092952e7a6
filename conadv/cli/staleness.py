"""``conadv staleness RUN...``: what the staleness probe measured, as a table and a picture for each run."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from conadv.errors import ConadvError, printable
from conadv.training.documents import probes
from conadv.training.record import read_lines
from conadv.training.run_dir import RunDir


@dataclass
class StalenessArgs:
    """Show what stale and predicted weights are worth to the attack, as runs with --probe.every-epochs measured it."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories; each gets its staleness.png."""


def command(args: StalenessArgs) -> None:
    """Print each run's table and write its picture. Raises ConadvError for a run whose record has no probe lines."""
    if not args.runs:
        raise ConadvError("Name at least one run directory: conadv staleness RUN...")
    read = [
        (RunDir(path), _lines(RunDir(path))) for path in args.runs
    ]  # all, before anything is written
    for run, lines in read:
        _show(run, lines)


def _lines(run: RunDir) -> list[dict[str, Any]]:
    if not run.record.is_file():
        raise ConadvError(f"{printable(run.path)} is not a run: it holds no {run.record.name}.")
    lines = probes(read_lines(run.record), run.record)
    if not lines:
        raise ConadvError(
            f"{printable(run.path)} has no probe lines in its record. Train with --probe.every-epochs N to measure "
            "staleness."
        )
    return lines


def _show(run: RunDir, lines: list[dict[str, Any]]) -> None:
    from conadv.analysis.staleness import draw, table, text, to_png  # needs matplotlib

    rows = table(lines)
    if not rows:
        raise ConadvError(
            f"{printable(run.record)} has no whole probe, from 'current' to 'noise'. Let the run go on: --resume."
        )
    image = to_png(draw(rows, _title(run, lines)))
    try:
        run.staleness.write_bytes(image)
    except OSError as error:
        raise ConadvError(f"Cannot write {printable(run.staleness)}: {error}.") from error
    sys.stdout.write(
        "\n".join([printable(run.path), *text(rows), f"picture: {printable(run.staleness)}"]) + "\n"
    )


def _title(run: RunDir, lines: list[dict[str, Any]]) -> str:
    """What was probed, e.g. "conadv tau=1, lars lr 3, batch 898, eps 0.2, 256 images"."""
    config = run.open()
    name = config.method + (f" tau={config.staleness}" if config.staleness else "")
    name += " + look-ahead" if config.lookahead else ""
    probe = lines[0]
    return (
        f"{name}, {config.optim.name} lr {config.optim.lr:g}, batch {config.global_batch_size:,}, "
        f"eps {probe['eps']:.4g}, {probe['images']} training images"
    )
