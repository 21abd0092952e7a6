"""Ranks: who this process is among those that torchrun started, and the few collectives that a run needs.

One code path serves 1 to N ranks. A :class:`Comm` of one rank starts no process group; every method returns at once.
All collectives are torch.distributed's own (gloo on CPU, NCCL on CUDA).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ConadvError

T = TypeVar("T")
TIMEOUT_SECONDS = 600.0


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """ "auto" is the CUDA device of this rank on its host, or the CPU where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cuda":
        return torch.device(name)
    if not torch.cuda.is_available():
        raise ConadvError("--device cuda: torch sees no CUDA device here. Use --device cpu.")
    if local_rank >= torch.cuda.device_count():
        raise ConadvError(
            f"Local rank {local_rank} has no CUDA device of its own: this host has {torch.cuda.device_count()}. "
            "Start at most that many processes per host, or use --device cpu."
        )
    return torch.device("cuda", local_rank)


@dataclass(frozen=True)
class Handle:
    """A sum over ranks that is under way. ``tensor`` belongs to the network until :meth:`wait` returns it."""

    comm: Comm
    tensor: Tensor
    work: Any

    def wait(self) -> Tensor:
        """The sum. CPU: blocks until it is there. CUDA: the current stream waits, this thread does not."""
        with self.comm.guard():
            self.work.wait()
        return self.tensor


class Comm:
    """This process among the ranks of a run.

    ``rank`` of ``ranks``, computing on ``device``. The methods are collective: every rank calls them in the same
    order. Every wait ends after the process group's timeout at the latest; what went wrong comes out as a ConadvError
    that names this rank, the phase and the step (:meth:`at`). On CUDA it is NCCL's watchdog that ends the process.
    """

    def __init__(
        self, rank: int = 0, ranks: int = 1, device: torch.device | None = None, backend: str | None = None
    ) -> None:
        self.rank = rank
        self.ranks = ranks
        self.device = device or torch.device("cpu")
        self.backend = backend
        self._timeout = TIMEOUT_SECONDS
        self._phase, self._step = "setup", 0
        self._broken = False

    @classmethod
    def from_environment(cls, device: str = "auto", timeout: float = TIMEOUT_SECONDS) -> Comm:
        """The rank that torchrun's environment says (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT).

        One process, or none of these variables: the trivial Comm. ``timeout``: seconds until a silent rank is an
        error. Raises ConadvError if the ranks do not find each other in that time.
        """
        if timeout <= 0:
            raise ConadvError(f"--comm-timeout {timeout:g} must be more than 0 seconds.")
        ranks = _variable("WORLD_SIZE", 1)
        local_rank = _variable("LOCAL_RANK", 0) if ranks > 1 else 0
        place = pick_device(device, local_rank)
        if ranks == 1:
            return cls(device=place)
        comm = cls(_variable("RANK", 0), ranks, place, "nccl" if place.type == "cuda" else "gloo")
        comm._timeout = timeout
        if place.type == "cuda":
            torch.cuda.set_device(place)
        with comm.guard():
            dist.init_process_group(comm.backend, timeout=timedelta(seconds=timeout))
        return comm

    @property
    def first(self) -> bool:
        """Whether this rank writes files and shows progress."""
        return self.rank == 0

    def at(self, phase: str, step: int) -> None:
        """Say where the run is, for the message of a collective that fails."""
        self._phase, self._step = phase, step

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Turn what torch.distributed raises into an error that says where it happened and what to do."""
        try:
            yield
        except (RuntimeError, ConnectionError) as error:
            self._broken = True
            raise ConadvError(
                f"Rank {self.rank} of {self.ranks}: communication failed in phase {self._phase!r} of step {self._step} "
                f"(timeout {self._timeout:g} s): {_first_line(error)} Another rank has ended, or does not answer. "
                "The newest checkpoint is intact: start all ranks again with --resume."
            ) from error

    def sum_async(self, tensor: Tensor) -> Handle:
        """Start to replace ``tensor`` (dense, contiguous) by its sum over ranks. Needs more than one rank."""
        assert self.ranks > 1
        with self.guard():
            return Handle(self, tensor, dist.all_reduce(tensor, async_op=True))

    def sum(self, tensor: Tensor) -> Tensor:
        """``tensor`` summed over ranks, in place."""
        return tensor if self.ranks == 1 else self.sum_async(tensor).wait()

    def any(self, flags: Tensor) -> Tensor:
        """Where ``flags`` (bool) is true on any rank."""
        if self.ranks == 1:
            return flags
        counts = flags.to(self.device, torch.int32)
        return (self.sum(counts) > 0).to(flags.device)

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite ``tensors`` by those of rank 0; one message per dtype."""
        if self.ranks == 1:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_dtype.setdefault(tensor.dtype, []).append(tensor.detach())
        for group in by_dtype.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in group])
            with self.guard():
                dist.broadcast(flat, 0)
            if not self.first:
                for tensor, part in zip(group, flat.split([t.numel() for t in group]), strict=True):
                    tensor.copy_(part.view_as(tensor))

    def share(self, value: T | None) -> T:
        """Rank 0's ``value`` on every rank: tensors on the CPU and plain values. The others' values do not matter."""
        box = [value if self.first else None]
        if self.ranks > 1:
            with self.guard():
                dist.broadcast_object_list(box, 0)
        assert box[0] is not None
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's ``value`` (tensors on the CPU and plain values) on rank 0, in rank order; empty elsewhere."""
        if self.ranks == 1:
            return [value]
        found: list[Any] | None = [None] * self.ranks if self.first else None
        with self.guard():
            dist.gather_object(value, found, 0)
        return found or []

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """A ConadvError that one rank raises inside is raised by all of them after the block, the lowest rank's.

        No collective inside: the others wait for it at the end of the block.
        """
        mine: ConadvError | None = None
        try:
            yield
        except ConadvError as error:
            if self.ranks == 1:
                raise
            mine = error
        if self.ranks == 1:
            return
        messages: list[str | None] = [None] * self.ranks
        with self.guard():
            dist.all_gather_object(messages, None if mine is None else str(mine))
        failed = [rank for rank, message in enumerate(messages) if message is not None]
        if failed:
            everyones = ConadvError(f"{messages[failed[0]]}" + (f" (rank {failed[0]})" if failed[0] else ""))
            everyones.agreed = True
            raise everyones from mine

    def close(self) -> None:
        """Leave the process group. After a failed collective nothing is waited for: the process is about to end."""
        if self.ranks > 1 and not self._broken:
            dist.destroy_process_group()


def _variable(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError as error:
        raise ConadvError(f"The environment variable {name} is {text!r}, not a number. torchrun sets it.") from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    line = text[0].rstrip(".") if text else type(error).__name__
    return line[:200] + "."
