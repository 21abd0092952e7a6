"""What an attack ascends: the trained loss, or minus the loss of a random other class."""

from __future__ import annotations

import torch
from torch import Tensor

from conadv.attacks.loss import Loss, TrainedLoss
from conadv.errors import ConadvError
from conadv.types import Forward


def trained_loss(forward: Forward, given: Loss | None = None) -> TrainedLoss:
    """The loss that an attack ascends: the ``given`` one, or the engine's, which its forward names.

    Cross-entropy for any other forward, such as a plain model.
    """
    if given is not None:
        return TrainedLoss(given)
    found: TrainedLoss | None = getattr(forward, "trained_loss", None)
    return found or TrainedLoss()


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


def targets(loss: TrainedLoss, output: Tensor, y_N: Tensor, generator: torch.Generator) -> Tensor:
    """Where a targeted attack goes, class by class. ConadvError without classes to choose from."""
    if not loss.classes or output.dim() != 2:
        raise ConadvError(
            "A targeted attack goes towards another class, so it needs cross-entropy (or NLL) over "
            f"(N, K) logits; the output is {tuple(output.shape)}. Use targeted=False."
        )
    return random_other_class(y_N, output.shape[1], generator)
