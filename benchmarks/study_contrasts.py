"""Comparisons that a page asks for and a report does not make, from the accuracies by seed in a summary.json."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from scipy.special import stdtrit  # type: ignore[import-untyped]

from conadv.report import table as cells
from conadv.report.stats import Difference, holm, paired_difference

Json = dict[str, Any]
Accuracies = Mapping[int, float]
Table = tuple[list[str], list[list[str]]]

# What results/studies/win-cifar10 was run for (docs/results/win.md says when they were named).
PRIMARY = (
    *(("LARS + ConAdv", "LARS"), ("LAMB + ConAdv", "LAMB")),
    *(("LARS + ConAdv", "LARS + random-sign noise"), ("LAMB + ConAdv", "LAMB + random-sign noise")),
)
TEST, HELD_OUT = "test_accuracy", "validation_accuracy"
TARGET = 0.8
"""Which share of the attack's gain a cheaper attack should keep."""


def cell(summary: Json, arm: str, batch: int | None = None) -> Json:
    """The only cell of ``arm``, or its cell at ``batch``."""
    every: list[Json] = [one for one in summary["cells"] if one["arm"] == arm]
    found = (
        every
        if batch is None
        else [one for one in every if one["settings"]["global_batch_size"] == batch]
    )
    if len(found) != 1:
        raise SystemExit(f"{len(found)} cells of the arm {arm!r}, wanted one.")
    return found[0]


def accuracies(summary: Json, arm: str, batch: int | None = None, on: str = TEST) -> Accuracies:
    """seed -> accuracy in [0, 1], ``on`` the images of TEST or of HELD_OUT."""
    return {int(seed): value for seed, value in cell(summary, arm, batch)[on]["values"].items()}


def paired(
    summary: Json, arm: str, reference: str, batch: int | None = None, on: str = TEST
) -> Difference | None:
    return paired_difference(
        accuracies(summary, arm, batch, on), accuracies(summary, reference, batch, on)
    )


def percent(summary: Json, arm: str, batch: int | None = None, on: str = TEST) -> str:
    """Mean and standard deviation over seeds in percent, without the latter for a single seed."""
    stat = cell(summary, arm, batch)[on]
    if stat is None:
        return cells.NONE
    spread = "" if stat["std"] is None else f" ± {100 * stat['std']:.2f}"
    return f"{100 * stat['mean']:.2f}{spread}"


def points(summary: Json, arm: str, reference: str) -> str:
    """The paired difference with its 95 % interval in points."""
    return cells.difference(paired(summary, arm, reference))


def held_out(summary: Json) -> Table:
    """Every arm of a study at one batch on the images held out of its training, beside its test accuracy."""
    base = cell(summary, summary["baseline"])["cost"]["total"]
    references = [summary["baseline"], *summary["controls"]]
    rows = []
    for own in summary["cells"]:
        arm = own["arm"]
        against = [
            cells.NONE
            if arm == other
            else cells.difference(paired(summary, arm, other, on=HELD_OUT))
            for other in references
        ]
        accuracy = [percent(summary, arm, on=images) for images in (HELD_OUT, TEST)]
        rows.append([arm, f"{own['cost']['total'] / base:.3g}", *accuracy, *against])
    head = [
        "arm",
        f"gradient images, times {summary['baseline']}'s",
        "held-out accuracy, %",
        "test accuracy, %",
    ]
    return head + [f"against {other.removeprefix('+ ')}, held-out" for other in references], rows


def primary(summary: Json) -> Table:
    """The PRIMARY comparisons on held-out images, with Holm's correction over all of them, beside the test images."""
    found = [paired(summary, *pair, on=HELD_OUT) for pair in PRIMARY]
    p = [one.p for one in found if one is not None and one.p is not None]
    if len(p) != len(PRIMARY):
        raise SystemExit("A primary comparison has no p.")
    rows = [
        [
            arm,
            other,
            cells.difference(one),
            f"{raw:.2g}",
            f"{adjusted:.2g}",
            points(summary, arm, other),
        ]
        for (arm, other), one, raw, adjusted in zip(PRIMARY, found, p, holm(p), strict=True)
    ]
    return ["arm", "minus", "held-out images, points", "p", "p, Holm", "test images, points"], rows


