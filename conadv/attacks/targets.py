"""What an attack ascends: the loss of the true class, or minus the loss of a random other class."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from conadv.errors import ConadvError


def random_other_class(y_N: Tensor, num_classes: int, generator: torch.Generator) -> Tensor:
    """A uniformly random class other than y for every image. Needs at least two classes.

    ``y_N`` may be probabilities (N, K), of mixed or smoothed labels: then one of the least probable
    classes.
    """
    if num_classes < 2:
        raise ConadvError("A targeted attack needs at least two classes.")
    if y_N.is_floating_point():
        least_NK = (y_N == y_N.amin(1, keepdim=True)).float()
        return torch.multinomial(least_NK, 1, generator=generator).squeeze(1)
    # A shift by 1 .. K - 1 is uniform over the other classes and can never be the own one.
    shift = torch.randint(1, num_classes, y_N.shape, generator=generator, device=y_N.device)
    return (y_N + shift) % num_classes


def ascent_loss(logits_NK: Tensor, y_N: Tensor, sign: int) -> Tensor:
    """Cross-entropy summed over the batch, times ``sign`` (-1 for targeted attacks).

    The sum, not the mean: an image's gradient must not shrink as the batch grows. No label
    smoothing. ``y_N``: classes, or probabilities (N, K) of mixed labels.
    """
    y_N = y_N.float() if y_N.is_floating_point() else y_N
    return sign * F.cross_entropy(logits_NK.float(), y_N, reduction="sum")
