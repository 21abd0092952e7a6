"""Running a step: phases, what waits between steps, look-ahead, and the order in which an executor runs things."""

from conadv.distributed.comm import Comm
from conadv.distributed.teams import Teams
from conadv.engine.attack_ranks.executor import Ranks
from conadv.engine.executors import Executor, Inline, Stream
from conadv.engine.guard import NonFiniteError
from conadv.engine.pending import Pending
from conadv.engine.step import TrainStep

__all__ = [
    "Comm",
    "Executor",
    "Inline",
    "NonFiniteError",
    "Pending",
    "Ranks",
    "Stream",
    "Teams",
    "TrainStep",
]
