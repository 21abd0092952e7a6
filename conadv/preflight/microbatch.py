"""``micro_batch_size`` auto: the largest micro-batch that fits on every rank's device, found by trial.

It divides a learner's share of the global batch, so that accumulation reaches the global batch exactly. On CUDA a trial
is a few steps of the real engine on synthetic images; one that runs out of memory, or comes too near, does not fit. On
a CPU, where running out of memory ends other programs too, two small trials give the memory per image, and what that
comes to must be well within what is free.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from conadv.config.schema import Config, replace, resolve
from conadv.data.source import Source
from conadv.distributed.teams import Teams
from conadv.errors import ConadvError
from conadv.nn.split_batchnorm import has_batchnorm
from conadv.plan.measure import activations
from conadv.plan.search import divisors
from conadv.preflight import memory
from conadv.preflight.rehearsal import Rehearsal, Shape
from conadv.training.build import method_of

CUDA_HEADROOM = 0.05
"""Share of a CUDA device's memory that stays free: NCCL's buffers, fragments, other sizes in evaluation."""
CPU_SHARE = 0.8
"""Share of the free memory of the host that a step may take: the prediction is linear, data loaders come on top."""
SMALL_TRIAL = 256 * memory.GIB // 1024
"""Activations of the larger of the two trials on a CPU: enough to stand out from everything else."""
KEPT = 1.5
"""At least so many times what autograd keeps: gradients and workspaces of a layer come on top."""


def settle(config: Config, teams: Teams, source: Source, tell: Callable[[str], None]) -> Config:
    """The config with a number as micro_batch_size. ``tell`` hears which and why.

    Raises ConadvError where not even the smallest micro-batch fits, or the global batch does not divide over learners.
    Ranks: collective over the world; every rank tries on its own device, and the smallest answer is that of all.
    """
    world = teams.world
    with world.agreed():
        sizes = candidates(config, len(teams.learners), len(teams.attackers))
    shape = Shape(source.channels, source.image_size, len(source.class_names))
    world.all_reduce(
        torch.zeros(1, device=world.device)
    )  # a barrier: none measures what is free while another one tries
    with world.agreed():
        free = memory.available(world.device)
        rehearsal = Rehearsal(config, shape, world.device)
        trials = _Trials(
            rehearsal, config.global_batch_size // len(teams.learners), len(teams.learners)
        )
        sizes = [
            size
            for size in sizes
            if size > 1 or sizes == [1] or not has_batchnorm(rehearsal.model())
        ]
    world.all_reduce(torch.zeros(1, device=world.device))
    with world.agreed():
        found = _largest_that_fits(sizes, trials, free)
        memory.release(world.device)
    answers = world.gather_objects(found)
    chosen = world.broadcast_object(min(answers) if answers else None)
    limit = sizes[sizes.index(chosen) + 1] if chosen != sizes[-1] else None
    beyond = f"; {limit} does not fit" if limit else ", the whole share of a rank"
    tell(
        f"micro-batch auto: {chosen}{beyond}. Batch norm sees it: with --micro-batch-size {chosen} it is the same on "
        "any machine."
    )
    settled: Config = replace(config, micro_batch_size=chosen)
    return resolve(settled)


def candidates(config: Config, learners: int, attackers: int = 0) -> list[int]:
    """Micro-batches that a learner's share divides into, ascending; those that leave every attack rank some work."""
    share, rest = divmod(config.global_batch_size, learners)
    if rest or not share:
        raise ConadvError(
            f"global_batch_size {config.global_batch_size} does not divide into {learners} rank(s)."
        )
    sizes = [size for size in divisors(share) if learners * (share // size) >= attackers]
    sizes = [size for size in sizes if round(config.attack.share * size)]
    if not sizes:
        raise ConadvError(
            f"No micro-batch of global_batch_size {config.global_batch_size} on {learners} learner(s) gives "
            f"{attackers} attack rank(s) work and attack.share {config.attack.share:g} an image. Change one of them."
        )
    return sizes


def largest(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The largest of the ascending ``sizes`` that fits, None without one: doubling from the first, then bisection.

    What is larger than a size that does not fit does not fit either. Nothing more than twice as large as what fits (or
    the next divisor) is tried: its images would fill the host's memory.
    """
    low, high = (
        -1,
        0,
    )  # sizes[low] fits; sizes[high] comes next, and does not fit once the first loop has ended
    while high < len(sizes) and fits(sizes[high]):
        low, twice = high, 2 * sizes[high]
        high = max(
            [i for i, size in enumerate(sizes) if size <= twice and i > low], default=low + 1
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(sizes[middle]) else (low, middle)
    return sizes[low] if low >= 0 else None


def _largest_that_fits(sizes: Sequence[int], trials: _Trials, free: int | None) -> int:
    if free is None:
        raise ConadvError(
            "This system does not say how much memory is free. Give micro_batch_size a number."
        )
    cuda = trials.rehearsal.device.type == "cuda"
    fits = (lambda size: trials.fits_on_cuda(size, free)) if cuda else trials.predictor(sizes, free)
    found = largest(sizes, fits)
    if found is None:
        raise ConadvError(
            f"Not even a micro-batch of {sizes[0]} fits into the {free / memory.GIB:.2f} GiB that are free on "
            f"{trials.rehearsal.device}. Use a smaller model or image_size, bf16, or more ranks."
        )
    return found


@dataclass(frozen=True)
class _Trials:
    """Trials of micro-batches on one rank, with ``share`` images of the global batch."""

    rehearsal: Rehearsal
    share: int
    learners: int

    def fits_on_cuda(self, size: int, free: int) -> bool:
        """Whether steps run and leave the headroom. Whatever memory they took is free again afterwards."""
        device = self.rehearsal.device
        memory.release(device)
        before = torch.cuda.memory_allocated(device)
        spare = CUDA_HEADROOM * torch.cuda.get_device_properties(device).total_memory
        try:
            peak = memory.peak_of(lambda: self.rehearsal.steps(size, self.ballast(size)), device)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            peak = None
        memory.release(device)  # here, where the error no longer holds the tensors of the trial
        return peak is not None and peak - before + spare <= free

    def predictor(self, sizes: Sequence[int], free: int) -> Callable[[int], bool]:
        """Whether a size fits by the line through two small trials."""
        device, start = self.rehearsal.device, memory.resident() or 0
        kept = self._kept_per_image()
        small = sizes[0]
        larger = max([size for size in sizes if size * kept <= SMALL_TRIAL], default=small)
        low, high = (
            memory.peak_of(lambda size=size: self.rehearsal.steps(size), device)  # type: ignore[misc]
            for size in (small, larger)
        )
        slope = max((high - low) / (larger - small) if larger > small else 0.0, KEPT * kept)
        return lambda size: (
            max(0.0, high - start + slope * (size - larger)) + self.ballast(size)
            <= CPU_SHARE * free
        )

    def ballast(self, size: int) -> int:
        """Bytes that a run holds beside a step of one micro-batch: waiting images, gradient buckets, an average."""
        config, shape = self.rehearsal.config, self.rehearsal.shape
        method = method_of(config)
        pixels = shape.channels * shape.image_size**2
        made = (
            4 if method.route is not None and not method.data_views else 0
        )  # this step's, as float32
        waiting = method.ahead or int(method.needs_input_gradient)
        per_image = made + waiting * _bytes_of(config.pending_dtype)
        rest = math.ceil(config.attack.share * (self.share - size)) * pixels * per_image
        copies = (self.learners > 1) + (config.ema.decay is not None)
        return rest + copies * sum(p.nbytes for p in self.rehearsal.model().parameters())

    def _kept_per_image(self) -> float:
        """Bytes of activations per clean image of a micro-batch."""
        engine = self.rehearsal.engine()
        x = engine.images(self.rehearsal.batch(engine, 0, 2).micro[0], "clean")
        method = engine.method
        views = 1 + (method.route is not None) + (self.rehearsal.config.data.aug_view is not None)
        return activations(engine, x) / len(x) * (views if engine.views_fused else 1)


def out_of_memory(error: BaseException) -> bool:
    """Whether torch, or a library below it, could not get memory."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in text
        for words in ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    )


def _bytes_of(pending_dtype: str | None) -> int:
    dtype: torch.dtype = getattr(torch, pending_dtype or "float32")
    return int(Tensor([]).to(dtype).element_size())
