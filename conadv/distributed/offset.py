"""How far the clocks of the ranks are apart, so that timelines of several hosts share one clock."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch import Tensor

from conadv.distributed.comm import Comm

ROUND_TRIPS = 8


def clock_offset(comm: Comm) -> float:
    """Seconds by which this rank's ``time.monotonic()`` is ahead of rank 0's.

    Rank 0 asks one rank after another. Half of the shortest round trip bounds the error
    (Cristian 1989). Collective; nothing else may be under way.
    """
    box = torch.zeros(1, dtype=torch.float64, device=comm.device)
    offsets = [0.0]
    with comm.guard():
        for other in range(1, comm.ranks):
            if comm.rank == 0:
                offsets.append(min(_ask(comm, box, other) for _ in range(ROUND_TRIPS))[1])
            elif comm.rank == other:
                for _ in range(ROUND_TRIPS):
                    dist.recv(box, group=comm.group, group_src=0)
                    box.item()  # sync point: the question is here
                    dist.send(box.fill_(time.monotonic()), group=comm.group, group_dst=0)
    return comm.scatter_objects(offsets if comm.rank == 0 else None)


def _ask(comm: Comm, box: Tensor, other: int) -> tuple[float, float]:
    """(seconds of one round trip, the other clock's lead)."""
    begin = time.monotonic()
    dist.send(box, group=comm.group, group_dst=other)
    dist.recv(box, group=comm.group, group_src=other)
    theirs = float(box)  # sync point
    end = time.monotonic()
    return end - begin, theirs - (begin + end) / 2
