"""The table of questions in README.md: accuracies, intervals and shares are those of records.

Where a record no longer says what a sentence does ("above", "not distinguishable"), drawing the table stops with that.
What describes a study's design (its batches, how many seeds) is typed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import study_contrasts as contrasts

from conadv.report import table as cells
from conadv.report.stats import Difference

Json = dict[str, Any]
HEAD = ["question", "answer", "evidence"]


class Study:
    """The published numbers of one study, in the forms that a sentence needs."""

    def __init__(self, studies: Path, name: str, on: str = contrasts.TEST) -> None:
        """``on``: the images that accuracies are of, contrasts.TEST or HELD_OUT."""
        self.name, self.on = name, on
        self.summary: Json = json.loads((studies / name / "summary.json").read_text())

    def difference(self, arm: str, reference: str, batch: int | None = None) -> Difference:
        """``arm`` minus ``reference``, paired by seed."""
        found = contrasts.paired(self.summary, arm, reference, batch, self.on)
        if found is None:
            raise SystemExit(f"{self.name}: {arm} and {reference} have no seed in common.")
        return found

    def above(self, arm: str, reference: str, batch: int | None = None) -> str:
        """ "1.03 [+0.65, +1.42]": points that ``arm`` is above ``reference``. SystemExit where the interval holds 0."""
        return self._said(arm, reference, batch, "higher").removeprefix("+")

    def alike(self, arm: str, reference: str) -> str:
        """ "+0.34 [-0.11, +0.79]". SystemExit where the interval does not hold 0."""
        return self._said(arm, reference, None, "not distinguishable")

    def accuracy(self, arm: str) -> str:
        return f"{contrasts.percent(self.summary, arm, on=self.on)} %"

    def cost(self, arm: str, reference: str) -> float:
        """Gradient images of a whole training, times those of ``reference``."""
        own, other = (
            contrasts.cell(self.summary, name)["cost"]["total"] for name in (arm, reference)
        )
        return float(own / other)

    def share(self, part: str, whole: str) -> str:
        return contrasts.share(self.summary, part, whole)

    def trials(self, arm: str) -> tuple[int, dict[str, float]]:
        """How many settings were tried, and the chosen one."""
        own = contrasts.cell(self.summary, arm)
        return own["trials"], own["chosen"]

    def not_above(self, arms: Sequence[str], reference: str, batch: int | None = None) -> None:
        """SystemExit where one of ``arms`` is above ``reference``, or has no interval."""
        for arm in arms:
            if self.difference(arm, reference, batch).verdict not in (
                "lower",
                "not distinguishable",
            ):
                raise SystemExit(f"{self.name}: that {arm} is not above {reference} is not shown.")

    def _said(self, arm: str, reference: str, batch: int | None, verdict: str) -> str:
        found = self.difference(arm, reference, batch)
        if found.verdict != verdict:
            raise SystemExit(
                f"{self.name}: {arm} to {reference} is {cells.difference(found)}, not {verdict!r}."
            )
        return cells.difference(found)


def answers(studies: Path) -> tuple[list[str], list[list[str]]]:
    """The rows of the table."""
    overfit, beside, cheaper, digits, decay = (
        Study(studies, name)
        for name in (
            "cifar10",
            "augmentation-cifar10",
            "cheaper-cifar10",
            "digits",
            "decay-cifar10",
        )
    )
    win = Study(studies, "win-cifar10", contrasts.HELD_OUT)
    rows = [tuned(decay), attack_or_images(win), at_equal_cost(win, overfit), won_back(overfit)]
    return HEAD, [*rows, augmented(beside), saved(cheaper, overfit), too_few_steps(digits)]


def tuned(decay: Study) -> list[str]:
    (count, lars), (other, lamb) = decay.trials("LARS"), decay.trials("LAMB")
    if count != other:
        raise SystemExit(f"{decay.name}: {count} and {other} trials.")
    settings = [
        f"{name} {chosen['optim.lr']:g} and {chosen['optim.weight_decay']:g}"
        for name, chosen in (("LARS", lars), ("LAMB", lamb))
    ]
    said = (
        f"Yes: learning rate and weight decay of LARS and LAMB together, {count} trials each, on 10,000 held-out "
        f"images ({', '.join(settings)}). Beside random signs and the attack they keep these, and eps is that of an "
        "earlier study: that favours the baselines"
    )
    return [
        "Was the baseline tuned?",
        said,
        "[tuning](docs/results/win.md#how-the-baselines-were-tuned)",
    ]


def attack_or_images(win: Study) -> list[str]:
    said = (
        f"With LAMB the attack: it is {win.above('LAMB + ConAdv', 'LAMB + random-sign noise')} above random signs. "
        f"With LARS that cannot be told: {win.alike('LARS + ConAdv', 'LARS + random-sign noise')}. Random signs are "
        f"above neither: {win.alike('LAMB + random-sign noise', 'LAMB')} with LAMB, "
        f"{win.alike('LARS + random-sign noise', 'LARS')} with LARS"
    )
    return [
        "Is it the attack, or just the extra images?",
        said,
        "[other images](docs/results/win.md)",
    ]


def at_equal_cost(win: Study, overfit: Study) -> list[str]:
    third = 1 / win.cost("LAMB + ConAdv", "LAMB")
    if round(third, 2) != 0.33:
        raise SystemExit(f"{win.name}: LAMB costs {third:.2f} of ConAdv, not a third.")
    overfit.alike("LARS, 3 times the epochs", "LARS")
    said = (
        f"LAMB with ConAdv is {win.above('LAMB + ConAdv', 'LAMB')} above LAMB, and LARS with ConAdv "
        f"{win.above('LARS + ConAdv', 'LARS')} above LARS, at three times the cost; random signs cost two times. "
        "Nothing that costs as much was found to do as well: three times the epochs win nothing with LARS (tuned, "
        "study B), and lose with LAMB at two rates; neither was run with the decay tuned"
    )
    return [
        "At equal cost?",
        said,
        "[other images](docs/results/win.md), [study B](docs/results/cifar10.md), [LAMB](docs/results/variants.md)",
    ]


def won_back(overfit: Study) -> list[str]:
    small, attack = "small batch 50, SGD-Nesterov", "+ ConAdv, tau = 1"
    said = (
        f"In part: ConAdv wins back {overfit.share(attack, small)} of it; batch 50 has {overfit.accuracy(small)} "
        f"(five other seeds), there {overfit.above(small, attack)} above ConAdv. Batch norm sees 50 images there and "
        "125 here, and the optimizers differ: the loss is of more than the batch"
    )
    return ["Is the loss to the small batch won back?", said, "[all arms](docs/results/cifar10.md)"]


def augmented(beside: Study) -> list[str]:
    beside.not_above(["crops + ConAdv"], "crops")
    beside.not_above(["+ ConAdv and AutoAugment view"], "+ AutoAugment view")
    said = (
        f"Crops and flips gain {beside.above('crops', 'LARS')} without a gradient image more. The attack on top, with "
        "settings tuned without augmentation, shows no gain"
    )
    return ["Beside augmentation?", said, "[augmentation](docs/results/augmentation.md)"]


def saved(cheaper: Study, overfit: Study) -> list[str]:
    quarter, recycled = "ConAdv, share 0.25", "recycle"
    half, thirds = (cheaper.cost(arm, "ConAdv") for arm in (quarter, recycled))
    if (round(half, 1), round(thirds, 2)) != (0.5, 0.67):
        raise SystemExit(
            f"{cheaper.name}: a quarter costs {half:.2f} and recycle {thirds:.2f} of ConAdv."
        )
    lamb = contrasts.accuracies(overfit.summary, "LAMB")
    for arm in (quarter, recycled):
        beside = contrasts.paired_difference(contrasts.accuracies(cheaper.summary, arm), lamb)
        if beside is None or beside.verdict != "not distinguishable":
            raise SystemExit(f"{cheaper.name}: {arm} can be told from LAMB.")
    said = (
        "Nothing is near the cost of a step without an attack. Attacking a quarter of the batch (half the cost) keeps "
        f"{cheaper.share(quarter, 'ConAdv')} of the gain, recycling the step's gradient (two thirds) "
        f"{cheaper.share(recycled, 'ConAdv')}; neither can be told from LAMB, which costs less than both"
    )
    return ["Cheaper?", said, "[cheaper attacks](docs/results/cheaper.md)"]


def too_few_steps(digits: Study) -> list[str]:
    attacks = [
        "+ sequential attack",
        "+ ConAdv, tau = 1",
        "+ ConAdv, tau = 1, look-ahead",
        "+ recycled gradient",
    ]
    for batch in (187, 374):
        digits.not_above(attacks, "LARS", batch)
    longer = digits.above("LARS, 3 times the epochs", "LARS", 374)
    said = f"On digits (study A, eps 0.2) no attack is above LARS, and longer training wins ({longer} at the full batch)"
    return ["Too few steps in place of overfitting?", said, "[digits](docs/results/digits.md)"]
