"""Pure functions of a run's record (the names here), and of a trained model.

Those of a model need torch and are imported from their own files: objective, hessian, sharpness, landscape, and model,
which has all of them.
"""

from conadv.analysis.shares import (
    Hidden,
    PhaseRow,
    StepRow,
    hidden_attack,
    hidden_communication,
    summary,
)
from conadv.analysis.timeline import Lane, Timeline, timeline
from conadv.analysis.trace import trace

__all__ = [
    "Hidden",
    "Lane",
    "PhaseRow",
    "StepRow",
    "Timeline",
    "hidden_attack",
    "hidden_communication",
    "summary",
    "timeline",
    "trace",
]
