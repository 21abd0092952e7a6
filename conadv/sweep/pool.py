"""Several trainings at a time, in processes of one thread each."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

from conadv.errors import ConadvError
from conadv.sweep.cells import Run
from conadv.sweep.choose import Result
from conadv.sweep.folder import tidy
from conadv.training.run_dir import RunDir

Work = Callable[[Run], None]
"""Trains a run; workers import it."""
Ended = list[tuple[Run, Result]]


def run_pool(
    next_run: Callable[[], Run | None], work: Work, workers: int
) -> Generator[tuple[list[Run], Ended], None, None]:
    """Run what ``next_run`` hands out, ``workers`` at a time, until it has nothing left.

    Yields several times a second (runs under way, runs that ended), and asks for the next runs
    after that. An exception in a run is its result. On Ctrl-C, and when the iterator is closed, all
    workers end at once and leave what a killed run leaves.
    Raises ConadvError when a worker dies.
    """
    going: dict[Future[Result], Run] = {}
    with _executor(workers) as executor:
        while True:
            while len(going) < workers and (run := next_run()) is not None:
                going[executor.submit(_result, work, run)] = run
            if not going:
                return
            done = wait(going, timeout=0.25, return_when=FIRST_COMPLETED).done
            ended = [(going.pop(future), future.result()) for future in done]
            yield list(going.values()), ended


def train_run(run: Run, runs: Path, *, keep_checkpoints: bool, device: str) -> None:
    """Train one run of a sweep, from its newest checkpoint where it was interrupted."""
    from conadv.engine.execution import Execution
    from conadv.training.loop import train

    out = RunDir(runs / run.name)
    # spans are most of a record, and no sweep needs them
    execution = Execution(timeline_steps=0)
    train(run.config, out.path, auto_resume=True, device=device, execution=execution)
    if not keep_checkpoints:
        tidy(out)


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

    import conadv.training.loop  # noqa: F401 -- not at the cost of the first run's seconds
    from conadv.data.workers import end_with_parent
    from conadv.training.allocator import keep_freed_memory

    # a terminal's Ctrl-C reaches all processes; the parent decides
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    keep_freed_memory()
    end_with_parent()


def _result(work: Work, run: Run) -> Result:
    """Exceptions become text here: not every one can be sent between processes."""
    from conadv.engine.guard import NonFiniteError

    begin, error, diverged = time.monotonic(), None, False
    try:
        work(run)
    except ConadvError as caught:
        error, diverged = str(caught), isinstance(caught, NonFiniteError)
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}\n{traceback.format_exc()}"
    return Result(seconds=time.monotonic() - begin, error=error, diverged=diverged)
