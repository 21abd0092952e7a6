"""The controls: what an attack must beat. Same views, same gradient work, same routes, no attack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from conadv.attacks import PixelSpace, RandomSigns
from conadv.methods.base import Method, SharedMethod, space_from_config
from conadv.types import Batch, ExtraBatch

if TYPE_CHECKING:
    from conadv.config.schema import Config
    from conadv.engine.step import TrainStep


@dataclass(frozen=True)
class MultiView(Method):
    """The extra images are a second, independent draw of the clean view's augmentation.

    Without augmentation both draws are the same images; what is left is then a second set of batch-norm statistics.
    """

    data_views: ClassVar[tuple[str, ...]] = ("second",)

    def extra(self, engine: TrainStep, batch: Batch) -> ExtraBatch:
        images = tuple(engine.images(micro, "second") for micro in batch.micro)
        return ExtraBatch(images, tuple(engine.labels(micro) for micro in batch.micro))


@dataclass(frozen=True)
class Noise(SharedMethod):
    """The extra images are x + eps * random signs, clipped to valid pixels: an attack's size without its gradient."""

    noise: RandomSigns

    @property
    def space(self) -> PixelSpace:
        return self.noise.space

    def extra(self, engine: TrainStep, batch: Batch) -> ExtraBatch | None:
        extra = engine.craft(self.noise, batch)
        return ExtraBatch(extra.images, extra.labels, None)

    @classmethod
    def from_config(cls, config: Config) -> Noise:
        return cls(
            RandomSigns(config.attack.eps, space_from_config(config)), share=config.attack.share
        )