def gain(summary: Json, whole: str, rival: tuple[str, Accuracies], base: str = "LARS") -> Table:
    """What each cheaper attack keeps of the gain of ``whole``, with the interval of that share.

    ``rival``: the name and the accuracies by seed of an arm of another study with the same settings and seeds.
    """
    spent = cell(summary, base)["cost"]["total"]
    full = _gains(summary, whole, base)
    rows = []
    for arm in (
        one["arm"] for one in summary["cells"] if "onAdv" in one["arm"] or one["arm"] == "recycle"
    ):
        kept = None if arm == whole else ratio_interval(_gains(summary, arm, base), full)
        text = "100 %" if arm == whole else share(summary, arm, whole, base)
        reached = (
            "–"
            if kept is None
            else "yes"
            if kept[0] >= TARGET
            else "no"
            if kept[1] < TARGET
            else "cannot be told"
        )
        cost = cell(summary, arm)["cost"]["total"] / spent
        above = cells.difference(paired_difference(accuracies(summary, arm), rival[1]))
        rows.append([arm, f"{cost:.3g}", points(summary, arm, base), text, reached, above])
    head = [
        "arm",
        f"gradient images, times {base}'s",
        f"gain over {base}",
        "share of the gain kept [95 %]",
    ]
    return [*head, f"at least {100 * TARGET:.0f} %?", f"against {rival[0]}"], rows


def share(summary: Json, part: str, whole: str, base: str = "LARS") -> str:
    """The share of the gain of ``whole`` over ``base`` that ``part`` has: "80 % [22, 167]", the interval Fieller's."""
    above, below = _gains(summary, part, base), _gains(summary, whole, base)
    low, high = ratio_interval(above, below)
    middle = 100 * statistics.fmean(above) / statistics.fmean(below)
    return f"{middle:.0f} % [{_whole_percent(low)}, {_whole_percent(high)}]"


def _gains(summary: Json, arm: str, base: str) -> list[float]:
    own, other = accuracies(summary, arm), accuracies(summary, base)
    return [own[seed] - other[seed] for seed in sorted(own.keys() & other.keys())]


def _whole_percent(value: float) -> str:
    """Without the digits of what only says that nothing is known."""
    return (
        f"below {cells.MINUS}100" if value < -1 else f"{100 * value:.0f}".replace("-", cells.MINUS)
    )


def ratio_interval(above: list[float], below: list[float]) -> tuple[float, float]:
    """The 95 % interval of mean(above) / mean(below), of pairs: all r for which the mean of above - r * below may be 0.

    E. C. Fieller, "Some problems in interval estimation", J. R. Statist. Soc. B 16 (1954). Raises SystemExit where the
    interval has no ends, since mean(below) itself may be 0.
    """
    n = len(above)
    factor = float(stdtrit(n - 1, 0.975)) ** 2 / n
    a = statistics.fmean(below) ** 2 - factor * statistics.variance(below)
    b = statistics.fmean(above) * statistics.fmean(below) - factor * statistics.covariance(
        above, below
    )
    c = statistics.fmean(above) ** 2 - factor * statistics.variance(above)
    if a <= 0:
        raise SystemExit(
            "The whole gain may be 0, so that no share of it has an interval with ends."
        )
    half = math.sqrt(max(b * b - a * c, 0.0)) / a
    return b / a - half, b / a + half


PREDICTORS = ("momentum", "last update", "momentum and gradient")


def predictors(summary: Json, arm: str = "+ ConAdv") -> tuple[Table, str]:
    """Look-ahead against stale weights, and predictors against momentum, at each tau; and what Holm leaves of it."""
    taus = sorted(
        {
            int(one["arm"].split("tau = ")[1].split(",")[0])
            for one in summary["cells"]
            if "tau = " in one["arm"]
        }
    )
    pairs = [(by, "") for by in PREDICTORS] + [(by, PREDICTORS[0]) for by in PREDICTORS[1:]]

    def name(tau: int, by: str) -> str:
        return f"{arm}, tau = {tau}" + (f", {by}" if by else "")

    rows = [
        [f"{tau}", *(points(summary, name(tau, a), name(tau, b)) for a, b in pairs)] for tau in taus
    ]
    tests = [
        paired_difference(accuracies(summary, name(tau, a)), accuracies(summary, name(tau, b)))
        for tau in taus
        for a, b in pairs
    ]
    known = [test.p for test in tests if test is not None and test.p is not None]
    apart = sum(p < 0.05 for p in known)
    left = sum(p < 0.05 for p in holm(known))
    said = f"Of these {len(known)} differences {apart} have an interval without 0; {left} remain after Holm's correction."
    return (["tau", *(f"{a} − {b or 'stale'}" for a, b in pairs)], rows), said
