"""The training objective as a function of the weights: what sharpness, Hessian and landscape are properties of."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from conadv.attacks.space import PixelSpace
from conadv.errors import ConadvError
from conadv.nn import split_batchnorm as norm

Tick = Callable[[float], None]
"""Hears of work done, in forward passes of one image."""

GRADIENT, HVP = 3.5, 13.0
"""Cost of a gradient and of a Hessian-vector product in forward passes: a small ResNet on one CPU core."""


class Value(NamedTuple):
    """Mean cross-entropy and accuracy in [0, 1]."""

    loss: float
    accuracy: float


def _ignore(work: float) -> None:
    return None


@dataclass(frozen=True)
class Objective:
    """L(theta) = mean over the images of the cross-entropy, as a function of the flat weight vector theta (P).

    Made by :func:`clean_objective`: ``model`` is a plain copy of the clean route in eval mode, so batch norm uses its
    running statistics, which do not move with theta, and L is a smooth function that does not depend on how the
    images are cut into chunks. No label smoothing, no weight decay.

    ``x_NCHW`` uint8 pixels (or floats in model space), ``y_N`` labels; ``chunk`` images go through the model at a
    time. theta and all vectors are 1-D tensors of the model's dtype on its device, in the order of ``parameters()``.
    ``tick`` hears of the work done. Every method is pure: the copy's own weights never change.

    Ranks: one process; nothing is reduced.
    """

    model: nn.Module
    x_NCHW: Tensor
    y_N: Tensor
    space: PixelSpace
    chunk: int = 125
    tick: Tick = field(default=_ignore, compare=False)

    @property
    def theta(self) -> Tensor:
        """The weights that the run has."""
        return torch.cat([p.detach().reshape(-1) for p in self.model.parameters()])

    @property
    def images(self) -> int:
        return len(self.y_N)

    def on(self, x_NCHW: Tensor, y_N: Tensor) -> Objective:
        """The same model on other images."""
        return replace(self, x_NCHW=x_NCHW, y_N=y_N)

    @torch.no_grad()
    def value(self, theta: Tensor) -> Value:
        """Loss and accuracy at theta. A sync point."""
        weights, loss, correct = self.named(theta), 0.0, 0
        for x, y in self._chunks():
            logits_NK = self._logits(weights, x)
            loss += float(F.cross_entropy(logits_NK, y, reduction="sum"))
            correct += int((logits_NK.argmax(1) == y).sum())
            self.tick(len(y))
        return Value(loss / self.images, correct / self.images)

    def gradient(self, theta: Tensor) -> tuple[float, Tensor]:
        """(L(theta), dL/dtheta). A sync point."""
        loss, total = 0.0, torch.zeros_like(theta)
        for x, y in self._chunks():
            leaf = theta.detach().requires_grad_()
            part = self._mean_loss(leaf, x, y)
            (gradient,) = torch.autograd.grad(part, leaf)
            loss, total = loss + float(part.detach()), total.add_(gradient)
            self.tick(GRADIENT * len(y))
        return loss, total

    def hvp(self, theta: Tensor, vector: Tensor) -> Tensor:
        """H v, H the Hessian of L at theta, by double backward: the gradient of (dL/dtheta . v).

        Memory: the graph of one chunk's gradient. Source: Pearlmutter 1994.
        """
        total = torch.zeros_like(theta)
        for x, y in self._chunks():
            leaf = theta.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self._mean_loss(leaf, x, y), leaf, create_graph=True)
            total.add_(torch.autograd.grad(gradient @ vector, leaf)[0])
            self.tick(HVP * len(y))
        return total

    def _mean_loss(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """This chunk's part of L."""
        logits_NK = self._logits(self.named(theta), x)
        return F.cross_entropy(logits_NK, y, reduction="sum") / self.images

    def _logits(self, weights: dict[str, Tensor], x: Tensor) -> Tensor:
        # float64 logits cost nothing and keep the rounding of the loss far below what its differences measure
        logits: Tensor = functional_call(self.model, weights, (x,)).double()
        return logits

    def named(self, theta: Tensor) -> dict[str, Tensor]:
        """theta in pieces: the parameters' names and shapes."""
        names, like = zip(*self.model.named_parameters(), strict=True)
        pieces = theta.split([p.numel() for p in like])
        return {
            name: piece.view(p.shape) for name, piece, p in zip(names, pieces, like, strict=True)
        }

    def _chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        like = next(self.model.parameters())
        for x, y in zip(self.x_NCHW.split(self.chunk), self.y_N.split(self.chunk), strict=True):
            pixels = x.dtype == torch.uint8
            x = x.to(like.device, like.dtype)
            yield self.space.normalize(x / 255) if pixels else x, y.to(like.device)


def clean_objective(
    model: nn.Module,
    x_NCHW: Tensor,
    y_N: Tensor,
    space: PixelSpace | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    chunk: int = 125,
    tick: Tick = _ignore,
) -> Objective:
    """The objective of the model's clean route on these images, in ``dtype``.

    Works on a copy: parameters, buffers, modes, requires_grad and .grad of ``model`` stay as they are. theta holds all
    parameters of the clean route, also frozen ones, and none of the extra routes', which the clean loss does not
    depend on: so a model trained with and one trained without an adversarial route have the same weight space.

    ``space``: the normalisation, for uint8 images. Raises ConadvError without images or without weights, and for a
    loss that is not finite at the model's own weights.
    """
    plain = norm.strip(copy.deepcopy(model)).eval().to(dtype)
    if not len(y_N) or not any(True for _ in plain.parameters()):
        raise ConadvError("The analysis needs at least one image and a model with weights.")
    for parameter in plain.parameters():
        parameter.grad = None
    found = Objective(plain, x_NCHW, y_N, space or PixelSpace(), chunk, tick)
    loss = found.value(found.theta).loss
    if not math.isfinite(loss):
        raise ConadvError(f"The loss of the trained model is {loss}: there is nothing to analyse.")
    return found
