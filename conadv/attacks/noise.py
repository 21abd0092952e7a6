"""Random signs: the control that has the attack's size and none of its knowledge."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from conadv.attacks.space import PixelSpace, pixel_size
from conadv.types import Forward


@dataclass(frozen=True)
class RandomSigns:
    """x + eps * s, s = -1 or +1 at random, clipped to valid pixels; calls no ``forward``."""

    num_steps: ClassVar[int] = 0  # input gradients of an image, as in the attacks
    eps: float
    space: PixelSpace = field(default=PixelSpace())

    def __post_init__(self) -> None:
        object.__setattr__(self, "eps", pixel_size("eps", self.eps, "linf"))

    def __call__(
        self, forward: Forward, x_NCHW: Tensor, y_N: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Perturbed images like ``x_NCHW``."""
        x = self.space.checked(x_NCHW)
        # Drawn as bytes: a quarter of the memory of floats, and every value takes one draw.
        coins = torch.randint(0, 2, x.shape, generator=generator, device=x.device, dtype=torch.int8)
        signs = coins.to(x.dtype).mul_(2).sub_(1)
        moved = self.space.ascend(x, signs, self.eps, "linf")
        return self.space.project(moved, x, self.eps, "linf")
