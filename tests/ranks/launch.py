"""The program under torchrun, as subprocesses that cannot outlive their test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ROOT = Path(__file__).parents[2]


@contextmanager
def started(
    command: Sequence[object], log: Path, **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A process group that is killed at the end; what it says goes to ``log``."""
    everything = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    with log.open("wb") as file:
        process = subprocess.Popen(
            list(map(str, command)),
            stdout=file,
            stderr=file,
            env=everything,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        for pid in (process.pid, *descendants(process.pid)):
            kill(pid)
        process.wait()


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """All processes below ``pid`` (Linux)."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        parents[int(stat.parent.name)] = int(fields[1])
    found: list[int] = []
    for parent in [pid]:
        found += [child for child, its in parents.items() if its == parent]
    return found + [grandchild for child in found for grandchild in descendants(child)]


def workers(pid: int) -> dict[int, int]:
    """Process ids below ``pid`` by the rank that their environment gives them."""
    found = {}
    for child in descendants(pid):
        try:
            variables = dict(
                part.split("=", 1)
                for part in Path(f"/proc/{child}/environ").read_text().split("\0")
                if "=" in part
            )
        except OSError:
            continue
        if "RANK" in variables:
            found.setdefault(int(variables["RANK"]), child)
    return found


def until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """The first true value of ``condition``; an AssertionError that says ``what`` did not happen in time."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"{what}: not after {seconds:g} s"
        time.sleep(0.02)
    return value
