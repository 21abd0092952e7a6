"""The memory of this process and its children (Linux): pages that several processes share count once."""

from __future__ import annotations

import os
import threading
from pathlib import Path

INTERVAL_SECONDS = 0.02


def private_memory() -> int | None:
    """Bytes that this process and its children take: the proportional set sizes of all. None without Linux's /proc."""
    sizes = [_proportional(pid) for pid in _family(os.getpid())]
    known = [size for size in sizes if size is not None]
    return sum(known) if known else None


class Peak:
    """``bytes``: the largest :func:`private_memory` inside a ``with`` block, sampled 50 times a second."""

    def __init__(self) -> None:
        self.bytes: int | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            now = private_memory()
            if now is None:
                return
            self.bytes = max(now, self.bytes or 0)
            if self._done.wait(INTERVAL_SECONDS):
                return


def _family(pid: int) -> list[int]:
    found = [pid]
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = file.read_text().split()
        except OSError:  # a thread that has ended
            continue
        for child in children:
            found += _family(int(child))
    return found


def _proportional(pid: int) -> int | None:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), None)
