"""Measure a profile: bursts of real steps while every process of the host works, and the link."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from conadv.config.schema import Config, DataConfig, ModelConfig, OptimConfig
from conadv.distributed.comm import Comm
from conadv.distributed.environment import processes_here
from conadv.distributed.reducer import cut
from conadv.errors import ConadvError
from conadv.planning.cost_model import MEASURED
from conadv.planning.profile import Bucket, Link, Measured, Point, Profile, Workload
from conadv.planning.timing import Sample, burst, interleave
from conadv.planning.trial import Shape, Trial, with_method
from conadv.training.provenance import git_state, machine, now, versions
from conadv.types import Span

KIB, MIB = 2**10, 2**20
BURST_STEPS = 3
HOOKED_STEPS = 3
TOUCHED = "touched "
LINK_SIZES = (4 * KIB, 64 * KIB, 512 * KIB, 2 * MIB, 8 * MIB)
LINK_ROUNDS = 7
SHORTEST = 1e-12  # seconds per byte that a fit is not below: 8 Tbit/s


def build_trial(
    workload: Workload, method: str, comm: Comm, micro_batch: int, **options: Any
) -> Trial:
    """A trial engine of a workload; ``options`` as those of :class:`Trial`."""
    config = Config(
        steps=10**6,
        precision=workload.precision,
        channels_last=workload.channels_last,
        data=DataConfig(mean=(0.5,), std=(0.25,)),
        model=ModelConfig(name=workload.model, width=workload.width, args=workload.args),
        optim=OptimConfig(name=workload.optimizer, lr=1.0),
    )
    shape = Shape(workload.channels, workload.image_size, workload.num_classes)
    return Trial(with_method(config, method), shape, comm, micro_batch, **options)


# ---- the phases of a step


def measure_phases(
    workload: Workload, micro_batches: Sequence[int], rounds: int, comm: Comm
) -> Profile | None:
    """A profile without a link: points at every micro-batch for every method that a plan needs.

    Ranks: all call it; each trains by itself, at the same time. A point is the median over rounds
    of the mean over ranks. Rank 0 gets the profile, the others None.
    """
    alone = Comm(device=comm.device)
    points: dict[str, list[Point]] = {method: [] for method in MEASURED}
    for size in sorted(micro_batches):
        trials = {method: build_trial(workload, method, alone, size) for method in MEASURED}
        runs = {m: partial(burst, trial.phases, BURST_STEPS) for m, trial in trials.items()}
        for method, samples in interleave(runs, rounds, comm).items():
            points[method] += [point(size, samples)] if comm.is_main else []
    if not comm.is_main:
        return None
    memory = _device_memory(comm.device)
    methods = {}
    for method, trial in trials.items():
        passes = 1 if method == "vanilla" or trial.engine.network.fuses_views else 2
        buckets = _buckets(trial, passes)
        methods[method] = Measured(points=tuple(points[method]), passes=passes, buckets=buckets)
    name = torch.cuda.get_device_name(comm.device) if comm.device.type == "cuda" else "cpu"
    return Profile(
        format=1,
        workload=workload,
        device="cuda" if comm.device.type == "cuda" else "cpu",
        processes=processes_here(),
        threads=torch.get_num_threads(),
        methods=methods,
        sizes=trials["conadv"].sizes.model_copy(update={"memory": memory}),
        machine=machine(name, torch.get_num_threads()),
        versions=versions(),
        git=git_state(),
        measured_at=now(),
    )


def point(micro_batch: int, rounds: Sequence[Sequence[Sample]]) -> Point:
    """The point of one method and micro-batch: medians over rounds of means over ranks."""

    def middle(value: Callable[[Sample], float]) -> float:
        return statistics.median(statistics.fmean(map(value, samples)) for samples in rounds)

    gradient, attack = middle(lambda s: s.phases["gradient"]), middle(lambda s: s.phases["attack"])
    rest = middle(lambda s: (s.seconds or 0) - s.phases["gradient"] - s.phases["attack"])
    return Point(micro_batch=micro_batch, gradient=gradient, attack=attack, rest=max(rest, 1e-9))


def _device_memory(device: torch.device) -> int:
    """Bytes of the device, or this process's share of the host's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // processes_here()


