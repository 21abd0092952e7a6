"""Point-to-point messages that are under way."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import torch

from .clock import Mark

if TYPE_CHECKING:
    from .comm import Comm


class Transfer:
    """A message to or from rank ``peer``. ``begin`` and ``end`` say when it was under way (``end`` after :meth:`wait`).

    gloo cannot say whether a message has arrived without waiting for it, so there a thread waits. NCCL can.
    """

    def __init__(self, comm: Comm, work: Any, peer: int) -> None:
        self._comm, self._work, self._peer = comm, work, peer
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self.begin: Mark = time.monotonic()
        self.end: Mark = self.begin
        if comm.device.type == "cuda":
            self.begin = self.end = torch.cuda.Event(enable_timing=True)
            self.begin.record()
            return
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether :meth:`wait` would return, or raise, at once."""
        return bool(self._work.is_completed()) if self._thread is None else not self._thread.is_alive()

    def wait(self) -> None:
        """CPU: blocks until the message is through. CUDA: the current stream waits, this thread does not.

        Raises ConadvError, naming the peer, if it ended or did not answer within the timeout.
        """
        with self._comm.guard(self._peer):
            if self._thread is None:
                with torch.cuda.stream(self._comm.watcher):  # the moment of arrival, whatever else runs
                    self._work.wait()
                    self.end = torch.cuda.Event(enable_timing=True)
                    self.end.record()
                self._work.wait()
                return
            self._thread.join()
            if self._error is not None:
                raise self._error

    def _watch(self) -> None:
        try:
            self._work.wait()
        except BaseException as error:
            self._error = error
        self.end = time.monotonic()
