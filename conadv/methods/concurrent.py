"""Concurrent adversarial learning: the attack for a later step beside the gradient."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from conadv.errors import ConadvError
from conadv.methods.base import AttackMethod
from conadv.types import Attack, Batch, Engine, ExtraBatch


@dataclass(frozen=True)
class Concurrent(AttackMethod):
    """L = E[L(theta_t; x)] + E[L(theta_t; x^(theta_{t - tau}))], tau = ``staleness``.

    At step t the batch B_{t + tau} is attacked at theta_t and waits, as images, for its step. With
    ``lookahead`` the attack uses a prediction of theta_{t + tau} instead (see
    conadv.engine.lookahead). A batch that nobody attacked in time, such as the first tau ones, is
    attacked on the critical path at theta_t; its version tag says so.

    Reduces to: ``Sequential`` for staleness 0. Raises ConadvError for look-ahead with staleness 0.
    In flight: up to tau batches of images, and with look-ahead one copy of the weights.

    Source: Liu et al., arXiv 2106.00221, algorithm 1. Look-ahead is our own addition.
    """

    staleness: int = 1
    lookahead: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.staleness, int) or self.staleness < 0:
            raise ConadvError(f"staleness = {self.staleness!r} must be a whole number, 0 or more.")
        if self.lookahead and not self.staleness:
            raise ConadvError("lookahead has no effect with staleness 0: the weights are current.")

    @property
    def ahead(self) -> int:
        return self.staleness

    @property
    def future_attack(self) -> Attack | None:
        return self.attack if self.staleness else None

    def attack_weights(self, engine: Engine) -> Mapping[str, Tensor] | None:
        return engine.predicted_weights(self.staleness) if self.lookahead else None

    def extra_view(self, engine: Engine, batch: Batch) -> ExtraBatch | None:
        waiting = engine.pending.pop(batch.step)
        if engine.pending.skips(batch.step):
            return None  # attack ranks were late, and all learners have agreed to go without
        if waiting is None:
            # The first tau steps find nothing, by definition. Later ones mean a loop that breaks
            # the stream of batches.
            if self.staleness and batch.step >= self.staleness:
                _warn_late()
            return engine.attack_batch(self.attack, batch)
        self._check_same_batch(waiting, engine, batch)
        return waiting

    def prepare(self, engine: Engine, future: Batch | None) -> None:
        if future is not None and self.staleness:
            # Images wait, not weights: a batch is smaller, and its version tag is a measured fact.
            made = engine.attack_batch(self.attack, future, self.attack_weights(engine))
            engine.pending.put(future.step, made)

    def _check_same_batch(self, waiting: ExtraBatch, engine: Engine, batch: Batch) -> None:
        """ConadvError unless the images that wait were made of this batch.

        Labels stand for images: they are small, and two batches of the same labels in the same
        order are rare.
        """
        labels = [
            engine.labels(micro)[: self.num_attacked(len(micro.y_N))] for micro in batch.micro
        ]
        same = len(labels) == len(waiting.labels) and all(map(torch.equal, labels, waiting.labels))
        if not same:
            raise ConadvError(
                f"The adversarial images that wait for step {batch.step} were made of another "
                "batch than the one given. Pass prepare() the batch that comes `ahead` steps later "
                "(conadv.windows does), and call step.pending.clear() when the data changes."
            )


def _warn_late() -> None:
    warnings.warn(
        "A batch was not attacked ahead of time and is attacked at the present weights, on the "
        "critical path. Give every step its future batch: one conadv.windows over all epochs, and "
        "step.prepare in each step.",
        stacklevel=2,
    )
