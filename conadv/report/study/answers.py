"""The referee's first three questions, answered in sentences and one table from the data of a study."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from conadv import documents
from conadv.report import table, words
from conadv.report.settings import part, show
from conadv.report.study import sharpness
from conadv.report.study.contrast import Contrast, differences, said
from conadv.report.study.cost import EQUAL, EqualCost, cost, equal_cost
from conadv.report.study.figures import axis_value
from conadv.report.study.sweep import Cell, Study

ALPHA = 0.05


@dataclass(frozen=True)
class Mark:
    """A table cell with its verdict: higher | lower | anything else."""

    text: str
    verdict: str = ""


def place(study: Study, x: float) -> str:
    """e.g. "batch 748"."""
    return part(study.axis, axis_value(study, x))


def percent(cell: Cell | None) -> str:
    """Test accuracy in percent, or how many runs diverged."""
    return (cell.divergence if cell else "") or table.percent(cell.stat() if cell else None)


def baseline_cell(study: Study) -> Cell | None:
    """The baseline at the largest x (the best of them where its line is split)."""
    cells = [cell for cell in study.at(study.largest) if cell.arm == study.baseline and cell.stat()]
    return max(cells, key=lambda cell: ((found := cell.stat()) and found.mean) or 0.0, default=None)


def lead(study: Study) -> str:
    """What was compared and what the large batch loses, in one or two sentences."""
    finished = [len(cell.finished) for cell in study.cells]
    seeds = (
        f"{min(finished)}"
        if min(finished) == max(finished)
        else f"{min(finished)} to {max(finished)}"
    )
    where = ", ".join(axis_value(study, x) for x in study.points)
    name = part(study.axis, where)
    text = f"{len(study.lines)} arms, {name}; {seeds} finished seeds for each arm and batch, {sum(finished)} runs in all."
    base, best = baseline_cell(study), _best_small(study)
    if base is None or best is None:
        return text
    return (
        f"{text} Test accuracy of {base.line} at {place(study, base.x)}: {percent(base)} %; the best without "
        f"extra images at a smaller batch ({best.line}, {place(study, best.x)}): {percent(best)} %."
    )


def _best_small(study: Study) -> Cell | None:
    """Without an attack, no control, no longer training: what one would run who has no need for a large batch."""
    base = baseline_cell(study)
    limit = (cost(base).total if base else None) or math.inf
    plain = [cell for cell in study.cells if not cell.attacks and cell.arm not in study.controls]
    small = [
        (found.mean, cell)
        for cell in plain
        if cell.x < study.largest
        and (cost(cell).total or 0.0) <= EQUAL * limit
        and (found := cell.stat())
    ]
    return max(small, key=lambda pair: pair[0])[1] if small else None


# Was the baseline tuned?


def tuned(study: Study) -> list[str]:
    """Trials per cell, what was chosen on which split, at the grid's edge or not; then how the other arms fared."""
    cells = [cell for cell in study.cells if cell.arm == study.baseline] or list(study.cells)
    if not any(cell.trials for cell in study.cells):
        return ["No: this sweep tuned nothing. Every arm has the settings that the spec gives."]
    verdict = "Yes." if all(cell.trials for cell in cells) else "Not everywhere."
    others = [
        cell for cell in study.cells if all(cell is not own for own in cells)
    ]  # == would compare arrays
    own = [
        sentence
        for line in dict.fromkeys(cell.line for cell in cells)
        for sentence in _choices(study, line)
    ]
    return [
        f"{verdict} {_selection(study)}",
        *own,
        *_others(study, cells, others),
        *_seed_overlap(study),
    ]


def _tune(study: Study) -> documents.Tune:
    return study.tune or documents.Tune()


def _selection(study: Study) -> str:
    """On which images and seeds the choice was made."""
    by, seeds = _tune(study).by, _tune(study).seeds
    with_seeds = f"with seed{'s' if len(seeds) != 1 else ''} {show('', seeds)}" if seeds else ""
    if by != "validation_accuracy":
        return f"But settings were chosen by {by} {with_seeds}, so the results are biased towards more trials.".strip()
    held = next(
        (
            run.config.get("data", {}).get("validation_images")
            for c in study.cells
            for run in c.runs
        ),
        None,
    )
    images = (
        f"{held} training images held out of every run" if held else "images held out of training"
    )
    return f"Settings were chosen by accuracy on {images} {with_seeds}; the test set took no part.".replace(
        " ;", ";"
    )


def _choices(study: Study, line: str) -> list[str]:
    """What one line tried and chose at each x, and where that was the edge."""
    cells = [cell for cell in study.cells if cell.line == line]
    parts = [f"{place(study, cell.x)}: {_choice(cell)}" for cell in cells]
    edges = [f"{short(cell.at_edge)} at {place(study, cell.x)}" for cell in cells if cell.at_edge]
    found = [f"{line} at {'; '.join(parts)}."]
    if edges:
        found.append(f"At the edge, so a better value may lie outside: {', '.join(edges)}.")
    elif any(cell.trials and _has_inside(cell) for cell in cells):
        found.append("No choice is at the edge of what was tried.")
    return found + _two_values(cells)


