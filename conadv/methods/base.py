"""What a method may do in a step, and the two attacks that a config can name."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from conadv.attacks.space import PixelSpace
from conadv.errors import ConadvError
from conadv.types import Attack, Batch, ExtraBatch

if TYPE_CHECKING:
    from conadv.engine.step import TrainStep


@dataclass(frozen=True)
class Method:
    """A method decides which images join the clean ones, through which route, made at which weights.

    A method holds settings only. What waits between steps is in ``engine.pending``, so that checkpoints, records and
    executors treat all methods alike. The three calls come in this order within step t, at weights theta_t:

    1. ``extra(engine, batch)``: the extra images of step t; on the critical path.
    2. ``absorb(engine, batch, clean, gradients)``: only if ``needs_input_gradient``; after backward.
    3. ``prepare(engine, future)``: work for step t + ``ahead`` that needs nothing of this step's gradient, so an
       executor may run it beside backward or communication. ``future`` is B_{t + ahead}, None when training ends first.

    Ranks: each rank handles its own images; nothing is reduced.
    """

    route: ClassVar[str | None] = "adv"
    data_views: ClassVar[tuple[str, ...]] = ()
    needs_input_gradient: ClassVar[bool] = False

    @property
    def ahead(self) -> int:
        """How many steps ahead ``prepare`` must see the data; 0 when it does nothing."""
        return 0

    @property
    def space(self) -> PixelSpace | None:
        """The normalisation that the method's perturbation lives in; None without one."""
        return None

    @property
    def future_attack(self) -> Attack | None:
        """The attack that ``prepare`` runs on a future batch, which attack ranks can run instead; None without one.

        ``extra`` of such a method returns None where ``engine.pending.skips(step)``: attack ranks were late.
        """
        return None

    # No annotations: these are the fields of AttackMethod, and constants of every other method.
    share = 1.0
    attack_route = "adv"
    attack_statistics = "batch"

    def num_attacked(self, num_images: int) -> int:
        """How many of ``num_images`` images get an extra copy: the first ones. ConadvError where that is none."""
        count = round(self.share * num_images)
        if not count:
            raise ConadvError(
                f"attack.share {self.share:g} of {num_images} images rounds to zero images; increase either."
            )
        return count

    def attack_weights(self, engine: TrainStep) -> Mapping[str, Tensor] | None:
        """The weights for that attack, seen from the present step; None for the present ones."""
        return None

    def attack_gradients(self) -> float:
        """Input gradients per attacked image (for counting cost)."""
        return 0

    def gradient_images(self, views: Collection[str], num_images: int) -> float:
        """What a step that trained on ``views`` cost in gradient images per clean image.

        A forward-backward of an image of any view counts 1, once more for SAM's second gradient; an input gradient
        counts 1. ``num_images``: clean images of a micro-batch.
        """
        passes = 2 if self.ascent_radius else 1
        share = self.num_attacked(num_images) / num_images
        attack = share * self.attack_gradients()
        return passes * sum(share if view == "adv" else 1 for view in views) + attack

    @property
    def ascent_radius(self) -> float:
        """rho of sharpness-aware minimisation: how far uphill the gradient is taken; 0 for the weights themselves."""
        return 0.0

    def extra(self, engine: TrainStep, batch: Batch) -> ExtraBatch | None:
        return None

    def absorb(
        self, engine: TrainStep, batch: Batch, clean: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> None:
        return

    def prepare(self, engine: TrainStep, future: Batch | None) -> None:
        return


@dataclass(frozen=True)
class SharedMethod(Method):
    """A method whose extra images may be those of a part of every micro-batch.

    share: only the first images of every micro-batch, this share of them rounded, get an extra copy. An image's loss
    counts the same in every view, so the weight of the extra view falls with its share.
    Source: sharing out the mini-batch, Mei et al., "Fast AdvProp", arXiv 2204.09838.
    """

    _: KW_ONLY
    share: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConadvError(f"attack.share = {self.share} must be above 0 and at most 1.")


@dataclass(frozen=True)
class AttackMethod(SharedMethod):
    """A method that attacks the clean view.

    attack_route: the batch-norm route of the attack's gradient. attack_statistics: whether that normalises by the
    batch or by the running statistics; neither moves the running ones.
    """

    attack: Attack
    _: KW_ONLY
    attack_route: str = "adv"
    attack_statistics: str = "batch"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attack_route not in ("adv", "clean") or self.attack_statistics not in (
            "batch",
            "running",
        ):
            raise ConadvError(
                f"attack_route {self.attack_route!r}, attack_statistics {self.attack_statistics!r}: the route is adv "
                "or clean, the statistics are batch or running."
            )

    @property
    def space(self) -> PixelSpace | None:
        return getattr(self.attack, "space", None)

    def attack_gradients(self) -> float:
        return float(getattr(self.attack, "num_steps", 1))
