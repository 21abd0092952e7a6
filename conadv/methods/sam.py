"""Sharpness-aware minimisation: the gradient at the worst weights nearby, clean images only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from conadv.errors import ConadvError
from conadv.types import Engine, Method


@dataclass(frozen=True)
class SAM(Method):
    """The update takes the gradient at theta_t + rho g / |g|, g the gradient at theta_t.

    ``rho``: the length of the excursion, over all parameters together. Recorded losses are those at
    theta_t, the recorded norm is that of the gradient applied. Batch norm normalises both passes by
    the batch; running statistics move in the first pass only, since evaluation uses theta and not
    the weights uphill.

    Ranks: g is the gradient of the whole global batch, so N ranks compute what one does. The
    original takes each device's own (m-sharpness with m images per device), which depends on the
    number of devices.
    In flight: one copy of the weights during the second pass. Costs two gradients in each step.
    Reduces to: ``Vanilla`` for rho = 0 (which is refused). Raises ConadvError for a value out of
    range.

    Source: Foret et al., "Sharpness-Aware Minimization", arXiv 2010.01412, equation 2 and algorithm
    1.
    """

    rho: float = 0.05
    route: ClassVar[str | None] = None
    two_gradients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.rho < float("inf"):
            raise ConadvError(
                f"sam_rho = {self.rho} must be above 0. Use the method vanilla for plain gradients."
            )

    @torch.no_grad()
    def second_gradient(self, engine: Engine, norm: Tensor, again: Callable[[], None]) -> None:
        """Take the gradient uphill; leaves theta with the bits that it had."""
        params = [p for p in engine.trainable().values() if p.grad is not None]
        uphill = [p.grad for p in params if p.grad is not None]
        # A copy, not a subtraction at the end: theta + e - e is theta only up to rounding.
        kept = [p.clone() for p in params]
        torch._foreach_mul_(uphill, self.rho / norm.clamp_min(1e-12))
        torch._foreach_add_(params, uphill)
        for p in params:
            p.grad = None
        try:
            again()
        finally:  # gradients may still be on the network, but nothing needs these weights any more
            torch._foreach_copy_(params, kept)
