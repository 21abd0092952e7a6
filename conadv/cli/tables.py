"""A report on the terminal."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from conadv.errors import printable, printable_lines
from conadv.report import Report

WIDTHS = {"seeds": 90, "cost": 90, "held-out accuracy, %": 120, "robust accuracy, %": 120}
WIDTHS |= {"train accuracy, %": 140, "test loss": 160}


def show_report(report: Report, out: Path, console: Console | None = None) -> None:
    """Print the table of arms, what to know before reading it, and where the report is."""
    console = console or Console(highlight=False)
    console.print(Text(printable(report.comparison.title), style="bold"))
    console.print(terminal_table(report.summary, console.width))
    for note in report.notes:
        console.print(f"- {note}", markup=False)
    console.print(f"report: {printable(out)}", markup=False, soft_wrap=True)


def terminal_table(frame: pd.DataFrame, width: int) -> Table:
    """The columns for which a terminal of ``width`` characters has room."""
    table = Table(header_style="bold", box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    shown = [name for name in frame if WIDTHS.get(name, 0) <= width]
    for name in shown:
        left = name in ("batch", "arm")
        table.add_column(Text(name), justify="left" if left else "right", overflow="fold")
    for row in frame[shown].to_numpy():
        # Text, not str: an arm's name with square brackets is not markup
        table.add_row(*(Text(printable_lines(cell)) for cell in row))
    return table
