"""The fast gradient sign method."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from conadv.attacks.loss import Loss, raised
from conadv.attacks.pgd import PGD
from conadv.attacks.space import Norm, PixelSpace, pixel_size
from conadv.types import Forward


@dataclass(frozen=True)
class FGSM:
    """x + eps * sign(grad_x L(x, y)), clipped to valid pixels: one input-only gradient.

    Arguments as in :class:`PGD`; the l2 form moves by eps along the normalised gradient.

    Source: Goodfellow et al., "Explaining and Harnessing Adversarial Examples", arXiv 1412.6572,
    section 4.
    """

    eps: float
    norm: Norm = "linf"
    targeted: bool = False
    space: PixelSpace = field(default=PixelSpace())
    loss: Loss | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "eps", pixel_size("eps", self.eps, self.norm))

    def __call__(
        self, forward: Forward, x_NCHW: Tensor, y_N: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Adversarial images like ``x_NCHW``."""
        # One step of PGD without a random start is FGSM, in the same bits.
        attack = PGD(self.eps, 1, self.eps, self.norm, self.targeted, 0.0, self.space, self.loss)
        return attack(forward, x_NCHW, y_N, generator)

    def from_gradient(self, x_NCHW: Tensor, gradient: Tensor) -> Tensor:
        """The perturbed images for an input gradient that is already there (method recycle)."""
        origin = raised(x_NCHW.detach())
        x = self.space.ascend(origin, raised(gradient), self.eps, self.norm)
        return self.space.project(x, origin, self.eps, self.norm).to(x_NCHW.dtype)
