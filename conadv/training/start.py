"""How a run begins: whether its directory may be used, new or from a checkpoint, and the record
that it writes to.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from conadv import __version__
from conadv.config.files import parse
from conadv.config.resolve import micro_batch, resolve
from conadv.config.schema import Config, differences, replace
from conadv.data.fingerprint import fingerprint
from conadv.distributed.comm import Comm
from conadv.engine.execution import Execution
from conadv.errors import ConadvError, printable
from conadv.optim.groups import describe
from conadv.training import checkpoint, provenance, record
from conadv.training.build import Run
from conadv.training.data_guard import changed_data
from conadv.training.lock import Lock
from conadv.training.observer import Observer
from conadv.training.resume import restore, scatter
from conadv.training.run_dir import RunDir


def admit(
    config: Config,
    run_dir: RunDir,
    comm: Comm,
    observer: Observer,
    execution: Execution | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    auto_resume: bool = False,
    restarted: bool = False,
) -> tuple[Config, bool]:
    """The resolved config, and whether to resume; arguments as those of ``train``. Changes nothing.

    Raises ConadvError for settings that do not fit together, differ between ranks, or may not go
    into ``run_dir``.
    Ranks: collective.
    """
    with comm.agreed():
        config = resolve(config)
        micro_batch(config)  # "auto" must be settled by now
    _check_same_settings(comm, config, execution or Execution())
    with comm.agreed():
        if comm.is_main:
            again = auto_resume or (restarted and run_dir.is_of_this_launcher())
            if again and not resume and run_dir.holds(config):
                resume, overwrite = _after_restart(run_dir, observer)
            run_dir.check(config, resume=resume, overwrite=overwrite)
    return config, comm.broadcast_object(resume)


def _check_same_settings(comm: Comm, config: Config, execution: Execution) -> None:
    """Every host has a command line of its own: all must ask for the same, but for where the data
    lies.
    """
    mine = replace(config, data__dir=None)
    theirs, how = comm.broadcast_object((mine.model_dump(mode="json"), execution))
    with comm.agreed():
        changed = differences(parse(theirs, "rank 0"), mine)
        changed += [f"{how} -> {execution}"] if how != execution else []
        if changed:
            raise ConadvError(
                f"This rank was started with other settings than rank 0: {'; '.join(changed)}."
            )


def _after_restart(run_dir: RunDir, observer: Observer) -> tuple[bool, bool]:
    """Whether to resume, and whether to overwrite, where a launcher has started this run's
    processes again.
    """
    saved = checkpoint.steps(run_dir.checkpoints)
    if not saved and run_dir.summary.is_file():
        raise ConadvError(
            f"{printable(run_dir.path)} holds this run, finished, but without a checkpoint to go "
            "on from. Add --overwrite to train it again, or choose another --out."
        )
    observer.message(f"started again: going on from step {saved[-1] if saved else 0}")
    return bool(saved), not saved


@dataclass
class Found:
    """What a resume has found. ``damaged``: what was wrong with newer checkpoints, which are
    renamed.

    ``data_changed``: what has changed in the data since the checkpoint (data.changed accept).
    """

    damaged: list[str] = field(default_factory=list)
    data_changed: list[str] = field(default_factory=list)


def load_or_claim(
    run_dir: RunDir, run: Run, resume: bool, lock: Lock, observer: Observer
) -> tuple[int, Found]:
    """Continue from the newest intact checkpoint, which rank 0 reads for all, or make the folder.

    Returns the first step. An attack rank needs no state: it gets weights with its first batch.
    Ranks: collective.
    """
    comm, world, state = run.comm, run.teams.world, None
    found = Found()
    with world.agreed():
        if world.is_main:
            run.fingerprint = fingerprint(run.data.source)
        if world.is_main and resume:
            state, found.damaged = checkpoint.find_newest(run_dir.checkpoints, torch.device("cpu"))
            state = _with_todays_data(state, run, found)
            checkpoint.set_aside(run_dir.checkpoints, state["step"])
            for message in (*found.damaged, *found.data_changed):
                observer.message(message)
            run_dir.mark()
        elif world.is_main:
            run_dir.claim(run.config, lock)
            run_dir.start(run.config)
    if resume and not run.teams.attacking:
        restore(run, scatter(state, comm))
    with world.agreed():
        # a kill may have come between a checkpoint and the removal of older ones
        if world.is_main and resume:
            keep, best = run.config.checkpoint.keep, run.best.get("step")
            checkpoint.prune(run_dir.checkpoints, keep, best)
    return world.broadcast_object(run.step.version), found


def _with_todays_data(state: dict[str, Any], run: Run, found: Found) -> dict[str, Any]:
    """``state``; where the data have changed, without the images that wait for other batches."""
    assert run.fingerprint is not None
    found.data_changed = changed_data(
        state,
        run.fingerprint,
        accept=run.config.data.changed == "accept",
        other_classes=True,
        remedy="To go on with what is there now: --data.changed accept.",
    )
    if not found.data_changed:
        return state
    with checkpoint.restoring(state):
        return {**state, "engine": {**state["engine"], "pending": {}}}


def open_record(run_dir: RunDir, run: Run, first: int, found: Found) -> record.Record:
    """A new record with its header, or the old one without what will be written again."""
    if not run.comm.is_main:
        return record.Record(None)
    if not first:
        log = record.Record(run_dir.record)
        log.write("header", **_header(run), **_placement(run))
        return log
    lines = record.read_lines(run_dir.record)
    record.check_steps(lines, run_dir.record, first)
    lines = record.truncate(run_dir.record, lines, first)
    run.data.logged.update(line["path"] for line in lines if line["type"] == "bad_image")
    log = record.Record(run_dir.record)
    steps, now = run.derived.steps, provenance.now()
    log.write("resume", step=first, steps=steps, **_placement(run), **asdict(found), time=now)
    return log


def _header(run: Run) -> dict[str, Any]:
    device = run.step.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "time": provenance.now(),
        "version": __version__,
        "versions": provenance.versions(),
        "machine": provenance.machine(name, torch.get_num_threads()),
        "git": provenance.git_state(),
        "recipe": run.config.recipe,
        "seed": run.config.seed,
        "config": run.config.model_dump(mode="json"),
        "steps": run.derived.steps,
        "parameter_groups": describe(run.step.optimizer.param_groups),
    }


def _placement(run: Run) -> dict[str, Any]:
    """How many ranks there are, and what runs where."""
    execution = {
        "executor": run.choice.name,
        "why": run.choice.why,
        "learners": len(run.teams.learners),
        "attack_ranks": len(run.teams.attackers),
        "late": run.execution.late,
        "on_attack_loss": run.execution.on_attack_loss,
    }
    return {"ranks": run.teams.world.ranks, "execution": execution}
