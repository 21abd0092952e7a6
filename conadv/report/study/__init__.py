"""A sweep folder -> Study -> differences, costs, figures, and its report. Scripts that draw docs pages use it too."""

from .contrast import Contrast, differences
from .cost import Cost, EqualCost, cost, equal_cost
from .figures import accuracy_figure, cost_figure
from .gallery import Gallery, gallery
from .page import StudySummary, write_sweep_report
from .sharpness import sharpness_figure
from .staleness_figures import staleness_course_figure, staleness_figure
from .sweep import Cell, Study, Trial, is_sweep, load_sweep

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
