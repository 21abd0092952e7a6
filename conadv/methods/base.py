"""What the methods with a perturbed view have in common."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from conadv.attacks.contract import check_attack
from conadv.attacks.space import PixelSpace
from conadv.errors import ConadvError, unknown
from conadv.types import Attack, Method


@dataclass(frozen=True)
class SharedMethod(Method):
    """A method whose extra images may be those of a part of every micro-batch.

    share: only the first images of every micro-batch, this share of them rounded, get an extra
    copy. An image's loss counts the same in every view, so the weight of the extra view falls with
    its share.
    mix: with "add" a step trains on the extra images beside all clean ones, as published. With
    "replace" they take the place of the images that they were made of: a step has as many gradients
    as a step of plain training.

    Source: sharing out the mini-batch, Mei et al., "Fast AdvProp", arXiv 2204.09838. To replace
    images is our own.
    """

    _: KW_ONLY
    share: float = 1.0
    mix: str = "add"

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConadvError(f"attack.share = {self.share} must be above 0 and at most 1.")
        if self.mix not in ("add", "replace"):
            raise unknown("mix", self.mix, ("add", "replace"))


@dataclass(frozen=True)
class AttackMethod(SharedMethod):
    """A method that attacks the clean view.

    attack_route: the batch-norm route of the attack's gradient, "adv" or "clean".
    attack_statistics: whether that pass normalises by the "batch" or by the "running" statistics;
    neither moves the running ones.
    """

    attack: Attack
    _: KW_ONLY
    attack_route: str = "adv"
    attack_statistics: str = "batch"

    def __post_init__(self) -> None:
        super().__post_init__()
        # Here, not in the first step: by then attack ranks wait for each other.
        check_attack(self.attack)
        if self.attack_route not in ("adv", "clean"):
            raise unknown("attack_route", self.attack_route, ("adv", "clean"))
        if self.attack_statistics not in ("batch", "running"):
            raise unknown("attack_statistics", self.attack_statistics, ("batch", "running"))

    # An attack of one's own may know no normalisation, or make no gradient steps.

    @property
    def space(self) -> PixelSpace | None:
        return getattr(self.attack, "space", None)

    def attack_gradients(self) -> float:
        return float(getattr(self.attack, "num_steps", 1))
