"""The controls that an attack must beat: same views, work and routes, no attack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from conadv.attacks.noise import RandomSigns
from conadv.attacks.space import PixelSpace
from conadv.methods.base import SharedMethod
from conadv.types import Batch, Engine, ExtraBatch


@dataclass(frozen=True)
class MultiView(SharedMethod):
    """The extra images are a second, independent draw of the clean view's augmentation.

    Without augmentation both draws are the same images; what is left is then a second set of
    batch-norm statistics.
    """

    data_views: ClassVar[tuple[str, ...]] = ("second",)

    def extra_view(self, engine: Engine, batch: Batch) -> ExtraBatch | None:
        counts = [self.num_attacked(len(micro.y_N)) for micro in batch.micro]
        pairs = list(zip(batch.micro, counts, strict=True))
        images = tuple(engine.images(micro, "second")[:count] for micro, count in pairs)
        return ExtraBatch(images, tuple(engine.labels(micro)[:count] for micro, count in pairs))


@dataclass(frozen=True)
class Noise(SharedMethod):
    """x + eps * random signs, clipped to valid pixels: an attack's size, no gradient."""

    noise: RandomSigns

    @property
    def space(self) -> PixelSpace:
        return self.noise.space

    def extra_view(self, engine: Engine, batch: Batch) -> ExtraBatch | None:
        extra = engine.attack_batch(self.noise, batch)
        # No weights made these images: a version would be recorded as a staleness.
        return ExtraBatch(extra.images, extra.labels, weight_version=None)
