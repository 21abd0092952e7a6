"""Projected gradient descent."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from conadv.attacks.loss import Loss, raised
from conadv.attacks.space import Norm, PixelSpace, as_number, pixel_size
from conadv.attacks.targets import targets, trained_loss
from conadv.errors import ConadvError
from conadv.types import Forward


@dataclass(frozen=True)
class PGD:
    """x_{k+1} = Project(x_k + step_size * direction(grad_x L(x_k, y))), k = 0 .. num_steps - 1.

    ``eps``, ``step_size``: [0, 1] pixel units, as numbers or text ("4/255"); step_size None: eps
    for one step, 2.5 eps / num_steps for more.
    ``norm``: "linf" or "l2". ``targeted``: descend towards a random other class. ``random_start``:
    probability, for each image, of starting from a random point of the ball instead of the image.
    ``space``: the model's normalisation; attacks clip to valid pixels, not to a fixed interval of
    normalised values. ``loss``: what the attack ascends; default: the loss that the engine trains,
    and cross-entropy where the forward is a plain model.

    Costs ``num_steps`` input-only forward-backward passes. Raises ConadvError for values out of
    range.
    Reduces to: FGSM for num_steps = 1 and random_start = 0; the identity for eps = 0.

    Source: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", arXiv
    1706.06083, eq. 2.2.
    """

    eps: float
    num_steps: int = 10
    step_size: float | None = None
    norm: Norm = "linf"
    targeted: bool = False
    random_start: float = 0.0
    space: PixelSpace = field(default=PixelSpace())
    loss: Loss | None = None

    def __post_init__(self) -> None:
        if isinstance(self.num_steps, bool) or not isinstance(self.num_steps, int):
            raise ConadvError(f"num_steps = {self.num_steps!r} must be a whole number.")
        if self.num_steps < 1:
            raise ConadvError(f"num_steps = {self.num_steps} must be 1 or more.")
        if not 0 <= as_number("random_start", self.random_start) <= 1:
            raise ConadvError(f"random_start = {self.random_start} is a probability in [0, 1].")
        eps = pixel_size("eps", self.eps, self.norm)
        # 2.5 eps in all: steps can reach the ball's edge from anywhere in it, and walk on it.
        step = eps if self.num_steps == 1 else 2.5 / self.num_steps * eps
        if self.step_size is not None:
            step = pixel_size("step_size", self.step_size, self.norm)
        object.__setattr__(self, "eps", eps)
        object.__setattr__(self, "step_size", step)

    def __call__(
        self, forward: Forward, x_NCHW: Tensor, y_N: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Adversarial images like ``x_NCHW``; parameters get no gradient."""
        assert self.step_size is not None
        # Steps in half precision would round eps away.
        origin, loss = raised(self.space.checked(x_NCHW)), trained_loss(forward, self.loss)
        aim_N, sign = y_N, 1
        x = self._start(origin, generator)
        for _ in range(self.num_steps):
            x.requires_grad_()
            with torch.enable_grad():
                output = forward(x.to(x_NCHW.dtype))
                if self.targeted and sign == 1:
                    # Drawn once, in the first step: only the logits know the number of classes.
                    aim_N, sign = targets(loss, output, y_N, generator), -1
                # Not backward(): that would leave gradients in the parameters.
                (gradient,) = torch.autograd.grad(sign * loss.total(output, aim_N), x)
            with torch.no_grad():
                x = self.space.ascend(x.detach(), gradient, self.step_size, self.norm)
                x = self.space.project(x, origin, self.eps, self.norm)
        return x.to(x_NCHW.dtype)

    def _start(self, origin: Tensor, generator: torch.Generator) -> Tensor:
        if not self.random_start:
            return origin.clone()
        # A coin per image, not per batch: clean and random starts are mixed in every batch.
        coins = torch.rand(len(origin), generator=generator, device=origin.device)
        chosen = coins < self.random_start
        start = self.space.random_start(origin, self.eps, self.norm, generator)
        return torch.where(chosen.view(-1, *[1] * (origin.dim() - 1)), start, origin)
