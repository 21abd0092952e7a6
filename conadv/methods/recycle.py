"""Recycle: perturb the last batch by the input gradient that its own step computed anyway."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from conadv.attacks.fgsm import FGSM
from conadv.attacks.noise import RandomSigns
from conadv.attacks.space import PixelSpace
from conadv.errors import ConadvError
from conadv.methods.base import SharedMethod
from conadv.types import Batch, Engine, ExtraBatch


@dataclass(frozen=True)
class Recycle(SharedMethod):
    """Train B_t clean, and B_{t-1} perturbed along grad_x L(theta_{t-1}; B_{t-1}).

    The gradient costs no pass of its own, only the input gradient of the first layer. The price: it
    comes through the clean route, and the perturbed images are those of the step before. Step 0 has
    no extra images.

    With ``mix="replace"`` a batch is the fresh images alone, and a step trains on them and on
    share / (1 - share) times as many of the step before: for share 0.5 on as many. To cost what
    plain training costs, the loader reads (1 - share) of the batch (:meth:`num_fresh`; the program
    does so). ``share`` is 0.5 at most: there are no more fresh images than the last step had.

    ``attack``: an untargeted FGSM, or RandomSigns for the control at the same cost; anything else
    raises ConadvError, one gradient is all there is.
    In flight: one batch of images. Staleness is 1 by construction.

    Source: our own; the reuse of a gradient is Fast AdvProp's idea (Mei et al., arXiv 2204.09838).
    """

    attack: FGSM | RandomSigns
    needs_input_gradient: ClassVar[bool] = True
    reads_fewer: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mix == "replace" and self.share > 0.5:
            raise ConadvError(
                f"attack.share {self.share:g} of recycle with mix replace must be at most 0.5: the "
                "images come from the fresh ones of the step before, which are 1 - share."
            )
        plain = isinstance(self.attack, FGSM) and not self.attack.targeted
        if not plain and not isinstance(self.attack, RandomSigns):
            raise ConadvError(
                "recycle needs an untargeted FGSM: it reuses one gradient of the true labels' "
                "loss. Use method disadv or conadv for other attacks."
            )

    @property
    def space(self) -> PixelSpace:
        return self.attack.space

    def num_attacked(self, num_images: int) -> int:
        if self.mix == "add":
            return super().num_attacked(num_images)
        return round(self.share / (1 - self.share) * num_images)

    def extra_view(self, engine: Engine, batch: Batch) -> ExtraBatch | None:
        return engine.pending.pop(batch.step)

    def on_input_grad(
        self, engine: Engine, batch: Batch, clean: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> None:
        # Directions only: the factor that the mean over the global batch put on the gradient does
        # not matter.
        if isinstance(
            self.attack, RandomSigns
        ):  # at the gradient's cost, and none of its knowledge
            extra = engine.attack_batch(self.attack, batch)
            engine.pending.put(batch.step + 1, ExtraBatch(extra.images, extra.labels))
            return
        counts = [self.num_attacked(len(x_NCHW)) for x_NCHW in clean]
        images = tuple(
            self.attack.from_gradient(x_NCHW[:count], gradient[:count])
            for x_NCHW, gradient, count in zip(clean, gradients, counts, strict=True)
        )
        labels = tuple(
            engine.labels(micro)[:count] for micro, count in zip(batch.micro, counts, strict=True)
        )
        engine.pending.put(batch.step + 1, ExtraBatch(images, labels, batch.step))
