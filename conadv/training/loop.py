"""From a config to a finished run directory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from conadv.config.schema import Config
from conadv.data.loader import naming_lost_workers
from conadv.data.windows import windows
from conadv.distributed.comm import Comm
from conadv.distributed.environment import pick_device
from conadv.distributed.offset import clock_offset
from conadv.engine.execution import Execution
from conadv.engine.stop import INTERRUPT
from conadv.errors import ConadvError
from conadv.training import checkpoint, record
from conadv.training.build import Run, build, overview, title
from conadv.training.hooks import Log, make_hooks
from conadv.training.observer import Guarded, Observer
from conadv.training.results import measure
from conadv.training.run_dir import RunDir
from conadv.training.signals import Patience, Signals, Stopped, granted_seconds
from conadv.training.start import admit, load_or_claim, open_record
from conadv.training.summary import summarize
from conadv.training.writer import Writer
from conadv.types import Batch


def train(
    config: Config,
    out: Path | str,
    *,
    resume: bool = False,
    overwrite: bool = False,
    auto_resume: bool = False,
    restarted: bool = False,
    device: str = "auto",
    observer: Observer | None = None,
    comm: Comm | None = None,
    execution: Execution | None = None,
) -> dict[str, Any]:
    """Train by ``config`` into the run directory ``out`` and return its summary.

    ``resume`` continues from the newest checkpoint: the finished run has the bits of one that was
    never interrupted. ``auto_resume`` does so where ``out`` holds a run of this config, and starts
    one otherwise: the same call serves every start of a job that may be pre-empted.
    ``restarted``: a launcher has started these processes again. A run of this config in ``out``
    that the same launcher process began is then this one: it goes on from its newest checkpoint,
    and from the start where there is none.
    ``comm``: this process among several ranks, which also says the device; default: alone on
    ``device``.
    ``execution``: when and where things run; default: everything on this process, in its turn.
    Raises ConadvError before the first step for anything wrong with config, data or ``out``, and
    NonFiniteError (the checkpoints before it stay) when a loss or gradient is not finite. SIGTERM
    and SIGINT end training after the present step with a checkpoint and
    :class:`conadv.training.signals.Stopped`, on all ranks. ``out`` is locked meanwhile: a second
    program that would train there ends at once with a ConadvError.
    Ranks: all call it alike. Rank 0 alone reads, writes and locks ``out`` and has an observer; what
    stops one before the first step stops all with its message. The summary is the same on all
    learners; an attack rank, which is done before the evaluation, returns an empty one.
    """
    comm = comm or Comm(device=pick_device(device))
    observer = Guarded(observer if observer and comm.is_main else Observer())
    run_dir = RunDir(Path(out))
    # launchers on several hosts count restarts on their own
    restarted = bool(comm.any(torch.tensor([restarted])))
    with run_dir.alone() as lock:
        with comm.agreed():
            granted_seconds()  # a bad environment variable is an error before any training
            if comm.is_main and run_dir.path.is_dir():
                lock.take()
        config, resume = admit(
            config,
            run_dir,
            comm,
            observer,
            execution,
            resume=resume,
            overwrite=overwrite,
            auto_resume=auto_resume,
            restarted=restarted,
        )
        run = build(config, comm.device, observer, comm, execution)
        first, found = load_or_claim(run_dir, run, resume, lock, observer)
        begin = _same_clock(comm, run)
        if run.teams.attacking:
            _attack(run, first)
            return {}
        with run.comm.agreed():
            log = Log(run, open_record(run_dir, run, first, found), observer, begin)
        return _learn(run_dir, run, log, first)


def _same_clock(comm: Comm, run: Run) -> float:
    """Have all ranks count time from one moment, now; returns it on this rank's
    ``time.monotonic()``.
    """
    ahead = clock_offset(comm)
    run.step.clock.origin = comm.broadcast_object(time.monotonic()) + ahead
    return run.step.clock.origin


def _learn(run_dir: RunDir, run: Run, log: Log, first: int) -> dict[str, Any]:
    """What a learner does: the steps, the evaluation, the summary. Errors go into the record."""
    observer, step = log.observer, run.step
    for line in overview(run):
        observer.message(line)
    observer.start(title(run.config), first, run.derived.steps)
    if first and run.comm.is_main:
        observer.earlier(run_dir.record)
    try:
        _loop(run_dir, run, log, first)
        if step.stop:
            stopped = Stopped(step.stop, step.version)
            log.record.write("stop", step=step.version, signal=stopped.signal, time=log.seconds())
            raise stopped
        observer.message("evaluating the trained model")
        return _finish(run_dir, run, log)
    except ConadvError as error:
        with suppress(ConadvError):  # on a full disk
            log.record.write("error", step=step.version, message=str(error))
        raise
    except Stopped:
        raise
    except KeyboardInterrupt as error:
        saved = checkpoint.steps(run_dir.checkpoints)
        advice = (
            f"--resume goes on from step {saved[-1]}" if saved else "there is no checkpoint yet"
        )
        raise KeyboardInterrupt(f" after {step.version} steps; {advice}") from error
    finally:
        log.record.close()
        observer.finish()


def _loop(run_dir: RunDir, run: Run, log: Log, first: int) -> None:
    """The steps from ``first`` on, until the last one or a request to stop (then
    ``run.step.stop``).
    """
    options = run.config.checkpoint
    with ExitStack() as stack:
        # signals outermost: one that comes while the other ranks already leave must not end this
        # one in between
        signals = stack.enter_context(Signals(log.observer.message))
        stack.enter_context(_closing(run, log))
        writer = Writer(
            run_dir.checkpoints, options.keep, background=options.background, before=log.record.sync
        )
        stack.enter_context(_written(run, writer))
        stack.enter_context(naming_lost_workers())
        # a checkpoint that could not be written ends the run at the next step: save() raises it on
        # all ranks
        run.step.stop_request.ask = lambda: max(signals.request, INTERRUPT * writer.failed)
        hooks = make_hooks(
            run, log, first, writer, Patience(granted_seconds(), log.observer.message)
        )
        for batch, future in _timed_batches(run, first):
            for hook in hooks:
                hook.before_step()
            done = run.step(batch, future)
            for hook in hooks:
                hook(done)
            if run.step.stop:
                return


def _timed_batches(run: Run, first: int) -> Iterator[tuple[Batch, Batch | None]]:
    """The batches from step ``first`` on, each with the one ``ahead`` of it; waiting for them
    counts as "data".
    """
    batches = run.data.train_batches(first, run.derived.steps, run.views)
    pairs = windows(batches, run.step.ahead, copy=False)
    while True:
        begin = time.monotonic()
        run.comm.at("data", run.step.version)
        pair = next(pairs, None)
        run.step.clock.add("data", begin, time.monotonic())
        if pair is None:
            return
        yield pair


def _attack(run: Run, first: int) -> None:
    """What an attack rank does until the learners have finished."""
    log = Log(run, record.Record(None), Observer(), run.step.clock.origin)
    batches = run.data.train_batches(first + run.step.ahead, run.derived.steps, ("clean",))
    # an attack rank that the learners can do without is ended by a signal alone: learners have
    # signals of their own
    listening = nullcontext(None) if run.teams.may_lose else Signals()
    with listening as signals, _closing(run, log), naming_lost_workers():
        if signals is not None:
            run.step.stop_request.ask = lambda: signals.request
        run.step.serve(batches, log.record_spans)
    if run.step.stop:
        raise Stopped(run.step.stop, run.step.version)


@contextmanager
def _closing(run: Run, log: Log) -> Iterator[None]:
    """End the exchange between learners and attack ranks; then all ranks' spans go into the record.

    Where attack ranks may fail, only the learners' spans do. Ranks: collective.
    """
    executor, world = run.step.executor, run.teams.world
    try:
        yield
    except (ConadvError, KeyboardInterrupt):
        if not world.broken and not run.comm.broken:
            with suppress(ConadvError):  # the others may be gone already; the first error says more
                executor.close(failed=True)
        raise
    if not executor.close():
        raise ConadvError("Training has ended with an error on the learners: see their message.")
    if run.teams.may_lose:  # nobody knows who is still there: attack ranks keep their spans
        if run.teams.attacking:
            return
        world = run.comm
    run.step.stop = world.broadcast_object(run.step.stop)  # attack ranks hear of it here
    role = "attack" if run.teams.attacking else "learner"
    for rank, of, spans in world.gather_objects((world.rank, role, log.spans))[1:]:
        for step, seen in spans:
            log.record.write("timeline", rank=rank, role=of, step=step, spans=seen)


@contextmanager
def _written(run: Run, writer: Writer) -> Iterator[None]:
    """Wait at the end until all is written. Ranks: after a good end all raise what rank 0 could not
    write.
    """
    try:
        yield
    except BaseException:
        with suppress(ConadvError):  # the first error says more
            writer.wait()
        raise
    with run.comm.agreed():
        writer.wait()


def _finish(run_dir: RunDir, run: Run, log: Log) -> dict[str, Any]:
    """Evaluate into the record and summary.json, which rank 0 writes; returns the summary."""
    results = measure(run)
    log.bad_images(of_all_ranks=True)
    log.evaluations(results)
    summary: dict[str, Any] | None = None
    with run.comm.agreed():
        if run.comm.is_main:
            summary = summarize(run, results, record.read_lines(run_dir.record))
            run_dir.write_summary(summary)
    return run.comm.broadcast_object(summary)
