"""Checkpoints of a run: what is saved, and how a run goes on from one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from conadv.config.files import home
from conadv.config.resolve import resolve
from conadv.config.schema import replace
from conadv.data.fingerprint import fingerprint
from conadv.distributed.comm import Comm
from conadv.engine.pending import Expected, gather, shard
from conadv.engine.validate import load_average, load_optimizer, load_weights
from conadv.errors import ConadvError, printable
from conadv.nn.ema import evaluated_state
from conadv.training import checkpoint
from conadv.training.build import Run, build
from conadv.training.data_guard import changed_data
from conadv.training.run_dir import RunDir
from conadv.training.writer import Writer


def save(run: Run, writer: Writer) -> None:
    """Write a checkpoint of the present state, or have it written (checkpoint.background).

    Ranks: collective. Rank 0 writes its own state and the images that wait on all ranks, as one
    rank would hold them; so a checkpoint does not depend on the number of ranks.
    """
    comm, step = run.comm, run.step.state_dict()
    # Each rank tracks running statistics of its own, and rank 0's are saved: an attack that uses
    # them must go on here as it will after a resume.
    comm.broadcast(run.model.buffers())
    comm.at("checkpoint", run.step.version)
    waiting = gather(step["pending"], comm)
    with comm.agreed():
        if comm.is_main:
            state = {
                "model": run.model.state_dict(),
                "optimizer": run.step.optimizer.state_dict(),
                "engine": {**step, "pending": waiting},
                "ema": None if run.ema is None else run.ema.state_dict(),
                "channels": run.data.channels,
                "image_size": run.data.image_size,
                "class_names": list(run.data.class_names),
                "data": run.fingerprint,
                "probe": None if run.probe is None else run.probe.state_dict(),
                "best": dict(run.best) or None,
            }
            writer.save(run.step.version, state, run.best.get("step"))


def restore(run: Run, state: dict[str, Any]) -> None:
    """Load a checkpoint into model, optimizer and step.

    Ranks: ``state`` is the same on all but for the images that wait, of which each has its own
    (:func:`scatter`).
    """
    step = run.step
    with checkpoint.restoring(state):
        load_weights(run.model, state["model"])
        if list(state["model"]) != list(run.model.state_dict()):
            # An optimizer's state goes by the order of the parameters, not by their names.
            raise ConadvError(
                "its model has the same layers in another order, so the momentum of one would go "
                "to another. Restore the order in the model's code"
            )
        step.load_state_dict(state["engine"], _expected_images(run))
        load_optimizer(step.optimizer, state["optimizer"])
        if run.probe is not None:
            run.probe.load_state_dict(state["probe"])
        run.best.update(state["best"] or {})
        if run.ema is not None:
            load_average(run.ema, state["ema"])


def scatter(state: dict[str, Any] | None, comm: Comm) -> dict[str, Any]:
    """Rank 0's ``state`` for every rank, on its device; of the images that wait only its own, on
    the CPU.

    Those of all ranks together may be more than a device holds. Ranks: collective, for any number
    of ranks that wrote.
    """
    shares: list[dict[str, Any]] | None = None
    with comm.agreed():
        if comm.is_main:
            assert state is not None
            with checkpoint.restoring(state):
                waiting = state["engine"]["pending"]
                shares = [shard(waiting, rank, comm.ranks) for rank in range(comm.ranks)]
                state = {**state, "engine": {**state["engine"], "pending": {}}}
    of_all = checkpoint.to_device(comm.broadcast_object(state), comm.device)
    mine = comm.scatter_objects(shares)
    return {**of_all, "engine": {**of_all["engine"], "pending": mine}}


def _expected_images(run: Run) -> Expected:
    """What this rank's share of the images of one step looks like."""
    data, method = run.data, run.step.method
    count = method.num_attacked(run.data.read)
    return Expected(
        micro_batches=run.derived.accumulation,
        images=(count, data.channels, data.image_size, data.image_size),
        classes=data.num_classes,
        ahead=max(method.ahead, 1),  # recycle keeps them for the next step
    )


def load_run(
    path: Path | str,
    device: torch.device,
    *,
    best: bool = False,
    step: int | None = None,
    data: Path | None = None,
) -> Run:
    """A run with one checkpoint loaded: newest, best (checkpoint.keep_best), or that of ``step``.

    Where a run has an average of its weights, that is the model. ``data``: where its data lie now;
    images other than those that the run saw are taken from there alone, and only of its classes.
    Raises ConadvError for data that have moved or changed.
    """
    run_dir = RunDir(path)
    # evaluating a stranger's run writes nothing
    config = replace(run_dir.open(), data__download=False)
    if data is not None:
        config = replace(config, data__dir=data)
    elif config.data.dir is not None and not home(config.data.dir).exists():
        raise ConadvError(
            f"The data of this run are no longer in {printable(config.data.dir)}. Say where they "
            "are now: --data DIR."
        )
    run = build(resolve(config), device)
    cpu = torch.device("cpu")
    if step is None:
        state = load_state(run_dir, cpu, best=best)
    else:
        state = checkpoint.load_step(run_dir.checkpoints, step, cpu)
    changed_data(
        state,
        fingerprint(run.data.source),
        accept=data is not None,
        other_classes=False,
        remedy="To take the images that are there now: --data DIR.",
    )
    with checkpoint.restoring(state):
        state = {**state, "engine": {**state["engine"], "pending": {}}}  # nobody trains here
    restore(run, checkpoint.to_device(state, device))
    with checkpoint.restoring(state):
        load_weights(run.model, evaluated_state(state))
    run.ema = None
    return run


def load_state(run_dir: RunDir, device: torch.device, *, best: bool = False) -> dict[str, Any]:
    """The newest intact checkpoint of a run, or that with the best validation accuracy so far."""
    if not checkpoint.steps(run_dir.checkpoints):
        raise run_dir.without_weights()
    state = checkpoint.load_newest(run_dir.checkpoints, device)
    if not best:
        return state
    if state["best"] is None:
        raise ConadvError(
            f"{printable(run_dir.path)} has kept no best checkpoint: train with "
            "--checkpoint.keep-best."
        )
    return checkpoint.load_step(run_dir.checkpoints, state["best"]["step"], device)
