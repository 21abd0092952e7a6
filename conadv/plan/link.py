"""Measure the network between ranks: sums and messages of several sizes, and what they take from a rank's own work."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from conadv.distributed.comm import Comm
from conadv.errors import ConadvError
from conadv.plan.profile import Link, LinkSample

KIB, MIB = 2**10, 2**20
SIZES = (4 * KIB, 64 * KIB, 512 * KIB, 2 * MIB, 8 * MIB)
BUSY_BYTES = 8 * MIB
REPEATS = 7
SHORTEST = 1e-12  # seconds per byte that a fit is not below: 8 Tbit/s


def measure_link(comm: Comm) -> Link:
    """Bandwidth, latency and contention between the ranks of ``comm``; needs at least two. The same on all ranks.

    Least squares of t = steps * latency + sent * seconds_per_byte with relative errors, over the medians at SIZES.
    """
    if comm.ranks < 2:
        raise ConadvError(
            "A link is between ranks, and this is one process. Start at least two: torchrun --nproc-per-node 2 "
            "-m conadv plan PROFILE.json --measure link, or one torchrun per host to measure the network between them."
        )
    boxes = [torch.zeros(size // 4, device=comm.device) for size in SIZES]
    sums = [
        LinkSample(bytes=box.nbytes, seconds=_median(partial(comm.all_reduce, box), comm))
        for box in boxes
    ]
    trips = [_median(partial(_ping, comm, box), comm) for box in boxes]
    messages = [
        LinkSample(bytes=box.nbytes, seconds=trip / 2)
        for box, trip in zip(boxes, trips, strict=True)
    ]
    steps, part = 2 * (comm.ranks - 1), 2 * (comm.ranks - 1) / comm.ranks
    latency, per_byte = fit([s.bytes * part for s in sums], [s.seconds for s in sums], steps)
    point_latency, point_per_byte = fit(
        [s.bytes for s in messages], [s.seconds for s in messages], 1
    )
    found = Link(
        ranks=comm.ranks,
        algorithm="ring" if comm.backend == "gloo" else "ring-or-tree",
        seconds_per_byte=per_byte,
        latency=latency,
        busy_seconds_per_byte=_busy(comm, sums[-1].seconds) / part,
        point_seconds_per_byte=point_per_byte,
        point_latency=point_latency,
        all_reduce=tuple(sums),
        point_to_point=tuple(messages),
    )
    return comm.broadcast_object(found)


def fit(sent: Sequence[float], seconds: Sequence[float], steps: int) -> tuple[float, float]:
    """(latency, seconds per byte) of t = steps * latency + sent * seconds per byte, both at least 0."""
    t = np.asarray(seconds)
    a = np.stack([np.full(len(t), float(steps)), np.asarray(sent, float)], axis=1) / t[:, None]
    latency, per_byte = np.linalg.lstsq(a, np.ones(len(t)), rcond=None)[0]
    if latency < 0:
        latency, per_byte = 0.0, np.mean(t / np.asarray(sent))
    return float(latency), max(float(per_byte), SHORTEST)


def _median(run: Callable[[], object], comm: Comm) -> float:
    """Median seconds of ``run`` on rank 0, all ranks beginning together; the first is thrown away."""
    seconds = []
    for _ in range(REPEATS + 1):
        _barrier(comm)
        begin = time.perf_counter()
        run()
        _synchronize(comm)
        seconds.append(time.perf_counter() - begin)
    return comm.broadcast_object(statistics.median(seconds[1:]))


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


def _busy(comm: Comm, alone: float) -> float:
    """Seconds per byte of a sum by which work beside it takes longer; ``alone``: seconds of BUSY_BYTES without work.

    The work lasts about twice as long as the sum, so that the sum is over before it.
    """
    _work(comm, 3)
    begin = time.perf_counter()
    _work(comm, 10)
    units = comm.broadcast_object(max(10, round(20 * alone / (time.perf_counter() - begin))))
    buffer = torch.ones(BUSY_BYTES // 4, device=comm.device)
    lost = []
    for _ in range(REPEATS):
        _barrier(comm)
        begin = time.perf_counter()
        _work(comm, units)
        middle = time.perf_counter()
        _barrier(comm)
        handle = comm.all_reduce_async(buffer)
        start = time.perf_counter()
        _work(comm, units)
        lost.append(time.perf_counter() - start - (middle - begin))
        handle.wait()
    mean = (
        comm.all_reduce(
            torch.tensor([statistics.median(lost)], dtype=torch.float64, device=comm.device)
        )
        / comm.ranks
    )
    return max(0.0, float(mean)) / BUSY_BYTES


def _work(comm: Comm, units: int) -> None:
    """Convolutions, about a millisecond each on a CPU core."""
    x, w = (
        torch.ones(8, 32, 16, 16, device=comm.device),
        torch.ones(32, 32, 3, 3, device=comm.device),
    )
    for _ in range(units):
        F.conv2d(x, w, padding=1)
    _synchronize(comm)


def _barrier(comm: Comm) -> None:
    comm.all_reduce(torch.zeros(1, device=comm.device))
    _synchronize(comm)


def _synchronize(comm: Comm) -> None:
    if comm.device.type == "cuda":
        torch.cuda.synchronize(comm.device)
