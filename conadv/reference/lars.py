"""LARS line by line: slow, obvious, and what the tests hold :class:`conadv.LARS` against.

Symbols: w weights, g gradient, v momentum buffer, gamma learning rate, m momentum, beta weight
decay, eta trust coefficient, r trust ratio (arXiv 1708.03888, Algorithm 1; there r is called lambda
and stands inside v, as in "tf").
"""

from __future__ import annotations

from torch import Tensor


def lars_step(
    weights: list[Tensor],
    gradients: list[Tensor],
    buffers: list[Tensor],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    trust_coefficient: float,
    eps: float,
    variant: str,
    adapt: bool = True,
) -> tuple[list[Tensor], list[Tensor]]:
    """One update; returns new weights and buffers, which start as zeros."""
    new_weights, new_buffers = [], []
    gamma, m, beta = lr, momentum, weight_decay
    for w, g, v in zip(weights, gradients, buffers, strict=True):
        r = _trust_ratio(w, g, lr, beta, trust_coefficient, eps, variant) if adapt else 1.0
        decayed = g + beta * w
        if variant in ("tf", "no-wd-ratio"):
            v = m * v + gamma * r * decayed
            w = w - v
        elif variant in ("timm", "larc"):
            v = m * v + r * decayed
            w = w - gamma * v
        elif variant == "nus":
            v = m * v + decayed.clamp(-10, 10)
            w = w - gamma * r * v
        new_weights.append(w)
        new_buffers.append(v)
    return new_weights, new_buffers


def _trust_ratio(
    w: Tensor, g: Tensor, gamma: float, beta: float, eta: float, eps: float, variant: str
) -> float:
    w_norm = w.square().sum().sqrt().item()
    g_norm = g.square().sum().sqrt().item()
    if w_norm == 0 or g_norm == 0:
        return 1.0
    r = (
        eta * w_norm / (g_norm + eps)
        if variant == "no-wd-ratio"
        else eta * w_norm / (g_norm + beta * w_norm + eps)
    )
    if variant == "larc":
        return 1.0 if r >= gamma else r / gamma
    if variant == "nus":
        return min(r, 50.0)
    return r