def _has_inside(cell: Cell) -> bool:
    """Whether a setting was chosen among more than two numbers, so that its choice could have been off the edge."""
    return bool(cell.chosen.keys() - set(cell.only_edges))


def short(names: Iterable[str]) -> str:
    """Settings without their section: "lr, eps"."""
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _two_values(cells: Iterable[Cell]) -> list[str]:
    names = short(name for cell in cells for name in cell.only_edges)
    return (
        [f"With two values only, which is always an edge and counted as none: {names}."]
        if names
        else []
    )


def _choice(cell: Cell) -> str:
    """e.g. "lr 2 (3 trials: 1, 2, 4)"."""
    if not cell.trials:
        return f"not tuned{_given(cell)}"
    tried = "; ".join(_tried(cell).values())
    return f"{setting_words(cell.chosen)} ({len(cell.trials)} trials: {tried})"


def _given(cell: Cell) -> str:
    return f", it uses {setting_words(cell.chosen)}" if cell.chosen else ""


def _tried(cell: Cell) -> dict[str, str]:
    names = dict.fromkeys(name for trial in cell.trials for name in trial.settings)
    return {
        name: ", ".join(
            dict.fromkeys(show(name, trial.settings.get(name)) for trial in cell.trials)
        )
        for name in names
    }


def setting_words(settings: Mapping[str, Any]) -> str:
    """e.g. "lr 2"; a dash for nothing."""
    return ", ".join(part(name, value) for name, value in settings.items()) or table.NONE


def _others(study: Study, own: list[Cell], others: list[Cell]) -> list[str]:
    if not others:
        return []
    counts = sorted({len(cell.trials) for cell in others if cell.trials})
    said = []
    untuned = [cell for cell in others if not cell.trials]
    if counts == sorted({len(cell.trials) for cell in own if cell.trials}) and len(counts) == 1:
        scope = "Every other arm" if not untuned else "The other arms that were tuned"
        said.append(f"{scope} had as many trials ({counts[0]}) at every batch.")
    elif counts:
        said.append(
            f"The other arms had {counts[0]} to {counts[-1]} trials, so the effort was not the same."
        )
    if untuned:
        source = _tune(study).tune_on
        choice = f" and use the choice made for {source}" if source else ""
        said.append(
            f"Not tuned{choice}: {'; '.join(dict.fromkeys(cell.line for cell in untuned))}."
        )
    return [*said, *_edges(study, others), *_two_values(others)] if counts else said


def _edges(study: Study, cells: list[Cell]) -> list[str]:
    """How many choices are at the edge, of those that could be elsewhere, and of which setting."""
    cells = [cell for cell in cells if _has_inside(cell)]
    found = [
        f"{short(cell.at_edge)} of {cell.line} at {place(study, cell.x)}, {setting_words(cell.chosen)}"
        for cell in cells
        if cell.at_edge
    ]
    names = f" ({'; '.join(found)})" if found else ""
    return [f"Their choices at the edge: {len(found)} of {len(cells)}{names}."] if cells else []


def _seed_overlap(study: Study) -> list[str]:
    tuning = set(_tune(study).seeds)
    both = sorted(tuning & {run.seed for cell in study.cells for run in cell.runs})
    return [f"Seeds {show('', both)} were used for tuning and are reported too."] if both else []


# Is it the attack, or just the extra images? And at equal cost?


def head(study: Study) -> list[str]:
    """Headings of :func:`rows`."""
    references = ([study.baseline] if study.baseline else []) + list(study.controls)
    return [
        "arm",
        "test accuracy, %",
        *(f"against {arm}" for arm in references),
        "cost per clean image",
        "against the best without attack at no more total cost",
    ]


def rows(study: Study) -> list[tuple[str, list[Mark]]]:
    """(line, cells) of each adversarial arm at the largest x: accuracy, differences, cost, equal-cost rival."""
    contrasts = differences(study, study.largest)
    references = ([study.baseline] if study.baseline else []) + list(study.controls)
    found = []
    for cell in study.adversarial(study.largest):
        marks = [Mark(percent(cell))]
        marks += [_contrast_mark(contrasts, cell, arm) for arm in references]
        spent = cost(cell).per_image
        marks += [
            Mark(table.NONE if spent is None else f"{spent:.3g}"),
            equal_mark(equal_cost(study, cell)),
        ]
        found.append((cell.line, marks))
    return found


def _contrast_mark(contrasts: Iterable[Contrast], cell: Cell, arm: str) -> Mark:
    chosen = [c for c in contrasts if c.cell is cell and c.reference.arm == arm]
    text = "; ".join(c.text for c in chosen) or table.NONE
    return Mark(text, chosen[0].difference.verdict if len(chosen) == 1 else "")


