"""The losses of the program: over classes, smoothed, weighted or mixed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from conadv.attacks.loss import Loss

_COMPARE: dict[str, Callable[..., Tensor]] = {
    "bce": F.binary_cross_entropy_with_logits,
    "mse": F.mse_loss,
}


def make_loss(name: str, label_smoothing: float, class_weights: Tensor | None = None) -> Loss:
    """(logits_NK, y_N) -> mean over N, or over N and K for "bce" and "mse", whose aims are 0 and 1.

    y_N: classes, or probabilities (N, K) of mixed images.
    """
    if name == "cross-entropy":
        return partial(F.cross_entropy, weight=class_weights, label_smoothing=label_smoothing)
    return partial(_over_classes, name, label_smoothing)


def balanced_weights(labels: Tensor, num_classes: int) -> Tensor:
    """Class weights by which all classes count alike; their mean over images is 1."""
    counts = torch.bincount(labels, minlength=num_classes).clamp_min(1)
    return len(labels) / (num_classes * counts)


def _over_classes(
    name: str, smoothing: float, logits_NK: Tensor, y_N: Tensor, reduction: str = "mean"
) -> Tensor:
    num_classes = logits_NK.shape[1]
    aims = y_N if y_N.is_floating_point() else F.one_hot(y_N, num_classes)
    aims = aims.to(logits_NK.dtype) * (1 - smoothing) + smoothing / num_classes
    return _COMPARE[name](logits_NK, aims, reduction=reduction)
