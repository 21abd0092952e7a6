"""How far the loss can rise near the weights: along the gradient (SAM) and in a box (Keskar)."""

from __future__ import annotations

import math

import torch

from conadv.analysis.objective import Objective


def sam_sharpness(objective: Objective, rho: float) -> float:
    """L(theta + rho g / |g|) - L(theta), g = dL/dtheta: the rise along one ascent step.

    In units of the loss. ``rho`` > 0: a Euclidean distance in weight space. Zero where g is zero;
    nan or inf where the loss is not finite. Reduces to: rho |g| for small rho.
    Source: Foret et al., arXiv 2010.01412, eq. 2, over all images instead of a batch.
    """
    theta = objective.theta
    loss, gradient = objective.gradient(theta)
    length = gradient.norm()
    if not length:
        return 0.0
    return objective.value(theta + (rho / length) * gradient).loss - loss


def keskar_sharpness(objective: Objective, eps: float, num_steps: int = 10) -> float:
    """100 (max L(theta + delta) - L) / (1 + L) over the box |delta_i| <= eps (|theta_i| + 1).

    ``eps`` > 0, 1e-3 and 5e-4 in the paper. The maximum is sought in the full space by
    ``num_steps`` >= 1 steps of projected gradient ascent from delta = 0, along the gradient's sign,
    each 2.5 / num_steps of the box's half width; the largest loss on the way counts. So it is a
    lower bound of the maximum, never below 0; inf where the loss overflows.
    Source: Keskar et al., arXiv 1609.04836, metric 2.1 with A = I (they use 10 steps of L-BFGS-B).
    """
    theta = objective.theta
    half_width = eps * (theta.abs() + 1)
    loss, gradient = objective.gradient(theta)
    best, delta = loss, torch.zeros_like(theta)
    for left in reversed(range(num_steps)):
        delta += (2.5 / num_steps) * half_width * gradient.sign()
        delta = delta.clamp(-half_width, half_width)
        if left:
            reached, gradient = objective.gradient(theta + delta)
        else:  # the last point needs no gradient
            reached = objective.value(theta + delta).loss
        best = max(best, math.inf if math.isnan(reached) else reached)
    return 100 * (best - loss) / (1 + loss)
