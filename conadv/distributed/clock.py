"""When the phases of a step ran: seconds per phase, and the spans behind them on one clock."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from conadv.types import Span

Mark = float | torch.cuda.Event
"""A moment: seconds of ``time.monotonic()``, or an event on a CUDA stream."""


def now(*, cuda: bool) -> Mark:
    """This moment; with ``cuda``, the moment that the current stream gets here."""
    if not cuda:
        return time.monotonic()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class Phases(NamedTuple):
    """What a process did: seconds by phase, all spans in their order, seconds in any phase."""

    by_name: dict[str, float]
    spans: list[Span]
    seconds: float


class PhaseClock:
    """Notes the phases of this process until :meth:`collect`. Phases may repeat, not nest.

    Times are seconds of ``time.monotonic()``, which the processes of one host share, minus
    ``origin``; a run sets it so that the ranks of all hosts count from the same moment (see
    :func:`conadv.distributed.offset.clock_offset`). On CUDA a phase lies between events on the
    current stream: it is the device's time, not the time to queue the work.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Mark, Mark, bool]] = []
        self._anchor: tuple[torch.cuda.Event, float] | None = None
        self.origin = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begin = self.mark()
        yield
        self.add(name, begin, self.mark())

    def mark(self) -> Mark:
        """This moment: on CUDA, when the current stream gets here."""
        if self._cuda and self._anchor is None:
            self._drop_anchor()
        return now(cuda=self._cuda)

    def add(self, name: str, begin: Mark, end: Mark, *, beside: bool = False) -> None:
        """Note a span measured elsewhere. ``beside`` this process's phases: the network."""
        self._marks.append((name, begin, end, beside))

    def discard(self) -> None:
        """Forget what was noted, without waiting for the device."""
        self._marks.clear()

    def collect(self) -> Phases:
        """What was noted since the last call. On CUDA a sync point: it waits for the last event."""
        seconds: dict[str, float] = {}
        spans, own = [], []
        for name, begin, end, beside in self._marks:
            first, last = self._seconds(begin), self._seconds(end)
            if not beside:
                seconds[name] = seconds.get(name, 0.0) + last - first
                own.append((first, last))
            spans.append((name, round(first - self.origin, 6), round(last - self.origin, 6)))
        self._marks.clear()
        if self._anchor is not None:
            # elapsed_time is float32 milliseconds: only a recent anchor keeps microseconds
            self._drop_anchor()
        return Phases(seconds, spans, covered(own))

    def _seconds(self, mark: Mark) -> float:
        if isinstance(mark, float):
            return mark
        assert self._anchor is not None
        mark.synchronize()
        event, at = self._anchor
        return at + float(event.elapsed_time(mark)) / 1000

    def _drop_anchor(self) -> None:
        """Tie the device's clock to the host's. Sync point."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        self._anchor = event, time.monotonic()


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of the union of (begin, end) ``intervals``: phases on two streams may overlap."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return round(total, 6)
