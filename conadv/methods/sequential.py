"""The sequential attack: AdvProp's shape, the paper's "DisAdv"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..attacks import PixelSpace
from ..types import Attack, Batch, ExtraBatch
from .base import Method, attack_from_config, num_steps, space_of

if TYPE_CHECKING:
    from ..config import Config
    from ..engine.step import TrainStep


@dataclass(frozen=True)
class Sequential(Method):
    """L = E[L(theta_t; x)] + E[L(theta_t; x^(theta_t))]: the attack waits for the weights, the gradient for the attack.

    Source: Xie et al., AdvProp, arXiv 1911.09665, algorithm 1; Liu et al., ConAdv, arXiv 2106.00221 ("DisAdv").
    """

    attack: Attack

    @property
    def space(self) -> PixelSpace | None:
        return space_of(self.attack)

    def attack_gradients(self) -> int:
        return num_steps(self.attack)

    def extra(self, engine: TrainStep, batch: Batch) -> ExtraBatch:
        return engine.craft(self.attack, batch)

    @classmethod
    def from_config(cls, config: Config) -> Sequential:
        return cls(attack_from_config(config))
