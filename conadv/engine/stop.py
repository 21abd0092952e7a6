"""Requests to stop: what any rank was asked for, all ranks learn within the sum of the losses.

A collective of its own per step would cost a round trip; one more number in a sum that is made
anyway costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable

INTERRUPT, TERMINATE = 1, 2
"""The stronger request is the larger number; 0 is none. Any rank's is everybody's."""


class StopRequest:
    """This rank's request to stop, and how it travels.

    ``ask``: called once per step; the request that this process has received (see
    conadv.training.signals), 0 for none.
    """

    def __init__(self, ranks: int) -> None:
        self.ask: Callable[[], int] | None = None
        self._ranks = ranks
        self._heard = 0

    def hear(self, request: int) -> None:
        """Take in a request from a rank that takes no part in the sum (an attack rank)."""
        self._heard = max(self._heard, request)

    def mine(self) -> int:
        return max(self._heard, 0 if self.ask is None else self.ask())

    def encoded(self) -> int:
        """A number whose sum over ranks tells what the strongest request was.

        Interrupts of all ranks sum to ``ranks`` at most, so a single request to terminate counts
        for one more.
        """
        request = self.mine()  # as late as possible: a signal may come at any time
        return self._ranks + 1 if request == TERMINATE else request

    def decoded(self, total: float) -> int:
        """The strongest request of all ranks, from the sum of their :meth:`encoded` numbers."""
        return TERMINATE if total > self._ranks else int(total > 0)
