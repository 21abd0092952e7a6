"""Point-to-point messages that are under way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from conadv.distributed.clock import Mark


class Transfer:
    """A message to or from another rank. ``begin`` and ``end`` say when it was under way (``end`` after :meth:`wait`).

    ``start`` puts it on its way and returns torch's handle; what goes wrong there comes out of :meth:`wait` too.
    ``guard``: turns torch's errors into ConadvError. ``watcher``: on CUDA, a stream on which only events lie.
    gloo cannot say whether a message has arrived without waiting for it, so there a thread waits. NCCL can.
    """

    def __init__(
        self,
        start: Callable[[], Any],
        guard: Callable[[], AbstractContextManager[None]],
        watcher: torch.cuda.Stream | None,
    ) -> None:
        self._guard, self._watcher = guard, watcher
        self._start = start  # holds the tensor for as long as the thread below may need it
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._cuda = watcher is not None
        self.begin: Mark = time.monotonic()
        self.end: Mark = self.begin
        if self._cuda:
            self.begin = self.end = torch.cuda.Event(enable_timing=True)
            self.begin.record()
            with guard():
                self._work = start()
            return
        try:
            self._work = start()
        except (RuntimeError, ConnectionError) as error:  # the other end has gone already
            self._error = error
            return
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether :meth:`wait` would return, or raise, at once."""
        if self._cuda:
            return bool(self._work.is_completed())
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        """CPU: blocks until the message is through. CUDA: the current stream waits, this thread does not.

        Raises ConadvError, naming the peer, if it ended or did not answer within the timeout.
        """
        with self._guard():
            if self._cuda:
                with torch.cuda.stream(self._watcher):  # the moment of arrival, whatever else runs
                    self._work.wait()
                    self.end = torch.cuda.Event(enable_timing=True)
                    self.end.record()
                self._work.wait()
                return
            if self._thread is not None:
                self._thread.join()
            if self._error is not None:
                raise self._error

    def failure(self, limit: float) -> BaseException | None:
        """Why the message is not through ``limit`` seconds from now; None if it is. CPU only; does not raise.

        TimeoutError: it is still under way.

        In place of :meth:`wait`, for a peer that may be lost. A message that has failed, or is still under way, may
        hold its tensor until the process group's timeout.
        """
        assert not self._cuda
        if self._thread is not None:
            self._thread.join(limit)
            if self._thread.is_alive():
                return TimeoutError()
        return self._error

    def _watch(self) -> None:
        try:
            self._work.wait()
        except BaseException as error:
            self._error = error
        self.end = time.monotonic()
