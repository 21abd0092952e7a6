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

ONE_HOST = ["--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
ROOT = Path(__file__).parents[2]


def torchrun(options: Sequence[object], *program: object) -> list[object]:
    """The command that runs ``conadv train`` with the arguments ``program`` under torchrun."""
    launch = [sys.executable, "-m", "torch.distributed.run", *options]
    return [*launch, "-m", "conadv", "train", *program, "--device", "cpu"]


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
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # it has ended meanwhile
            for child in map(int, file.read_text().split()):
                found += [child, *descendants(child)]
    return found


def workers(pid: int) -> dict[int, int]:
    """Process ids below ``pid`` by the rank that their environment gives them."""
    found: dict[int, int] = {}
    for child in descendants(pid):
        with suppress(OSError):
            for text in Path(f"/proc/{child}/environ").read_text().split("\0"):
                if text.startswith("RANK="):
                    found.setdefault(int(text.removeprefix("RANK=")), child)
    return found


def until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """The first true value of ``condition``; an AssertionError that says ``what`` did not happen in
    time.
    """
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"{what}: not after {seconds:g} s"
        time.sleep(0.02)
    return value
