"""Seconds per phase of a step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class PhaseClock:
    """Adds up the time of named phases until :meth:`collect`. Phases may repeat, not nest.

    On CUDA a phase is measured between events on the current stream, so that it is the device's time and not the time
    to queue the work; :meth:`collect` waits for the last event (a sync point).
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self._cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
            return
        begin = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - begin)

    def add(self, name: str, seconds: float) -> None:
        """Count time that was measured elsewhere, such as waiting for data."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def discard(self) -> None:
        """Forget what was measured, without waiting for the device."""
        self._events.clear()
        self._seconds.clear()

    def collect(self) -> dict[str, float]:
        """Seconds per phase since the last call."""
        for name, start, end in self._events:
            end.synchronize()
            self.add(name, start.elapsed_time(end) / 1000)
        self._events.clear()
        seconds, self._seconds = self._seconds, {}
        return seconds
