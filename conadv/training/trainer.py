"""From a config to a finished run directory."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conadv import __version__, rng
from conadv.attacks.pgd import PGD
from conadv.attacks.space import PixelSpace
from conadv.config.schema import (
    Config,
    accumulation,
    differences,
    micro_batch,
    optimizer_settings,
    parse,
    replace,
    resolve,
    scaled_lr,
)
from conadv.data.loader import Data, naming_lost_workers
from conadv.data.windows import windows
from conadv.distributed.comm import Comm
from conadv.distributed.environment import pick_device
from conadv.distributed.offset import clock_offset
from conadv.distributed.teams import Teams, make_teams
from conadv.engine import Executor, TrainStep
from conadv.engine.execution import Choice, Execution, choose
from conadv.engine.pending import Expected, gather, shard
from conadv.engine.stop import INTERRUPT, TERMINATE
from conadv.engine.validate import load_optimizer, load_weights
from conadv.errors import ConadvError, printable
from conadv.methods import METHODS
from conadv.methods.base import Method
from conadv.models.trial import check_model
from conadv.nn.ema import EMA, evaluated_state
from conadv.nn.precise_bn import recalibrate
from conadv.nn.split_batchnorm import CLEAN, has_batchnorm, routes_of, split_batchnorm
from conadv.optim.groups import MODEL_RULES, describe, parameter_groups
from conadv.optim.make import build_optimizer
from conadv.optim.schedules import WarmupDecay
from conadv.training import checkpoint, record
from conadv.training.build import method_of, space_of
from conadv.training.data import load_data, load_model, load_source
from conadv.training.evaluate import Result, evaluate, stop_if_diverged
from conadv.training.lock import Lock
from conadv.training.observer import Guarded, Observer, Silent
from conadv.training.probe import Probe, check_duration
from conadv.training.run_dir import RunDir
from conadv.training.signals import (
    Patience,
    Signals,
    Stopped,
    granted_seconds,
)
from conadv.training.summary import summarize
from conadv.training.writer import Writer
from conadv.types import Attack, Batch, Schedule, Span, StepRecord


@dataclass(frozen=True)
class Parts:
    """Everything that a run is made of."""

    config: Config
    data: Data
    model: nn.Module
    optimizer: torch.optim.Optimizer
    method: Method
    engine: TrainStep
    schedule: WarmupDecay
    space: PixelSpace
    num_steps: int
    groups: list[dict[str, Any]]
    comm: Comm
    teams: Teams
    execution: Execution
    choice: Choice
    probe: Probe | None = None
    best: dict[str, Any] = field(
        default_factory=dict
    )  # step and accuracy of the best checkpoint, empty without one
    ema: EMA | None = None

    @property
    def evaluated(self) -> nn.Module:
        """The model that is evaluated: the average of the weights where there is one."""
        return self.model if self.ema is None else self.ema.module


def train(
    config: Config,
    out: Path,
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

    ``resume`` continues from the newest checkpoint: the finished run has the bits of one that was never interrupted.
    ``auto_resume`` does so where ``out`` holds a run of this config, and starts one where there is none: the same call
    serves every start of a job that may be pre-empted.
    ``restarted``: a launcher has started these processes again. A run of this config in ``out`` that the same launcher
    process began is then this one: it goes on from its newest checkpoint, and from the start where there is none.
    ``comm``: this process among several ranks, which also says the device; default: alone on ``device``.
    ``execution``: when and where things run; default: everything on this process, in its turn.
    Raises ConadvError before the first step for whatever is wrong with config, data or ``out``, and NonFiniteError
    (the checkpoints before it stay) when a loss or gradient is not finite. SIGTERM and SIGINT end training after the
    present step with a checkpoint and :class:`conadv.training.signals.Stopped`, on all ranks.
    ``out`` is locked meanwhile: a second program that would train there ends at once with a ConadvError.
    Ranks: all call it alike. Rank 0 alone reads, writes and locks ``out`` and has an observer; what stops one before
    the first step stops all with its message. The summary is the same on all learners; an attack rank, which is done
    before the evaluation, returns an empty one.
    """
    comm = comm or Comm(device=pick_device(device))
    observer = Guarded(observer if observer and comm.is_main else Silent())
    run = RunDir(out)
    restarted = bool(
        comm.any(torch.tensor([restarted]))
    )  # launchers on several hosts count on their own
    with run.alone() as lock:
        with comm.agreed():
            granted_seconds()  # what is wrong with the environment is said before any training
            if comm.is_main and run.path.is_dir():
                lock.take()
        config, resume = admit(
            config,
            run,
            comm,
            observer,
            execution,
            resume=resume,
            overwrite=overwrite,
            auto_resume=auto_resume,
            restarted=restarted,
        )
        parts = _with_probe(build(config, comm.device, observer, comm, execution))
        first, damaged = _start(run, parts, resume, lock, observer)
        begin = _same_clock(comm, parts.engine)
        if parts.teams.attacking:
            _attack(parts, first)
            return {}
        with parts.comm.agreed():
            log = _open_record(run, parts, first, damaged)
        return _learn(run, parts, log, first, begin, observer)


