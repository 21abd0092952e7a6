"""What happens around the steps of a run: probe, average, record, evaluation, checkpoints; in that
order.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from itertools import chain

import torch

from conadv.engine.stop import INTERRUPT, TERMINATE
from conadv.training import record, resume
from conadv.training.build import Run
from conadv.training.evaluate import Result, stop_if_diverged
from conadv.training.observer import Observer
from conadv.training.results import evaluate_split, recalibrate_model
from conadv.training.signals import Patience
from conadv.training.writer import Writer
from conadv.types import Span, StepRecord


class Hook:
    """Called around every step. Ranks: every learner has the same hooks; rank 0 alone writes and
    shows.
    """

    def before_step(self) -> None:
        """At the weights of the coming step."""

    def __call__(self, done: StepRecord) -> None:
        """After the update."""


@dataclass
class Log:
    """The record of a run, and those who watch it. ``begin``: the moment that times count from."""

    run: Run
    record: record.Record
    observer: Observer
    begin: float
    spans: list[tuple[int, list[Span]]] = field(default_factory=list)
    """(step, spans) of this rank, for the timeline."""

    def seconds(self) -> float:
        return time.monotonic() - self.begin

    def record_spans(self, step: int, spans: list[Span]) -> None:
        if len(self.spans) < self.run.execution.timeline_steps:
            self.spans.append((step, spans))

    def step(self, done: StepRecord) -> None:
        """A step's line; numbers of a skipped step that are not finite become null."""
        values = asdict(done)
        if done.skipped is not None:
            values |= {name: record.finite(values[name]) for name in ("loss", "grad_norm")}
            values["losses"] = {view: record.finite(loss) for view, loss in done.losses.items()}
        self.record.write("step", **values, staleness=done.staleness, time=self.seconds())
        self.observer.step(done)

    def evaluations(self, results: dict[str, Result | None]) -> None:
        """One line per split. Raises NonFiniteError for a model that has diverged (on_nonfinite
        stop).
        """
        step = self.run.step.version
        if self.run.config.on_nonfinite == "stop":
            stop_if_diverged(results, step)
        epoch = step / self.run.derived.steps_per_epoch
        for split, result in results.items():
            if result is None:
                continue
            values = {**asdict(result), "loss": record.finite(result.loss)}
            values |= {"split": split, "time": self.seconds()}
            self.record.write("eval", step=step, epoch=epoch, **values)
            self.observer.evaluation(step, split, result.loss, result.accuracy)

    def bad_images(self, *, of_all_ranks: bool = False) -> None:
        """Files that could not be read, each once.

        Ranks: rank 0 writes its own at once; with ``of_all_ranks`` those of the others too
        (collective).
        """
        data, comm = self.run.data, self.run.comm
        if not data.skip_bad or not (comm.is_main or of_all_ranks):
            return
        last = self.run.step.version - 1  # the one that an evaluation follows
        own = [{**x, "step": last if x["step"] is None else x["step"]} for x in data.bad.values()]
        found = comm.gather_objects(own) if of_all_ranks else [own]
        for line in sorted(chain(*found), key=lambda line: int(line["step"])):
            if line["path"] not in data.logged:
                data.logged.add(line["path"])
                self.record.write("bad_image", **line)
                self.observer.message(
                    f"skipped an unreadable image: {line['path']} ({line['reason']})"
                )

    def failed_attack_ranks(self, *, of_all_ranks: bool = False) -> None:
        """Attack ranks that failed and that learners go on without. Ranks: as for
        :meth:`bad_images`.
        """
        comm, executor = self.run.comm, self.run.step.executor
        if not self.run.teams.may_lose or not (comm.is_main or of_all_ranks):
            return
        found = [executor.failed_ranks()]
        if of_all_ranks:
            executor.settle()  # finds the last ones now, not in the middle of the checkpoint
            found = comm.gather_objects([*found[0], *executor.failed_ranks()])
        for failure in chain(*found):
            self.record.write("attack_loss", **asdict(failure))
            self.observer.message(
                f"attack rank {failure.attack_rank} failed at step {failure.step} "
                f"({failure.reason}); the learners attack in its place"
            )


