"""Differences between cells of a study, paired by seed, with Holm's correction within each grid point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from conadv.report import table
from conadv.report.stats import Difference, holm, paired_difference
from conadv.report.study.sweep import Cell, Study


@dataclass(frozen=True)
class Contrast:
    """``cell`` minus ``reference`` at one grid point. ``adjusted``: Holm's p among all contrasts of that point."""

    cell: Cell
    reference: Cell
    difference: Difference
    adjusted: float | None = None

    @property
    def text(self) -> str:
        """The difference in points with its interval, or which runs diverged in its place."""
        return said(self.difference, self.cell, self.reference)


def said(difference: Difference, cell: Cell, reference: Cell) -> str:
    """``difference`` of the two in points, or which of their runs diverged: then there is no difference to speak of."""
    broken = [f"{one.line}: {one.divergence}" for one in (cell, reference) if one.diverged]
    return "; ".join(broken) or table.difference(difference)


def paired(cell: Cell, other: Cell, metric: str = "test_accuracy") -> Difference | None:
    """``cell`` minus ``other`` by seed; without interval and p where a run of either diverged.

    The seeds that are left were chosen by their success, which is what the interval takes for chance.
    """
    found = paired_difference(cell.values(metric), other.values(metric))
    if found is not None and (cell.diverged or other.diverged):
        return replace(found, low=None, high=None, p=None)
    return found


def differences(
    study: Study, at: float | None = None, metric: str = "test_accuracy"
) -> list[Contrast]:
    """Every arm against the baseline, and every arm that is no control against every control, at the same x.

    at: one value of the axis; None takes all. metric: a field of summary.json, so accuracies are in [0, 1]. An arm
    whose grid has more axes than its reference's is compared with the reference that agrees on the axes they share.
    Holm's family is all contrasts of one grid point.
    """
    points = study.points if at is None else (at,)
    return [contrast for x in points for contrast in _adjust(list(_point(study, x, metric)))]


def _point(study: Study, x: float, metric: str) -> list[Contrast]:
    found = []
    for reference_arm in ([study.baseline] if study.baseline else []) + list(study.controls):
        for cell in study.at(x):
            if cell.arm in (study.baseline, reference_arm) or (
                cell.arm in study.controls and reference_arm != study.baseline
            ):
                continue
            found += _against(study, cell, reference_arm, metric)
    return found


def _against(study: Study, cell: Cell, reference_arm: str, metric: str) -> list[Contrast]:
    references = [
        other
        for other in study.at(cell.x)
        if other.arm == reference_arm and _agree(cell.settings, other.settings)
    ]
    pairs = ((other, paired(cell, other, metric)) for other in references)
    return [Contrast(cell, other, found) for other, found in pairs if found is not None]


def _agree(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return all(a[name] == b[name] for name in a.keys() & b.keys())


def _adjust(contrasts: Sequence[Contrast]) -> list[Contrast]:
    tested = [
        index for index, contrast in enumerate(contrasts) if contrast.difference.p is not None
    ]
    adjusted = holm([contrasts[index].difference.p or 0.0 for index in tested])
    by_index = dict(zip(tested, adjusted, strict=True))
    return [
        replace(contrast, adjusted=by_index.get(index)) for index, contrast in enumerate(contrasts)
    ]
