"""Several trainings at a time in processes of one thread each."""

from __future__ import annotations

import multiprocessing as mp
import os
import queue
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from conadv.config.schema import Config
from conadv.data.workers import end_with_parent
from conadv.errors import ConadvError
from conadv.sweep.display import Display
from conadv.training.allocator import keep_freed_memory
from conadv.training.observer import Silent
from conadv.types import StepRecord

GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class Job:
    """One run: whose it is in words, what it computes, and where its run directory is."""

    arm: str
    config: Config
    out: Path

    @property
    def label(self) -> str:
        return f"{self.arm}, seed {self.config.seed}"


@dataclass(frozen=True)
class Outcome:
    """How a job ended. ``error``: None, or what stopped it; ``trace``: its traceback where it was no ConadvError."""

    seconds: float
    error: str | None = None
    diverged: bool = False
    trace: str = ""


class Source(Protocol):
    """Where the jobs come from and where their outcomes go, both in the parent process.

    ``next``: a job that can start now, or None; asked again after every outcome. What ``done`` raises stops all.
    """

    def next(self) -> Job | None: ...
    def done(self, job: Job, outcome: Outcome) -> None: ...


Work = Callable[[Job, Silent], None]
"""Trains a job in a worker, telling the observer; a function at the top of a module, so that workers can find it."""


def run_pool(source: Source, work: Work, workers: int, display: Display) -> None:
    """Run what ``source`` hands out, ``workers`` at a time, until it has nothing left and all have ended.

    An exception in a job is its outcome. On Ctrl-C, and on any other exception here, all workers end at once: what
    they have written is what a killed run leaves. Raises ConadvError where a worker dies (out of memory).
    """
    running: dict[Future[Outcome], tuple[int, Job]] = {}
    number = 0
    with _workers(workers) as (pool, reports), display:
        while True:
            while len(running) < workers and (job := source.next()) is not None:
                running[pool.submit(_run, work, number, job)] = (number, job)
                display.started(number, job.label, job.config)
                number += 1
            if not running:
                return
            finished, _ = wait(running, timeout=0.25, return_when=FIRST_COMPLETED)
            display.advance(_drain(reports))
            for future in finished:
                which, job = running.pop(future)
                outcome = future.result()
                source.done(job, outcome)
                display.finished(which, outcome.seconds, outcome.error)


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _workers(count: int) -> Iterator[tuple[ProcessPoolExecutor, Any]]:
    context = mp.get_context("spawn")
    reports = context.Queue()
    before = mp.active_children()
    pool = ProcessPoolExecutor(
        count, mp_context=context, initializer=_start_worker, initargs=(reports,)
    )
    try:
        yield pool, reports
        pool.shutdown()
    except BaseException as error:
        pool.shutdown(wait=False, cancel_futures=True)
        _end([process for process in mp.active_children() if process not in before])
        if isinstance(error, BrokenProcessPool):
            raise ConadvError(
                "A worker process has died, most likely for want of memory. The same command with a smaller --jobs "
                "goes on where this one stopped."
            ) from error
        raise


def _end(workers: list[Any]) -> None:
    """End them for good: one that takes SIGTERM as a request to stop its run would begin the next one."""
    for process in workers:
        process.terminate()
    end = time.monotonic() + GRACE_SECONDS
    for process in workers:
        process.join(max(0.0, end - time.monotonic()))
        process.kill()


_reports: Any = None  # a worker's way to its parent


def _start_worker(reports: Any) -> None:
    import torch

    from conadv.training import trainer  # noqa: F401 -- not at the cost of the first job's seconds

    global _reports
    _reports = reports
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # a terminal's Ctrl-C reaches all processes: the parent decides
    torch.set_num_threads(1)
    keep_freed_memory()
    end_with_parent()  # a killed parent must not leave its workers training on


def _run(work: Work, number: int, job: Job) -> Outcome:
    """Exceptions become words here: not every one survives the way between processes."""
    from conadv.engine import NonFiniteError

    begin = time.monotonic()
    try:
        work(job, _Reporter(number))
    except Exception as error:
        text = str(error) if isinstance(error, ConadvError) else f"{type(error).__name__}: {error}"
        trace = "" if isinstance(error, ConadvError) else traceback.format_exc()
        return Outcome(time.monotonic() - begin, text, isinstance(error, NonFiniteError), trace)
    return Outcome(time.monotonic() - begin)


class _Reporter(Silent):
    """Tells the parent process how far a run is."""

    def __init__(self, number: int) -> None:
        self._number = number

    def start(self, title: str, first_step: int, num_steps: int) -> None:
        self._every = max(1, num_steps // 40)
        self._total = num_steps

    def step(self, record: StepRecord) -> None:
        if record.step % self._every == 0:
            _reports.put((self._number, record.step / self._total))


def _drain(reports: Any) -> dict[int, float]:
    """The latest share done of each run that reported."""
    latest: dict[int, float] = {}
    while True:
        try:
            number, share = reports.get_nowait()
        except queue.Empty:
            return latest
        latest[number] = share
