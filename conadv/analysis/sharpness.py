"""How much the loss can rise near the weights: SAM's measure along the gradient, Keskar's in a box."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from conadv.analysis.objective import Objective
from conadv.errors import ConadvError


def sam_sharpness(objective: Objective, rho: float) -> float:
    """L(theta + rho g / |g|) - L(theta), g the gradient of L at theta: the rise along one ascent step of length rho.

    In units of the loss. rho is a Euclidean distance in weight space, above 0. Zero where the gradient is zero. nan or
    inf where the loss is not finite there.
    Reduces to: rho |g| for small rho.

    Source: Foret et al., "Sharpness-Aware Minimization", arXiv 2010.01412, eq. 2, over all images instead of a batch.
    """
    _check("rho", rho)
    theta = objective.theta
    loss, gradient = objective.gradient(theta)
    length = gradient.norm()
    if not length:
        return 0.0
    return objective.value(theta + (rho / length) * gradient).loss - loss


def keskar_sharpness(objective: Objective, eps: float, num_steps: int = 10) -> float:
    """100 (max L(theta + delta) - L) / (1 + L) over the box |delta_i| <= eps (|theta_i| + 1), in percent.

    eps is relative to the weights' size, above 0 (1e-3 and 5e-4 in the paper). The maximum is sought in the full space
    by projected gradient ascent from delta = 0: ``num_steps`` steps along the gradient's sign, each 2.5 / num_steps of
    the box's half width per weight; the largest loss on the way counts. So it is a lower bound of the maximum, never
    below 0. inf where the loss overflows.

    Source: Keskar et al., "On Large-Batch Training for Deep Learning", arXiv 1609.04836, metric 2.1 with A = I (they
    maximise by 10 iterations of L-BFGS-B).
    """
    _check("eps", eps)
    if num_steps < 1:
        raise ConadvError(f"num_steps = {num_steps} must be 1 or more.")
    theta = objective.theta
    half_width = eps * (theta.abs() + 1)
    loss, gradient = objective.gradient(theta)
    best, delta = loss, torch.zeros_like(theta)
    for step in range(num_steps):
        delta = _clamp(delta + (2.5 / num_steps) * half_width * gradient.sign(), half_width)
        last = step + 1 == num_steps
        reached, gradient = (
            (objective.value(theta + delta).loss, gradient)
            if last
            else objective.gradient(theta + delta)
        )
        best = max(best, math.inf if math.isnan(reached) else reached)
    return 100 * (best - loss) / (1 + loss)


def _clamp(delta: Tensor, half_width: Tensor) -> Tensor:
    return torch.clamp(delta, -half_width, half_width)


def _check(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ConadvError(f"{name} = {value} must be a number above 0.")