def admit(
    config: Config,
    run: RunDir,
    comm: Comm,
    observer: Observer,
    execution: Execution | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    auto_resume: bool = False,
    restarted: bool = False,
) -> tuple[Config, bool]:
    """The resolved config, and whether to resume; arguments as those of :func:`train`. Changes nothing.

    Raises ConadvError for settings that do not fit together, differ between ranks, or may not go into ``run``.
    Ranks: collective.
    """
    with comm.agreed():
        config = resolve(config)
        micro_batch(config)  # "auto" must be settled by now: see conadv.planning.micro_batch
    _check_same_settings(comm, config, execution or Execution())
    with comm.agreed():
        if comm.is_main:
            again = auto_resume or (restarted and run.is_of_this_launcher())
            if again and not resume and run.holds(config):
                resume, overwrite = _after_restart(run, observer)
            run.check(config, resume=resume, overwrite=overwrite)
    return config, comm.broadcast_object(resume)


def _with_probe(parts: Parts) -> Parts:
    """Rank 0 of the learners measures; the weights are the same on all."""
    probe = None
    with parts.teams.world.agreed():
        if (
            parts.config.probe.every_epochs is not None
            and parts.comm.is_main
            and not parts.teams.attacking
        ):
            probe = Probe(parts.config, parts.engine, parts.data, parts.num_steps, parts.schedule)
    return dataclasses.replace(parts, probe=probe)


def _learn(
    run: RunDir, parts: Parts, log: record.Record, first: int, begin: float, observer: Observer
) -> dict[str, Any]:
    """What a learner does: the steps, the evaluation, the summary; errors go into the record."""
    for line in chain(overview(parts), group_lines(parts)):
        observer.message(line)
    observer.start(_title(parts.config), first, parts.num_steps)
    try:
        _loop(parts, run, log, first, begin, observer)
        if parts.engine.stop:
            stopped = Stopped(parts.engine.stop, parts.engine.version)
            log.write(
                "stop",
                step=parts.engine.version,
                signal=stopped.signal,
                time=time.monotonic() - begin,
            )
            raise stopped
        observer.message("evaluating the trained model")
        summary = finish(parts, run, log, begin, observer)
    except ConadvError as error:
        with suppress(ConadvError):  # on a full disk
            log.write("error", step=parts.engine.version, message=str(error))
        raise
    except Stopped:
        raise
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(
            f" after {parts.engine.version} steps; {_how_to_go_on(run)}"
        ) from error
    finally:
        log.close()
        observer.finish()
    return summary


def _check_same_settings(comm: Comm, config: Config, execution: Execution) -> None:
    """Every host has a command line of its own: all must ask for the same, but for where the data lies."""
    mine = replace(config, data__dir=None)
    theirs, how = comm.broadcast_object((mine.model_dump(mode="json"), execution))
    with comm.agreed():
        changed = differences(parse(theirs, "rank 0"), mine)
        changed += [f"{how} -> {execution}"] if how != execution else []
        if changed:
            raise ConadvError(
                f"This rank was started with other settings than rank 0: {'; '.join(changed)}."
            )


def _after_restart(run: RunDir, observer: Observer) -> tuple[bool, bool]:
    """Whether to resume, and whether to overwrite, where a launcher has started the processes of this run again."""
    saved = checkpoint.steps(run.checkpoints)
    if not saved and run.summary.is_file():
        raise ConadvError(
            f"{printable(run.path)} holds this run, finished, but without a checkpoint: there is nothing to go on "
            "from. Add "
            "--overwrite to train it again, or choose another --out."
        )
    observer.message(f"started again: going on from step {saved[-1] if saved else 0}")
    return bool(saved), not saved


def _same_clock(comm: Comm, engine: TrainStep) -> float:
    """Have all ranks count time from one moment, now; returns it on this rank's ``time.monotonic()``."""
    ahead = clock_offset(comm)
    engine.clock.origin = comm.broadcast_object(time.monotonic()) + ahead
    return engine.clock.origin


def _attack(parts: Parts, first: int) -> None:
    """What an attack rank does until the learners have finished."""
    spans: Timelines = []
    batches = parts.data.train_batches(first + parts.engine.ahead, parts.num_steps, ("clean",))
    # an attack rank that may be lost is: a signal ends it alone, and learners have signals of their own
    listening = nullcontext(None) if parts.teams.may_lose else Signals()
    with listening as signals, _closing(parts, spans), naming_lost_workers():
        if signals is not None:
            parts.engine.stop_request = lambda: signals.request
        parts.engine.serve(batches, lambda step, seen: _note(parts, spans, step, seen))
    if parts.engine.stop:
        raise Stopped(parts.engine.stop, parts.engine.version)


