"""The loss along random directions that are scaled to the weights' filters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from conadv.analysis.objective import Objective, Value
from conadv.errors import ConadvError


def filter_normalised(objective: Objective, generator: torch.Generator) -> Tensor:
    """A random direction d in weight space (P), each filter as long as the model's own: d <- d / |d| * |w|.

    A filter is what makes one output: index 0 of a weight with two or more dimensions (a row of a linear layer).
    Batch-norm parameters and biases, which have one dimension, get zero. ``generator`` (CPU) draws normal numbers in
    float32, so that one seed gives runs of the same architecture directions of the same origin.

    Source: Li et al., "Visualizing the Loss Landscape of Neural Nets", arXiv 1712.09913, section 4.
    """
    pieces = []
    for weight in objective.model.parameters():
        draw = torch.randn(weight.shape, generator=generator).to(weight)
        if weight.dim() < 2:
            draw = torch.zeros_like(draw)
        else:
            w, d = weight.detach().flatten(1), draw.flatten(1)
            tiny = torch.finfo(d.dtype).tiny
            draw = d * (w.norm(dim=1) / d.norm(dim=1).clamp_min(tiny))[:, None]
        pieces.append(draw.reshape(-1))
    return torch.cat(pieces)


@dataclass(frozen=True)
class Line:
    """Values at theta + alpha d for every alpha, on training and on test images."""

    alphas: list[float]
    train: list[Value]
    test: list[Value]


@dataclass(frozen=True)
class Plane:
    """loss[i][j]: training loss at theta + alphas[j] d_1 + betas[i] d_2."""

    alphas: list[float]
    betas: list[float]
    loss: list[list[float]]


def line(train: Objective, test: Objective, direction: Tensor, alphas: Sequence[float]) -> Line:
    """Loss and accuracy along one direction (alpha 1 moves every filter by its own length).

    ``train``, ``test``: the same model on training and on test images. Losses far away may be inf or nan.
    """
    theta = train.theta
    points = [theta + alpha * direction for alpha in alphas]
    return Line(
        list(alphas),
        [train.value(point) for point in points],
        [test.value(point) for point in points],
    )


def plane(objective: Objective, first: Tensor, second: Tensor, alphas: Sequence[float]) -> Plane:
    """The loss on a square grid spanned by two directions."""
    theta = objective.theta
    rows = [[objective.value(theta + a * first + b * second).loss for a in alphas] for b in alphas]
    return Plane(list(alphas), list(alphas), rows)


def grid(points: int, reach: float = 1.0) -> list[float]:
    """``points`` numbers from -reach to reach, evenly spaced, 0 among them. ConadvError unless odd and 3 or more."""
    if points < 3 or points % 2 == 0:
        raise ConadvError(
            f"A grid of {points} points: choose an odd number, 3 or more, so that 0 is one of them."
        )
    half = points // 2
    return [reach * i / half for i in range(-half, half + 1)]
