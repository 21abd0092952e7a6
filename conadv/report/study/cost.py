"""What a cell costs, in gradient images and in seconds, and what else could be had for it."""

from __future__ import annotations

from dataclasses import dataclass

from conadv.report.stats import Difference, stat
from conadv.report.study.contrast import paired
from conadv.report.study.sweep import Cell, Study

EQUAL = 1.005  # costs this close count as equal: schedules round to whole steps


@dataclass(frozen=True)
class Cost:
    """Medians over a cell's finished runs.

    ``per_image``: gradient images per clean image, which is views plus attack gradients. ``total``: gradient images
    of the whole training. ``step_seconds``: median seconds of a step; None where the summary has no times.
    """

    per_image: float | None
    total: float | None
    step_seconds: float | None
    seconds: float | None


def cost(cell: Cell) -> Cost:
    """From the rates in summary.json: rate times seconds is the exact count, whatever the machine's speed was."""
    seconds, step = (stat(cell.values(name)) for name in ("seconds", "step_seconds_median"))
    rate, clean = cell.values("gradient_images_per_second"), cell.values("clean_images_per_second")
    spent = cell.values("seconds")
    seed = next(iter(sorted(rate.keys() & clean.keys() & spent.keys())), None)
    return Cost(
        per_image=None if seed is None else rate[seed] / clean[seed],
        total=None if seed is None else rate[seed] * spent[seed],
        step_seconds=step.median if step else None,
        seconds=seconds.median if seconds else None,
    )


@dataclass(frozen=True)
class EqualCost:
    """The best cell without an attack that costs no more than ``cell``; None for both where nothing qualifies.

    ``share``: the total gradient images of the dearest such cell over those of ``cell``: far below 1 means that
    nobody spent as much.
    """

    cell: Cell
    best: Cell | None
    difference: Difference | None
    share: float | None


def equal_cost(study: Study, cell: Cell) -> EqualCost:
    """Compare ``cell`` with the best of the cells at its x that make no attack and cost at most as much.

    The best is picked by mean test accuracy, which favours it: the comparison errs against ``cell``. A cell of which a
    run diverged has no mean and is none of them.
    """
    own = cost(cell).total
    if not own:
        return EqualCost(cell, None, None, None)
    rivals = [
        (value.mean, other, total)
        for other in study.at(cell.x)
        if not other.attacks and other is not cell
        if (value := other.stat())
        and (total := cost(other).total) is not None
        and total <= EQUAL * own
    ]
    if not rivals:
        return EqualCost(cell, None, None, None)
    best = max(rivals, key=lambda rival: rival[0])[1]
    dearest = max(total for *_, total in rivals)
    return EqualCost(cell, best, paired(cell, best), dearest / own)


def unit(study: Study) -> tuple[float, str]:
    """(divisor, word) for numbers of gradient images that read well: thousands, millions or billions."""
    largest = max((cost(cell).total or 0.0 for cell in study.cells), default=0.0)
    return next(
        ((size, word) for size, word in ((1e9, "billions"), (1e6, "millions")) if largest >= size),
        (1e3, "thousands"),
    )
