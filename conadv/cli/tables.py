"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from conadv.errors import printable, printable_lines

if TYPE_CHECKING:
    from conadv.report import Report

LESS = ("test loss", "train accuracy, %", "robust accuracy, %", "held-out accuracy, %")
"""Columns of a report that a narrow terminal goes without, after these the costs and the seeds."""

WRAPS = 32
"""Longer names wrap before a column goes."""


def fitted(
    rows: Sequence[Mapping[str, str]],
    console: Console,
    left: Collection[str],
    drop: Sequence[str] = (),
) -> Table:
    """Rows as a table. Where it is too wide for the console, columns in ``drop`` go, in that order.

    The first column may wrap, numbers never do. Columns in ``left`` are flushed left.
    """
    names, unlimited = list(rows[0]), console.options.update(width=1000)
    longest = max(len(row[names[0]]) for row in rows)
    for leaving in (None, *drop):
        names = [name for name in names if name != leaving]
        table = Table(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, header_style="bold")
        for name in names:
            justify, first = "left" if name in left else "right", name == names[0]
            table.add_column(Text(name), justify=justify, no_wrap=not first, overflow="fold")  # type: ignore[arg-type]
        for row in rows:
            # Text, not str: a name with square brackets is not markup
            table.add_row(*(Text(printable_lines(row[name])) for name in names))
        wide = Measurement.get(console, unlimited, table).maximum - max(0, longest - WRAPS)
        if wide <= console.width:
            break
    return table


def show_report(report: Report, out: Path, console: Console | None = None) -> None:
    """Print the table of arms, what to know before reading it, and where the report is."""
    console = console or Console(highlight=False)
    console.print(Text(printable(report.comparison.title), style="bold"))
    rows = [{str(k): str(v) for k, v in row.items()} for row in report.summary.to_dict("records")]
    console.print(fitted(rows, console, ("batch", "arm"), (*LESS, "cost", "seeds")))
    for note in report.notes:
        console.print(f"- {note}", markup=False)
    console.print(f"report: {printable(out)}", markup=False, soft_wrap=True)
