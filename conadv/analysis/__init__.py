"""Pure functions of a run's record."""

from .shares import Hidden, PhaseRow, StepRow, hidden_attack, hidden_communication, summary
from .timeline import Lane, Timeline, timeline
from .trace import trace

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
