"""Concurrent adversarial learning: the attack of step t + tau runs beside the gradient of step t."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..attacks import PixelSpace
from ..errors import ConadvError
from ..types import Attack, Batch, ExtraBatch
from .base import Method, attack_from_config, num_steps, space_of

if TYPE_CHECKING:
    from ..config import Config
    from ..engine.step import TrainStep


@dataclass(frozen=True)
class Concurrent(Method):
    """L = E[L(theta_t; x)] + E[L(theta_t; x^(theta_{t - tau}))], tau = ``staleness``.

    At step t the batch B_{t + tau} is attacked at theta_t and waits, as images, for its step. With ``lookahead`` the
    attack uses a prediction of theta_{t + tau} instead (see conadv.engine.lookahead). A batch that nobody attacked in
    time, such as the first tau ones, is attacked on the critical path at theta_t; its version tag says so.

    Reduces to: ``Sequential`` for staleness 0. Raises ConadvError for look-ahead with staleness 0.
    In flight: up to tau batches of images, and with look-ahead one copy of the weights.

    Source: Liu et al., arXiv 2106.00221, algorithm 1. Look-ahead is our own addition.
    """

    attack: Attack
    staleness: int = 1
    lookahead: bool = False

    def __post_init__(self) -> None:
        if self.staleness < 0:
            raise ConadvError(f"staleness = {self.staleness} must be 0 or more.")
        if self.lookahead and not self.staleness:
            raise ConadvError("lookahead has no effect with staleness 0: the weights are current.")

    @property
    def ahead(self) -> int:
        return self.staleness

    @property
    def space(self) -> PixelSpace | None:
        return space_of(self.attack)

    def attack_gradients(self) -> int:
        return num_steps(self.attack)

    def extra(self, engine: TrainStep, batch: Batch) -> ExtraBatch:
        return engine.pending.pop(batch.step) or engine.craft(self.attack, batch)

    def prepare(self, engine: TrainStep, future: Batch | None) -> None:
        if future is None or not self.staleness:
            return
        weights = engine.predicted_weights(self.staleness) if self.lookahead else None
        engine.pending.put(future.step, engine.craft(self.attack, future, weights))

    @classmethod
    def from_config(cls, config: Config) -> Concurrent:
        assert config.staleness is not None
        return cls(attack_from_config(config), config.staleness, bool(config.lookahead))
