"""Several trainings at a time, in processes of one thread each."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from conadv.config.schema import ProbeConfig, replace
from conadv.errors import ConadvError
from conadv.sweep.cells import Run
from conadv.sweep.choose import Result
from conadv.sweep.folder import tidy
from conadv.training.run_dir import RunDir


@dataclass(frozen=True)
class Outcome:
    """How a run ended: wall seconds, and what stopped it (with a traceback if unexpected)."""

    seconds: float
    error: str | None = None
    diverged: bool = False


class Source(Protocol):
    """Where runs come from and where their outcomes go, both in the parent process.

    ``next``: a run that can start now, or None; asked again after every outcome. ``done``: stops
    everything by an exception. ``runs``: all that there will be; ``results``: of those that ended.
    """

    results: dict[str, Result]

    def runs(self) -> list[Run]: ...
    def next(self) -> Run | None: ...
    def done(self, run: Run, outcome: Outcome) -> None: ...


class Display(Protocol):
    """Hears of runs under way, several times a second, and of every one that ended."""

    def going(self, runs: list[Run]) -> None: ...
    def ended(self, run: Run, outcome: Outcome) -> None: ...


Work = Callable[[Run], None]
"""Trains a run; workers import it."""


def run_pool(source: Source, work: Work, workers: int, display: Display) -> None:
    """Run what ``source`` hands out, ``workers`` at a time, until all of it has ended.

    An exception in a run is its outcome. On Ctrl-C, and on any other exception here, all workers
    end at once and leave what a killed run leaves. Raises ConadvError when a worker dies.
    """
    going: dict[Future[Outcome], Run] = {}
    with _executor(workers) as executor:
        while True:
            while len(going) < workers and (run := source.next()) is not None:
                going[executor.submit(_outcome, work, run)] = run
            if not going:
                return
            display.going(list(going.values()))
            for future in wait(going, timeout=0.25, return_when=FIRST_COMPLETED).done:
                run, outcome = going.pop(future), future.result()
                source.done(run, outcome)
                display.ended(run, outcome)


def train_run(run: Run, runs: Path, *, keep_checkpoints: bool, device: str) -> None:
    """Train one run of a sweep, from its newest checkpoint where it was interrupted."""
    from conadv.engine.execution import Execution
    from conadv.training.trainer import train

    out = RunDir(runs / run.name)
    # spans are most of a record, and no sweep needs them
    execution = Execution(timeline_steps=0)
    train(run.config, out.path, auto_resume=True, device=device, execution=execution)
    if not keep_checkpoints:
        tidy(out)


def measure(run: Run, device: str, steps: int = 8) -> tuple[float, float]:
    """(share of ``run``, its seconds) of a few steps without evaluations, on one thread."""
    import torch

    from conadv.training.trainer import train

    few: dict[str, Any] = {"steps": steps, "epochs": None, "schedule__warmup_epochs": 0.0}
    few |= {"eval__every_epochs": None, "eval__robust_images": 0, "probe": ProbeConfig()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with TemporaryDirectory() as folder:
            summary = train(replace(run.config, **few), Path(folder) / "run", device=device)
    finally:
        torch.set_num_threads(threads)
    total = run.config.steps or (run.config.epochs or 1) * steps / summary["epochs"]
    return steps / total, steps * summary["step_seconds_median"]


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _executor(workers: int) -> Iterator[ProcessPoolExecutor]:
    before = mp.active_children()
    context = mp.get_context("spawn")
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        yield executor
        executor.shutdown()
    except BaseException as error:
        executor.shutdown(wait=False, cancel_futures=True)
        for process in mp.active_children():
            if process not in before:
                process.kill()  # SIGTERM would ask a run to stop, and the next one would begin
        if isinstance(error, BrokenProcessPool):
            raise ConadvError(
                "A worker process died, most likely for lack of memory. The same command with a "
                "smaller --jobs continues where this one stopped."
            ) from error
        raise


def _start_worker() -> None:
    import torch

    import conadv.training.trainer  # noqa: F401 -- not at the cost of the first run's seconds
    from conadv.data.workers import end_with_parent
    from conadv.training.allocator import keep_freed_memory

    # a terminal's Ctrl-C reaches all processes; the parent decides
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    keep_freed_memory()
    end_with_parent()


def _outcome(work: Work, run: Run) -> Outcome:
    """Exceptions become text here: not every one can be sent between processes."""
    from conadv.engine.guard import NonFiniteError

    begin, error, diverged = time.monotonic(), None, False
    try:
        work(run)
    except ConadvError as caught:
        error, diverged = str(caught), isinstance(caught, NonFiniteError)
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}\n{traceback.format_exc()}"
    return Outcome(time.monotonic() - begin, error, diverged)
