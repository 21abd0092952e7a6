"""When, on which images and how strongly a method attacks: pure functions of the step."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from conadv.errors import ConadvError
from conadv.types import Attack, Schedule

Statistics = Literal["batch", "running"]


@dataclass(frozen=True)
class AttackPlan:
    """The attack of a whole run; the default attacks every image in every step.

    share: only the first images of every micro-batch, this share of them rounded, get an adversarial copy. An image's
    loss counts the same in every view, so the weight of the adversarial view falls with its share.
    every: attack for steps 0, k, 2k, ...; the others have no adversarial view.
    stop: the first step without an attack; None never stops.
    eps_factor: eps of the step that *uses* the images, relative to the attack's own; None is 1.
    route: the batch-norm route of the attack's gradient. statistics: whether that normalises by the batch or by the
    running statistics; neither moves the running ones.

    Raises ConadvError for values out of range. Ranks: the same on all; with attack ranks batch statistics only.
    Source: sharing out the mini-batch, Mei et al., "Fast AdvProp", arXiv 2204.09838; the rest is our own.
    """

    share: float = 1.0
    every: int = 1
    stop: int | None = None
    eps_factor: Schedule | None = None
    route: str = "adv"
    statistics: Statistics = "batch"

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConadvError(f"attack.share = {self.share} must be above 0 and at most 1.")
        if self.every < 1:
            raise ConadvError(f"attack.every = {self.every} must be 1 or more.")
        if self.stop is not None and self.stop < 1:
            raise ConadvError(
                "The attack would stop before the first step: choose a larger attack.until."
            )
        if self.route not in ("adv", "clean") or self.statistics not in ("batch", "running"):
            raise ConadvError(
                f"attack.route {self.route!r}, attack.statistics {self.statistics!r}: the route is adv or clean, the "
                "statistics are batch or running."
            )

    def active(self, step: int) -> bool:
        """Whether ``step`` trains on adversarial images."""
        return step % self.every == 0 and (self.stop is None or step < self.stop)

    def count(self, num_images: int) -> int:
        """How many of ``num_images`` images are attacked. Raises ConadvError where the share comes to none."""
        count = round(self.share * num_images)
        if not count:
            raise ConadvError(
                f"attack.share {self.share:g} of {num_images} images is no image: choose a larger one."
            )
        return count

    def at(self, attack: Attack, step: int) -> Attack:
        """The attack for the images of ``step``: its eps and step size times ``eps_factor(step)``."""
        factor = 1.0 if self.eps_factor is None else self.eps_factor(step)
        return attack if factor == 1 else scaled(attack, factor)


EVERYTHING = AttackPlan()


def scaled(attack: Attack, factor: float) -> Attack:
    """The attack with its eps and step size times ``factor``. Raises ConadvError for one without a field eps."""
    made: Any = attack
    names: list[str] = (
        [f.name for f in dataclasses.fields(made)] if dataclasses.is_dataclass(attack) else []
    )
    if "eps" not in names:
        raise ConadvError(
            f"{type(attack).__name__} has no field eps that a schedule of eps could change."
        )
    sizes = {name: factor * getattr(made, name) for name in ("eps", "step_size") if name in names}
    changed: Attack = dataclasses.replace(made, **sizes)
    return changed
