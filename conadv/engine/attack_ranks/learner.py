"""A learner's side of the exchange with attack ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from conadv.distributed.message import FAILED, REQUESTED, STOP, WORK, Message
from conadv.distributed.teams import Channels, Teams, shares
from conadv.distributed.transfer import Transfer
from conadv.engine.attack_ranks.failed import FailedRanks
from conadv.errors import ConadvError
from conadv.types import Batch, ExtraBatch

if TYPE_CHECKING:
    from conadv.engine.step import TrainStep


@dataclass(frozen=True)
class Arrival:
    """The images of some of this learner's micro-batches, on their way from one attack rank."""

    attacker: int
    indices: tuple[int, ...]
    message: Message
    transfer: Transfer


@dataclass(frozen=True)
class Incoming:
    """The images of one step: on their way, or made here for attack ranks that are lost (``own``, by micro-batch).

    ``weights``: what they are made at, kept where attack ranks may be lost; ``version``: of which weights.
    """

    batch: Batch
    version: int
    labels: Mapping[int, Tensor]
    dtype: torch.dtype  # of the images before they were encoded
    arrivals: Sequence[Arrival]
    weights: Mapping[str, Tensor] | None
    own: dict[int, Tensor] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        return all(arrival.transfer.done for arrival in self.arrivals)


