"""Records -> arms -> HTML, Markdown, summary.json and a terminal table. Only the command line and the demo use it."""

from .compare import Arm, Comparison, compare
from .html import write_report
from .load import Run, find_runs, load_run
from .summary import Summary
from .table import arms_table
from .terminal import show

__all__ = [
    "Arm",
    "Comparison",
    "Run",
    "Summary",
    "arms_table",
    "compare",
    "find_runs",
    "load_run",
    "show",
    "write_report",
]