Timelines = list[tuple[int, list[Span]]]  # (step, spans) of this rank


def _note(parts: Parts, spans: Timelines, step: int, seen: list[Span]) -> None:
    if len(spans) < parts.execution.timeline_steps:
        spans.append((step, seen))


@contextmanager
def _closing(parts: Parts, spans: Timelines, log: record.Record | None = None) -> Iterator[None]:
    """End the exchange between learners and attack ranks; if all went well, all ranks' spans go into the record.

    Those of learners alone where attack ranks may be lost.
    """
    executor, world = parts.engine.executor, parts.teams.world
    try:
        yield
    except (ConadvError, KeyboardInterrupt):
        if not world.broken and not parts.comm.broken:
            with suppress(
                ConadvError
            ):  # the others may be gone already; what happened here says more
                executor.close(failed=True)
        raise
    if not executor.close():
        raise ConadvError("Training has ended with an error on the learners: see their message.")
    if (
        parts.teams.may_lose
    ):  # who is there still? attack ranks have heard of a stop, and keep their spans
        if parts.teams.attacking:
            return
        world = parts.comm
    parts.engine.stop = world.broadcast_object(parts.engine.stop)  # attack ranks hear of it here
    everyones = world.gather_objects(
        (world.rank, "attack" if parts.teams.attacking else "learner", spans)
    )
    for rank, role, theirs in everyones[1:]:
        for step, seen in theirs:
            assert log is not None
            log.write("timeline", rank=rank, role=role, step=step, spans=seen)


def _how_to_go_on(run: RunDir) -> str:
    saved = checkpoint.steps(run.checkpoints)
    return (
        f"--resume goes on from step {saved[-1]}"
        if saved
        else "there is no checkpoint yet to resume from"
    )


def build(
    config: Config,
    device: torch.device,
    observer: Observer | None = None,
    world: Comm | None = None,
    execution: Execution | None = None,
) -> Parts:
    """Data, model, optimizer and engine of a resolved config.

    Ranks: collective; a ConadvError on one rank is raised by all.
    """
    world = world or Comm(device=device)
    observer = observer or Silent()
    execution = execution or Execution()
    with world.agreed():
        method = method_of(config)
        choice = choose(execution, method, device)
    teams = make_teams(world, execution.attack_ranks, may_lose=execution.may_lose)
    comm = teams.comm
    with world.agreed():
        source = load_source(config, observer.loading)
    with world.agreed():
        mine = teams.micro_batches(accumulation(config, len(teams.learners)))
        data = load_data(config, rank=comm.rank, ranks=comm.ranks, mine=mine, source=source)
        space = space_of(config)
        model = make_model(config, data.channels, data.num_classes)
        with rng.scope(torch.device("cpu"), config.seed, "trial"):
            images = smallest_pass(config)
            check_model(model, data.channels, data.image_size, data.num_classes, images)
        model = model.to(device)
        if config.channels_last:
            model = model.to(memory_format=torch.channels_last)
        num_steps = _num_steps(config, data)
        schedule = _schedule(config, num_steps, data.order.steps_per_epoch)
        groups = parameter_groups(
            model, weight_decay=config.optim.weight_decay or 0.0, rules=MODEL_RULES
        )
        optimizer = build_optimizer(
            config.optim.name, groups, schedule(0), **optimizer_settings(config.optim)
        )
        _check_precise_bn(config, model)
        ema = None if config.ema.decay is None or teams.attacking else EMA(model, config.ema.decay)
    engine = make_engine(
        config, model, optimizer, method, schedule, comm, choice.make(teams, execution.late)
    )
    return Parts(
        config,
        data,
        model,
        optimizer,
        method,
        engine,
        schedule,
        space,
        num_steps,
        groups,
        comm,
        teams,
        execution,
        choice,
        ema=ema,
    )


def make_engine(
    config: Config,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    method: Method,
    schedule: Schedule | None,
    comm: Comm,
    executor: Executor | None = None,
) -> TrainStep:
    """The engine of a resolved config. Ranks: collective over ``comm``."""
    return TrainStep(
        model,
        optimizer,
        method,
        loss=_loss(config.label_smoothing),
        adv_route="clean" if config.adv_route == "clean" else "adv",
        view_weights={"aug": config.aug_weight or 1.0, "adv": config.adv_weight or 1.0},
        space=space_of(config),
        precision=config.precision,
        clip_norm=config.optim.clip_norm,
        on_nonfinite=config.on_nonfinite,
        nonfinite_limit=config.nonfinite_limit,
        channels_last=config.channels_last,
        pending_dtype=config.pending_dtype,
        lr_at=schedule,
        seed=config.seed,
        comm=comm,
        executor=executor,
        compile=config.compile,
    )


