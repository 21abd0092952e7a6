"""The sequential attack: AdvProp's shape, the paper's "DisAdv"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from conadv.attacks import PixelSpace
from conadv.methods.base import Planned, attack_from_config, gradients_of, space_of
from conadv.types import Attack, Batch, ExtraBatch

if TYPE_CHECKING:
    from conadv.config.schema import Config
    from conadv.engine.step import TrainStep


@dataclass(frozen=True)
class Sequential(Planned):
    """L = E[L(theta_t; x)] + E[L(theta_t; x^(theta_t))]: the attack waits for the weights, the gradient for the attack.

    Source: Xie et al., AdvProp, arXiv 1911.09665, algorithm 1; Liu et al., ConAdv, arXiv 2106.00221 ("DisAdv").
    """

    attack: Attack

    @property
    def space(self) -> PixelSpace | None:
        return space_of(self.attack)

    def attack_gradients(self) -> float:
        return gradients_of(self.attack)

    def extra(self, engine: TrainStep, batch: Batch) -> ExtraBatch | None:
        return engine.craft(self.attack, batch) if self.plan.active(batch.step) else None

    @classmethod
    def from_config(cls, config: Config) -> Sequential:
        return cls(attack_from_config(config))
