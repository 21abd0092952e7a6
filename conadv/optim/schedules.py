"""Schedules: pure functions of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from conadv.errors import ConadvError


@dataclass(frozen=True)
class WarmupDecay:
    """Linear warm-up to ``peak``, then decay to ``end`` at step ``total_steps``.

    Warm-up: lr(t) = peak (t + 1) / warmup_steps, so that no step is lost at lr 0; step
    warmup_steps - 1 has the peak.
    Decay, with s = (t - warmup_steps) / (total_steps - warmup_steps) in [0, 1]:
    polynomial: end + (peak - end) (1 - s)^power; cosine: end + (peak - end) (1 + cos(pi s)) / 2;
    constant: peak. After ``total_steps``: end (constant: peak). Steps count from 0.

    Source: Goyal et al. 2017, arXiv 1706.02677 (warm-up); You et al. 2017, arXiv 1708.03888
    (polynomial, power 2); Loshchilov and Hutter 2017, arXiv 1608.03983 (cosine).
    """

    peak: float
    total_steps: int
    warmup_steps: int = 0
    decay: Literal["polynomial", "cosine", "constant"] = "polynomial"
    power: float = 2.0
    end: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_steps <= self.total_steps:
            raise ConadvError(
                f"The warm-up of {self.warmup_steps} steps does not fit into {self.total_steps} "
                "steps. Shorten schedule.warmup_epochs or train longer."
            )
        if self.decay != "constant" and self.end > self.peak:
            raise ConadvError(f"end_lr {self.end:g} is above the peak {self.peak:g}.")

    def phase(self, step: int) -> str:
        """ "warm-up"; "peak" while the rate is at least half of ``peak``; then "decay"."""
        if step < self.warmup_steps:
            return "warm-up"
        return "peak" if self(step) >= self.peak / 2 else "decay"

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.decay == "constant":
            return self.peak
        # Beyond the end it stays there: a resumed run may ask for one step more.
        s = min((step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1), 1.0)
        shape = (
            (1 - s) ** self.power if self.decay == "polynomial" else (1 + math.cos(math.pi * s)) / 2
        )
        return self.end + (self.peak - self.end) * shape
