"""Ranks: who this process is among those that torchrun started, and the few collectives that a run needs.

One code path serves 1 to N ranks. A :class:`Comm` of one rank starts no process group; every method returns at once.
All collectives are torch.distributed's own: gloo for what lies on the CPU, plain values among it, NCCL on CUDA.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from conadv.distributed.clock import Mark
from conadv.distributed.diagnosis import RollCall
from conadv.distributed.rendezvous import rendezvous
from conadv.distributed.transfer import Transfer
from conadv.errors import ConadvError, printable

T = TypeVar("T")
TIMEOUT_SECONDS = 600.0
LONGEST_TIMEOUT = 1e7
"""Seconds: about four months; torch counts them in the nanoseconds of 64 bits."""
MOST_RANKS = 2**20
BACKENDS = {"gloo": "gloo", "nccl": "cpu:gloo,cuda:nccl"}
"""What a process group is made with. With NCCL alone, plain values and tensors on the CPU, such as the images of a
checkpoint, would travel through the GPU's memory."""
CLOCK_ROUNDS = 8


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


class Handle:
    """A sum over ranks that is under way. ``tensor`` belongs to the network until :meth:`wait` returns it.

    ``begin`` and ``end`` say when it was under way, see conadv.distributed.clock; ``end`` after :meth:`wait`.
    """

    def __init__(self, comm: Comm, tensor: Tensor, work: Any) -> None:
        self._comm, self._tensor, self._work = comm, tensor, work
        self._cuda = comm.device.type == "cuda"
        self.begin: Mark = _event() if self._cuda else time.monotonic()
        self.end: Mark = self.begin
        self._finished: list[float] = []
        if not self._cuda:
            work.get_future().add_done_callback(lambda _: self._finished.append(time.monotonic()))

    def wait(self) -> Tensor:
        """The sum. CPU: blocks until it is there. CUDA: the current stream waits, this thread does not."""
        with self._comm.guard():
            if self._cuda:
                with torch.cuda.stream(
                    self._comm.watcher
                ):  # the moment that the sum is there, whatever else runs
                    self._work.wait()
                    self.end = _event()
            self._work.wait()
        if not self._cuda:  # the callback may come a little after the waiting thread has been woken
            self.end = self._finished[0] if self._finished else time.monotonic()
        return self._tensor


