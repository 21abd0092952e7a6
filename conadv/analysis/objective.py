"""The training loss as a function of the weights: what sharpness, Hessian and landscape measure."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector

from conadv.attacks.space import PixelSpace
from conadv.errors import ConadvError
from conadv.nn import split_batchnorm as norm


class Value(NamedTuple):
    """Mean cross-entropy and accuracy in [0, 1]."""

    loss: float
    accuracy: float


@dataclass(frozen=True)
class Objective:
    """L(theta): the mean cross-entropy over the images as a function of flat weights theta (P).

    Made by :func:`clean_objective`. ``model`` is a plain copy of the clean route in eval mode:
    batch norm uses its running statistics, so L is smooth and does not depend on how the images are
    cut into chunks. No label smoothing, no weight decay. Every method leaves the copy's weights
    alone.

    ``x_NCHW``: uint8 pixels, or floats in model space. ``chunk``: images in one forward pass.
    Vectors are 1-D, in the model's dtype, on its device, in the order of ``parameters()``.
    Ranks: one process; nothing is reduced.
    """

    model: nn.Module
    x_NCHW: Tensor
    y_N: Tensor
    space: PixelSpace
    chunk: int = 125

    @property
    def theta(self) -> Tensor:
        """The trained weights."""
        return parameters_to_vector(self.model.parameters()).detach()

    @torch.no_grad()
    def value(self, theta: Tensor) -> Value:
        """Loss and accuracy at theta. A sync point."""
        loss, correct = 0.0, 0
        for x, y in self:
            logits_NK = self._logits(theta, x)
            loss += float(F.cross_entropy(logits_NK, y, reduction="sum"))
            correct += int((logits_NK.argmax(1) == y).sum())
        return Value(loss / len(self.y_N), correct / len(self.y_N))

    def gradient(self, theta: Tensor) -> tuple[float, Tensor]:
        """(L(theta), dL/dtheta). A sync point."""
        loss, total = 0.0, torch.zeros_like(theta)
        for x, y in self:
            leaf = theta.detach().requires_grad_()
            part = self.part(leaf, x, y)
            total += torch.autograd.grad(part, leaf)[0]
            loss += float(part.detach())
        return loss, total

    def part(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """What a chunk adds to L: no mean of its own, since the last chunk may be smaller."""
        return F.cross_entropy(self._logits(theta, x), y, reduction="sum") / len(self.y_N)

    def named(self, theta: Tensor) -> dict[str, Tensor]:
        """theta by parameter name, in the parameters' shapes."""
        names, like = zip(*self.model.named_parameters(), strict=True)
        pieces = theta.split([p.numel() for p in like])
        return {n: piece.view(p.shape) for n, piece, p in zip(names, pieces, like, strict=True)}

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The images as the model sees them, chunk by chunk, with their labels."""
        like = next(self.model.parameters())
        for x, y in zip(self.x_NCHW.split(self.chunk), self.y_N.split(self.chunk), strict=True):
            pixels = x.dtype == torch.uint8
            x = x.to(like.device, like.dtype)
            yield self.space.normalize(x / 255) if pixels else x, y.to(like.device)

    def _logits(self, theta: Tensor, x: Tensor) -> Tensor:
        # Some modules write to their buffers in eval mode, too: they write to copies.
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        logits: Tensor = functional_call(self.model, buffers | self.named(theta), (x,))
        # float64 keeps the loss's rounding far below the differences that sharpness is made of.
        return logits.double()


def clean_objective(
    model: nn.Module,
    x_NCHW: Tensor,
    y_N: Tensor,
    space: PixelSpace | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    chunk: int = 125,
) -> Objective:
    """The objective of the model's clean route on these images, in ``dtype``.

    Works on a copy: parameters, buffers, modes, requires_grad and .grad of ``model`` stay as they
    are. theta holds the clean route's parameters, frozen ones included, and none of the other
    routes': models trained with and without an adversarial route have the same weight space.

    ``space``: the normalisation of uint8 images.
    Raises ConadvError without images or weights, and where the loss of the trained weights is not
    finite.
    """
    plain = norm.strip(copy.deepcopy(model)).eval().to(dtype)
    if not len(y_N) or not any(True for _ in plain.parameters()):
        raise ConadvError("The analysis needs at least one image and a model with weights.")
    found = Objective(plain, x_NCHW, y_N, space or PixelSpace(), chunk)
    loss = found.value(found.theta).loss
    if not math.isfinite(loss):
        raise ConadvError(f"The trained model's loss is {loss}: there is nothing to analyse.")
    return found