# ---- when gradients become final


def _buckets(trial: Trial, passes: int) -> tuple[Bucket, ...]:
    """A step's buckets and when each is complete within the last pass, from steps with hooks."""
    clock = trial.engine.clock
    params = [p for p in trial.engine.model.parameters() if p.requires_grad]

    def note(number: int, _: Tensor) -> None:
        moment = clock.mark()
        clock.add(f"{TOUCHED}{number}", moment, moment, beside=True)

    hooks = [p.register_post_accumulate_grad_hook(partial(note, i)) for i, p in enumerate(params)]
    steps = [final_moments(trial.step().spans, passes) for _ in range(HOOKED_STEPS)]
    for hook in hooks:
        hook.remove()
    ready = {
        i: statistics.median(step[i] for step in steps) for i in sorted(steps[0], reverse=True)
    }
    early, late = ([i for i in ready if bool(ready[i]) == touched] for touched in (False, True))
    return tuple(
        Bucket(bytes=sum(params[i].nbytes for i in group), ready=max(ready[i] for i in group))
        for group in (*cut(params, early), *cut(params, late, first=MIB))
    )


def final_moments(spans: Sequence[Span], passes: int) -> dict[int, float]:
    """Parameter -> when its gradient is final, as a share of the last of equally long passes.

    0 for parameters that only earlier passes touch. ``spans``: the step's gradient phase, and one
    span for every touch of a parameter.
    """
    begin, end = next((start, end) for name, start, end in spans if name == "gradient")
    last = (end - begin) / passes
    touches = {
        int(name.removeprefix(TOUCHED)): start  # the last one counts
        for name, start, _ in sorted(spans, key=lambda span: span[1])
        if name.startswith(TOUCHED)
    }
    return {i: min(max(1 - (end - at) / last, 0.0), 1.0) for i, at in touches.items()}


# ---- the link between ranks


def measure_link(comm: Comm) -> Link | None:
    """Bandwidth, latency and contention of all-reduces; needs two ranks. Rank 0 gets it.

    Least squares of t = steps * latency + sent * seconds_per_byte with relative errors, over the
    medians at LINK_SIZES. What a rank's work loses is the processor time of the largest: none where
    a device sends.
    """
    if comm.ranks < 2:
        raise ConadvError(
            "A link is between ranks, and this is one process. Start at least two: torchrun "
            "--nproc-per-node 2 -m conadv plan PROFILE.json --measure link, or one torchrun per "
            "host to measure the network between them."
        )
    boxes = {f"{size}": torch.zeros(size // 4, device=comm.device) for size in LINK_SIZES}
    sums = {name: partial(comm.all_reduce, box) for name, box in boxes.items()}
    runs = {name: partial(burst, run, 1) for name, run in sums.items()}
    rounds = interleave(runs, LINK_ROUNDS, comm)
    begin = time.process_time()
    for _ in range(LINK_ROUNDS):
        sums[f"{LINK_SIZES[-1]}"]()
    busy = (time.process_time() - begin) / LINK_ROUNDS if comm.device.type == "cpu" else 0.0
    if not comm.is_main:
        return None
    seconds = [statistics.median(s[0].seconds or 0 for s in found) for found in rounds.values()]
    part = 2 * (comm.ranks - 1) / comm.ranks
    sent = [size * part for size in LINK_SIZES]
    latency, per_byte = fit(sent, seconds, 2 * (comm.ranks - 1))
    return Link(
        ranks=comm.ranks,
        algorithm="ring" if comm.backend == "gloo" else "ring-or-tree",
        seconds_per_byte=per_byte,
        latency=latency,
        busy_seconds_per_byte=busy / sent[-1],
    )


def fit(sent: Sequence[float], seconds: Sequence[float], steps: int) -> tuple[float, float]:
    """(latency, seconds per byte) of t = steps * latency + sent * seconds per byte, at least 0."""
    a = np.column_stack([np.full(len(sent), float(steps)), sent]) / np.asarray(seconds)[:, None]
    latency, per_byte = nnls(a, np.ones(len(sent)))[0]
    return float(latency), max(float(per_byte), SHORTEST)
