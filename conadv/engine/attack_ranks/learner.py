"""A learner's side of the exchange with attack ranks: sends weights, takes images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from conadv.distributed.handle import Handle
from conadv.distributed.message import Message
from conadv.distributed.teams import Teams, shares
from conadv.engine.attack_ranks.failed import FailedRanks
from conadv.engine.attack_ranks.messages import (
    FAILED,
    STOP,
    WORK,
    Channels,
    Header,
    check_micro_batches,
)
from conadv.engine.executors import Step
from conadv.errors import ConadvError
from conadv.types import Batch, ExtraBatch, MicroBatch


@dataclass(frozen=True)
class Arrival:
    """The images of some of this learner's micro-batches, on their way from one attack rank."""

    attacker: int
    indices: Sequence[int]
    message: Message
    handle: Handle


@dataclass(frozen=True)
class Incoming:
    """The images of one step, on their way; ``version``: of the weights that they are made at.

    ``weights``: those weights, kept where attack ranks may fail. ``images``: those that are here,
    by
    micro-batch.
    """

    batch: Batch
    version: int
    arrivals: Sequence[Arrival]
    weights: Mapping[str, Tensor] | None
    images: dict[int, Tensor] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        return all(arrival.handle.done for arrival in self.arrivals)


class Learner:
    """What :class:`conadv.engine.attack_ranks.executor.Ranks` runs on a learner.

    Ranks: with ``skip`` each step is collective over the learners; otherwise nothing is, and
    messages alone keep the ranks in step.
    In flight: one copy of the weights, if this learner sends them, and tau batches of images. Where
    attack ranks may fail, also tau copies of the weights that images were asked for at.
    """

    def __init__(self, teams: Teams, engine: Step, channels: Channels, skip: bool) -> None:
        self._teams, self._world, self._engine, self._skip = teams, teams.world, engine, skip
        self._channels = channels
        self.failed = FailedRanks(teams)
        me = teams.world.rank
        self._fed = [a for number, a in enumerate(teams.attackers) if teams.feeder(number) == me]
        self._names = engine.attack_state().keys()
        self._weights = self._new_weights()
        self._sent: dict[int, Handle] = {}
        self._incoming: dict[int, Incoming] = {}
        self._too_late: list[Incoming] = []  # the network still writes into their buffers

    # ---- called by the executor, in this order

    def begin(self, batch: Batch, future: Batch | None) -> bool:
        """Send weights, take images. Returns whether the step goes without them: they are late."""
        engine, step = self._engine, batch.step
        engine.begin()  # attack ranks, too, see the buffers of the beginning of the step
        self._world.at("send", step)
        with engine.clock.phase("send"):
            busy, late = self._agree(step) if self._skip else (False, False)
            if future is not None and not busy:
                self._request(future, len(batch.micro))
            engine.snapshot()
        self._world.at("receive", step)
        with engine.clock.phase("receive"):
            if late:
                engine.pending.skip(step)
                self._too_late += [self._incoming.pop(step)] if step in self._incoming else []
            arrived = self._await(step)
        self._hand_over(step, arrived)
        return late

    def prepare(self) -> None:
        """Attack, beside the sums, what failed attack ranks were not asked for at this step."""
        for incoming in self._incoming.values():
            if incoming.version == self._engine.version:
                self._attack(incoming, {i for a in incoming.arrivals for i in a.indices})

    def settle(self) -> None:
        """Take everything that is under way, so that the engine's state is complete."""
        self._world.at("receive", self._engine.version)
        for step in sorted(self._incoming):
            self._hand_over(step, self._await(step))

    def close(self, failed: bool) -> bool:
        """Tell the attack ranks that training has ended, with an error if it has ``failed``."""
        self._world.at("close", self._engine.version)
        for incoming in (*self._incoming.values(), *self._too_late):
            for arrival in incoming.arrivals:
                self._is_through(arrival.attacker, arrival.handle)
        self._send(Header(FAILED if failed else STOP, self._engine.stop))
        self._free_weights()
        if self.failed.ranks:
            # Leave without waiting: messages of the failed ranks may still be under way.
            self._world.broken = True
        return not failed

    # ---- late images

    def _agree(self, step: int) -> tuple[bool, bool]:
        """(an attack rank still has to take older weights, images of ``step`` are missing).

        All learners must train on the same views, and ask for the same steps. Sync point.
        """
        self._too_late = [incoming for incoming in self._too_late if not incoming.done]
        incoming = self._incoming.get(step)
        busy = not all(handle.done for handle in self._sent.values())
        here = step in self._engine.pending or (incoming is not None and incoming.done)
        # The first steps were asked of nobody: they attack their own images.
        missing = step >= self._engine.ahead and not here
        flags = self._teams.comm.any(torch.tensor([busy, missing]))
        return bool(flags[0]), bool(flags[1])

    # ---- weights out

    def _request(self, future: Batch, accumulation: int) -> None:
        """Ask for the images of ``future``, at these weights or the look-ahead's prediction."""
        engine = self._engine
        check_micro_batches(self._teams, future, accumulation)
        weights = engine.attack_state()
        if weights.keys() != self._names:
            name = min(weights.keys() ^ self._names)
            raise ConadvError(
                f"The parameter {name!r} was frozen or unfrozen during training. Attack ranks take "
                "the parameters that are trained at the start: train without them, or start again."
            )
        if self._fed or self._teams.may_lose:
            weights |= engine.method.attack_weights(engine) or {}
        self._send(Header(WORK, 0, engine.version, future.step, accumulation), weights)
        self._expect_images(future, accumulation, weights)

    def _send(self, header: Header, weights: Mapping[str, Tensor] | None = None) -> None:
        """Send from the one buffer, which the last weights must have left: no rank falls behind."""
        self._free_weights()
        if self._weights is None:
            return
        self._weights.fill(header, list(weights.values()) if weights else [])
        for attacker in self._fed:
            if attacker not in self.failed.ranks:
                sent = self._world.send(self._weights.bytes, attacker, self._channels.weights)
                self._sent[attacker] = sent

    def _free_weights(self) -> None:
        """Wait until what was sent last has left."""
        for attacker, handle in self._sent.items():
            if self._is_through(attacker, handle):
                self._engine.clock.add("transfer", handle.begin, handle.end, beside=True)
            else:
                self._weights = self._new_weights()  # the network may hold the old buffer
        self._sent = {}

    def _new_weights(self) -> Message | None:
        weights = list(self._engine.attack_state().values())
        return Message(weights, self._engine.device) if self._fed else None

    def _is_through(self, attacker: int, handle: Handle) -> bool:
        return self.failed.is_through(handle, attacker, self._engine.version)

    # ---- images in

    def _expect_images(
        self, future: Batch, accumulation: int, weights: Mapping[str, Tensor]
    ) -> None:
        """Receive before anybody sends: a message that is not awaited does not move."""
        engine, teams, arrivals = self._engine, self._teams, []
        parts = shares(len(teams.learners) * accumulation, len(teams.attackers))
        for attacker, part in zip(teams.attackers, parts, strict=True):
            mine = [micro for micro in future.micro if micro.index in part]
            if mine and attacker not in self.failed.ranks:
                like = [engine.pending.encoded_like(self._example(micro)) for micro in mine]
                message = Message(like, engine.device)
                handle = self._world.receive(message.bytes, attacker, self._channels.images)
                arrivals.append(Arrival(attacker, [m.index for m in mine], message, handle))
        # A copy: by the time that an attack rank turns out to have failed, theta has moved on.
        kept = {name: w.detach().clone() for name, w in weights.items()} if teams.may_lose else None
        # The loader may fill its memory again before the images are here, or have to be made here.
        micros = tuple(
            MicroBatch(
                micro.index,
                micro.y_N.clone(),
                {name: x.clone() if teams.may_lose else x for name, x in micro.views.items()},
            )
            for micro in future.micro
        )
        owned = replace(future, micro=micros)
        self._incoming[future.step] = Incoming(owned, engine.version, arrivals, kept)

    def _example(self, micro: MicroBatch) -> Tensor:
        """A tensor on the meta device like the attacked images of a micro-batch."""
        count = self._engine.method.num_attacked(len(micro.y_N))
        return self._engine.inputs.example(micro)[:count]

    def _await(self, step: int) -> list[Arrival]:
        """Block until the images of ``step`` are here; returns those that are."""
        arrivals = self._incoming[step].arrivals if step in self._incoming else ()
        return [a for a in arrivals if self._is_through(a.attacker, a.handle)]

    def _hand_over(self, step: int, arrived: Sequence[Arrival]) -> None:
        """Move the images of ``step`` to what waits in the engine; make those that are missing."""
        incoming = self._incoming.pop(step, None)
        if incoming is None:
            return
        engine, micros = self._engine, incoming.batch.micro
        for arrival in arrived:
            header = Header.of(arrival.message)
            assert (header.version, header.step) == (incoming.version, step), header
            engine.stop_request.hear(header.request)
            incoming.images.update(zip(arrival.indices, arrival.message.parts, strict=True))
        self._attack(incoming, set())
        # In the order of the batch, whoever made them and whichever came first.
        parts = tuple(incoming.images[micro.index] for micro in micros)
        counts = [engine.method.num_attacked(len(micro.y_N)) for micro in micros]
        labels = tuple(engine.labels(m)[:n] for m, n in zip(micros, counts, strict=True))
        dtype = self._example(micros[0]).dtype
        engine.pending.put(step, ExtraBatch(parts, labels, incoming.version), dtype)

    def _attack(self, incoming: Incoming, awaited: set[int]) -> None:
        """Attack what is neither here nor awaited: the same weights and draws, so the same bits."""
        there = incoming.images.keys() | awaited
        missing = tuple(micro for micro in incoming.batch.micro if micro.index not in there)
        attack = self._engine.method.future_attack
        if missing and attack is not None:
            with self._engine.clock.phase("attack"):
                batch = replace(incoming.batch, micro=missing)
                extra = self._engine.attack_batch(attack, batch, incoming.weights)
            incoming.images.update(zip((m.index for m in missing), extra.images, strict=True))