class Learner:
    """Sends weights and takes images, see conadv.engine.attack_ranks.executor."""

    def __init__(self, teams: Teams, engine: TrainStep, channels: Channels, skip: bool) -> None:
        self._teams, self._world, self._engine, self._skip = teams, teams.world, engine, skip
        self._channels = channels
        self._fed = [
            a for n, a in enumerate(teams.attackers) if teams.feeder(n) == teams.world.rank
        ]
        self._weights = self._weights_message() if self._fed else None
        self._sent: dict[int, Transfer] = {}
        self._incoming: dict[int, Incoming] = {}
        self._too_late: list[Incoming] = []
        self.failed = FailedRanks(teams.world)

    def begin(self, batch: Batch, future: Batch | None) -> bool:
        """Send weights, take images. Returns whether the step goes without images because they are late."""
        engine, step = self._engine, batch.step
        self._world.at("send", step)
        self._teams.comm.at("send", step)
        with engine.clock.phase("send"):
            busy, late = self._agree(step) if self._skip else (False, False)
            if future is not None and not busy:
                self._send(future, len(batch.micro))
            engine.remember()
        self._world.at("receive", step)
        taken = None if late else self._incoming.get(step)
        with engine.clock.phase("receive"):
            if late:
                self._drop(step)
            arrived = self._await(taken) if taken else None
        if arrived is not None:
            self._hand_over(step, arrived)
        return late

    def prepare(self) -> None:
        """Attack, at this step's weights, what lost attack ranks would have had to attack at them."""
        for incoming in self._incoming.values():
            if incoming.version == self._engine.version:
                self._complete(incoming, incoming.arrivals)

    def _agree(self, step: int) -> tuple[bool, bool]:
        """Whether some attack rank still has to take older weights, and whether some images of ``step`` are missing.

        All learners must train on the same views, and ask attack ranks for the same steps. Sync point.
        """
        self._too_late = [incoming for incoming in self._too_late if not incoming.done]
        if self._teams.may_lose:
            self._give_up_overdue()
        busy = not all(transfer.done for transfer in self._sent.values())
        here = step in self._engine.pending or (
            step in self._incoming and self._incoming[step].done
        )
        due = step >= self._engine.ahead
        flags = self._teams.comm.any(torch.tensor([busy, due and not here]))
        return bool(flags[0]), bool(flags[1])

    def _give_up_overdue(self) -> None:
        """With "skip" nobody waits for an attack rank that says nothing: look at how long messages are under way."""
        arrivals = [
            (a.attacker, a.transfer) for incoming in self._too_late for a in incoming.arrivals
        ]
        for attacker, transfer in (*self._sent.items(), *arrivals):
            if self.failed.overdue(transfer):
                self._is_through(transfer, attacker, now=True)
        self._sent = {
            attacker: transfer
            for attacker, transfer in self._sent.items()
            if attacker in self._living()
        }

    def _send(self, future: Batch, accumulation: int) -> None:
        mine, found = (
            list(self._teams.micro_batches(accumulation)),
            [micro.index for micro in future.micro],
        )
        if found != mine:
            raise ConadvError(
                f"Rank {self._world.rank} was given micro-batches {found} of the global batch, not {mine}: MicroBatch "
                "says how they are numbered."
            )
        weights = self._attack_weights()
        self._send_weights((WORK, self._engine.version, future.step, accumulation), weights)
        self._expect_images(future, accumulation, weights)

    def _attack_weights(self) -> Mapping[str, Tensor]:
        """What this step's images are made at: only a learner that sends them, or may need them later, asks."""
        if not (self._fed or self._teams.may_lose):
            return {}
        return self._engine.method.attack_weights(self._engine) or self._engine.trainable()

    def _send_weights(self, tags: tuple[int, int, int, int], weights: Mapping[str, Tensor]) -> None:
        """One buffer for all: the last weights must have left it. That they have means that nobody is far behind."""
        engine = self._engine
        self._free_weights()
        if self._weights is not None:
            self._weights.fill(tags, [weights[name] for name in engine.trainable()])
            self._sent = self._send_to_all()

    def _free_weights(self) -> None:
        """Wait until what was sent last has left."""
        for attacker, transfer in self._sent.items():
            if self._is_through(transfer, attacker):
                self._engine.clock.add("transfer", transfer.begin, transfer.end, beside=True)
        self._sent = {}

    def _send_to_all(self) -> dict[int, Transfer]:
        assert self._weights is not None
        channel, content = self._channels.weights, self._weights.bytes
        return {
            attacker: self._world.send(content, attacker, channel) for attacker in self._living()
        }

    def _expect_images(
        self, future: Batch, accumulation: int, weights: Mapping[str, Tensor]
    ) -> None:
        """Buffers for what comes back, ready before anybody sends: a message that is not awaited does not move."""
        engine, attackers, count = (
            self._engine,
            self._teams.attackers,
            self._engine.method.num_attacked,
        )
        images = {
            micro.index: engine.example(micro)[: count(len(micro.y_N))] for micro in future.micro
        }
        arrivals = []
        for attacker, part in zip(
            attackers, shares(len(self._teams.learners) * accumulation, len(attackers)), strict=True
        ):
            common = tuple(index for index in images if index in part)
            if common and attacker not in self.failed.ranks:
                message = Message(
                    [engine.pending.encoded_like(images[index]) for index in common], engine.device
                )
                transfer = self._world.receive(message.bytes, attacker, self._channels.images)
                arrivals.append(Arrival(attacker, common, message, transfer))
        labels = {
            micro.index: engine.labels(micro)[: count(len(micro.y_N))] for micro in future.micro
        }
        kept = (
            {name: weight.detach().clone() for name, weight in weights.items()}
            if self._teams.may_lose
            else None
        )
        dtype = next(iter(images.values())).dtype
        self._incoming[future.step] = Incoming(
            future, engine.version, labels, dtype, arrivals, kept
        )

    def _is_through(self, transfer: Transfer, attacker: int, *, now: bool = False) -> bool:
        """Wait for a message. False if its attack rank is lost; ConadvError where that must not be."""
        if not self._teams.may_lose:
            transfer.wait()
            return True
        before = len(self.failed.ranks)
        through = self.failed.check(transfer, attacker, self._engine.version, now=now)
        if len(self.failed.ranks) > before and self._weights is not None:
            self._weights = self._weights_message()  # the network may hold the old one
        return through

    def _await(self, incoming: Incoming) -> list[Arrival]:
        """Block until the images are here; returns those that are."""
        return [
            arrival
            for arrival in incoming.arrivals
            if self._is_through(arrival.transfer, arrival.attacker)
        ]

    def _hand_over(self, step: int, arrived: Sequence[Arrival]) -> None:
        """Move the images of ``step`` to what waits in the engine, and make those that have not come."""
        incoming = self._incoming.pop(step)
        for arrival in arrived:
            kind, *tags, _ = arrival.message.tags
            assert tags == [incoming.version, step], (tags, incoming.version, step)
            self._engine.hear(kind // REQUESTED)
        self._complete(incoming, arrived)
        images = dict(incoming.own)
        for arrival in arrived:
            images |= zip(arrival.indices, arrival.message.parts, strict=True)
        indices = [micro.index for micro in incoming.batch.micro]
        parts, labels = (
            tuple(by_index[index] for index in indices) for by_index in (images, incoming.labels)
        )
        self._engine.pending.put(step, ExtraBatch(parts, labels, incoming.version), incoming.dtype)

    def _complete(self, incoming: Incoming, arrivals: Sequence[Arrival]) -> None:
        """Attack here, with the bits that an attack rank would have sent, what is not in ``arrivals``."""
        there = {index for arrival in arrivals for index in arrival.indices} | incoming.own.keys()
        missing = tuple(micro for micro in incoming.batch.micro if micro.index not in there)
        if not missing:
            return
        engine, attack = self._engine, self._engine.method.future_attack
        assert attack is not None
        with engine.clock.phase("attack"):
            extra = engine.craft(attack, replace(incoming.batch, micro=missing), incoming.weights)
        incoming.own.update(zip((micro.index for micro in missing), extra.images, strict=True))

    def _drop(self, step: int) -> None:
        self._engine.pending.skip(step)
        if step in self._incoming:
            self._too_late.append(
                self._incoming.pop(step)
            )  # the network still writes into its buffers

    def _living(self) -> list[int]:
        """The attack ranks that get weights from here."""
        return [attacker for attacker in self._fed if attacker not in self.failed.ranks]

    def _weights_message(self) -> Message:
        return Message(list(self._engine.trainable().values()), self._engine.device)

    def settle(self) -> None:
        """Take everything that is under way, so that the engine's state is complete."""
        self._world.at("receive", self._engine.version)
        for step in sorted(self._incoming):
            self._hand_over(step, self._await(self._incoming[step]))

    def close(self, failed: bool) -> bool:
        self._world.at("close", self._engine.version)
        for incoming in (*self._incoming.values(), *self._too_late):
            self._await(incoming)
        self._free_weights()
        if self._weights is not None:
            self._weights.fill((FAILED if failed else STOP, self._engine.stop, 0, 0), [])
            self._sent = self._send_to_all()
            self._free_weights()
        if self.failed.ranks:
            self._world.broken = (
                True  # leave it without waiting: messages of the lost may still be under way
            )
        return not failed
