"""An attack rank's side of the exchange with learners: takes weights, attacks, sends images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from conadv.distributed.handle import Handle
from conadv.distributed.message import Message
from conadv.distributed.teams import Teams
from conadv.engine.attack_ranks.messages import STOP, WORK, Channels, Header
from conadv.engine.executors import Served, Step
from conadv.errors import ConadvError
from conadv.types import Batch, ExtraBatch


class Attacker:
    """What :class:`conadv.engine.attack_ranks.executor.Ranks` runs on an attack rank.

    Ranks: nothing is collective; learners decide by their messages what is attacked, and when it
    ends.
    In flight: two copies of the weights, since those of the next step may arrive while the present
    ones are in use, and the images of one step. With ``skip`` weights are asked for only when the
    attack is done: an attack rank that is late should go on with the newest ones.
    """

    def __init__(self, teams: Teams, engine: Step, channels: Channels, skip: bool) -> None:
        self._teams, self._world, self._engine, self._skip = teams, teams.world, engine, skip
        self._channels = channels
        self._feeder = teams.feeder(teams.attackers.index(teams.world.rank))
        weights = list(engine.trainable().values())
        self._buffers = [Message(weights, engine.device) for _ in range(2)]
        self._next: Handle | None = None
        self._sent: list[Handle] = []
        self._end: Header | None = None

    def serve(self, batches: Iterable[Batch], served: Served | None) -> None:
        """Attack ``batches``, as learners ask for them, until either ends."""
        stream = iter(batches)
        while (batch := self._read(stream)) is not None:
            header = self._await_weights()
            if header is None:
                return
            weights = dict(zip(self._engine.trainable(), self._buffers[0].parts, strict=True))
            if not self._skip:
                self._next = self._ask()
            self._attack(self._up_to(batch, stream, header.step), header, weights)
            spans = self._engine.clock.collect().spans
            if served is not None:
                served(header.step, spans)

    def close(self, failed: bool) -> bool:
        """Wait for the learners' end, unless this side has failed or has seen it."""
        if failed:
            return False
        if self._end is None and self._await_weights() is not None:
            raise ConadvError(
                f"Attack rank {self._world.rank} was asked for another batch after its last one. "
                "Its batches must end with those of the learners."
            )
        self._world.at("close", self._engine.version)
        for handle in self._sent:
            handle.wait()
        return self._end is not None and self._end.kind == STOP

    # ---- weights

    def _ask(self) -> Handle:
        """Start to receive into the buffer that is not in use."""
        self._buffers.reverse()
        return self._world.receive(self._buffers[0].bytes, self._feeder, self._channels.weights)

    def _await_weights(self) -> Header | None:
        """Block until the next weights are in the first buffer; None if training has ended."""
        engine = self._engine
        self._world.at("receive", engine.version)
        if self._end is not None:
            return None
        with engine.clock.phase("receive"):
            # NCCL: the first message on a channel blocks until both sides are there, so not before
            (self._next or self._ask()).wait()
        self._next = None
        header = Header.of(self._buffers[0])
        if header.kind != WORK:
            self._end, engine.stop = header, header.request
            return None
        engine.version = header.version
        return header

    # ---- batches

    def _read(self, stream: Iterator[Batch]) -> Batch | None:
        with self._engine.clock.phase("data"):
            return next(stream, None)

    def _up_to(self, batch: Batch, stream: Iterator[Batch], step: int) -> Batch:
        """The batch of ``step``: with ``skip``, learners leave steps out."""
        found: Batch | None = batch
        while found is not None and found.step < step:
            batch, found = found, self._read(stream)
        batch = found or batch
        if batch.step != step:
            raise ConadvError(
                f"Attack rank {self._world.rank} was asked for step {step}, but its data goes on "
                f"with step {batch.step}. Its batches must begin `ahead` steps after the learners'."
            )
        return batch

    # ---- images

    def _attack(self, batch: Batch, header: Header, weights: dict[str, Tensor]) -> None:
        engine = self._engine
        expected = list(self._teams.micro_batches(header.accumulation))
        found = [micro.index for micro in batch.micro]
        if found != expected:
            raise ConadvError(
                f"Attack rank {self._world.rank} has micro-batches {found}, its share is {expected}"
            )
        attack = engine.method.future_attack
        assert attack is not None
        self._world.at("attack", batch.step)
        with engine.clock.phase("attack"):
            extra = engine.attack_batch(attack, batch, weights)
        self._world.at("send", batch.step)
        with engine.clock.phase("send"):
            self._send(batch, extra, header)

    def _send(self, batch: Batch, extra: ExtraBatch, header: Header) -> None:
        """Send each learner its micro-batches, once those of the step before have left."""
        engine = self._engine
        for handle in self._sent:
            handle.wait()
            engine.clock.add("transfer", handle.begin, handle.end, beside=True)
        self._sent.clear()
        by_learner: dict[int, list[Tensor]] = {}
        for micro, images in zip(batch.micro, extra.images, strict=True):
            learner = self._teams.learners[micro.index // header.accumulation]
            by_learner.setdefault(learner, []).append(engine.pending.encode(images))
        request = engine.stop_request.mine()
        for learner, parts in by_learner.items():
            message = Message(parts, engine.device)
            message.fill(header._replace(request=request), parts)
            self._sent.append(self._world.send(message.bytes, learner, self._channels.images))
