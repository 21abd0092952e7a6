"""Measure a profile: bursts of real steps while every process of the host works, and the link."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from conadv.config.schema import Config, DataConfig, ModelConfig, OptimConfig
from conadv.distributed.comm import Comm
from conadv.distributed.environment import processes_here
from conadv.distributed.reducer import cut
from conadv.errors import ConadvError
from conadv.planning.cost_model import MEASURED
from conadv.planning.profile import (
    Bucket,
    Link,
    LinkSample,
    Measured,
    Point,
    Profile,
    Workload,
)
from conadv.planning.timing import Sample, burst, interleave
from conadv.planning.trial import Shape, Trial, with_method
from conadv.training.provenance import git_state, machine, now, versions
from conadv.types import Span

KIB, MIB = 2**10, 2**20
BURST_STEPS = 3
COPIES = 10
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

    Ranks: all call it; each trains by itself, at the same time. A point is the median over rounds of
    the mean over ranks. Rank 0 gets the profile, the others None.
    """
    alone = Comm(device=comm.device)
    points: dict[str, list[Point]] = {method: [] for method in MEASURED}
    for size in sorted(micro_batches):
        trials = {method: build_trial(workload, method, alone, size) for method in MEASURED}
        runs = {m: partial(burst, trial.phases, BURST_STEPS) for m, trial in trials.items()}
        for method, samples in interleave(runs, rounds, comm).items():
            points[method] += [point(size, samples)] if comm.is_main else []
    copies = _copies(trials["conadv"].engine.model)
    seconds = interleave({"copy": partial(burst, copies, COPIES)}, 1, comm)["copy"]
    if not comm.is_main:
        return None
    memory = _device_memory(comm.device)
    sizes = trials["conadv"].sizes.model_copy(update={"memory": memory})
    methods = {}
    for method, trial in trials.items():
        passes = 1 if method == "vanilla" or trial.engine.network.fuses_views else 2
        found, buckets = tuple(points[method]), _buckets(trial)
        methods[method] = Measured(points=found, passes=passes, buckets=buckets)
    name = torch.cuda.get_device_name(comm.device) if comm.device.type == "cuda" else "cpu"
    return Profile(
        format=1,
        workload=workload,
        device="cuda" if comm.device.type == "cuda" else "cpu",
        processes=processes_here(),
        threads=torch.get_num_threads(),
        methods=methods,
        sizes=sizes,
        copy_seconds_per_byte=_middle(seconds, lambda sample: sample.seconds or 0) / sizes.weights,
        machine=machine(name, torch.get_num_threads()),
        versions=versions(),
        git=git_state(),
        measured_at=now(),
    )


def point(micro_batch: int, rounds: Sequence[Sequence[Sample]]) -> Point:
    """The point of one method and micro-batch from the samples of all rounds and ranks."""
    gradient, attack = (
        _middle(rounds, lambda sample, name=name: sample.phases[name])  # type: ignore[misc]
        for name in ("gradient", "attack")
    )
    rest = _middle(rounds, lambda s: (s.seconds or 0) - s.phases["gradient"] - s.phases["attack"])
    return Point(micro_batch=micro_batch, gradient=gradient, attack=attack, rest=max(rest, 1e-9))


def _middle(rounds: Sequence[Sequence[Sample]], value: Callable[[Sample], float]) -> float:
    """Median over rounds of the mean over ranks."""
    return statistics.median(statistics.fmean(map(value, samples)) for samples in rounds)


def _copies(model: nn.Module) -> Callable[[], object]:
    """Copy tensors like the gradients into a flat buffer, as the reducer does."""
    parts = [torch.ones_like(p) for p in model.parameters()]
    flat = torch.empty(sum(p.numel() for p in parts), device=parts[0].device)
    views = [
        view.view(p.shape)
        for view, p in zip(flat.split([p.numel() for p in parts]), parts, strict=True)
    ]
    return lambda: torch._foreach_copy_(views, parts)


def _device_memory(device: torch.device) -> int:
    """Bytes of the device, or this process's share of the host's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // processes_here()


# ---- when gradients become final


def _buckets(trial: Trial) -> tuple[Bucket, ...]:
    """A step's buckets and when each is complete within the last pass, from steps with hooks."""
    clock = trial.engine.clock
    params = [p for p in trial.engine.model.parameters() if p.requires_grad]

    def note(number: int, _: Tensor) -> None:
        moment = clock.mark()
        clock.add(f"{TOUCHED}{number}", moment, moment, beside=True)

    hooks = [p.register_post_accumulate_grad_hook(partial(note, i)) for i, p in enumerate(params)]
    steps = [final_moments(trial.step().spans) for _ in range(HOOKED_STEPS)]
    for hook in hooks:
        hook.remove()
    ready = {i: statistics.median(step[i] for step in steps) for i in steps[0]}
    early, late = (
        [i for i in sorted(ready, reverse=True) if bool(ready[i]) == touched]
        for touched in (False, True)
    )
    return tuple(
        Bucket(bytes=sum(params[i].nbytes for i in group), ready=max(ready[i] for i in group))
        for group in (*cut(params, early), *cut(params, late, first=MIB))
    )