NO_BATCH_NORM = (
    "no batch norm in this model: the routes share its normalisation and every weight, so that clean and extra images "
    "are told apart by their loss alone"
)


def smallest_pass(config: Config) -> int:
    """Images of the smallest forward pass of a run, which a network may refuse: view, attack or probe.

    Two stand for more: batch norm over a map of one pixel needs two.
    """
    attacked = max(1, round(config.attack.share * micro_batch(config)))
    probed = config.probe.images if config.probe.every_epochs is not None else 2
    return min(2, attacked, probed)


def _check_precise_bn(config: Config, model: nn.Module) -> None:
    if config.eval.precise_bn_images is not None and not has_batchnorm(model):
        raise ConadvError(
            "eval.precise_bn_images has no effect: this model has no batch norm. Leave it out."
        )


def _schedule(config: Config, num_steps: int, steps_per_epoch: int) -> WarmupDecay:
    return WarmupDecay(
        peak=scaled_lr(config.optim, config.global_batch_size),
        total_steps=num_steps,
        warmup_steps=round(config.schedule.warmup_epochs * steps_per_epoch),
        decay=config.schedule.decay,
        power=config.schedule.power,
        end=config.schedule.end_lr,
    )


def _num_steps(config: Config, data: Data) -> int:
    count = config.steps or round((config.epochs or 0) * data.order.steps_per_epoch)
    if count < 1:
        raise ConadvError(
            f"epochs = {config.epochs} is less than one step of {data.order.steps_per_epoch} per epoch."
        )
    if config.staleness is not None and config.staleness >= count:
        raise ConadvError(
            f"staleness {config.staleness} has no effect in {count} steps: no batch is attacked so far ahead. "
            "Train longer, or choose a smaller staleness."
        )
    check_duration(config.probe, count, data.order.steps_per_epoch)
    return count


def make_model(config: Config, channels: int, num_classes: int) -> nn.Module:
    """The network on the CPU, initialised by the seed alone, with the routes that the views need."""
    with rng.scope(torch.device("cpu"), config.seed, "init"):
        model = load_model(config.model, channels, num_classes)
    split_batchnorm(model.train(), *(["aug"] if config.data.aug_view is not None else []))
    route = resolve_name(METHODS[config.method].target).route
    if route is None or config.adv_route == "clean":
        return model
    return split_batchnorm(model, route, share_affine=config.adv_route == "statistics")


def restore(parts: Parts, state: dict[str, Any]) -> int:
    """Load a checkpoint into model, optimizer and engine; returns the step to go on with.

    Ranks: ``state`` is the same on all but for the images that wait, of which each has its own share (:func:`_deal`).
    """
    with checkpoint.giving(state):
        load_weights(parts.model, state["model"])
        parts.engine.load_state_dict(state["engine"], _images_that_wait(parts))
        load_optimizer(
            parts.optimizer, state["optimizer"], parts.engine.version, some=parts.engine.has_updated
        )
        if parts.probe is not None:
            parts.probe.load_state_dict(state["probe"])
        parts.best.update(state["best"] or {})
        if parts.ema is not None:
            parts.ema.load_state_dict(state["ema"])
    return parts.engine.version


def _deal(state: dict[str, Any] | None, comm: Comm) -> dict[str, Any]:
    """Rank 0's ``state`` for every rank, on its device; of the images that wait only its own, on the CPU.

    Those of all ranks together may be more than a device holds. Ranks: collective, however many wrote the checkpoint.
    """
    shares: list[dict[str, Any]] | None = None
    with comm.agreed():
        if comm.is_main:
            assert state is not None
            with checkpoint.giving(state):
                shares = [
                    shard(state["engine"]["pending"], rank, comm.ranks)
                    for rank in range(comm.ranks)
                ]
                state = {**state, "engine": {**state["engine"], "pending": {}}}
    everyones = checkpoint.to_device(comm.broadcast_object(state), comm.device)
    return {**everyones, "engine": {**everyones["engine"], "pending": comm.scatter_objects(shares)}}


def _images_that_wait(parts: Parts) -> Expected:
    """What this rank's share of the images of one step looks like."""
    config, method = parts.config, parts.engine.method
    count = method.num_attacked(micro_batch(config))
    return Expected(
        micro_batches=accumulation(config, len(parts.teams.learners)),
        images=(count, parts.data.channels, parts.data.image_size, parts.data.image_size),
        classes=parts.data.num_classes,
        ahead=max(method.ahead, 1),  # recycle keeps them for the next step
    )


