"""Intervals that the pages type in their sentences, held against the records.

A difference of two arms is in the pages as "1.03 [+0.65, +1.42]", "+1.03 points [+0.65, +1.42]" or "1.40 lower [...]";
a share of a gain as "80 % [22, 167]". Every such interval has to be one of a study under results/studies/, with that
middle: a figure that a new record has overtaken is found.
"""

from __future__ import annotations

import json
import re
from itertools import permutations
from pathlib import Path

import study_contrasts as contrasts

from conadv.report import table as cells
from conadv.report.stats import paired_difference

TYPED = re.compile(r"(?P<middle>\d+(?:\.\d+)?)(?: %|(?: \w+){1,3})?\s+(?P<interval>\[[^\]]*\d\])(?!\()")
SHARES = {
    "cheaper-cifar10": [(arm, "ConAdv") for arm in ("ConAdv, share 0.25", "ConAdv, every 4th step", "recycle")],
    "cifar10": [
        ("+ ConAdv, tau = 1", "small batch 50, SGD-Nesterov"),
        ("+ ConAdv, tau = 1", "+ sequential attack"),
        ("+ ConAdv, tau = 1, look-ahead", "+ sequential attack"),
    ],
}
"""Of which arm's gain over LARS which arm's share is said."""


def figures(studies: Path) -> set[tuple[str, str]]:
    """(middle without its sign, interval) of every paired difference within a study, and of the SHARES."""
    said = []
    for file in sorted(studies.glob("*/summary.json")):
        summary = json.loads(file.read_text())
        arms = [
            {int(seed): value for seed, value in one["test_accuracy"]["values"].items()}
            for one in summary["cells"]
            if one["test_accuracy"]
        ]
        said += [cells.difference(paired_difference(arm, other)) for arm, other in permutations(arms, 2)]
        said += [contrasts.share(summary, *pair) for pair in SHARES.get(file.parent.name, ())]
    return {(middle.lstrip(f"+{cells.MINUS}").removesuffix(" %"), f"[{rest}") for middle, rest in map(_halves, said)}


def _halves(text: str) -> tuple[str, str]:
    middle, _, rest = text.partition(" [")
    return middle, rest


def unknown(text: str, known: set[tuple[str, str]]) -> list[str]:
    """The typed intervals of ``text`` that are in no record."""
    found = [(mark["middle"], " ".join(mark["interval"].split())) for mark in TYPED.finditer(text)]
    return [" ".join(one) for one in found if one not in known]
