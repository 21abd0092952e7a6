"""Work of a process beside messages on its network: when each of them ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Message:
    """Something for the network. One message is under way at a time, in the order given.

    ready: seconds of the process's work after which it may leave. seconds: its time on an otherwise idle host.
    busy: seconds of the host's processor that it takes, 0 to ``seconds`` (copies in the kernel, adding up); a
    device with an engine of its own for that has 0.
    """

    ready: float
    seconds: float
    busy: float = 0.0


@dataclass(frozen=True)
class Ends:
    """Seconds after the begin of the work at which the work and the last message end."""

    work: float
    network: float

    @property
    def both(self) -> float:
        return max(self.work, self.network)

    @property
    def wait(self) -> float:
        """How long the process waits for the network when its work is done."""
        return max(0.0, self.network - self.work)


def beside(work: float, messages: Sequence[Message]) -> Ends:
    """Run ``work`` seconds of a process beside ``messages``.

    While both are under way they share the processor fairly: a message that alone uses a share u = busy / seconds of
    it gets min(u, 1/2). So work runs at the rate 1 - min(u, 1/2) and the message at min(1, 1 / (2 u)). With u = 0
    they do not feel each other; with u = 1 nothing is gained by running both at once.
    """
    clock = done = 0.0
    work_end: float | None = None
    for message in messages:
        idle = max(0.0, min(message.ready, work) - done)
        clock, done, left = clock + idle, done + idle, message.seconds
        if done < work and left > 0:
            share = min(1.0, message.busy / message.seconds)
            rate, speed = 1 - min(share, 0.5), min(1.0, 0.5 / share) if share else 1.0
            if (work - done) / rate <= left / speed:
                clock += (work - done) / rate
                left -= (work - done) / rate * speed
                done = work
            else:
                clock += left / speed
                done, left = done + left / speed * rate, 0.0
        if done >= work and work_end is None:
            work_end = clock
        clock += max(0.0, left)
    network_end = clock if messages else 0.0
    return Ends(clock + work - done if work_end is None else work_end, network_end)
