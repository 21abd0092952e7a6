"""What learners and attack ranks send each other.

* weights: from one learner per attack rank (``Teams.feeder``) to that attack rank, the trainable
  parameters; one message in flight.
* images: from an attack rank to every learner whose micro-batches it has, those images as they wait
  (pending dtype); tau messages in flight.

Every message begins with a :class:`Header`. Buffers of the model do not travel: the attack
normalises by batch statistics, and the other buffers of an attack rank stay as they were at the
start.
"""

from __future__ import annotations

from typing import NamedTuple

from conadv.distributed.comm import Comm
from conadv.distributed.message import Message

STOP, WORK, FAILED = range(3)


class Header(NamedTuple):
    """The integers of a message.

    kind: WORK, or how training has ended. request: a request to stop that has reached the sender,
    see conadv.training.signals; after STOP and FAILED the one that has ended the run. version: of
    the weights. step: that the images are for. accumulation: micro-batches of a learner and step.
    """

    kind: int
    request: int = 0
    version: int = 0
    step: int = 0
    accumulation: int = 0

    @classmethod
    def of(cls, message: Message) -> Header:
        """The header of a message that has arrived. Sync point."""
        return cls(*message.tags)


class Channels(NamedTuple):
    """The channels on which the learners and attack ranks of one engine talk."""

    weights: int
    images: int

    @classmethod
    def open(cls, world: Comm) -> Channels:
        """New ones. Collective."""
        return cls(world.new_channel(), world.new_channel())
