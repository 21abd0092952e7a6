"""Running a step: phases, what waits between steps, look-ahead, and the order in which an executor runs things."""

from .comm import Comm
from .executor import Inline
from .pending import Pending
from .step import NonFiniteError, TrainStep

__all__ = ["Comm", "Inline", "NonFiniteError", "Pending", "TrainStep"]