def equal_mark(found: EqualCost) -> Mark:
    if found.best is None or found.difference is None:
        return Mark("none was run")
    text = f"{found.best.line}: {said(found.difference, found.cell, found.best)}"
    return Mark(text, found.difference.verdict)


def attack_or_images(study: Study) -> list[str]:
    """How many adversarial arms stand out from the baseline, from every control, and after Holm's correction."""
    where, arms, called = (
        place(study, study.largest),
        study.adversarial(study.largest),
        study.called(study.largest),
    )
    contrasts = [
        c for c in differences(study, study.largest) if any(c.cell is cell for cell in arms)
    ]
    if not arms or not contrasts:
        return [
            f"Nothing to compare at {where} yet: none of the {called} has a seed in common with a reference."
        ]
    attacks = any(cell.attacks for cell in arms)
    said = [] if attacks else ["No arm attacks."]
    if study.baseline:
        own = [c for c in contrasts if c.reference.arm == study.baseline]
        unknown = _without_interval(arms, own)
        said.append(
            f"{sum(map(_above, own))} of {len(arms)} {called} are above {study.baseline} at {where}{unknown}."
        )
    if not study.controls:
        return said + (
            ["No control was run, so the attack cannot be told from the extra images."]
            if attacks
            else []
        )
    winners = [cell for cell in arms if _beats_all(study, contrasts, cell)]
    names = f": {'; '.join(cell.line for cell in winners)}" if winners else ""
    unknown = _without_interval(arms, [c for c in contrasts if c.reference.arm in study.controls])
    said.append(f"{len(winners)} of {len(arms)} are above every control{names}{unknown}.")
    said.append("“Above” means that the 95 % interval of the paired difference excludes 0.")
    return said + _corrected(study, contrasts)


def _without_interval(arms: Iterable[Cell], contrasts: Sequence[Contrast]) -> str:
    """How many arms have a comparison that no interval exists for, as the end of a sentence."""
    unknown = sum(
        any(c.cell is cell and c.difference.low is None for c in contrasts) for cell in arms
    )
    return f"; no interval for {unknown} (one seed in common, or a diverged run)" if unknown else ""


def _above(contrast: Contrast) -> bool:
    return contrast.difference.verdict == "higher"


def _beats_all(study: Study, contrasts: Iterable[Contrast], cell: Cell) -> bool:
    own = [c for c in contrasts if c.cell is cell and c.reference.arm in study.controls]
    return {c.reference.arm for c in own} == set(study.controls) and all(map(_above, own))


def _corrected(study: Study, contrasts: Iterable[Contrast]) -> list[str]:
    """What is left of the differences above after Holm's correction; nothing to say where there are none."""
    tested = sum(c.difference.p is not None for c in differences(study, study.largest))
    above = [c for c in contrasts if _above(c)]
    kept = sum(c.adjusted is not None and c.adjusted < ALPHA for c in above)
    if not above:
        return []
    after = f"after Holm's correction for all {tested} comparisons at this batch"
    if len(above) == 1:
        return [f"The one such difference {'remains' if kept else 'does not remain'} {after}."]
    return [f"Of the {len(above)} such differences, {kept} remain {after}."]


def at_equal_cost(study: Study) -> list[str]:
    """Who costs no more than the attack, and whether it does as well."""
    compared = [equal_cost(study, cell) for cell in study.adversarial(study.largest)]
    known = [found for found in compared if found.difference is not None]
    if not known:
        called = study.called(study.largest)
        return [
            f"Unknown: no other arm without an attack cost as little as the {called} compared at this batch."
        ]
    verdicts = Counter(found.difference.verdict for found in known if found.difference)
    share = max(found.share or 0.0 for found in known)
    unknown = verdicts["no interval"]
    said = [
        f"Against the best arm without an attack that costs no more in total, {verdicts['higher']} of {len(known)} "
        f"{study.called(study.largest)} are higher, {verdicts['lower']} lower, {verdicts['not distinguishable']} not "
        "distinguishable"
        f"{f', {unknown} without an interval (one seed in common, or a diverged run)' if unknown else ''}."
    ]
    if share < 0.9:
        said.append(
            f"But nobody spent as much: the dearest such arm spent {100 * share:.0f} % of it."
        )
    return [*said, COST]


COST = (
    "Cost is gradient images: views plus attack gradients per clean image. The total, which is compared, is that of "
    "the whole training."
)


def robustness(study: Study) -> str:
    """How robust accuracy was measured, from the runs' configurations; empty where it was not."""
    return words.robustness(run for cell in study.cells for run in cell.finished)


def analysed_robustness(study: Study) -> str:
    """The same of the sharpness table, from the analyses; empty where they left it out."""
    found = [
        analysis.get("robust") or {}
        for cell in study.cells
        for analysis in sharpness.measured(cell).values()
    ]
    ways = dict.fromkeys(
        words.pgd(*(one.get(name) for name in ("eps", "steps", "images"))) for one in found if one
    )
    return f"Robust accuracy: {'; '.join(ways)}." if ways else ""
