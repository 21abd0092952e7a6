"""Measure the points of a profile: bursts of real steps, while every process of the host is busy with the same."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from conadv.distributed.comm import Comm
from conadv.distributed.environment import processes_here
from conadv.engine import TrainStep
from conadv.plan.model import MEASURED
from conadv.plan.profile import Bucket, Measured, Point, Profile, Sizes, Workload
from conadv.plan.workload import batches, build_step, try_out
from conadv.training.record import git_state, machine, now, versions
from conadv.types import Batch, Span, StepRecord

MIB = 2**20
WARMUP_STEPS = 2
BURST_STEPS = 4
HOOKED_STEPS = 3
TOUCHED = "touched "


@dataclass
class Times:
    """Seconds of the steps of one method at one size."""

    gradient: list[float] = field(default_factory=list)
    attack: list[float] = field(default_factory=list)
    rest: list[float] = field(default_factory=list)

    def add(self, wall: float, record: StepRecord) -> None:
        gradient, attack = record.phases["gradient"], record.phases["attack"]
        self.gradient.append(gradient)
        self.attack.append(attack)
        self.rest.append(wall - gradient - attack)

    def medians(self) -> tuple[float, float, float]:
        return (
            statistics.median(self.gradient),
            statistics.median(self.attack),
            statistics.median(self.rest),
        )


def measure_phases(workload: Workload, sizes: Sequence[int], rounds: int, comm: Comm) -> Profile:
    """A profile without a link: points at every size for every method that a plan needs.

    Rounds are interleaved: each runs a burst of every method, in a new random order, so that a disturbed machine
    disturbs all alike. Ranks: all call it; each trains by itself, at the same time; a point is the mean of the ranks'
    medians. What is returned is the same on all.
    """
    alone = Comm(device=comm.device)
    try_out(workload)
    found: dict[str, list[Point]] = {method: [] for method in MEASURED}
    for micro_batch in sorted(sizes):
        engines = {method: build_step(workload, method, alone) for method in MEASURED}
        times = _bursts(engines, workload, micro_batch, rounds, comm)
        for method, seconds in times.items():
            gradient, attack, rest = _mean(comm, seconds.medians())
            found[method].append(
                Point(
                    micro_batch=micro_batch, gradient=gradient, attack=attack, rest=max(rest, 1e-9)
                )
            )
    largest = max(sizes)
    methods = {
        method: Measured(
            points=tuple(points),
            passes=_passes(method, alone),
            buckets=_buckets(engines[method], workload, largest),
        )
        for method, points in found.items()
    }
    return Profile(
        format=1,
        workload=workload,
        device="cuda" if comm.device.type == "cuda" else "cpu",
        processes=processes_here(),
        threads=torch.get_num_threads(),
        methods=methods,
        sizes=_sizes(engines["conadv"], workload, largest),
        copy_seconds_per_byte=_copy(engines["conadv"], comm),
        machine=machine(_device_name(comm.device), torch.get_num_threads()),
        versions=versions(),
        git=git_state(),
        measured_at=now(),
    )


def _bursts(
    engines: dict[str, TrainStep], workload: Workload, micro_batch: int, rounds: int, comm: Comm
) -> dict[str, Times]:
    """Time ``rounds`` bursts of each engine; all ranks begin a burst together."""
    times = {method: Times() for method in engines}
    for number in range(rounds + 1):
        order = list(engines)
        random.Random(number).shuffle(order)
        for method in order:
            comm.all_reduce(torch.zeros(1, device=comm.device))  # a barrier
            steps = _burst(
                engines[method], workload, micro_batch, WARMUP_STEPS if number == 0 else BURST_STEPS
            )
            for wall, record in steps[1:] if number else ():
                times[method].add(wall, record)
    return times


def _burst(
    engine: TrainStep, workload: Workload, micro_batch: int, count: int
) -> list[tuple[float, StepRecord]]:
    """Wall time and record of steps that follow each other. The first of a burst finds cold caches."""
    micro = next(batches(workload, range(1), micro_batch, engine.device)).micro
    steps = []
    for _ in range(count):
        step = engine.version
        begin = time.perf_counter()
        record = engine(
            Batch(step, micro), Batch(step + engine.ahead, micro) if engine.ahead else None
        )
        steps.append((time.perf_counter() - begin, record))
    return steps


def _mean(comm: Comm, values: Sequence[float]) -> list[float]:
    total: list[float] = comm.all_reduce(
        torch.tensor(values, dtype=torch.float64, device=comm.device)
    ).tolist()
    return [value / comm.ranks for value in total]


def _passes(method: str, comm: Comm) -> int:
    """Forward-backward passes per micro-batch: TrainStep fuses the views on CUDA."""
    return 1 if method == "vanilla" or comm.device.type == "cuda" else 2


# ---- when gradients become final


def _buckets(engine: TrainStep, workload: Workload, micro_batch: int) -> tuple[Bucket, ...]:
    """The buckets of a step and the moment of the last pass when each is complete, from steps with hooks.

    A parameter that the last pass does not touch is ready when that pass begins.
    """
    params = [p for p in engine.model.parameters() if p.requires_grad]
    hooks = [
        p.register_post_accumulate_grad_hook(partial(_note, engine, i))
        for i, p in enumerate(params)
    ]
    steps = [
        final_moments(record.spans)
        for _, record in _burst(engine, workload, micro_batch, HOOKED_STEPS)
    ]
    for hook in hooks:
        hook.remove()
    ready = {i: statistics.median(step[i] for step in steps) for i in steps[0]}
    order = sorted(ready, reverse=True)
    size = {i: params[i].nbytes for i in order}
    groups = [
        *cut([(i, size[i]) for i in order if not ready[i]], 25 * MIB, 25 * MIB),
        *cut([(i, size[i]) for i in order if ready[i]], MIB, 25 * MIB),
    ]
    return tuple(
        Bucket(bytes=sum(size[i] for i in group), ready=max(ready[i] for i in group))
        for group in groups
    )


def _note(engine: TrainStep, number: int, _: Tensor) -> None:
    moment = engine.clock.mark()
    engine.clock.add(f"{TOUCHED}{number}", moment, moment, beside=True)


def final_moments(spans: Sequence[Span]) -> dict[int, float]:
    """Parameter -> when its gradient is final, as a share of the last pass; 0 for those that only earlier ones touch.

    ``spans``: the step's gradient phase, and one span for every touch of a parameter, which each pass gives at most one
    of. The first touch of the last pass is the first that completes a parameter's number of touches, if that number is
    the number of passes; that pass began where the touches of the one before ended.
    """
    touches: dict[int, list[float]] = {}
    for name, start, _ in spans:
        if name.startswith(TOUCHED):
            touches.setdefault(int(name.removeprefix(TOUCHED)), []).append(start)
    begin, end = next((start, end) for name, start, end in spans if name == "gradient")
    passes = max(map(len, touches.values()))
    first = min(times[-1] for times in touches.values() if len(times) == passes)
    begin = max(
        (moment for times in touches.values() for moment in times if moment < first), default=begin
    )
    return {
        number: min(1.0, (times[-1] - begin) / (end - begin)) if times[-1] >= first else 0.0
        for number, times in touches.items()
    }


def cut(sizes: Sequence[tuple[int, int]], first: int, later: int) -> list[list[int]]:
    """(number, bytes) pairs as groups, in order, that are full when they reach ``first`` and then ``later`` bytes.

    The rule of conadv.distributed.reducer for parameters of one dtype.
    """
    groups: list[list[int]] = []
    room = 0
    for number, size in sizes:
        if not groups or room <= 0:
            groups.append([])
            room = first if len(groups) == 1 else later
        groups[-1].append(number)
        room -= size
    return groups


# ---- bytes and copies


def _sizes(engine: TrainStep, workload: Workload, micro_batch: int) -> Sizes:
    model = engine.model
    x = next(batches(workload, range(1), micro_batch, engine.device)).micro[0].views["clean"]
    states = [value for state in engine.optimizer.state.values() for value in state.values()]
    return Sizes(
        weights=sum(p.nbytes for p in model.parameters()),
        optimizer_state=sum(value.nbytes for value in states if isinstance(value, Tensor)),
        image=x[0].nbytes,
        activations_per_image=activations(engine, x) // micro_batch,
        memory=_memory(engine.device),
    )


def activations(engine: TrainStep, x: Tensor) -> int:
    """Bytes that autograd keeps of a forward pass of ``x``, without the parameters and buffers themselves."""
    own = {
        t.untyped_storage().data_ptr()
        for t in (*engine.model.parameters(), *engine.model.buffers())
    }
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = engine.model(x)
        loss = F.cross_entropy(logits, torch.zeros(len(x), dtype=torch.long, device=x.device))
    del loss
    return sum(size for place, size in kept.items() if place not in own)


def _memory(device: torch.device) -> int:
    """Bytes of the device, or this process's share of the host's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(host) // processes_here()


def _copy(engine: TrainStep, comm: Comm) -> float:
    """Seconds per byte of copying tensors like the gradients into a flat buffer."""
    parts = [torch.ones_like(p) for p in engine.model.parameters()]
    size = sum(p.nbytes for p in parts)
    flat = torch.empty(sum(p.numel() for p in parts), device=engine.device)
    views = [
        view.view(p.shape)
        for view, p in zip(flat.split([p.numel() for p in parts]), parts, strict=True)
    ]
    seconds = []
    comm.all_reduce(torch.zeros(1, device=comm.device))  # a barrier
    for _ in range(12):
        _synchronize(engine.device)
        begin = time.perf_counter()
        torch._foreach_copy_(views, parts)
        _synchronize(engine.device)
        seconds.append(time.perf_counter() - begin)
    return _mean(comm, [statistics.median(seconds[2:]) / size])[0]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
