"""Records -> arms -> a page (HTML, Markdown), summary.json and a table for the terminal."""

from conadv.report.comparison import is_sweep
from conadv.report.page import Report, write_report, write_sweep_report

__all__ = ["Report", "is_sweep", "write_report", "write_sweep_report"]
