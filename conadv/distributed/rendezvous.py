"""A store for one start of the ranks.

torchrun keeps one store for all attempts of ``--max-restarts``, and torch puts the same keys into
it at each: a rank of the second attempt may then find the address of a process of the first, where
nobody answers. So the ranks first agree on a prefix of their own. The launcher's count of restarts
would not do: agents on several hosts count differently.
"""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta
from time import monotonic, sleep
from typing import Any
from uuid import uuid4

import torch.distributed as dist


def rendezvous(store: Any, rank: int, ranks: int, limit: timedelta) -> Any:
    """``store`` under a prefix that all ranks of this start share, and no earlier start has used.

    Rank 0 announces a prefix. The others say there who they are, and go on once rank 0 repeats just
    that: what an earlier rank 0 has seen was another process. Collective. Raises torch's DistError
    (a RuntimeError) after ``limit``.
    """
    me, others = uuid4().hex, range(1, ranks)
    if rank == 0:
        mine = _under(me, store)
        store.set("conadv/prefix", me)
        mine.wait([f"here/{other}" for other in others], limit)
        for other in others:
            mine.set(f"seen/{other}", mine.get(f"here/{other}"))
        return mine
    end = monotonic() + limit.total_seconds()
    while monotonic() < end:
        announced = _under(store.get("conadv/prefix").decode(), store)
        announced.set(f"here/{rank}", me)
        with suppress(
            dist.DistStoreError
        ):  # not yet; or the prefix is an old one, and a new one comes
            announced.wait([f"seen/{rank}"], timedelta(seconds=1))
            if announced.get(f"seen/{rank}").decode() == me:
                return announced
        sleep(0.05)
    raise dist.DistStoreError(f"Not all ranks have come within {limit.total_seconds():g} s")


def _under(prefix: str, store: Any) -> Any:
    return dist.PrefixStore(f"conadv/{prefix}", store)  # type: ignore[attr-defined]
