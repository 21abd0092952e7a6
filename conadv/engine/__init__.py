"""Running a step: phases, what waits between steps, look-ahead, and the order in which an executor runs things."""

from .comm import Comm
from .executor import Executor, Inline, Stream
from .guard import NonFiniteError
from .pending import Pending
from .ranks import Ranks
from .step import TrainStep
from .teams import Teams

__all__ = ["Comm", "Executor", "Inline", "NonFiniteError", "Pending", "Ranks", "Stream", "Teams", "TrainStep"]
