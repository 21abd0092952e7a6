"""A sweep folder -> Study -> differences, costs, figures, and its report. Scripts that draw docs pages use it too."""

from conadv.report.study.contrast import Contrast, differences
from conadv.report.study.cost import Cost, EqualCost, cost, equal_cost
from conadv.report.study.figures import accuracy_figure, cost_figure
from conadv.report.study.gallery import Gallery, gallery
from conadv.report.study.page import StudySummary, write_sweep_report
from conadv.report.study.sharpness import sharpness_figure
from conadv.report.study.staleness_figures import staleness_course_figure, staleness_figure
from conadv.report.study.sweep import Cell, Study, Trial, is_sweep, load_sweep

__all__ = [
    "Cell",
    "Contrast",
    "Cost",
    "EqualCost",
    "Gallery",
    "Study",
    "StudySummary",
    "Trial",
    "accuracy_figure",
    "cost",
    "cost_figure",
    "differences",
    "equal_cost",
    "gallery",
    "is_sweep",
    "load_sweep",
    "sharpness_figure",
    "staleness_course_figure",
    "staleness_figure",
    "write_sweep_report",
]
