"""Sharpness-aware minimisation: the gradient at the worst weights nearby, clean images only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from conadv.errors import ConadvError
from conadv.methods.base import Method


@dataclass(frozen=True)
class SAM(Method):
    """The update of step t takes the gradient at theta_t + rho g / |g|, where g is the gradient at theta_t.

    ``rho``: the length of the excursion, over all parameters together. Recorded losses are those at theta_t, the recorded norm is that of the gradient applied.
    Batch norm normalises both passes by the batch; running statistics move in the first pass only, since evaluation
    uses theta and not the weights uphill.

    Ranks: g is the gradient of the whole global batch, so N ranks compute what one does. The original takes each
    device's own (m-sharpness with m images per device), which depends on the number of devices.
    In flight: one copy of the weights during the second pass. Costs two gradients in each step.
    Reduces to: ``Vanilla`` for rho = 0 (which is refused). Raises ConadvError for values out of range.

    Source: Foret et al., "Sharpness-Aware Minimization", arXiv 2010.01412, equation 2 and algorithm 1.
    """

    rho: float = 0.05
    route: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        if not 0 < self.rho < float("inf"):
            raise ConadvError(
                f"sam_rho = {self.rho} must be above 0. Use the method vanilla for plain gradients."
            )

    @property
    def ascent_radius(self) -> float:
        return self.rho
