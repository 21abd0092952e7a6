"""Intervals that the pages type in their sentences, held against the records.

A difference of two arms is in the pages as "1.03 [+0.65, +1.42]", "+1.03 points [+0.65, +1.42]" or "1.40 lower [...]";
a share of a gain as "80 % [22, 167]". Every such interval has to be one of a study under results/studies/, with that
middle, and with its sign where it has one: a figure that a new record has overtaken is found. That it belongs to the
arms that the sentence names, and numbers without an interval, are for the reader of a change to check.
"""

from __future__ import annotations

import json
import re
from itertools import permutations
from pathlib import Path

import study_contrasts as contrasts

from conadv.report import table as cells
from conadv.report.stats import paired_difference

INTERVAL = re.compile(r"(?!\[0, 1\])\[[^\[\]]*\d,\s+[^\[\]]*\d\](?!\()")
MIDDLE = re.compile(r"(?P<sign>[+−]?)(?P<middle>\d+(?:\.\d+)?)(?: %)?[^\d\[\]]{0,60}$")
"""The number before an interval, with words between them."""
SHARES = {
    "cheaper-cifar10": [
        (arm, "ConAdv") for arm in ("ConAdv, share 0.25", "ConAdv, every 4th step", "recycle")
    ],
    "cifar10": [
        ("+ ConAdv, tau = 1", "small batch 50, SGD-Nesterov"),
        ("+ ConAdv, tau = 1", "+ sequential attack"),
        ("+ ConAdv, tau = 1, look-ahead", "+ sequential attack"),
    ],
}
"""Of which arm's gain over LARS which arm's share is said."""


def figures(studies: Path) -> set[tuple[str, str]]:
    """(middle, interval) of every paired difference within a study, and of the SHARES."""
    said = []
    for file in sorted(studies.glob("*/summary.json")):
        summary = json.loads(file.read_text())
        for on in (contrasts.TEST, contrasts.HELD_OUT):
            arms = [
                {int(seed): value for seed, value in one[on]["values"].items()}
                for one in summary["cells"]
                if one.get(on)
            ]
            said += [
                cells.difference(paired_difference(arm, other))
                for arm, other in permutations(arms, 2)
            ]
        said += [contrasts.share(summary, *pair) for pair in SHARES.get(file.parent.name, ())]
    return set(map(_halves, said))


def _halves(text: str) -> tuple[str, str]:
    middle, _, rest = text.partition(" [")
    return middle.removesuffix(" %"), f"[{rest}"


def unknown(text: str, known: set[tuple[str, str]]) -> list[str]:
    """The typed intervals of ``text`` that are in no record, or stand behind no number."""
    return [
        said for interval in INTERVAL.finditer(text) if (said := _unknown(text, interval, known))
    ]


def _unknown(text: str, found: re.Match[str], known: set[tuple[str, str]]) -> str:
    interval = " ".join(found[0].split())
    before = MIDDLE.search(text[: found.start()])
    if before is None:
        return interval
    signs = [before["sign"]] if before["sign"] else ["", "+", cells.MINUS]
    in_records = any((sign + before["middle"], interval) in known for sign in signs)
    return "" if in_records else f"{before['sign']}{before['middle']} {interval}"
