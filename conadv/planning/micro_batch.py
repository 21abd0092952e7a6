"""``micro_batch_size`` auto: the largest micro-batch that fits on every rank's device.

It divides a learner's share of the global batch, so that accumulation reaches the global batch
exactly. On CUDA a size is tried by steps of the real engine on random images; one that runs out of
memory, or comes too near, does not fit. On a CPU, where running out of memory ends other programs
too, the cost model says what a size needs.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path

import torch

from conadv.config.resolve import resolve
from conadv.config.schema import Config, replace
from conadv.distributed.comm import Comm
from conadv.errors import ConadvError
from conadv.nn.split_batchnorm import has_batchnorm
from conadv.planning import memory
from conadv.planning.search import divisors
from conadv.planning.trial import Shape, Trial, trial_model
from conadv.training.data import load_source
from conadv.training.run_dir import RunDir

CUDA_HEADROOM = 0.05
"""Share of a CUDA device's memory left free for NCCL's buffers, fragments and evaluation."""
CPU_SHARE = 0.8
"""Share of the host's free memory that a step may take; data loaders need the rest."""
WORKSPACE = 2.0
"""Factor on what autograd keeps, for the gradients and workspaces of a layer."""


def settle(
    config: Config,
    comm: Comm,
    out: Path | None = None,
    *,
    attack_ranks: int = 0,
    goes_on: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> Config:
    """``config`` with a number as micro_batch_size; itself where it has one.

    ``goes_on``: a run in ``out`` is resumed if there is one; its own number is taken, since another
    would be another run. ``tell`` hears which number is taken, and why.
    Raises ConadvError where not even the smallest micro-batch fits, or the global batch does not
    divide over the learners.
    Ranks: collective; every rank tries on its own device, and the smallest answer is taken by all.
    """
    with comm.agreed():
        wanted = config.micro_batch_size
        if comm.is_main and wanted == "auto" and goes_on and out and RunDir(out).config.is_file():
            wanted = RunDir(out).open().micro_batch_size
    wanted = comm.broadcast_object((wanted,))[0]
    if wanted == "auto":
        wanted = _find(resolve(config), comm, attack_ranks, tell)
    chosen = wanted if config.micro_batch_size == "auto" else config.micro_batch_size
    settled: Config = replace(config, micro_batch_size=chosen)
    return settled


def _find(config: Config, comm: Comm, attack_ranks: int, tell: Callable[[str], None]) -> int:
    learners, device = max(1, comm.ranks - attack_ranks), comm.device
    with comm.agreed():
        source = load_source(config)
        shape = Shape(source.channels, source.image_size, len(source.class_names))
        sizes = candidates(config, learners, attack_ranks)
        if has_batchnorm(trial_model(config, shape)):  # which has no variance of one image
            sizes = [size for size in sizes if size > 1] or sizes
        free = memory.available(device)
        if free is None:
            raise ConadvError(
                "This system does not say how much memory is free. Give micro_batch_size a number."
            )
    comm.barrier()  # none measures what is free while another tries
    with comm.agreed():
        fits = fits_on_cuda if device.type == "cuda" else fits_on_cpu
        fit = fits(config, shape, device, learners, free)
        # what is larger than a size that does not fit does not fit either
        count = bisect_left(sizes, True, key=lambda size: not fit(size))
        if not count:
            raise ConadvError(
                f"Not even a micro-batch of {sizes[0]} fits into the {memory.gib(free)} that are "
                f"free on {device}. Use a smaller model or image_size, bf16, or more ranks."
            )
    answers = comm.gather_objects(sizes[count - 1])
    chosen = comm.broadcast_object(min(answers) if answers else None)
    larger = [size for size in sizes if size > chosen]
    beyond = f"{larger[0]} does not fit" if larger else "the whole share of a rank"
    tell(
        f"micro-batch auto: {chosen}; {beyond}. Batch norm sees it: with --micro-batch-size "
        f"{chosen} it is the same on any machine."
    )
    return chosen


def candidates(config: Config, learners: int, attack_ranks: int = 0) -> list[int]:
    """Divisors of a learner's share, ascending, that leave every attack rank some work."""
    batch, share = config.global_batch_size, config.attack.share
    sizes = [
        size
        for size in (divisors(batch // learners) if batch % learners == 0 else [])
        if batch // size >= attack_ranks and round(share * size)
    ]
    if not sizes:
        raise ConadvError(
            f"No micro-batch divides global_batch_size {batch} over {learners} learner(s), gives "
            f"{attack_ranks} attack rank(s) work and attack.share {share:g} an image. Change one."
        )
    return sizes


def fits_on_cuda(
    config: Config, shape: Shape, device: torch.device, learners: int, free: int
) -> Callable[[int], bool]:
    """Whether steps of a size run beside what the rest of the run holds, and leave the headroom."""
    spare = CUDA_HEADROOM * torch.cuda.get_device_properties(device).total_memory

    def fits(size: int) -> bool:
        def steps() -> None:
            trial = Trial(config, shape, Comm(device=device), size)
            held = torch.empty(beside_a_pass(trial, learners), dtype=torch.uint8, device=device)
            for _ in range(min(trial.engine.ahead, 2) + 2):  # until all that waits is there
                trial.step()
            del held

        peak = memory.cuda_peak(steps, device)
        return peak is not None and peak + spare <= free

    return fits


def beside_a_pass(trial: Trial, learners: int) -> int:
    """Bytes that a run holds and a trial does not: other images, buckets, the average."""
    config, sizes = trial.config, trial.sizes
    images = config.global_batch_size // learners - trial.micro_batch
    copies = (learners > 1) + (config.ema.decay is not None)
    return math.ceil(images * trial.held * sizes.image) + copies * sizes.weights


def fits_on_cpu(
    config: Config, shape: Shape, device: torch.device, learners: int, free: int
) -> Callable[[int], bool]:
    """Whether the cost model's bytes of a size are well within what is free."""
    trial = Trial(config, shape, Comm(device=device), 2)
    return lambda size: trial.run_bytes(learners, 0, size, WORKSPACE) <= CPU_SHARE * free
