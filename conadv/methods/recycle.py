"""Recycle: perturb the last batch by the input gradient that its own step computed anyway."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from conadv.attacks.fgsm import FGSM
from conadv.attacks.space import PixelSpace
from conadv.errors import ConadvError
from conadv.types import Batch, Engine, ExtraBatch, Method


@dataclass(frozen=True)
class Recycle(Method):
    """Train B_t clean, and B_{t-1} perturbed along grad_x L(theta_{t-1}; B_{t-1}).

    No forward pass is added, only the input gradient of the first layer. The price: the gradient
    comes through the clean route, and the perturbed images are those of the step before. Step 0 has
    no extra images.

    ``attack``: an untargeted FGSM; anything else raises ConadvError, one gradient is all there is.
    In flight: one batch of images. Staleness is 1 by construction.

    Source: our own; the reuse of a gradient is Fast AdvProp's idea (Mei et al., arXiv 2204.09838).
    """

    attack: FGSM
    needs_input_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.attack, FGSM) or self.attack.targeted:
            raise ConadvError(
                "recycle needs an untargeted FGSM: it reuses one gradient of the true labels' "
                "loss. Use method disadv or conadv for other attacks."
            )

    @property
    def space(self) -> PixelSpace:
        return self.attack.space

    def extra_view(self, engine: Engine, batch: Batch) -> ExtraBatch | None:
        return engine.pending.pop(batch.step)

    def on_input_grad(
        self, engine: Engine, batch: Batch, clean: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> None:
        # Directions only: the factor that the mean over the global batch put on the gradient does
        # not matter.
        images = tuple(map(self.attack.from_gradient, clean, gradients))
        labels = tuple(engine.labels(micro) for micro in batch.micro)
        engine.pending.put(batch.step + 1, ExtraBatch(images, labels, batch.step))