class Comm:
    """This process among the ranks of a run, or of a team of them (see conadv.distributed.teams).

    ``rank`` of ``ranks``, computing on ``device``. ``members``: the numbers of the ranks in the whole world, which are
    those that messages use; ``group``: their process group, None for the world's. The methods are collective: every
    rank calls them in the same order. Every wait ends after the process group's timeout at the latest; what went wrong
    comes out as a ConadvError that names this rank, the phase and the step (:meth:`at`). On CUDA it is NCCL's watchdog
    that ends the process.
    """

    def __init__(
        self,
        rank: int = 0,
        ranks: int = 1,
        device: torch.device | None = None,
        backend: str | None = None,
        *,
        members: Sequence[int] | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.rank = rank
        self.ranks = ranks
        self.device = device or torch.device("cpu")
        self.backend = backend
        self._channels: list[dist.ProcessGroup | None] = [
            group
        ]  # channel 0: messages outside of any exchange
        self.members = tuple(range(ranks) if members is None else members)
        self.group = group
        self.timeout = TIMEOUT_SECONDS
        self._world_ranks = ranks
        self._phase, self._step = "setup", 0
        self.broken = False
        self._roll: RollCall | None = None

    @classmethod
    def from_environment(cls, device: str = "auto", timeout: float = TIMEOUT_SECONDS) -> Comm:
        """The rank that torchrun's environment says (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT).

        One process, or none of these variables: the trivial Comm. ``timeout``: seconds until a silent rank is an
        error. Raises ConadvError for a variable that cannot be, and if the ranks do not find each other in that time.
        """
        if not 0 < timeout <= LONGEST_TIMEOUT:
            raise ConadvError(
                f"--comm-timeout {timeout:g} must be more than 0 and at most {LONGEST_TIMEOUT:g} seconds."
            )
        ranks = _variable("WORLD_SIZE", range(1, MOST_RANKS + 1), 1)
        local_rank = _variable("LOCAL_RANK", range(ranks), 0) if ranks > 1 else 0
        place = pick_device(device, local_rank)
        if ranks == 1:
            return cls(device=place)
        if dist.is_initialized():
            raise ConadvError(
                "The process group exists already. Comm.from_environment takes init_process_group's place."
            )
        rank = _variable("RANK", range(ranks))
        _variable("MASTER_PORT", range(1, 2**16))
        if not os.environ.get("MASTER_ADDR"):
            raise _missing("MASTER_ADDR")
        comm = cls(rank, ranks, place, "nccl" if place.type == "cuda" else "gloo")
        comm.timeout = timeout
        if place.type == "cuda":
            torch.cuda.set_device(place)
        limit = timedelta(seconds=timeout)
        with comm.guard():
            found, rank, ranks = next(dist.rendezvous("env://", timeout=limit))  # type: ignore[attr-defined]
            store = rendezvous(found, rank, ranks, limit)
            assert comm.backend is not None
            dist.init_process_group(
                BACKENDS[comm.backend], store=store, rank=rank, world_size=ranks, timeout=limit
            )
            comm._roll = RollCall(store, rank, ranks)
        return comm

    @classmethod
    def from_process_group(cls, device: torch.device | str) -> Comm:
        """This process in the process group that somebody else has made, such as Accelerate; alone without one.

        The group's own timeout holds, and an error cannot say who is missing (:meth:`from_environment` can). Raises
        ConadvError where a launcher has started several processes (WORLD_SIZE) and nobody has made a group of them.
        """
        place = torch.device(device)
        if not (dist.is_available() and dist.is_initialized()):
            started = os.environ.get("WORLD_SIZE", "1")
            if started not in ("", "0", "1"):
                raise ConadvError(
                    f"{started} processes were started (WORLD_SIZE), but there is no process group: each would train "
                    "for itself. Call this after init_process_group, or pass Comm(device=...) to mean just that."
                )
            return cls(device=place)
        return cls(
            dist.get_rank(),
            dist.get_world_size(),
            place,
            "nccl" if place.type == "cuda" else "gloo",
        )

    @property
    def is_main(self) -> bool:
        """Whether this rank, the world's rank 0, writes files and shows progress."""
        return self.members[self.rank] == 0

    @cached_property
    def watcher(self) -> torch.cuda.Stream:
        """A stream on which only events lie."""
        return torch.cuda.Stream(self.device)

    def team(self, members: Sequence[int], group: dist.ProcessGroup | None = None) -> Comm:
        """This process among some ranks of the world, by their numbers in the world. Not collective."""
        comm = Comm(
            members.index(self.rank),
            len(members),
            self.device,
            self.backend,
            members=members,
            group=group,
        )
        comm.timeout, comm._world_ranks, comm._roll = self.timeout, self.ranks, self._roll
        return comm

    def at(self, phase: str, step: int) -> None:
        """Say where the run is, for the message of a collective that fails."""
        self._phase, self._step = phase, step
        if self._roll is not None:
            self._roll.last = (phase, step)

    @contextmanager
    def guard(self, peer: int | None = None) -> Iterator[None]:
        """Turn what torch.distributed raises into an error that says where it happened and what to do.

        ``peer``: the rank at the other end, where there is one.
        """
        try:
            yield
        except (RuntimeError, ConnectionError) as error:
            self.broken = True
            found = (
                self._roll.findings()
                if self._roll
                else "Another rank has ended, or does not answer."
            )
            at_the_other_end = "" if peer is None else f" Rank {peer} was at the other end."
            raise ConadvError(
                f"Rank {self.members[self.rank]} of {self._world_ranks}: communication failed in phase "
                f"{self._phase!r} of step {self._step} (timeout {self.timeout:g} s): {first_line(error)}"
                f"{at_the_other_end} {found} "
                "The newest checkpoint is intact: start all ranks again with --resume."
            ) from error

    def all_reduce_async(self, tensor: Tensor) -> Handle:
        """Start to replace ``tensor`` (dense, contiguous) by its sum over ranks. Needs more than one rank."""
        assert self.ranks > 1
        with self.guard():
            return Handle(self, tensor, dist.all_reduce(tensor, group=self.group, async_op=True))

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """``tensor`` summed over ranks, in place."""
        return tensor if self.ranks == 1 else self.all_reduce_async(tensor).wait()

    def any(self, flags: Tensor) -> Tensor:
        """Where ``flags`` (bool) is true on any rank."""
        if self.ranks == 1:
            return flags
        counts = flags.to(self.device, torch.int32)
        return (self.all_reduce(counts) > 0).to(flags.device)

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
                dist.broadcast(flat, self.members[0], self.group)
            if not self.is_main:
                for tensor, part in zip(group, flat.split([t.numel() for t in group]), strict=True):
                    tensor.copy_(part.view_as(tensor))

    def broadcast_object(self, value: T | None) -> T:
        """Rank 0's ``value`` on every rank: tensors on the CPU and plain values. The others' values do not matter."""
        box = [value if self.is_main else None]
        if self.ranks > 1:
            with self.guard():
                dist.broadcast_object_list(box, self.members[0], self.group)
        assert box[0] is not None
        return box[0]

    def gather_objects(self, value: T) -> list[T]:
        """Every rank's ``value`` (tensors on the CPU and plain values) on rank 0, in rank order; empty elsewhere."""
        if self.ranks == 1:
            return [value]
        found: list[Any] | None = [None] * self.ranks if self.is_main else None
        with self.guard():
            dist.gather_object(value, found, self.members[0], self.group)
        return found or []

    def scatter_objects(self, values: Sequence[T] | None) -> T:
        """This rank's one of rank 0's ``values``, one per rank: tensors on the CPU and plain values."""
        found: list[Any] = [values[0] if values else None]
        if self.ranks > 1:
            with self.guard():
                dist.scatter_object_list(
                    found, list(values) if values else None, self.members[0], self.group
                )
        mine: T = found[0]
        return mine

    def new_group(self, members: Iterable[int]) -> Any:
        """A process group of some of the world's ranks. Collective over the world, members or not."""
        with self.guard():
            backend = None if self.backend is None else BACKENDS[self.backend]
            return dist.new_group(list(members), timedelta(seconds=self.timeout), backend)

    def new_channel(self) -> int:
        """A number for :meth:`send` and :meth:`receive` that nobody else uses. Collective.

        gloo tells channels apart by tags; NCCL knows none and runs what two ranks exchange in one order, so there every
        channel has its own group.
        """
        self._channels.append(
            self.new_group(range(self.ranks)) if self.backend == "nccl" else self.group
        )
        return len(self._channels) - 1

    def send(self, tensor: Tensor, peer: int, channel: int) -> Transfer:
        """Start to send ``tensor`` to rank ``peer``, which must call :meth:`receive` with the same size and channel.

        Messages on one channel between two ranks arrive in their order. The tensor belongs to the network until
        :meth:`Transfer.wait` has returned.
        """
        return Transfer(
            lambda: dist.isend(tensor, peer, self._channels[channel], channel), *self._ends(peer)
        )

    def receive(self, tensor: Tensor, peer: int, channel: int) -> Transfer:
        """Start to overwrite ``tensor`` by what rank ``peer`` sends."""
        return Transfer(
            lambda: dist.irecv(tensor, peer, self._channels[channel], channel), *self._ends(peer)
        )

    def _ends(
        self, peer: int
    ) -> tuple[Callable[[], AbstractContextManager[None]], torch.cuda.Stream | None]:
        return partial(self.guard, peer), self.watcher if self.device.type == "cuda" else None

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
            dist.all_gather_object(messages, None if mine is None else str(mine), self.group)
        failed = [rank for rank, message in enumerate(messages) if message is not None]
        if failed:
            where = f" (rank {self.members[failed[0]]})" if failed[0] else ""
            everyones = ConadvError(f"{messages[failed[0]]}{where}")
            everyones.agreed = True
            raise everyones from mine

    def clock_offset(self) -> float:
        """Seconds by which this rank's ``time.monotonic()`` is ahead of rank 0's; 0 on one host, up to noise.

        Half of the shortest round trip bounds the error (Cristian 1989). Collective: rank 0 asks one after another.
        """
        if self.ranks == 1:
            return 0.0
        offset = 0.0
        with self.guard():
            for other in range(1, self.ranks):
                if self.rank == 0:
                    self._ask_time(other)
                elif self.rank == other:
                    offset = self._tell_time()
        return offset

    def _ask_time(self, other: int) -> None:
        box = torch.zeros(2, dtype=torch.float64, device=self.device)
        best, offset = float("inf"), 0.0
        for _ in range(CLOCK_ROUNDS):
            begin = time.monotonic()
            dist.send(box, self.members[other], self.group)
            dist.recv(box, self.members[other], self.group)
            theirs = float(box[0])  # sync point
            end = time.monotonic()
            if end - begin < best:
                best, offset = end - begin, theirs - (begin + end) / 2
        dist.send(box.fill_(offset), self.members[other], self.group)

    def _tell_time(self) -> float:
        box = torch.zeros(2, dtype=torch.float64, device=self.device)
        for _ in range(CLOCK_ROUNDS):
            dist.recv(box, self.members[0], self.group)
            box[0].item()  # sync point: the message is here
            dist.send(box.fill_(time.monotonic()), self.members[0], self.group)
        dist.recv(box, self.members[0], self.group)
        return float(box[0])

    def close(self) -> None:
        """Leave the process group. After a failed collective nothing is waited for: the process is about to end."""
        if self._roll is not None:
            self._roll.close()
        if self.ranks > 1 and not self.broken:
            dist.destroy_process_group()


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def processes_here(default: int = 1) -> int:
    """How many processes the launcher has started on this host (LOCAL_WORLD_SIZE). Raises ConadvError."""
    return _variable("LOCAL_WORLD_SIZE", range(1, MOST_RANKS + 1), default)


def _variable(name: str, allowed: range, default: int | None = None) -> int:
    """A number of the environment; without a ``default`` it must be there."""
    text = os.environ.get(name) or ("" if default is None else str(default))
    if not text:
        raise _missing(name)
    try:
        value = int(text)
    except ValueError as error:
        raise _not_allowed(name, text, allowed) from error
    if value not in allowed:
        raise _not_allowed(name, text, allowed)
    return value


def _missing(name: str) -> ConadvError:
    return ConadvError(
        f"The environment variable {name} is not set, though WORLD_SIZE asks for several processes. Start them by "
        "torchrun, which sets it."
    )


def _not_allowed(name: str, text: str, allowed: range) -> ConadvError:
    return ConadvError(
        f"The environment variable {name} is {printable(text)[:40]!r}, not a number from {allowed.start} to "
        f"{allowed.stop - 1}. torchrun sets it."
    )


def first_line(error: BaseException) -> str:
    """What torch.distributed said, as one short sentence."""
    text = str(error).strip().splitlines()
    line = text[0].rstrip(".") if text else type(error).__name__
    return line[:200] + "."
