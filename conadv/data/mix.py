"""Mixup and cutmix of a micro-batch, as a pure function of (seed, step, micro-batch)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from conadv import rng


@dataclass(frozen=True)
class Mix:
    """Every image mixed with another of its micro-batch, and the labels as probabilities.

    ``mixup``, ``cutmix``: alpha of the Beta(alpha, alpha) that draws how much of the other image
    comes in; 0 is off, and with both on each micro-batch draws which one it is. All views of a
    sample are mixed alike, with the same partner, share and box, since they have one label.
    torchvision's v2.MixUp and v2.CutMix do the work.

    Source: Zhang et al., "mixup", arXiv 1710.09412; Yun et al., "CutMix", arXiv 1905.04899.
    """

    mixup: float
    cutmix: float
    num_classes: int
    seed: int

    def __call__(
        self, views: Mapping[str, Tensor], y_N: Tensor, step: int, index: int
    ) -> tuple[dict[str, Tensor], Tensor]:
        """uint8 images N,C,H,W by view and classes N -> whole levels, mixed, and labels N,K."""
        kinds = ((v2.MixUp, self.mixup), (v2.CutMix, self.cutmix))
        chosen = [kind(alpha=alpha, num_classes=self.num_classes) for kind, alpha in kinds if alpha]
        # RandomChoice of one would draw too, and move the stream behind it
        transform = chosen[0] if len(chosen) == 1 else v2.RandomChoice(chosen)
        floats = {name: tv_tensors.Image(images.float()) for name, images in views.items()}
        with rng.scope(torch.device("cpu"), self.seed, "mix", step, index):
            mixed, y_NK = transform(floats, y_N)
        return {k: x.as_subclass(Tensor).round_().to(torch.uint8) for k, x in mixed.items()}, y_NK
