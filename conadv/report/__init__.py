"""Records -> arms -> HTML, Markdown, summary.json and a terminal table. Only the command line and the demo use it."""

from conadv.report.compare import Arm, Comparison, compare
from conadv.report.html import write_report
from conadv.report.load import Run, find_runs, load_run
from conadv.report.study import StudySummary, is_sweep, write_sweep_report
from conadv.report.summary import Summary
from conadv.report.table import arms_table
from conadv.report.terminal import show, show_study

__all__ = [
    "Arm",
    "Comparison",
    "Run",
    "StudySummary",
    "Summary",
    "arms_table",
    "compare",
    "find_runs",
    "is_sweep",
    "load_run",
    "show",
    "show_study",
    "write_report",
    "write_sweep_report",
]
