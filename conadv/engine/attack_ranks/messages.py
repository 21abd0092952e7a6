"""What learners and attack ranks send each other.

* weights: from one learner per attack rank (``Teams.feeder``) to that attack rank, the trained
  parameters and all buffers but those of batch norm; one message in flight.
* images: from an attack rank to every learner whose micro-batches it has, those images as they wait
  (pending dtype); tau messages in flight.

Every message begins with a :class:`Header`. Running statistics of batch norm do not travel: the
attack normalises by the batch. Other buffers are the feeding learner's. Where they depend on images
(moving quantisers), those of other learners differ from them, and so do the attacks that inline
would make there.
"""

from __future__ import annotations

from typing import NamedTuple

from conadv.distributed.comm import Comm
from conadv.distributed.message import Message
from conadv.distributed.teams import Teams
from conadv.errors import ConadvError
from conadv.types import Batch

# Learners decide how training ends; an attack rank that hears FAILED ends with an error, too.
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
        # Two, so that weights that are under way hold no images up.
        return cls(world.new_channel(), world.new_channel())


def check_micro_batches(teams: Teams, batch: Batch, accumulation: int) -> None:
    """ConadvError unless ``batch`` has this rank's share of the global batch."""
    found, mine = [m.index for m in batch.micro], list(teams.micro_batches(accumulation))
    if found != mine:
        # Somebody else's would be attacked by nobody, or sent to a learner that does not wait.
        raise ConadvError(
            f"Rank {teams.world.rank} has micro-batches {found} of the global batch, its share is "
            f"{mine}: MicroBatch says how they are numbered."
        )
