"""``conadv train ... --dry-run``: everything up to the first step, and what the run is going to be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from conadv.config.schema import Config
from conadv.data.images import BadImage
from conadv.data.splits import PhotoSplit
from conadv.distributed.comm import Comm
from conadv.engine.execution import Execution
from conadv.errors import ConadvError, printable
from conadv.plan import Profile, load
from conadv.preflight import estimate, memory, picture
from conadv.preflight.estimate import Cost, Disk, Group, Time, gib
from conadv.preflight.profiled import predicted_time
from conadv.preflight.rehearsal import Rehearsal, Shape
from conadv.training import checkpoint
from conadv.training.observer import Observer, Silent
from conadv.training.run_dir import RunDir
from conadv.training.trainer import Parts, admit, build, overview

SAMPLE = 512
"""So many image files of a split are read; `conadv check` reads all."""


@dataclass(frozen=True)
class DataFound:
    """What the data settings lead to. ``sampled``: image files that were read; ``bad``: those that cannot be."""

    train: int
    validation: int | None
    test: int
    classes: int
    channels: int
    image_size: int
    sampled: int
    bad: tuple[str, ...]


@dataclass(frozen=True)
class Preview:
    """What a run is going to be. Curves map a step to a value."""

    title: str
    first_step: int
    steps_per_epoch: int
    lines: tuple[str, ...]
    data: DataFound
    curves: tuple[tuple[str, Callable[[int], float]], ...]
    groups: tuple[Group, ...]
    memory_needed: int
    memory_free: int | None
    disk: Disk
    cost: Cost
    time: Time
    device: str


def preview(
    config: Config,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    auto_resume: bool = False,
    comm: Comm,
    execution: Execution | None = None,
    observer: Observer | None = None,
    profile: Path | None = None,
    link_gbit: float | None = None,
    latency_us: float | None = None,
) -> Preview:
    """Check data, settings, memory and disk as a run into ``out`` would need them; no step is made.

    Writes nothing (data.download aside) and leaves ``out`` as it is. ``profile``: of ``conadv plan``, for the time,
    with ``link_gbit`` and ``latency_us`` of the link between ranks in place of the measured one; without a profile, a
    few steps of one micro-batch on synthetic images are timed, in an engine of their own.
    Raises ConadvError for all that :func:`conadv.training.trainer.train` would stop at before its first step, and where image
    files in the sample cannot be read, memory or disk would not do.
    Ranks: collective; the preview is rank 0's, with the least free memory and the slowest step of all.
    """
    observer = observer if observer and comm.is_main else Silent()
    run = RunDir(out)
    measured: Profile | None = None
    with comm.agreed():
        measured = None if profile is None else load(profile)
    options: dict[str, Any] = {"resume": resume, "overwrite": overwrite, "auto_resume": auto_resume}
    config, resume = admit(config, run, comm, observer, execution, **options)
    parts = build(config, comm.device, observer, comm, execution)
    with comm.agreed():
        data = _data(parts) if comm.is_main else None
    needs, free = _memory(parts, comm)
    with comm.agreed():
        disk = estimate.disk(parts, needs.sizes, out)
        if comm.is_main and disk.needed > disk.free:
            raise ConadvError(
                f"The checkpoints take {gib(disk.needed)} ({disk.files} of {gib(disk.checkpoint)}), and "
                f"{printable(out)} has {gib(disk.free)} left. Free some space, choose another --out, or a smaller "
                f"--checkpoint.keep. {gib(disk.waiting)} of each are images that wait (--pending-dtype)."
            )
        if measured is not None:
            time = predicted_time(parts, measured, link_gbit, latency_us)
        else:
            time = estimate.rehearsed_time(parts, needs.rehearsal)
    slowest = max(comm.gather_objects(time.step), default=0.0)
    saved = checkpoint.steps(run.checkpoints) if resume and comm.is_main else []
    return Preview(
        title=f"{config.recipe} {parts.config.method}",
        first_step=saved[-1] if saved else 0,
        steps_per_epoch=parts.data.order.steps_per_epoch,
        lines=tuple(overview(parts)),
        data=data or _facts(parts, 0, ()),
        curves=_curves(parts),
        groups=tuple(estimate.groups(parts)),
        memory_needed=needs.bytes,
        memory_free=free,
        disk=disk,
        cost=estimate.cost(parts),
        time=Time(slowest, time.source, time.notes),
        device=str(comm.device),
    )


# ---- data


def _data(parts: Parts) -> DataFound:
    """Read a sample of the image files. Raises ConadvError where the run would stop at one of them."""
    source = parts.data.source
    splits = [
        split
        for split in (source.train, source.validation, source.test)
        if isinstance(split, PhotoSplit)
    ]
    bad, sampled = [], 0
    for split in splits:
        chosen = _spread(len(split.labels))
        sampled += len(chosen)
        for index in chosen:
            try:
                split.listing.read(index)
            except BadImage as error:
                bad.append(": ".join(split.listing.bad(index, error)))
    if bad and not parts.data.skip_bad:
        raise ConadvError(
            f"{len(bad)} of {sampled} image files that were tried cannot be read, the first: {printable(bad[0])}. "
            "`conadv check DIR` lists all; replace or remove them, or train with --on-bad-image skip."
        )
    return _facts(parts, sampled, tuple(map(printable, bad)))


def _spread(count: int) -> Sequence[int]:
    """At most SAMPLE numbers below ``count``, evenly spread: files of every class."""
    return range(count) if count <= SAMPLE else [index * count // SAMPLE for index in range(SAMPLE)]


def _facts(parts: Parts, sampled: int, bad: tuple[str, ...]) -> DataFound:
    data, held = parts.data, parts.data.source.validation
    return DataFound(
        data.train_size,
        None if held is None else len(held.labels),
        data.test_size,
        data.num_classes,
        data.channels,
        data.image_size,
        sampled,
        bad,
    )


# ---- memory


@dataclass(frozen=True)
class _Needs:
    rehearsal: Rehearsal
    sizes: Any
    bytes: int


def _memory(parts: Parts, comm: Comm) -> tuple[_Needs, int | None]:
    """What a step needs at least, and the least that any rank's device has free. Raises ConadvError if it is less."""
    data = parts.data
    rehearsal = Rehearsal(
        parts.config, Shape(data.channels, data.image_size, data.num_classes), comm.device
    )
    comm.all_reduce(
        torch.zeros(1, device=comm.device)
    )  # a barrier: nobody rehearses while others look what is free
    with comm.agreed():
        free = memory.available(comm.device)
    comm.all_reduce(torch.zeros(1, device=comm.device))
    with comm.agreed():
        sizes = estimate.sizes(parts, rehearsal, free or 0)
        needed = estimate.memory_needed(parts, sizes)
        there = needed - sizes.weights  # the model lies there already
        if free is not None and there > free:
            raise ConadvError(
                f"A step needs at least {gib(needed)} and {comm.device} has {gib(free)} left. Use --micro-batch-size "
                "auto or a smaller one, bf16, a smaller image_size or model, or more ranks."
            )
    known = [value for value in comm.gather_objects(free) if value is not None]
    return _Needs(rehearsal, sizes, needed), min(known, default=None)


# ---- curves


def _curves(parts: Parts) -> tuple[tuple[str, Callable[[int], float]], ...]:
    return (("learning rate", parts.schedule),)


def draw(shown: Preview, path: Path) -> None:
    """The curves as a PNG. Raises ConadvError where it cannot be written."""
    picture.draw(shown.curves, shown.cost.steps, shown.steps_per_epoch, path)


def hours(seconds: float) -> str:
    """e.g. 12.3 s, 45 min, 3 h 05 min, 4 days 2 h."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = math.ceil(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes // 1440} days {minutes % 1440 // 60} h"