def final_moments(spans: Sequence[Span]) -> dict[int, float]:
    """Parameter -> when its gradient is final, as a share of the last pass.

    0 for parameters that only earlier passes touch. ``spans``: the step's gradient phase, and one span
    for every touch of a parameter, of which each pass makes at most one. The first touch of the last
    pass is the first that completes a parameter's number of touches, if that is the number of passes;
    that pass begins where the touches of the one before end.
    """
    touches: dict[int, list[float]] = {}
    for name, start, _ in spans:
        if name.startswith(TOUCHED):
            touches.setdefault(int(name.removeprefix(TOUCHED)), []).append(start)
    begin, end = next((start, end) for name, start, end in spans if name == "gradient")
    passes = max(map(len, touches.values()))
    first = min(times[-1] for times in touches.values() if len(times) == passes)
    earlier = [moment for times in touches.values() for moment in times if moment < first]
    begin = max(earlier, default=begin)
    return {
        number: min(1.0, (times[-1] - begin) / (end - begin)) if times[-1] >= first else 0.0
        for number, times in touches.items()
    }


# ---- the link between ranks


def measure_link(comm: Comm) -> Link | None:
    """Bandwidth, latency and contention between the ranks; needs two. Rank 0 gets it.

    Least squares of t = steps * latency + sent * seconds_per_byte with relative errors, over the
    medians at LINK_SIZES.
    """
    if comm.ranks < 2:
        raise ConadvError(
            "A link is between ranks, and this is one process. Start at least two: torchrun "
            "--nproc-per-node 2 -m conadv plan PROFILE.json --measure link, or one torchrun per host to "
            "measure the network between them."
        )
    runs: dict[str, Callable[[], None]] = {}
    for size in LINK_SIZES:
        box = torch.zeros(size // 4, device=comm.device)
        runs |= {f"sum {size}": partial(_sum, comm, box), f"ping {size}": partial(_ping, comm, box)}
    seconds = _timed(runs, comm)
    sums = [LinkSample(bytes=size, seconds=seconds[f"sum {size}"]) for size in LINK_SIZES]
    messages = [LinkSample(bytes=size, seconds=seconds[f"ping {size}"] / 2) for size in LINK_SIZES]
    steps, part = 2 * (comm.ranks - 1), 2 * (comm.ranks - 1) / comm.ranks
    latency, per_byte = fit([s.bytes * part for s in sums], [s.seconds for s in sums], steps)
    point_latency, point_per_byte = fit(LINK_SIZES, [s.seconds for s in messages], 1)
    return Link(
        ranks=comm.ranks,
        algorithm="ring" if comm.backend == "gloo" else "ring-or-tree",
        seconds_per_byte=per_byte,
        latency=latency,
        busy_seconds_per_byte=_busy(comm, sums[-1]) / part,
        point_seconds_per_byte=point_per_byte,
        point_latency=point_latency,
        all_reduce=tuple(sums),
        point_to_point=tuple(messages),
    )


def _timed(runs: dict[str, Callable[[], None]], comm: Comm) -> dict[str, float]:
    """Median over rounds of rank 0's seconds, the same on all ranks."""
    once = {name: partial(burst, run, 1) for name, run in runs.items()}
    rounds = interleave(once, LINK_ROUNDS, comm).items()
    return comm.broadcast_object(
        {name: statistics.median(s[0].seconds or 0 for s in found) for name, found in rounds}
        if comm.is_main
        else None
    )


def fit(sent: Sequence[float], seconds: Sequence[float], steps: int) -> tuple[float, float]:
    """(latency, seconds per byte) of t = steps * latency + sent * seconds per byte, at least 0."""
    t = np.asarray(seconds)
    a = np.stack([np.full(len(t), float(steps)), np.asarray(sent, float)], axis=1) / t[:, None]
    latency, per_byte = np.linalg.lstsq(a, np.ones(len(t)), rcond=None)[0]
    if latency < 0:
        latency, per_byte = 0.0, np.mean(t / np.asarray(sent))
    return float(latency), max(float(per_byte), SHORTEST)


def _sum(comm: Comm, box: Tensor) -> None:
    comm.all_reduce(box)


def _ping(comm: Comm, box: Tensor) -> None:
    """From rank 0 to the last rank, which is on another host where there are several, and back."""
    last = comm.ranks - 1
    with comm.guard():
        if comm.rank == 0:
            dist.send(box, last)
            dist.recv(box, last)
        elif comm.rank == last:
            dist.recv(box, 0)
            dist.send(box, 0)


def _busy(comm: Comm, largest: LinkSample) -> float:
    """Seconds per byte of a sum by which work beside it takes longer.

    The work lasts about twice as long as the sum, which is over before it.
    """
    box = torch.ones(largest.bytes // 4, device=comm.device)
    x = torch.ones(8, 32, 16, 16, device=comm.device)
    w = torch.ones(32, 32, 3, 3, device=comm.device)

    def work(units: int) -> None:
        for _ in range(units):
            F.conv2d(x, w, padding=1)

    def beside(units: int) -> None:
        handle = comm.all_reduce_async(box)
        work(units)
        handle.wait()

    ten = burst(partial(work, 10), 1).seconds or 1.0
    units = comm.broadcast_object(max(10, round(20 * largest.seconds / ten)))
    found = _timed({"alone": partial(work, units), "beside": partial(beside, units)}, comm)
    return max(0.0, found["beside"] - found["alone"]) / largest.bytes
