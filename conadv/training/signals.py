"""Signals that ask a run to stop: at the next step boundary, with a checkpoint.

SIGTERM is what Slurm, Kubernetes and torchrun send before they kill; SIGHUP is a terminal that
closes, and counts as SIGTERM; SIGINT is Ctrl-C. The first of them is a request, which all ranks
learn of within the step's own all-reduce (conadv.engine.stop). After it SIGINT has the system's own
action again: a second Ctrl-C ends the process at once, even while it waits for something.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from conadv.engine.stop import INTERRUPT, TERMINATE
from conadv.errors import ConadvError, printable

EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143
_NAMES = {INTERRUPT: "SIGINT", TERMINATE: "SIGTERM"}
_REQUESTS = {signal.SIGINT: INTERRUPT, signal.SIGTERM: TERMINATE}
if hasattr(signal, "SIGHUP"):  # not on Windows
    _REQUESTS[signal.SIGHUP] = TERMINATE


class Stopped(KeyboardInterrupt):
    """A run has stopped because a signal asked it to, and its checkpoint is written. ``code``: the
    exit code.
    """

    def __init__(self, request: int, steps: int) -> None:
        self.signal = _NAMES[request]
        self.code = EXIT_TERMINATED if request == TERMINATE else EXIT_INTERRUPTED
        resume = f"--resume goes on from step {steps}"
        super().__init__(f" by {self.signal} after {steps} steps; {resume}")


class Signals:
    """Inside the block SIGTERM, SIGHUP and SIGINT are requests to stop: ``request`` is then
    INTERRUPT or TERMINATE.

    A signal that this process was started to ignore stays ignored: SIGHUP under nohup, SIGINT of a
    script's ``&``. ``tell`` hears of the first one, on a thread of its own (what a handler may call
    is little). The earlier handlers come back at the end. Off the main thread, where Python takes
    no handlers, nothing changes.
    """

    def __init__(self, tell: Callable[[str], None] | None = None) -> None:
        self.request = 0
        self._tell = tell
        self._before: dict[signal.Signals, Any] = {}
        self._pid = os.getpid()

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            heard = [n for n in _REQUESTS if signal.getsignal(n) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._handle) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a worker process that was forked inside the block
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        first = not self.request
        self.request = max(self.request, _REQUESTS[signal.Signals(number)])
        if signal.SIGINT in self._before:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if first and self._tell is not None:
            name = _NAMES[self.request]
            text = f"{name}: stopping after this step with a checkpoint; Ctrl-C leaves at once"
            threading.Thread(target=self._tell, args=(text,), daemon=True).start()


def granted_seconds() -> float | None:
    """How long after SIGTERM this process is killed; None where nobody has said so.

    CONADV_GRACE_SECONDS is what a job script knows (`conadv slurm` has it). torchrun kills after 30
    seconds, newer ones after TORCH_ELASTIC_SHUTDOWN_TIMEOUT. Raises ConadvError for a value that is
    not a number of seconds.
    """
    torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    for name in ("CONADV_GRACE_SECONDS", *["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] * torchrun):
        if text := os.environ.get(name):
            try:
                seconds = float(text)
            except ValueError:
                seconds = math.nan
            if not 0 <= seconds < math.inf:
                raise ConadvError(
                    f"The environment variable {name} is {printable(text)[:80]!r}, not a number "
                    "of seconds."
                )
            return seconds
    return 30.0 if torchrun else None


class Patience:
    """Says once, by ``tell``, that a run which is asked to stop would be killed before it has
    saved.

    ``granted``: seconds from the request to the kill, None if unknown. A request may come just
    after a step has begun, so what counts is the longest time between two :meth:`turn` calls, the
    first step with its compilation left out, and then what saving takes.
    """

    def __init__(self, granted: float | None, tell: Callable[[str], None]) -> None:
        self._granted, self._tell = granted, tell
        self._since: float | None = None
        self._longest = 0.0
        self._saving: float | None = None

    def turn(self) -> None:
        """The run looks for a request now."""
        now = time.monotonic()
        if self._since is not None:
            self._longest = max(self._longest, now - self._since)
        self._since = now

    def saved(self) -> None:
        """The run goes on after it has saved itself at the last turn."""
        assert self._since is not None
        now = time.monotonic()
        self._saving, self._since = now - self._since, now

    def judge(self, writing: float | None) -> None:
        """``writing``: seconds of a background write, 0 without; None while that is unknown."""
        if self._granted is None or self._saving is None or writing is None:
            return
        needed = self._longest + self._saving + writing
        if needed > self._granted:
            self._tell(
                f"stopping takes up to {needed:.3g} s (a step or evaluation, then a checkpoint), "
                f"but this process is killed {self._granted:g} s after SIGTERM: work since the "
                "last checkpoint would be lost. Have it signalled earlier (Slurm: "
                "--signal=TERM@SECONDS and CONADV_GRACE_SECONDS) or killed later (torchrun: "
                "TORCH_ELASTIC_SHUTDOWN_TIMEOUT)."
            )
            self._granted = None
