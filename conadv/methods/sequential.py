"""The sequential attack: AdvProp's shape, the paper's "DisAdv"."""

from __future__ import annotations

from dataclasses import dataclass

from conadv.methods.base import AttackMethod
from conadv.types import Batch, Engine, ExtraBatch


@dataclass(frozen=True)
class Sequential(AttackMethod):
    """L = E[L(theta_t; x)] + E[L(theta_t; x^(theta_t))]: one waits for the other.

    Source: Xie et al., AdvProp, arXiv 1911.09665, algorithm 1; Liu et al., ConAdv, arXiv 2106.00221
    ("DisAdv").
    """

    def extra_view(self, engine: Engine, batch: Batch) -> ExtraBatch | None:
        return engine.attack_batch(self.attack, batch)