def _start(
    run: RunDir, parts: Parts, resume: bool, lock: Lock, observer: Observer
) -> tuple[int, list[str]]:
    """Continue from the newest intact checkpoint, which rank 0 reads for all, or make the folder.

    Returns the first step and what was wrong with newer checkpoints, which are renamed.
    An attack rank needs no state: it gets weights with its first batch.
    """
    comm, world, state = parts.comm, parts.teams.world, None
    damaged: list[str] = []
    with world.agreed():
        if world.is_main and resume:
            state, damaged = checkpoint.find_newest(run.checkpoints, torch.device("cpu"))
            checkpoint.set_aside(run.checkpoints, state["step"])
            for message in damaged:
                observer.message(message)
            run.mark()
        elif world.is_main:
            run.claim(parts.config, lock)
            run.start(parts.config)
    if resume and not parts.teams.attacking:
        restore(parts, _deal(state, comm))
    with world.agreed():
        if (
            world.is_main and resume
        ):  # a kill may have come between a checkpoint and the end of older ones
            checkpoint.prune(run.checkpoints, parts.config.checkpoint.keep, parts.best.get("step"))
    return world.broadcast_object(parts.engine.version), damaged


def load_run(
    path: Path, device: torch.device, *, best: bool = False, step: int | None = None
) -> Parts:
    """The parts of a run with one checkpoint loaded: newest, best (checkpoint.keep_best), or that of ``step``.

    Where a run has an average of its weights, that is the model.
    """
    run = RunDir(path)
    config = replace(run.open(), data__download=False)  # evaluating a stranger's run writes nothing
    parts = build(resolve(config), device)
    cpu = torch.device("cpu")
    state = (
        load_state(run, cpu, best=best)
        if step is None
        else checkpoint.load_step(run.checkpoints, step, cpu)
    )
    with checkpoint.giving(state):
        state = {**state, "engine": {**state["engine"], "pending": {}}}  # nobody trains here
    restore(parts, checkpoint.to_device(state, device))
    with checkpoint.giving(state):
        load_weights(parts.model, evaluated_state(state))
    return dataclasses.replace(parts, ema=None)


def load_state(run: RunDir, device: torch.device, *, best: bool = False) -> dict[str, Any]:
    """The newest intact checkpoint of a run, or that with the best validation accuracy so far."""
    if not checkpoint.steps(run.checkpoints):
        raise run.without_weights()
    state = checkpoint.load_newest(run.checkpoints, device)
    if not best:
        return state
    if state["best"] is None:
        raise ConadvError(
            f"{printable(run.path)} has kept no best checkpoint: train with --checkpoint.keep-best."
        )
    return checkpoint.load_step(run.checkpoints, state["best"]["step"], device)


def measure(parts: Parts, *, observer: Observer | None = None) -> dict[str, Result | None]:
    """Train, test and validation results of the model as it is, and the test result under PGD.

    None for what is switched off: validation without held-out images, PGD with eval.robust_images 0.

    Ranks: collective; all get the same results, those of the model with rank 0's running statistics.
    """
    options = parts.config.eval

    def run(split: str, limit: int | None, attack: PGD | None = None) -> Result:
        return _evaluate(parts, split, limit, attack)

    assert options.robust_eps is not None
    pgd = PGD(
        options.robust_eps,
        options.robust_steps,
        None,
        parts.config.attack.norm,
        False,
        1.0,
        parts.space,
    )
    return {
        "train": run("train", options.train_images),
        "validation": run("validation", None) if parts.data.source.validation is not None else None,
        "test": run("test", None),
        "robust": run("test", options.robust_images, pgd) if options.robust_images else None,
    }


def _evaluate(parts: Parts, split: str, limit: int | None, attack: PGD | None = None) -> Result:
    config, comm = parts.config, parts.comm
    comm.at("evaluation", parts.engine.version)
    comm.broadcast(parts.model.buffers())  # each rank has tracked the statistics of its own images
    if parts.ema is not None:
        comm.broadcast(parts.ema.module.buffers())
    return evaluate(
        parts.evaluated,
        parts.data.eval_batches(split, limit, config.eval.batch_size),
        parts.space,
        attack=attack,
        seed=config.seed,
        precision=config.precision,
        channels_last=config.channels_last,
        comm=comm,
    )


