"""``conadv train --dry-run``: everything up to the first step, and what the run would need."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from conadv.config.schema import Config
from conadv.distributed.comm import Comm
from conadv.engine.execution import Execution
from conadv.errors import ConadvError, printable
from conadv.planning import memory
from conadv.planning.memory import gib
from conadv.planning.timing import burst
from conadv.planning.trial import Shape, Trial
from conadv.training import checkpoint
from conadv.training.build import Run, build
from conadv.training.observer import Observer
from conadv.training.run_dir import RunDir
from conadv.training.start import admit


@dataclass(frozen=True)
class Preview:
    """A ``run`` as it would be trained, and what it would need. Sizes in bytes.

    memory_free: None if it is not known. waiting: the part of a checkpoint that is images for later
    steps. checkpoints: files at a time.
    step_seconds: without loading images and talking to other ranks.
    """

    run: Run
    first_step: int
    memory_needed: int
    memory_free: int | None
    checkpoint: int
    waiting: int
    checkpoints: int
    disk_free: int
    step_seconds: float

    @property
    def gradient_images(self) -> float:
        """Per clean image (docs/record.md)."""
        config, method = self.run.config, self.run.step.method
        extra = (("aug", config.data.aug_view), ("adv", method.route))
        views = ["clean", *(name for name, there in extra if there is not None)]
        return method.gradient_images(views, self.run.derived.micro_batch_size)


def preview(
    config: Config,
    out: Path,
    *,
    comm: Comm,
    execution: Execution | None = None,
    observer: Observer | None = None,
    **existing: bool,
) -> Preview:
    """Check data, settings, memory and disk as a run into ``out`` would need them; no step is made.

    Writes nothing (data.download aside) and leaves ``out`` as it is. The time is that of a few
    steps of one micro-batch of random images. ``existing``: resume, overwrite, auto_resume, as in
    training. The micro-batch must be settled.
    Raises ConadvError for all that :func:`conadv.training.loop.train` would stop at before its
    first step, and where memory or disk are too small. Image files are not read: `conadv check`
    does.
    Ranks: collective; the preview is rank 0's, with the least free memory and the slowest step of
    all.
    """
    observer = observer if observer and comm.is_main else Observer()
    folder = RunDir(out)
    config, resume = admit(config, folder, comm, observer, execution, **existing)
    run = build(config, comm.device, observer, comm, execution)
    data, micro = run.data, run.derived.micro_batch_size
    learners, attackers = len(run.teams.learners), len(run.teams.attackers)
    shape = Shape(data.channels, data.image_size, data.num_classes)
    with comm.agreed():
        trial = Trial(config, shape, Comm(device=comm.device), min(2, micro))
        needed = trial.run_bytes(learners, attackers, micro)
        free = memory.available(comm.device)
    comm.barrier()  # none takes memory while others look
    with comm.agreed():
        if free is not None and needed - trial.sizes.weights > free:  # the run's model is there
            raise ConadvError(
                f"A step needs at least {gib(needed)} and {comm.device} has {gib(free)} left. Use "
                "--micro-batch-size auto or a smaller one, bf16, a smaller image_size or model, or "
                "more ranks."
            )
        saved, waiting = checkpoint_bytes(run, trial)
        count, disk_free = checkpoints_at_a_time(run), free_disk(out)
        if comm.is_main and saved * count > disk_free:
            raise ConadvError(
                f"The checkpoints take {gib(saved * count)} ({count} of {gib(saved)}), and "
                f"{printable(out)} has {gib(disk_free)} left. Free space, choose another --out or "
                f"a smaller --checkpoint.keep. {gib(waiting)} of each are images that wait "
                "(--pending-dtype)."
            )
        seconds = step_seconds(run, shape)
    slowest = max(comm.gather_objects(seconds), default=0.0)
    everyones = [value for value in comm.gather_objects(free) if value is not None]
    done = checkpoint.steps(folder.checkpoints) if resume and comm.is_main else []
    return Preview(
        run,
        done[-1] if done else 0,
        needed,
        min(everyones, default=None),
        saved,
        waiting,
        count,
        disk_free,
        slowest,
    )


# ---- disk


def checkpoint_bytes(run: Run, trial: Trial) -> tuple[int, int]:
    """Bytes of a checkpoint, and what of it is images, with labels, that wait on all ranks.

    The rest: weights and buffers, their average, and the optimizer's state.
    """
    config, method = run.config, run.step.method
    batches = method.ahead or int(method.needs_input_gradient)
    dtype: torch.dtype = getattr(torch, config.pending_dtype or "float32")
    image = trial.sizes.image // 4 * dtype.itemsize + 8
    waiting = int(config.global_batch_size * batches * config.attack.share * image)
    tensors = (x for x in run.model.state_dict().values() if isinstance(x, Tensor))
    model = sum(x.nbytes for x in tensors) * (1 + (config.ema.decay is not None))
    return model + trial.sizes.optimizer_state + waiting, waiting


def checkpoints_at_a_time(run: Run) -> int:
    """A new checkpoint is complete before an older one is removed."""
    settings, every = run.config.checkpoint, run.derived.checkpoint_every
    planned = -(-run.derived.steps // every) if every is not None else 1
    return min(settings.keep + 1, planned) + settings.keep_best


def free_disk(out: Path) -> int:
    folders = (out.absolute(), *out.absolute().parents)
    return shutil.disk_usage(next(folder for folder in folders if folder.exists())).free


# ---- time


def step_seconds(run: Run, shape: Shape) -> float:
    """Of one micro-batch on this device, times the accumulation. Each rank for itself."""
    size, device = run.derived.micro_batch_size, run.step.device
    trial = Trial(run.config, shape, Comm(device=device), size)
    return (burst(trial.phases, 1).seconds or 0.0) * run.derived.accumulation
