"""A learner's side of the exchange with attack ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import ConadvError
from ..types import Batch, ExtraBatch
from .parcel import FAILED, REQUESTED, STOP, WORK, Parcel
from .teams import Lines, Teams, shares
from .transfer import Transfer

if TYPE_CHECKING:
    from .step import TrainStep


@dataclass(frozen=True)
class Incoming:
    """The images of one step on their way: a parcel from each attack rank that has micro-batches of this learner."""

    labels: tuple[Tensor, ...]
    dtype: torch.dtype  # of the images before they were encoded
    parcels: list[tuple[Parcel, Transfer]]

    @property
    def done(self) -> bool:
        return all(transfer.done for _, transfer in self.parcels)

    def wait(self) -> None:
        for _, transfer in self.parcels:
            transfer.wait()


class Learner:
    """Sends weights and takes images, see conadv.engine.ranks."""

    def __init__(self, teams: Teams, engine: TrainStep, lines: Lines, skip: bool) -> None:
        self._teams, self._world, self._engine, self._skip = teams, teams.world, engine, skip
        self._lines = lines
        self._fed = [a for n, a in enumerate(teams.attackers) if teams.feeder(n) == teams.world.rank]
        self._weights = Parcel(list(engine.trainable().values()), engine.device) if self._fed else None
        self._sent: list[Transfer] = []
        self._incoming: dict[int, Incoming] = {}
        self._too_late: list[Incoming] = []

    def begin(self, batch: Batch, future: Batch | None) -> bool:
        """Send weights, take images. Returns whether the step goes without images because they are late."""
        engine, step = self._engine, batch.step
        self._world.at("send", step)
        self._teams.comm.at("send", step)
        with engine.clock.phase("send"):
            busy, late = self._agree(step) if self._skip else (False, False)
            if future is not None and not busy and engine.method.plan.active(future.step):
                self._send(future, len(batch.micro))
            engine.remember()
        self._world.at("receive", step)
        with engine.clock.phase("receive"):
            if late:
                self._drop(step)
            elif step in self._incoming:
                self._take(step)
        return late

    def _agree(self, step: int) -> tuple[bool, bool]:
        """Whether some attack rank still has to take older weights, and whether some images of ``step`` are missing.

        All learners must train on the same views, and ask attack ranks for the same steps. Sync point.
        """
        self._too_late = [incoming for incoming in self._too_late if not incoming.done]
        busy = not all(transfer.done for transfer in self._sent)
        here = step in self._engine.pending or (step in self._incoming and self._incoming[step].done)
        due = step >= self._engine.ahead and self._engine.method.plan.active(step)
        flags = self._teams.comm.any(torch.tensor([busy, due and not here]))
        return bool(flags[0]), bool(flags[1])

    def _send(self, future: Batch, accumulation: int) -> None:
        mine, found = list(self._teams.micro_batches(accumulation)), [micro.index for micro in future.micro]
        if found != mine:
            raise ConadvError(
                f"Rank {self._world.rank} was given micro-batches {found} of the global batch, not {mine}: MicroBatch "
                "says how they are numbered."
            )
        self._send_weights((WORK, self._engine.version, future.step, accumulation))
        self._expect_images(future, accumulation)

    def _send_weights(self, tags: tuple[int, int, int, int]) -> None:
        """One buffer for all: the last weights must have left it. That they have means that nobody is far behind."""
        engine = self._engine
        if self._weights is None:
            return
        for transfer in self._sent:
            transfer.wait()
            engine.clock.add("transfer", transfer.begin, transfer.end, beside=True)
        named = engine.trainable()
        weights = engine.method.attack_weights(engine) or named
        self._weights.fill(tags, [weights[name] for name in named])
        self._sent = self._send_to_all()

    def _send_to_all(self) -> list[Transfer]:
        assert self._weights is not None
        return [self._world.send(self._weights.bytes, attacker, self._lines.weights) for attacker in self._fed]

    def _expect_images(self, future: Batch, accumulation: int) -> None:
        """Buffers for what comes back, ready before anybody sends: a message that is not awaited does not move."""
        engine, attackers, count = self._engine, self._teams.attackers, self._engine.method.plan.count
        images = {micro.index: engine.example(micro)[: count(len(micro.y_N))] for micro in future.micro}
        parcels = []
        for attacker, part in zip(
            attackers, shares(len(self._teams.learners) * accumulation, len(attackers)), strict=True
        ):
            common = [image for index, image in images.items() if index in part]
            if common:
                parcel = Parcel([engine.pending.encoded_like(image) for image in common], engine.device)
                parcels.append((parcel, self._world.receive(parcel.bytes, attacker, self._lines.images)))
        labels = tuple(engine.labels(micro)[: count(len(micro.y_N))] for micro in future.micro)
        self._incoming[future.step] = Incoming(labels, next(iter(images.values())).dtype, parcels)

    def _take(self, step: int) -> None:
        """Move the images of ``step`` to what waits in the engine, blocking until they are here."""
        incoming = self._incoming.pop(step)
        incoming.wait()
        kinds, *tags = zip(*(parcel.tags for parcel, _ in incoming.parcels), strict=True)
        self._engine.hear(max(kinds) // REQUESTED)
        (version,), (made_for,) = map(set, tags[:2])
        assert made_for == step, (made_for, step)
        images = tuple(part for parcel, _ in incoming.parcels for part in parcel.parts)
        self._engine.pending.put(step, ExtraBatch(images, incoming.labels, version), incoming.dtype)

    def _drop(self, step: int) -> None:
        self._engine.pending.skip(step)
        if step in self._incoming:
            self._too_late.append(self._incoming.pop(step))  # the network still writes into its buffers

    def settle(self) -> None:
        """Take everything that is under way, so that the engine's state is complete."""
        self._world.at("receive", self._engine.version)
        for step in sorted(self._incoming):
            self._take(step)

    def close(self, failed: bool) -> bool:
        self._world.at("close", self._engine.version)
        for incoming in (*self._incoming.values(), *self._too_late):
            incoming.wait()
        if self._weights is not None:
            for transfer in self._sent:
                transfer.wait()
            self._weights.fill((FAILED if failed else STOP, 0, 0, 0), [])
            for transfer in self._send_to_all():
                transfer.wait()
        return not failed
