"""Worker processes: they outlive a signal that stops the run, and end with their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading

GRACE_SECONDS = 600
"""How long a worker goes on after a signal: a step, an evaluation and a checkpoint."""


def outlive_stop(_: int = 0) -> None:
    """For a worker that loads data: go on while the process it works for saves its checkpoint.

    Launchers and terminals signal whole process groups. The main process ends its workers when it
    is done with them; a worker that was signalled and is still there after ``GRACE_SECONDS`` ends
    by itself, and so does one whose main process was killed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    if not hasattr(signal, "SIGALRM"):  # Windows, where nobody signals groups
        return
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: signal.alarm(GRACE_SECONDS))


def end_with_parent() -> None:
    """End this worker process when the one that made it is gone, however that ended.

    A worker of a fork server has the server as its system's parent, which lives as long as its
    workers do: torch's DataLoader, which looks at that parent, would wait for ever there (Python
    3.14 makes fork servers the default).
    """
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
