"""What an analysis reports while it runs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Watch:
    """Hears what is being done: the part's name, and work in forward passes of one image. Shows nothing.

    ``total`` is what the whole analysis has to do at most, ``done`` what of it is done; ``seconds`` per finished part.
    """

    def __init__(self) -> None:
        self.part, self.total, self.done = "", 0.0, 0.0
        self.seconds: dict[str, float] = {}

    def begin(self, total: float) -> None:
        self.total = total

    def tick(self, work: float) -> None:
        self.done += work

    @contextmanager
    def timed(self, part: str, work: float) -> Iterator[None]:
        """Time a part. Afterwards ``done`` has grown by ``work``, however early the part was finished."""
        self.part, before, begin = part, self.done, time.monotonic()
        self.tick(0.0)
        yield
        self.seconds[part] = time.monotonic() - begin
        self.tick(before + work - self.done)
