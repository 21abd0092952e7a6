"""What `conadv report` and the demo show when the report is written."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from conadv.errors import printable, printable_lines
from conadv.report import words
from conadv.report.study import StudySummary, answers
from conadv.report.summary import Summary
from conadv.report.table import arms_table


def show(summary: Summary, console: Console | None = None) -> None:
    """Write the arms table, the findings and the notes to ``console`` (standard output by default)."""
    console = console or Console(highlight=False)
    console.print(printable(words.lead(summary.comparison)), markup=False)
    console.print(arms_table(summary.comparison, width=console.width))
    for sentence in (*words.findings(summary.comparison), *words.notes(summary.comparison)):
        console.print(printable(f"- {sentence}"), markup=False)


def show_study(summary: StudySummary, console: Console | None = None) -> None:
    """Write what a sweep's report has at the top to ``console`` (standard output by default)."""
    console = console or Console(highlight=False)
    study = summary.study
    console.print(printable(answers.lead(study)), markup=False)
    for question, sentences in (
        ("Was the baseline tuned?", answers.tuned(study)),
        ("Is it the attack, or just the extra images?", answers.attack_or_images(study)),
        ("At equal cost?", answers.at_equal_cost(study)),
    ):
        console.print(Text(f"\n{question}", style="bold"))
        console.print(printable(" ".join(sentences)), markup=False)
    console.print(_answers_table(summary))


def _answers_table(summary: StudySummary) -> Table:
    table = Table(header_style="bold", box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    for index, name in enumerate(answers.head(summary.study)):
        table.add_column(
            Text(printable_lines(name)), justify="right" if index else "left", overflow="fold"
        )
    for line, marks in answers.rows(summary.study):
        # Text, not str: a label with square brackets must not be read as markup
        colours = {"higher": "green", "lower": "red"}
        table.add_row(
            Text(printable(line)),
            *(Text(mark.text, style=colours.get(mark.verdict, "")) for mark in marks),
        )
    return table
