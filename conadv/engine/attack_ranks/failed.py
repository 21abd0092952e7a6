"""Attack ranks that have failed, and that learners go on without."""

from __future__ import annotations

from dataclasses import dataclass

from conadv.distributed.comm import first_line
from conadv.distributed.handle import Handle
from conadv.distributed.teams import Teams


@dataclass(frozen=True)
class FailedRank:
    """``rank``, a learner, goes on without ``attack_rank`` from before the update of ``step``."""

    step: int
    rank: int
    attack_rank: int
    reason: str


class FailedRanks:
    """The attack ranks that this learner goes on without, by their numbers in the world.

    One has failed when a message to or from it fails, or is not through after half of the process
    group's timeout: the other learners, which wait in a sum meanwhile, must not give up first. It
    stays failed for the rest of the run.
    """

    def __init__(self, teams: Teams) -> None:
        self.ranks: set[int] = set()
        self._teams, self._limit = teams, teams.world.timeout / 2
        self._news: list[FailedRank] = []

    def is_through(self, handle: Handle, attacker: int, step: int) -> bool:
        """Wait until a message is through, or its attack rank has failed (False).

        Raises ConadvError where an attack rank may not fail.
        """
        if not self._teams.may_lose:
            handle.wait()
            return True
        # Nobody waits twice for a rank that is gone: its other messages are through, or never are.
        error = handle.failure(0.0 if attacker in self.ranks else self._limit)
        if error is not None and attacker not in self.ranks:
            self.ranks.add(attacker)
            silent = isinstance(error, TimeoutError)
            reason = f"no word within {self._limit:g} s" if silent else first_line(error)
            self._news.append(FailedRank(step, self._teams.world.rank, attacker, reason))
        return error is None

    def take(self) -> list[FailedRank]:
        """Those that nobody has been told of yet."""
        news, self._news = self._news, []
        return news
