"""This process among those that the launcher started, and the collectives that a run needs.

One code path serves 1 to N ranks. A :class:`Comm` of one rank starts no process group; every method
returns at once. The collectives are torch.distributed's own: gloo for what lies on the CPU, plain
values among it, and NCCL on CUDA.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from conadv.distributed.diagnosis import RollCall
from conadv.distributed.environment import pick_device, variable, world_size
from conadv.distributed.handle import Handle
from conadv.distributed.rendezvous import rendezvous
from conadv.errors import ConadvError

T = TypeVar("T")
CPU = torch.device("cpu")
TIMEOUT_SECONDS = 600.0
LONGEST_TIMEOUT = 1e7
"""Seconds, about four months: torch counts nanoseconds in 64 bits."""
BACKENDS = {"gloo": "gloo", "nccl": "cpu:gloo,cuda:nccl"}
"""What a process group is made with. With NCCL alone, plain values and tensors on the CPU, such as
the images of a checkpoint, would travel through the GPU's memory."""


@dataclass(eq=False)
class Comm:
    """This process as ``rank`` of ``ranks``, of the whole world or of a team of it (:meth:`team`).

    ``device``: where this rank computes. ``members``: the world's numbers of these ranks, which
    messages use. ``group``: their process group, None for the world's.
    Ranks: the methods are collective unless they say otherwise; all ranks call them in one order.
    Every wait ends after the process group's timeout at the latest, with a ConadvError that names
    this rank, the phase and the step (:meth:`at`). On CUDA NCCL's watchdog ends the process.
    """

    rank: int = 0
    ranks: int = 1
    device: torch.device = CPU
    backend: str | None = None
    members: Sequence[int] = ()
    group: dist.ProcessGroup | None = None
    timeout: float = TIMEOUT_SECONDS
    world: Comm | None = None

    def __post_init__(self) -> None:
        self.members = tuple(self.members or range(self.ranks))
        self.broken = False
        self._world = self.world or self  # one process is in one place, whatever team it acts for
        self._place = ("setup", 0)
        self._roll: RollCall | None = None
        self._channels = [self.group]  # channel 0: messages outside of any exchange

    @classmethod
    def from_environment(cls, device: str = "auto", timeout: float = TIMEOUT_SECONDS) -> Comm:
        """The rank that torchrun's environment names, or the Comm of one process without it.

        ``timeout``: seconds until a silent rank is an error. Raises ConadvError for a variable that
        cannot be right, and if the ranks do not find each other in that time.
        """
        if not 0 < timeout <= LONGEST_TIMEOUT:
            most = f"{LONGEST_TIMEOUT:g} seconds"
            raise ConadvError(f"--comm-timeout {timeout:g} must be above 0 and at most {most}.")
        ranks = world_size()
        local_rank = variable("LOCAL_RANK", range(ranks), 0) if ranks > 1 else 0
        place = pick_device(device, local_rank)
        if ranks == 1:
            return cls(device=place)
        if dist.is_initialized():
            raise ConadvError(
                "Comm.from_environment takes init_process_group's place: call one of them."
            )
        rank = variable("RANK", range(ranks))
        variable("MASTER_PORT", range(1, 2**16))
        if not os.environ.get("MASTER_ADDR"):
            raise ConadvError("The environment variable MASTER_ADDR is not set. torchrun sets it.")
        comm = cls(rank, ranks, place, _backend_for(place), timeout=timeout)
        comm._connect()
        return comm

    @classmethod
    def from_process_group(cls, device: torch.device | str) -> Comm:
        """This process in the process group that somebody else has made, such as Accelerate.

        The group's own timeout holds, and an error cannot say who is missing. Raises ConadvError
        where a launcher has started several processes and nobody has made a group of them.
        """
        place = torch.device(device)
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), place, _backend_for(place))
        started = os.environ.get("WORLD_SIZE", "1")
        if started not in ("", "0", "1"):
            raise ConadvError(
                f"{started} processes were started (WORLD_SIZE), but there is no process group: "
                "each would train for itself. Call this after init_process_group, or pass "
                "Comm(device=...) to mean just that."
            )
        return cls(device=place)

    def _connect(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        limit = timedelta(seconds=self.timeout)
        with self.guard():
            found, rank, ranks = next(dist.rendezvous("env://", timeout=limit))  # type: ignore[attr-defined]
            store = rendezvous(found, rank, ranks, limit)
            backend = BACKENDS[str(self.backend)]
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=ranks, timeout=limit
            )
            self._roll = RollCall(store, rank, ranks, lambda: self._place)

    def team(self, members: Sequence[int], group: dist.ProcessGroup | None = None) -> Comm:
        """This process among some of the world's ranks, given by number. Not collective."""
        place = members.index(self.rank), len(members), self.device, self.backend
        return Comm(*place, members, group, self.timeout, world=self)

    @property
    def is_main(self) -> bool:
        """Whether this rank, the world's rank 0, writes files and shows progress."""
        return self.members[self.rank] == 0

    @cached_property
    def _stream(self) -> torch.cuda.Stream | None:
        """On CUDA, a stream that carries nothing but events."""
        return torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    # ---- where the run is, and what went wrong

    def at(self, phase: str, step: int) -> None:
        """Say where this process is, for the message of a collective that fails. Not collective."""
        self._world._place = (phase, step)

    @contextmanager
    def guard(self, peer: int | None = None) -> Iterator[None]:
        """Turn torch.distributed's errors into one that says where it happened and what to do.

        ``peer``: the rank at the other end of a message. Not collective.
        """
        try:
            yield
        except (RuntimeError, ConnectionError) as error:
            world = self._world
            self.broken = world.broken = True
            phase, step = world._place
            found = "Another rank has ended, or does not answer."
            if world._roll is not None:
                found = world._roll.findings()
            if peer is not None:
                found = f"Rank {peer} was at the other end. {found}"
            raise ConadvError(
                f"Rank {world.rank} of {world.ranks}: communication failed in phase {phase!r} of "
                f"step {step} (timeout {self.timeout:g} s): {first_line(error)} {found} "
                "The newest checkpoint is intact: start all ranks again with --resume."
            ) from error

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """A ConadvError that one rank raises inside is raised by all of them after the block.

        Where several raise, it is the lowest rank's. No collective inside: the other ranks wait for
        this one at the end of the block.
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
            dist.all_gather_object(messages, None if mine is None else str(mine), self.group)
        for rank, message in zip(self.members, messages, strict=True):
            if message is not None:
                everyones = ConadvError(f"{message} (rank {rank})" if rank else message)
                everyones.agreed = True
                raise everyones from mine

    def close(self) -> None:
        """Leave the process group; after a failed collective, without waiting for anybody."""
        if self._roll is not None:
            self._roll.close()
        if self.ranks > 1 and not self.broken:
            dist.destroy_process_group()

    # ---- tensors

    def all_reduce_async(self, tensor: Tensor) -> Handle:
        """Start to replace ``tensor`` (dense) by its sum over ranks. Needs several ranks."""
        assert self.ranks > 1
        start = partial(dist.all_reduce, group=self.group, async_op=True)
        return Handle(tensor, start, self.guard, self._stream)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """``tensor`` summed over ranks, in place."""
        return tensor if self.ranks == 1 else self.all_reduce_async(tensor).wait()

    def barrier(self) -> None:
        """No rank goes on before all are here."""
        self.all_reduce(torch.zeros(1, device=self.device))

    def any(self, flags: Tensor) -> Tensor:
        """Where ``flags`` (bool) is true on any rank."""
        if self.ranks == 1:
            return flags
        counts = flags.to(self.device, torch.int32)
        return (self.all_reduce(counts) > 0).to(flags.device)

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite ``tensors`` by those of rank 0."""
        if self.ranks == 1:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_dtype.setdefault(tensor.dtype, []).append(tensor.detach())
        for group in by_dtype.values():  # one message per dtype: most tensors are small
            flat = torch.cat([tensor.reshape(-1) for tensor in group])
            with self.guard():
                dist.broadcast(flat, group=self.group, group_src=0)
            for tensor, part in zip(group, flat.split([t.numel() for t in group]), strict=True):
                tensor.copy_(part.view_as(tensor))

    # ---- plain values, and tensors on the CPU

    def broadcast_object(self, value: T | None) -> T:
        """Rank 0's ``value`` on every rank; the others' values do not matter."""
        box: list[T | None] = [value]
        if self.ranks > 1:
            with self.guard():
                dist.broadcast_object_list(box, group=self.group, group_src=0)
        assert box[0] is not None
        return box[0]

    def gather_objects(self, value: T) -> list[T]:
        """Every rank's ``value`` on rank 0, in rank order; empty elsewhere."""
        if self.ranks == 1:
            return [value]
        found: list[Any] = [None] * (self.ranks if self.rank == 0 else 0)
        with self.guard():
            dist.gather_object(value, found or None, group=self.group, group_dst=0)
        return found

    def scatter_objects(self, values: Sequence[T] | None) -> T:
        """This rank's one of rank 0's ``values``, one per rank."""
        given: list[Any] = list(values) if values else [None]
        box = given[:1]
        if self.ranks > 1:
            with self.guard():
                dist.scatter_object_list(box, given, group=self.group, group_src=0)
        mine: T = box[0]
        return mine

    # ---- messages between two ranks of the world

    def new_group(self, members: Iterable[int]) -> Any:
        """A process group of some ranks. Collective over the world, members or not."""
        with self.guard():
            backend = None if self.backend is None else BACKENDS[self.backend]
            return dist.new_group(list(members), timedelta(seconds=self.timeout), backend)

    def new_channel(self) -> int:
        """A number for :meth:`send` and :meth:`receive` that nobody else uses.

        gloo tells channels apart by tags. NCCL knows none and runs what two ranks exchange in one
        order, so that every channel has a group of its own there.
        """
        needs_group = self.backend == "nccl"
        self._channels.append(self.new_group(range(self.ranks)) if needs_group else self.group)
        return len(self._channels) - 1

    def send(self, tensor: Tensor, peer: int, channel: int) -> Handle:
        """Start to send ``tensor`` to rank ``peer``, which receives one of the same size.

        Messages on one channel between two ranks arrive in their order.
        """
        return self._message(partial(dist.isend, dst=peer), tensor, peer, channel)

    def receive(self, tensor: Tensor, peer: int, channel: int) -> Handle:
        """Start to overwrite ``tensor`` by what rank ``peer`` sends."""
        return self._message(partial(dist.irecv, src=peer), tensor, peer, channel)

    def _message(self, call: Callable[..., Any], tensor: Tensor, peer: int, channel: int) -> Handle:
        start = partial(call, group=self._channels[channel], tag=channel)
        return Handle(tensor, start, partial(self.guard, peer), self._stream, message=True)


def _backend_for(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def first_line(error: BaseException) -> str:
    """What torch.distributed said, as one short sentence."""
    text = str(error).strip().splitlines()
    line = text[0].rstrip(".") if text else type(error).__name__
    return line[:200] + "."