@dataclass
class Measure(Hook):
    """The staleness probe. Numbers that are not finite are left out, as is the step behind them."""

    run: Run
    log: Log

    def before_step(self) -> None:
        lines = [] if self.run.probe is None else self.run.probe.before_step()
        values = [v for line in lines for v in line.values() if isinstance(v, float)]
        if all(map(math.isfinite, values)):
            for line in lines:
                self.log.record.write("probe", **line)


@dataclass
class Average(Hook):
    """The average of the weights; after the last step also precise statistics of batch norm."""

    run: Run

    def __call__(self, done: StepRecord) -> None:
        run = self.run
        if run.ema is not None and done.skipped is None:
            run.ema.update_parameters(run.model)
        last = run.step.version == run.derived.steps
        if last and run.config.eval.precise_bn_images is not None:
            recalibrate_model(run)


@dataclass
class WriteRecord(Hook):
    """The step's line in the record, with its spans in the first ``timeline_steps`` steps."""

    run: Run
    log: Log
    first: int

    def __call__(self, done: StepRecord) -> None:
        self.log.record_spans(done.step, done.spans)
        if done.step - self.first >= self.run.execution.timeline_steps:
            done.spans = []
        self.log.step(done)
        self.log.bad_images()
        self.log.failed_attack_ranks()


@dataclass
class Evaluate(Hook):
    """Test accuracy every ``eval.every_epochs``; the best on held-out images is noted in
    ``run.best``.
    """

    run: Run
    log: Log

    def __call__(self, done: StepRecord) -> None:
        run, count = self.run, self.run.step.version
        keep_best = run.config.checkpoint.keep_best
        if (
            count == run.derived.steps
        ):  # the end evaluates all; the last checkpoint must know before
            if keep_best:
                self._note_if_best(evaluate_split(run, "validation"))
            return
        if not run.derived.due(run.derived.evaluate_every, count):
            return
        self._evaluate("test")
        if keep_best:
            self._note_if_best(self._evaluate("validation"))
        agree_to_stop(run)

    def _evaluate(self, split: str) -> Result:
        result = evaluate_split(self.run, split)
        self.log.evaluations({split: result})
        return result

    def _note_if_best(self, result: Result) -> None:
        best = self.run.best
        if math.isfinite(result.loss) and result.accuracy > best.get("accuracy", -1.0):
            best.update(step=self.run.step.version, accuracy=result.accuracy)


@dataclass
class Save(Hook):
    """A checkpoint where one is due, where the model is the best so far, at the end and before a
    stop.
    """

    run: Run
    log: Log
    writer: Writer
    patience: Patience

    def __call__(self, done: StepRecord) -> None:
        run, count = self.run, self.run.step.version
        self.patience.turn()
        is_due = run.derived.due(run.derived.checkpoint_every, count) or count == run.derived.steps
        if is_due or run.step.stop or run.best.get("step") == count:
            self.log.bad_images(of_all_ranks=True)
            self.log.failed_attack_ranks(of_all_ranks=True)
            resume.save(run, self.writer)
            self.patience.saved()
        self.patience.judge(self.writer.background_seconds)


def agree_to_stop(run: Run) -> None:
    """If any rank got a stop request, all ranks stop, at this step and not at the next. Ranks:
    collective.
    """
    step = run.step
    mine = max(step.stop, step.stop_request.mine())
    flags = run.comm.any(torch.tensor([mine >= INTERRUPT, mine == TERMINATE]))
    step.stop = int(flags.sum())


def make_hooks(run: Run, log: Log, first: int, writer: Writer, patience: Patience) -> list[Hook]:
    return [
        Measure(run, log),
        Average(run),
        WriteRecord(run, log, first),
        Evaluate(run, log),
        Save(run, log, writer, patience),
    ]
