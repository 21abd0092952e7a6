"""What a method may do in a step, and the two attacks that a config can name."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from conadv.attacks import FGSM, PGD, AttackPlan, PixelSpace
from conadv.attacks.plan import EVERYTHING
from conadv.types import Attack, Batch, ExtraBatch

if TYPE_CHECKING:
    from conadv.config.schema import Config
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

    @property
    def plan(self) -> AttackPlan:
        """When and how strongly the method attacks; by default every image in every step."""
        return EVERYTHING

    def for_run(self, plan: AttackPlan) -> Method:
        """The method with the plan of a run, for methods that have one; itself otherwise."""
        return self

    def attack_weights(self, engine: TrainStep) -> Mapping[str, Tensor] | None:
        """The weights for that attack, seen from the present step; None for the present ones."""
        return None

    def attack_gradients(self) -> float:
        """Input gradients per attacked image (for counting cost)."""
        return 0

    def gradient_images(self, step: int, views: Collection[str], num_images: int) -> float:
        """What ``step``, which trained on ``views``, cost in gradient images per clean image.

        A forward-backward of an image of any view counts 1, once more for SAM's second gradient; an input gradient
        of resolution r counts r^2, by its pixels. ``num_images``: clean images of a micro-batch.
        """
        passes = 2 if self.ascent_radius(step) else 1
        share = self.plan.count(num_images) / num_images
        attack = share * self.attack_gradients() if self.plan.active(step) else 0
        return passes * sum(share if view == "adv" else 1 for view in views) + attack

    def ascent_radius(self, step: int) -> float:
        """rho of sharpness-aware minimisation in ``step``: how far uphill its gradient is taken; 0 for the weights."""
        return 0.0

    def extra(self, engine: TrainStep, batch: Batch) -> ExtraBatch | None:
        return None

    def absorb(
        self, engine: TrainStep, batch: Batch, clean: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> None:
        return

    def prepare(self, engine: TrainStep, future: Batch | None) -> None:
        return

    @classmethod
    def from_config(cls, config: Config) -> Method:
        return cls()


@dataclass(frozen=True)
class Planned(Method):
    """A method whose attack, or noise, follows a plan."""

    attack_plan: AttackPlan = field(default=EVERYTHING, kw_only=True)

    @property
    def plan(self) -> AttackPlan:
        return self.attack_plan

    def for_run(self, plan: AttackPlan) -> Method:
        return replace(self, attack_plan=plan)


def space_from_config(config: Config) -> PixelSpace:
    return PixelSpace(config.data.mean, config.data.std)


def attack_from_config(config: Config) -> Attack:
    """FGSM for one plain step, PGD otherwise."""
    a, space = config.attack, space_from_config(config)
    step_size = a.eps if a.step_size is None else a.step_size
    if a.num_steps == 1 and not a.random_start and step_size == a.eps:
        return FGSM(a.eps, a.norm, a.targeted, space, a.resolution)
    return PGD(
        a.eps, a.num_steps, step_size, a.norm, a.targeted, a.random_start, space, a.resolution
    )


def gradients_of(attack: Attack) -> float:
    """Input gradients of an attack per image, by pixels."""
    steps: float = getattr(attack, "num_steps", 1) * getattr(attack, "resolution", 1.0) ** 2
    return steps


def space_of(attack: Attack) -> PixelSpace | None:
    return getattr(attack, "space", None)
