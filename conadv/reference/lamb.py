"""LAMB line by line: slow, obvious, and what the tests hold :class:`conadv.LAMB` against.

Symbols: x weights, g gradient, m and v first and second moment, t the update counted from 1, r
Adam's ratio, eta the learning rate, lambda weight decay (arXiv 1904.00962, Algorithm 2, with phi(z)
= z).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LambState:
    """m and v of one tensor and t, the number of updates done. Starts as zeros and 0."""

    m: Tensor
    v: Tensor
    t: int


def lamb_step(
    weights: list[Tensor],
    gradients: list[Tensor],
    states: list[LambState],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    adapt: bool = True,
) -> tuple[list[Tensor], list[LambState]]:
    """One update; returns new weights and new states and changes nothing."""
    beta1, beta2 = betas
    new_weights, new_states = [], []
    for x, g, state in zip(weights, gradients, states, strict=True):
        t = state.t + 1
        m = beta1 * state.m + (1 - beta1) * g
        v = beta2 * state.v + (1 - beta2) * g * g
        m_hat = m / (1 - beta1**t)
        v_hat = v / (1 - beta2**t)
        r = m_hat / (v_hat.sqrt() + eps)
        update = r + weight_decay * x
        new_weights.append(x - lr * (_ratio(x, update) if adapt else 1.0) * update)
        new_states.append(LambState(m, v, t))
    return new_weights, new_states


def _ratio(x: Tensor, update: Tensor) -> float:
    x_norm = x.square().sum().sqrt().item()
    update_norm = update.square().sum().sqrt().item()
    if x_norm == 0 or update_norm == 0:
        return 1.0
    return x_norm / update_norm
