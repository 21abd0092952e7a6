"""Attack ranks that learners go on without."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

from conadv.distributed.comm import Comm, first_line
from conadv.distributed.transfer import Transfer


@dataclass(frozen=True)
class FailedRank:
    """``rank``, a learner, has lost ``attack_rank`` before the update of ``step`` (numbers of the world)."""

    step: int
    rank: int
    attack_rank: int
    reason: str


class FailedRanks:
    """The attack ranks that this learner has lost. An attack rank that is lost stays so.

    It is lost when a message to or from it fails, or is not through after half of the process group's timeout: the
    other learners, which wait in a sum meanwhile, must not give up first.
    """

    def __init__(self, world: Comm) -> None:
        self.ranks: set[int] = set()
        self._world, self._limit = world, world.timeout / 2
        self._news: list[FailedRank] = []

    def check(self, transfer: Transfer, attacker: int, step: int, *, now: bool = False) -> bool:
        """Whether a message is through; otherwise its attack rank is lost.

        Blocks until one or the other is known, unless it must be said ``now``.
        """
        error = transfer.failure(0.0 if now or attacker in self.ranks else self._limit)
        if error is not None and attacker not in self.ranks:
            self.ranks.add(attacker)
            self._news.append(FailedRank(step, self._world.rank, attacker, self._words(error)))
        return error is None

    def _words(self, error: BaseException) -> str:
        if isinstance(error, TimeoutError):
            return f"no word within {self._limit:g} s"
        said = re.sub(r"^\[\S+:\d+\] ", "", first_line(error))  # the line of gloo's own source
        return said.split(". ")[0].rstrip(".")

    def overdue(self, transfer: Transfer) -> bool:
        """Whether a message has been under way for longer than one would wait for it."""
        assert isinstance(transfer.begin, float)  # CPU
        return not transfer.done and time.monotonic() - transfer.begin > self._limit

    def take(self) -> list[FailedRank]:
        """What nobody has been told of yet."""
        news, self._news = self._news, []
        return news
