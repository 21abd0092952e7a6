"""A tensor on its way over the network: a sum over ranks, or a message to or from one rank."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from conadv.distributed.clock import Mark, now


class Handle:
    """``tensor`` belongs to the network until :meth:`wait` has returned it.

    start: puts the tensor on its way and returns torch's work.
    guard: a context that turns torch's errors into ConadvError. message: from one rank to another.
    stream: on CUDA, a stream that carries nothing but events, so that the moment of arrival is
    known whatever the current stream is busy with.

    ``begin`` and ``end`` say when the tensor was under way; ``end`` holds after ``wait``.
    """

    def __init__(
        self,
        tensor: Tensor,
        start: Callable[[Tensor], Any],
        guard: Callable[[], AbstractContextManager[None]],
        stream: torch.cuda.Stream | None = None,
        *,
        message: bool = False,
    ) -> None:
        self._tensor, self._guard, self._stream = tensor, guard, stream
        self._arrival: concurrent.futures.Future[float] = concurrent.futures.Future()  # CPU
        self.begin: Mark = now(cuda=stream is not None)
        self.end: Mark = self.begin
        if stream is not None:
            with guard():
                self._work = start(tensor)
            return
        try:
            self._work = start(tensor)
        except (RuntimeError, ConnectionError) as error:  # the other end has gone: wait() says so
            self._arrival.set_exception(error)
            return
        if message:
            # gloo cannot say whether a message has arrived without waiting for it: a thread waits
            Thread(target=self._settle, args=(self._work.wait,), daemon=True).start()
        else:
            self._work.get_future().add_done_callback(lambda future: self._settle(future.value))

    @property
    def done(self) -> bool:
        """Whether :meth:`wait` would return, or raise, at once."""
        return bool(self._work.is_completed()) if self._stream else self._arrival.done()

    def wait(self) -> Tensor:
        """The tensor. CPU: blocks until it is there. CUDA: the stream waits, this thread does not.

        Raises ConadvError if another rank has ended or does not answer within the timeout.
        """
        with self._guard():
            if self._stream is None:
                self.end = self._arrival.result()
            else:
                with torch.cuda.stream(self._stream):
                    self._work.wait()
                    self.end = now(cuda=True)
                self._work.wait()
        return self._tensor

    def failure(self, seconds: float) -> BaseException | None:
        """Why the message is not through ``seconds`` from now; None if it is. CPU only.

        TimeoutError: it is still under way. In place of :meth:`wait`, for a peer that may fail. A
        message that has not come through may hold its tensor until the process group's timeout.
        """
        assert self._stream is None
        try:
            return self._arrival.exception(seconds)
        except concurrent.futures.TimeoutError:
            return TimeoutError()

    def _settle(self, finish: Callable[[], object]) -> None:
        try:
            finish()
        except BaseException as error:
            self._arrival.set_exception(error)
        else:
            self._arrival.set_result(time.monotonic())
