"""An attack rank's side of the exchange with learners: takes weights, attacks, sends images."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from conadv.distributed.handle import Handle
from conadv.distributed.message import Message
from conadv.distributed.teams import Teams
from conadv.engine.attack_ranks.messages import STOP, WORK, Channels, Header, check_micro_batches
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
        state = engine.attack_state()
        self._names = list(state)
        self._buffers = [Message(list(state.values()), engine.device) for _ in range(2)]
        self._next: Handle | None = None
        self._sent: list[Handle] = []
        self._end: Header | None = None

    def serve(self, batches: Iterable[Batch], served: Served | None) -> None:
        """Attack ``batches``, as learners ask for them, until either ends."""
        engine, stream = self._engine, iter(batches)
        while True:
            with engine.clock.phase("data"):
                batch = next(stream, None)
            if batch is None or (header := self._await_weights()) is None:
                return
            weights = dict(zip(self._names, self._buffers[0].parts, strict=True))
            if not self._skip:
                self._next = self._ask()
            with engine.clock.phase("data"):
                while batch is not None and batch.step < header.step:
                    batch = next(stream, None)  # with `skip`, learners leave steps out
            self._attack(batch, header, weights)
            spans = engine.clock.collect().spans
            if served is not None:
                served(header.step, spans)

    def close(self, failed: bool) -> bool:
        """Wait for the learners' end, unless this side has failed or has seen it."""
        if failed:
            return False
        if self._end is None and (header := self._await_weights()) is not None:
            raise self._out_of_step(None, header)
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
            # NCCL: the first message on a channel blocks until both sides are there, so it is
            # awaited here and not at the start.
            (self._next or self._ask()).wait()
        self._next = None
        header = Header.of(self._buffers[0])
        if header.kind != WORK:
            self._end, engine.stop = header, header.request
            return None
        engine.version = header.version
        return header

    # ---- images

    def _attack(self, batch: Batch | None, header: Header, weights: dict[str, Tensor]) -> None:
        engine, attack = self._engine, self._engine.method.future_attack
        if batch is None or batch.step != header.step:
            raise self._out_of_step(batch, header)
        check_micro_batches(self._teams, batch, header.accumulation)
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
        # An attack rank takes part in no sum: a signal that reached it travels with its images.
        request = engine.stop_request.mine()
        for learner, parts in by_learner.items():
            message = Message(parts, engine.device)
            message.fill(header._replace(request=request), parts)
            self._sent.append(self._world.send(message.bytes, learner, self._channels.images))

    def _out_of_step(self, batch: Batch | None, header: Header) -> ConadvError:
        found = "has ended" if batch is None else f"goes on with step {batch.step}"
        return ConadvError(
            f"Attack rank {self._world.rank} was asked for step {header.step}, but its data "
            f"{found}. Its batches must be those of the learners, from `ahead` steps later on."
        )