def _recalibrate(parts: Parts) -> None:
    """Precise statistics for the model that is evaluated, on its clean route and on that of the extra images.

    The images are training images as evaluation sees its own, without augmentation: always the same whole
    micro-batches for any number of ranks. The extra images of a method are made of them at the final weights.
    Ranks: collective.
    """
    config, comm = parts.config, parts.comm
    assert config.eval.precise_bn_images is not None
    assert isinstance(config.micro_batch_size, int)
    count = min(config.eval.precise_bn_images, parts.data.train_size)
    size = min(config.micro_batch_size, count)
    routes: dict[str, Attack | None] = {CLEAN: None}
    if "adv" in routes_of(parts.evaluated):
        routes["adv"] = getattr(parts.method, "attack", getattr(parts.method, "noise", None))
    for name, attack in routes.items():
        comm.at(f"recalibration of the {name} route", parts.engine.version)
        recalibrate(
            parts.evaluated,
            parts.data.eval_batches("train", count // size * size, size),
            parts.space,
            route=name,
            attack=attack,
            seed=config.seed,
            precision=config.precision,
            channels_last=config.channels_last,
            comm=comm,
        )


def finish(
    parts: Parts, run: RunDir, log: record.Record, begin: float, observer: Observer
) -> dict[str, Any]:
    """Evaluate into the record and summary.json, which rank 0 writes; returns the summary."""
    results = measure(parts)
    _log_bad_images(parts, log, observer, everyones=True)
    _log_evaluations(parts, results, log, begin, observer)
    summary: dict[str, Any] | None = None
    with parts.comm.agreed():
        if parts.comm.is_main:
            summary = summarize(parts, results, record.read_lines(run.record))
            run.write_summary(summary)
    return parts.comm.broadcast_object(summary)


def _loss(label_smoothing: float) -> Any:
    def loss(logits_NK: Tensor, y_N: Tensor) -> Tensor:
        return F.cross_entropy(logits_NK, y_N, label_smoothing=label_smoothing)

    return loss


def _title(config: Config) -> str:
    method = config.method
    if method == "conadv":
        method += f" tau={config.staleness}" + (" + look-ahead" if config.lookahead else "")
    return f"{config.recipe} {method}"


def overview(parts: Parts) -> Iterator[str]:
    """What is about to be trained: the sizes that decide the mathematics."""
    config = parts.config
    micro, ranks = config.micro_batch_size, parts.comm.ranks
    count = accumulation(config, ranks)
    attackers = len(parts.teams.attackers)
    more = f" (and {attackers} attack rank(s))" if attackers else ""
    normed = has_batchnorm(parts.model)
    sees = f"batch norm sees {micro} images per route; " if normed else ""
    lr = scaled_lr(config.optim, config.global_batch_size)
    yield (
        f"global batch {config.global_batch_size} = micro-batch {micro} x accumulation {count} x ranks {ranks}{more}; "
        f"{sees}{parts.num_steps} steps of {parts.data.order.steps_per_epoch} per epoch; {config.optim.name} lr {lr:g}"
    )
    if not normed:
        yield NO_BATCH_NORM
    if ranks > 1 or parts.choice.name != "inline":
        yield f"executor {parts.choice.name}: {parts.choice.why}"


def group_lines(parts: Parts) -> Iterator[str]:
    """Who gets weight decay and trust ratio."""
    yield f"{'group':<10}{'tensors':>9}{'parameters':>14}{'decay':>10}  trust ratio"
    for row in describe(parts.groups):
        adapt = "yes" if row["adapt"] else "no"
        yield f"{row['name']:<10}{row['tensors']:>9}{row['parameters']:>14,}{row['weight_decay']:>10.2g}  {adapt}"


def _open_record(run: RunDir, parts: Parts, first: int, damaged: list[str]) -> record.Record:
    """A new record with its header, or the old one without what will be written again."""
    if not parts.comm.is_main:
        return record.Record(None)
    if first:
        record.check_steps(run.record, first)
        run.check_header(parts.config)
        record.truncate(run.record, first)
        earlier = [
            line["path"] for line in record.read_lines(run.record) if line["type"] == "bad_image"
        ]
        parts.data.bad.logged.update(earlier)
    log = record.Record(run.record)
    if first:
        log.write("resume", step=first, **_placement(parts), damaged=damaged, time=record.now())
        return log
    log.write(
        "header",
        time=record.now(),
        version=__version__,
        versions=record.versions(),
        machine=record.machine(_device_name(parts.engine.device), torch.get_num_threads()),
        git=record.git_state(),
        **_placement(parts),
        recipe=parts.config.recipe,
        seed=parts.config.seed,
        config=parts.config.model_dump(mode="json"),
        steps=parts.num_steps,
        parameter_groups=describe(parts.groups),
    )
    return log


def _placement(parts: Parts) -> dict[str, Any]:
    """How many ranks there are, and what runs where."""
    execution = {
        "executor": parts.choice.name,
        "why": parts.choice.why,
        "learners": len(parts.teams.learners),
        "attack_ranks": len(parts.teams.attackers),
        "late": parts.execution.late,
        "on_attack_loss": parts.execution.on_attack_loss,
    }
    return {"ranks": parts.teams.world.ranks, "execution": execution}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _data_views(parts: Parts) -> tuple[str, ...]:
    aug = ("aug",) if parts.config.data.aug_view is not None else ()
    return ("clean", *parts.method.data_views, *aug)


def _loop(
    parts: Parts, run: RunDir, log: record.Record, first: int, begin: float, observer: Observer
) -> None:
    """The steps from ``first`` on, until the last one or a request to stop (then ``parts.engine.stop``)."""
    spans: Timelines = []
    keep, background = parts.config.checkpoint.keep, parts.config.checkpoint.background
    writer = Writer(run.checkpoints, keep, background=background, before=log.sync)
    patience = Patience(granted_seconds(), observer.message)
    # signals outermost: one that reaches this rank when the others already leave must not end it in between
    with (
        Signals(observer.message) as signals,
        _closing(parts, spans, log),
        _written(parts, writer),
        naming_lost_workers(),
    ):
        # a checkpoint that could not be written ends the run at the next step: save() raises it on all ranks
        parts.engine.stop_request = lambda: max(signals.request, INTERRUPT * writer.failed)
        for batch, future in _timed(parts, first):
            _probe(parts, log)
            done = parts.engine(batch, future)
            _follow(parts, done)
            _note(parts, spans, done.step, done.spans)
            if done.step - first >= parts.execution.timeline_steps:
                done.spans = []
            _log_step(log, done, begin)
            _log_bad_images(parts, log, observer)
            _log_attack_losses(parts, log, observer)
            observer.step(done)
            better = _evaluate_if_due(parts, log, begin, observer)
            patience.turn()
            if better or parts.engine.stop or _checkpoint_is_due(parts):
                _log_bad_images(parts, log, observer, everyones=True)
                _log_attack_losses(parts, log, observer, everyones=True)
                save(parts, writer)
                patience.saved()
            patience.judge(writer.background_seconds)
            if parts.engine.stop:
                return


def _probe(parts: Parts, log: record.Record) -> None:
    """Measure before a step that has a probe. One of numbers that are not finite is left out: so is the step, then."""
    lines = [] if parts.probe is None else parts.probe.before_step()
    if all(
        math.isfinite(value)
        for line in lines
        for value in line.values()
        if isinstance(value, float)
    ):
        for line in lines:
            log.write("probe", **line)


def _follow(parts: Parts, done: StepRecord) -> None:
    """What comes after an update and before anything is evaluated or saved."""
    if parts.ema is not None and done.skipped is None:
        parts.ema.update_parameters(parts.model)
    if parts.engine.version == parts.num_steps and parts.config.eval.precise_bn_images is not None:
        _recalibrate(parts)


@contextmanager
def _written(parts: Parts, writer: Writer) -> Iterator[None]:
    """Wait at the end until all is written. Ranks: after a good end all raise what rank 0 could not write."""
    try:
        yield
    except BaseException:
        with suppress(ConadvError):  # what ended the run says more
            writer.wait()
        raise
    with parts.comm.agreed():
        writer.wait()


def _log_step(log: record.Record, done: StepRecord, begin: float) -> None:
    """Write a step's line; what is not finite in a step that was left out becomes null."""
    values = asdict(done)
    if done.skipped is not None:
        values |= {name: record.finite(values[name]) for name in ("loss", "grad_norm")}
        values["losses"] = {view: record.finite(loss) for view, loss in done.losses.items()}
    log.write("step", **values, staleness=done.staleness, time=time.monotonic() - begin)


def _checkpoint_is_due(parts: Parts) -> bool:
    count = parts.engine.version
    every = parts.config.checkpoint.every_epochs
    return _due(count, every, parts.data.order.steps_per_epoch) or count == parts.num_steps


def _evaluate_if_due(parts: Parts, log: record.Record, begin: float, observer: Observer) -> bool:
    """Evaluate where the config says so; returns whether the model is the best so far (checkpoint.keep_best).

    A request to stop that came meanwhile counts at this step, not at the next.
    """
    count, every, best = (
        parts.engine.version,
        parts.config.eval.every_epochs,
        parts.config.checkpoint.keep_best,
    )
    if count == parts.num_steps:  # finish() evaluates; the last checkpoint must know before
        return best and _is_best(parts, _evaluate(parts, "validation", None))
    if not _due(count, every, parts.data.order.steps_per_epoch):
        return False
    _evaluate_now(parts, log, begin, observer, "test")
    better = best and _is_best(parts, _evaluate_now(parts, log, begin, observer, "validation"))
    _agree_to_stop(parts)
    return better


def _is_best(parts: Parts, result: Result) -> bool:
    """Whether no earlier step was as good on the held-out images; then this step is noted as the best."""
    better = math.isfinite(result.loss) and result.accuracy > parts.best.get("accuracy", -1.0)
    if better:
        parts.best.update(step=parts.engine.version, accuracy=result.accuracy)
    return better


def _agree_to_stop(parts: Parts) -> None:
    """Outside of the steps: what any learner was asked for is asked of all. Ranks: collective."""
    engine = parts.engine
    mine = max(engine.stop, engine.stop_request() if engine.stop_request else 0)
    flags = parts.comm.any(torch.tensor([mine >= INTERRUPT, mine == TERMINATE]))
    engine.stop = int(flags.sum())


def _log_bad_images(
    parts: Parts, log: record.Record, observer: Observer, *, everyones: bool = False
) -> None:
    """Files that could not be read, into the record, each once.

    Ranks: rank 0 writes its own at once; with ``everyones`` those of the others too (collective).
    """
    data, comm = parts.data, parts.comm
    if not data.skip_bad or not (comm.is_main or everyones):
        return
    found = [data.bad.take(parts.engine.version - 1)]
    if everyones:
        found = comm.gather_objects(found[0])
    for line in sorted(chain(*found), key=lambda line: int(line["step"])):
        if line["path"] not in data.bad.logged:
            data.bad.logged.add(line["path"])
            log.write("bad_image", **line)
            observer.message(f"left out, as it cannot be read: {line['path']} ({line['reason']})")


def _log_attack_losses(
    parts: Parts, log: record.Record, observer: Observer, *, everyones: bool = False
) -> None:
    """Attack ranks that learners have lost, into the record.

    Ranks: rank 0 writes its own at once; with ``everyones`` those of the other learners too (collective).
    """
    comm = parts.comm
    if not parts.teams.may_lose or not (comm.is_main or everyones):
        return
    found = [parts.engine.executor.failed_ranks()]
    if everyones:
        parts.engine.executor.settle()  # finds the last ones, before the checkpoint instead of in it
        found = comm.gather_objects([*found[0], *parts.engine.executor.failed_ranks()])
    for loss in chain(*found):
        log.write("attack_loss", **asdict(loss))
        observer.message(
            f"attack rank {loss.attack_rank} is lost at step {loss.step} ({loss.reason}): attacking here"
        )


def _timed(parts: Parts, first: int) -> Iterator[tuple[Batch, Batch | None]]:
    """The batches from step ``first`` on, each with the one that is ``ahead`` of it; waiting counts as "data"."""
    batches = parts.data.train_batches(first, parts.num_steps, _data_views(parts))
    pairs = windows(batches, parts.engine.ahead)
    while True:
        begin = time.monotonic()
        parts.comm.at("data", parts.engine.version)
        pair = next(pairs, None)
        parts.engine.clock.add("data", begin, time.monotonic())
        if pair is None:
            return
        yield pair


def _due(count: int, every_epochs: float | None, steps_per_epoch: int) -> bool:
    """Whether ``count`` updates complete a whole number of periods; a period is at least one step."""
    return every_epochs is not None and count % max(1, round(every_epochs * steps_per_epoch)) == 0


def _evaluate_now(
    parts: Parts, log: record.Record, begin: float, observer: Observer, split: str
) -> Result:
    result = _evaluate(parts, split, None)
    _log_evaluations(parts, {split: result}, log, begin, observer)
    return result


def _log_evaluations(
    parts: Parts,
    results: dict[str, Result | None],
    log: record.Record,
    begin: float,
    observer: Observer,
) -> None:
    """Write one line for each result; a loss that is not finite ends the run, or with on_nonfinite skip is null."""
    step = parts.engine.version
    if parts.config.on_nonfinite == "stop":
        stop_if_diverged(results, step)
    epoch = step / parts.data.order.steps_per_epoch
    for split, result in results.items():
        if result is not None:
            values = {**asdict(result), "loss": record.finite(result.loss)}
            log.write(
                "eval", step=step, epoch=epoch, split=split, **values, time=time.monotonic() - begin
            )
            observer.evaluation(step, split, result.loss, result.accuracy)


def save(parts: Parts, writer: Writer) -> None:
    """Write a checkpoint of the present state, or have it written (checkpoint.background).

    Ranks: collective. Rank 0 writes its own state and the images that wait on all ranks, as one rank would hold them;
    so a checkpoint does not depend on the number of ranks.
    """
    comm, engine = parts.comm, parts.engine.state_dict()
    comm.at("checkpoint", parts.engine.version)
    waiting = gather(engine["pending"], comm)
    with comm.agreed():
        if comm.is_main:
            state = {
                "model": parts.model.state_dict(),
                "optimizer": parts.optimizer.state_dict(),
                "engine": {**engine, "pending": waiting},
                "ema": None if parts.ema is None else parts.ema.state_dict(),
                "channels": parts.data.channels,
                "image_size": parts.data.image_size,
                "class_names": list(parts.data.class_names),
                "probe": None if parts.probe is None else parts.probe.state_dict(),
                "best": dict(parts.best) or None,
            }
            writer.save(parts.engine.version, state, parts.best.get("step"))
