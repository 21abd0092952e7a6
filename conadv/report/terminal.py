"""What `conadv report` and the demo show when the report is written."""

from __future__ import annotations

from rich.console import Console

from . import words
from .summary import Summary
from .table import arms_table


def show(summary: Summary, console: Console | None = None) -> None:
    """Write the arms table, the findings and the notes to ``console`` (standard output by default)."""
    console = console or Console(highlight=False)
    console.print(words.lead(summary.comparison), markup=False)
    console.print(arms_table(summary.comparison, width=console.width))
    for sentence in (*words.findings(summary.comparison), *words.notes(summary.comparison)):
        console.print(f"- {sentence}", markup=False)
