"""``conadv check DIR``: what a training run would stumble over in an image folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from conadv.errors import printable


@dataclass
class Args:
    """Read every image of DIR/{train,test or val}/<class>/ and list those that cannot be read.

    Exit code 0: nothing is wrong; 1: something is listed; 2: splits or class folders are wrong.
    """

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """Image folder."""
    workers: int | None = None
    """Threads that decode (default: a few more than there are processors)."""
    show: int = 20
    """How many findings are shown; --json has them all."""
    json: Path | None = None
    """Write all findings into this file."""
    quiet: bool = False
    """No progress."""


def command(args: Args) -> bool:
    """Check, show, write; returns whether nothing is wrong."""
    from conadv.data.check import check_folder  # imports torch
    from conadv.safe_io import write_atomic

    columns = (TextColumn("check"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console()
    quiet = args.quiet or not console.is_terminal
    with Progress(*columns, transient=True, disable=quiet, console=console) as bar:
        task = bar.add_task("check", total=None)
        images, bad = check_folder(
            args.folder,
            args.workers,
            lambda _, done, total: bar.update(task, completed=done, total=total),
        )
    if bad and args.show > 0:
        table = Table("path", "why")
        for finding in bad[: args.show]:
            table.add_row(Text(finding.path, overflow="fold"), Text(finding.reason))
        console.print(table)
    if len(bad) > args.show:
        more = f"and {len(bad) - args.show} more: --json FILE writes them all"
        console.print(more, highlight=False)
    verdict = f"{len(bad)} cannot be read" if bad else "nothing wrong"
    console.print(Text(f"{images} images in {printable(args.folder)}: {verdict}"), highlight=False)
    if args.json is not None:
        content = {"folder": printable(args.folder), "images": images, "bad": len(bad)}
        content["findings"] = [asdict(finding) for finding in bad]
        write_atomic(args.json, json.dumps(content, indent=1) + "\n")
    return not bad
