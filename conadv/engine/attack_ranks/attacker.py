"""An attack rank's side of the exchange with learners."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from conadv.distributed.message import REQUESTED, STOP, WORK, Message
from conadv.distributed.teams import Channels, Teams
from conadv.distributed.transfer import Transfer
from conadv.engine.executors import Served
from conadv.errors import ConadvError
from conadv.types import Batch, ExtraBatch

if TYPE_CHECKING:
    from conadv.engine.step import TrainStep


class Attacker:
    """Takes weights, attacks, sends images, see conadv.engine.attack_ranks.executor.

    The weights of the next step may arrive while the present ones are in use, so there are two buffers. With ``skip``
    weights are asked for only when the attack is done: who is late should go on with the newest ones.
    """

    def __init__(self, teams: Teams, engine: TrainStep, channels: Channels, skip: bool) -> None:
        self._teams, self._world, self._engine, self._skip = teams, teams.world, engine, skip
        self._channels = channels
        self._feeder = teams.feeder(teams.attackers.index(teams.world.rank))
        self._names = list(engine.trainable())
        self._buffers = [
            Message(list(engine.trainable().values()), engine.device) for _ in range(2)
        ]
        self._next: Transfer | None = None
        self._sent: list[Transfer] = []
        self._ended: int | None = None

    def serve(self, batches: Iterable[Batch], served: Served | None) -> None:
        """Attack ``batches``, as learners ask for them, until either ends."""
        stream = iter(batches)
        while (batch := self._read(stream)) is not None:
            weights = self._await_weights()
            if weights is None:
                return
            if not self._skip:
                self._next = self._ask()
            self._attack(self._up_to(batch, stream, weights.tags[2]), weights)
            spans = self._engine.clock.collect().spans
            if served is not None:
                served(weights.tags[2], spans)

    def _ask(self) -> Transfer:
        """Start to receive into the buffer that is not in use."""
        self._buffers.reverse()
        return self._world.receive(self._buffers[0].bytes, self._feeder, self._channels.weights)

    def _read(self, stream: Iterator[Batch]) -> Batch | None:
        with self._engine.clock.phase("data"):
            return next(stream, None)

    def _await_weights(self) -> Message | None:
        """The next weights; None if training has ended."""
        self._world.at("receive", self._engine.version)
        if self._ended is not None:
            return None
        with self._engine.clock.phase("receive"):
            transfer = (
                self._next or self._ask()
            )  # NCCL: the first message on a channel blocks until both sides are there
            transfer.wait()
        self._next = None
        weights = self._buffers[0]
        kind, version, _, _ = weights.tags
        if kind != WORK:
            self._ended, self._engine.stop = kind, version
            return None
        self._engine.version = version
        return weights

    def _up_to(self, batch: Batch, stream: Iterator[Batch], step: int) -> Batch:
        """The batch of ``step``; with "skip", learners leave steps out."""
        while batch.step < step:
            following = self._read(stream)
            if following is None:
                break
            batch = following
        if batch.step != step:
            raise ConadvError(
                f"Attack rank {self._world.rank} was asked for step {step}, but its data goes on with step "
                f"{batch.step}. Its batches must begin `ahead` steps after those of the learners."
            )
        return batch

    def _attack(self, batch: Batch, weights: Message) -> None:
        engine, accumulation = self._engine, weights.tags[3]
        expected = list(self._teams.micro_batches(accumulation))
        found = [micro.index for micro in batch.micro]
        if found != expected:
            raise ConadvError(
                f"Attack rank {self._world.rank} has micro-batches {found}, its share is {expected}."
            )
        attack = engine.method.future_attack
        assert attack is not None
        self._world.at("attack", batch.step)
        with engine.clock.phase("attack"):
            extra = engine.craft(attack, batch, dict(zip(self._names, weights.parts, strict=True)))
        self._world.at("send", batch.step)
        with engine.clock.phase("send"):
            self._send(batch, extra, accumulation)

    def _send(self, batch: Batch, extra: ExtraBatch, accumulation: int) -> None:
        """Each learner gets its micro-batches. What was sent for the step before has left by now, or is waited for."""
        for transfer in self._sent:
            transfer.wait()
            self._engine.clock.add("transfer", transfer.begin, transfer.end, beside=True)
        self._sent.clear()
        by_learner: dict[int, list[int]] = {}
        for place, micro in enumerate(batch.micro):
            by_learner.setdefault(self._teams.learners[micro.index // accumulation], []).append(
                place
            )
        for learner, places in by_learner.items():
            images = [self._engine.pending.encode(extra.images[place]) for place in places]
            message = Message(images, self._engine.device)
            kind = WORK + REQUESTED * (
                self._engine.stop_request() if self._engine.stop_request else 0
            )
            message.fill((kind, self._engine.version, batch.step, accumulation), images)
            self._sent.append(self._world.send(message.bytes, learner, self._channels.images))

    def close(self, failed: bool) -> bool:
        """Wait for the learners' end, unless this side has failed or has seen it."""
        if failed:
            return False
        if self._ended is None and self._await_weights() is not None:
            raise ConadvError(
                f"Attack rank {self._world.rank} was asked for another batch after its last one. Its batches must end "
                "with those of the learners."
            )
        self._world.at("close", self._engine.version)
        for transfer in self._sent:
            transfer.wait()
        return self._ended == STOP
