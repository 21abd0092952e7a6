"""Sharpness of single runs: what is published of it, and what it says of flatness and accuracy together."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from scipy.special import stdtrit  # type: ignore[import-untyped]
from scipy.stats import spearmanr  # type: ignore[import-untyped]

Json = dict[str, Any]
Table = tuple[list[str], list[list[str]]]
FILE = "analysis.jsonl"
MEASURES = {
    "eigenvalue": "largest Hessian eigenvalue",
    "trace": "Hessian trace",
    "sam": "SAM sharpness",
    "keskar": "Keskar sharpness",
}


def line(run: Path, arm: str, seed: int) -> Json:
    """What analysis.json has in single numbers. ``test_accuracy`` is of the checkpoint that was analysed."""
    found = json.loads((run / "analysis.json").read_text())
    along = found["landscape_1d"]
    here = along["test_accuracy"][along["alphas"].index(0.0)] if along else None
    numbers = {
        name: found[name]
        for name in ("at_loss", "step", "newest_step", "images", "loss", "accuracy")
    }
    final = json.loads((run / "summary.json").read_text())["test_accuracy"]
    return {
        "run": run.name,
        "arm": arm,
        "seed": seed,
        **numbers,
        "test_accuracy": here,
        "final_test_accuracy": final,
        "eigenvalue": found["hessian"]["eigenvalues"][0],
        "trace": found["hessian"]["trace"],
        **{name: found["sharpness"][name]["value"] for name in ("sam", "keskar")},
    }


def lines(sweep: Path) -> list[Json]:
    """A line for every analysed confirmation run of a sweep."""
    document = json.loads((sweep / "sweep.json").read_text())
    runs = [
        (sweep / name, cell["arm"], seed)
        for cell in document["cells"]
        for name, seed in zip(cell["runs"], cell["seeds"], strict=True)
    ]
    return [line(run, arm, seed) for run, arm, seed in runs if (run / "analysis.json").is_file()]


def read(study: Path) -> list[Json]:
    return [json.loads(text) for text in (study / FILE).read_text().splitlines()]


def ranks(found: list[Json], without: str) -> Table:
    """Spearman's correlation over the arms of mean accuracy with the mean logarithm of each measure.

    Below 0 the flatter arms are the more accurate, which is what the flatter-minimum story says. Four times: with the
    accuracy of the finished runs, and with the accuracy of the checkpoints analysed; each with and without ``without``.
    """
    every = _by_arm(found)
    fewer = {arm: runs for arm, runs in every.items() if arm != without}
    rows = []
    for name, title in MEASURES.items():
        asked = [
            (arms, when)
            for when in ("final_test_accuracy", "test_accuracy")
            for arms in (every, fewer)
        ]
        rows.append([title, *(_correlation(arms, name, accuracy) for arms, accuracy in asked)])
    head = ["rank correlation (p) of test accuracy with", "finished runs", f"without {without}"]
    return [*head, "the same checkpoints", f"without {without}"], rows


def ratios(found: list[Json], base: str = "LARS") -> Table:
    """How many times flatter than ``base``: geometric mean over paired seeds with its 95 % interval (t, of logs)."""
    arms = _by_arm(found)
    names = ("eigenvalue", "trace")
    rows = [
        [arm, *(_ratio(arms[base], runs, name) for name in names)]
        for arm, runs in arms.items()
        if arm != base
    ]
    return ["arm", *(f"{base}'s {MEASURES[name]} over its own" for name in names)], rows


def _by_arm(found: list[Json]) -> dict[str, list[Json]]:
    arms: dict[str, list[Json]] = defaultdict(list)
    for one in found:
        arms[one["arm"]].append(one)
    return dict(arms)


def _correlation(arms: dict[str, list[Json]], name: str, accuracy: str) -> str:
    sharp = [statistics.fmean(math.log(run[name]) for run in runs) for runs in arms.values()]
    reached = [statistics.fmean(run[accuracy] for run in runs) for runs in arms.values()]
    test = spearmanr(reached, sharp)
    p = f"{test.pvalue:.2f}" if test.pvalue >= 0.005 else "< 0.01"
    return f"{test.statistic:+.2f} ({p})".replace("-", "−")


def _ratio(base: list[Json], runs: list[Json], name: str) -> str:
    own = {run["seed"]: math.log(run[name]) for run in runs}
    logs = [math.log(run[name]) - own[run["seed"]] for run in base if run["seed"] in own]
    mean, spread = statistics.fmean(logs), statistics.stdev(logs) / math.sqrt(len(logs))
    half = float(stdtrit(len(logs) - 1, 0.975)) * spread
    low, middle, high = (f"{math.exp(value):.2g}" for value in (mean - half, mean, mean + half))
    return f"{middle} [{low}, {high}]"
