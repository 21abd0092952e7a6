"""SAM (Foret et al., arXiv 2010.01412, algorithm 1), plain, slow and obvious.

The paper's symbols: w the weights, L_B the loss on the batch B, rho the neighbourhood size,
epsilon^ the excursion. p = 2, as in the paper's experiments: epsilon^(w) = rho grad L_B(w) / |grad
L_B(w)|_2.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sam(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[tuple[Tensor, Tensor]],
    rho: float,
) -> list[float]:
    """Train ``model`` on ``batches``; returns L_B(w) of every step."""
    losses = []
    for x, y in batches:
        loss = F.cross_entropy(model(x), y)
        gradient = torch.autograd.grad(loss, list(model.parameters()))
        gradient = gradient_uphill(model, gradient, x, y, rho)
        for w, g in zip(model.parameters(), gradient, strict=True):
            w.grad = g
        optimizer.step()
        losses.append(loss.item())
    return losses


def gradient_uphill(
    model: nn.Module, gradient: Sequence[Tensor], x: Tensor, y: Tensor, rho: float
) -> tuple[Tensor, ...]:
    """grad L_B(w + epsilon^(w)), on a copy of the model: its running statistics are thrown away."""
    twin = copy.deepcopy(model)
    length = torch.stack([(g**2).sum() for g in gradient]).sum().sqrt()
    with torch.no_grad():
        for w, g in zip(twin.parameters(), gradient, strict=True):
            w.add_(rho * g / length)
    return torch.autograd.grad(F.cross_entropy(twin(x), y), list(twin.parameters()))
