"""The tables of a report: DataFrames of text, the same for HTML, Markdown and the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd

from conadv.analysis.staleness import table as probe_table
from conadv.config.schema import flatten
from conadv.errors import printable
from conadv.report.comparison import Arm, Comparison
from conadv.report.settings import part, show, varying
from conadv.report.sharpness import measured

NONE, MINUS = "–", "−"
Columns = Mapping[str, Callable[[Arm], str]]


def table(rows: Sequence[Mapping[str, str]]) -> pd.DataFrame:
    """A row per mapping; columns that hold nothing are left out."""
    named = [{printable(name): cell for name, cell in row.items()} for row in rows]
    frame = pd.DataFrame(named, dtype=object).fillna(NONE)
    return frame.loc[:, (frame != NONE).any()]


def arm_table(c: Comparison, columns: Columns) -> pd.DataFrame:
    """A row per arm; empty where no arm has anything in ``columns``."""
    frame = table([c.row(a) | {name: text(a) for name, text in columns.items()} for a in c.arms])
    return frame if set(columns) & set(frame) else pd.DataFrame()


def number(value: float, form: str) -> str:
    return NONE if math.isnan(value) else format(value, form).replace("-", MINUS)


def spread(values: pd.Series, form: str = ".3g") -> str:
    """Mean and sample standard deviation."""
    mean = number(values.mean(), form)
    return f"{mean} ± {values.std():{form}}" if len(values) > 1 else mean


def percent(arm: Arm, metric: str = "test_accuracy") -> str:
    """Mean and standard deviation in percent, or how many runs diverged."""
    return arm.divergence or spread(100 * arm.values(metric), ".2f")


def points(arm: Arm, other: Arm | None, metric: str = "test_accuracy") -> str:
    """The paired difference in points with its interval, or which of the two diverged."""
    found = other and arm.minus(other, metric)
    if not other or not found:
        return NONE
    if broken := [f"{one.name}: {one.divergence}" for one in (arm, other) if one.diverged]:
        return "; ".join(broken)
    mean, low, high = (number(100 * (x or 0), "+.2f") for x in found[1:4])
    if found.low == found.high:
        return f"{mean} ({'1 pair' if found.n == 1 else 'all pairs alike'})"
    return f"{mean} [{low}, {high}]"


def per_image(arm: Arm) -> str:
    """Gradient images per clean image."""
    return number(arm.medians.gradient_images_per_clean_image, ".3g")


def duration(seconds: float) -> str:
    """Seconds with a unit and three significant digits: 12.3 ms, 4.56 s, 78.9 min, 12.3 h."""
    units = ((1, "ms", 1e-3), (120, "s", 1), (7200, "min", 60), (math.inf, "h", 3600))
    unit, size = next(((u, s) for limit, u, s in units if seconds < limit), ("", 1))
    return NONE if math.isnan(seconds) else f"{format(seconds / size, '#.3g').rstrip('.')} {unit}"


def accuracy(c: Comparison, metric: str = "test_accuracy") -> pd.DataFrame:
    """All accuracies; the difference to the baseline and the order of columns go by ``metric``."""
    names = {"test": "test", "validation": "held-out", "robust": "robust", "train": "train"}
    own: dict[str, Callable[[Arm], str]] = {
        f"{name}_accuracy": partial(percent, metric=f"{name}_accuracy") for name in names
    }
    columns: dict[str, Callable[[Arm], str]] = {
        metric: own[metric],
        "against the baseline": lambda a: points(a, c.baseline(a), metric),
        "cost": per_image,
        "seeds": lambda a: f"{len(a.results)} of {a.planned}" if a.unfinished else f"{a.planned}",
        **own,
        "test loss": lambda a: NONE if a.diverged else spread(a.values("test_loss"), ".3f"),
    }
    shown = {f"{name}_accuracy": f"{said} accuracy, %" for name, said in names.items()}
    return arm_table(c, {shown.get(name, name): text for name, text in columns.items()})


def differences(
    c: Comparison, pairs: Collection[tuple[str, str]] = (), metric: str = "test_accuracy"
) -> pd.DataFrame:
    rows = []
    for arm, other, found, holm in c.contrasts(pairs, metric):
        known = [(x and (f"{x:.3f}" if x > 5e-4 else "< 0.001")) or NONE for x in (found.p, holm)]
        row = {"minus": other.name, "pairs": f"{found.n}", "points": points(arm, other, metric)}
        rows.append(c.row(arm) | row | dict(zip(("p", "p, Holm"), known, strict=True)))
    return table(rows)


def costs(c: Comparison) -> pd.DataFrame:
    def slower(arm: Arm) -> str:
        base = (c.baseline(arm) or arm).medians.step_seconds_median
        return number(arm.medians.step_seconds_median / base, ".2f")

    def rival(arm: Arm) -> str:
        best = c.equal_cost(arm) if arm.attacks else None
        return f"{best.name}: {points(arm, best)}" if best else NONE

    columns: Columns = {
        "gradient images per image": per_image,
        "of the whole training": lambda a: number(a.medians.gradient_images, ",.0f"),
        "step time": lambda a: duration(a.medians.step_seconds_median),
        "times the baseline's": slower,
        "training time": lambda a: duration(a.medians.seconds),
        "attack's share, %": lambda a: number(100 * a.medians.attack_seconds_share, ".0f"),
        "best without attack at no more cost": rival,
    }
    return arm_table(c, columns)


def tuning(c: Comparison) -> pd.DataFrame:
    def words(settings: Mapping[str, Any]) -> str:
        return ", ".join(part(name, value) for name, value in settings.items())

    def trials(arm: Arm) -> str:
        means = ["failed" if t.mean is None else f"{100 * t.mean:.2f}" for t in arm.trials]
        tried = zip((words(t.settings) for t in arm.trials), means, strict=True)
        return " · ".join(map(": ".join, tried)) or NONE

    columns: Columns = {
        "chosen": lambda a: words(a.chosen) or NONE,
        "choice is": lambda a: a.edge if a.chosen else NONE,
        "held-out accuracy of every trial, %": trials,
    }
    return arm_table(c, columns)


def sharpness(c: Comparison) -> pd.DataFrame:
    rows = [(arm, found) for arm in c.arms if len(found := measured(arm))]
    means = [c.row(arm) | {n: spread(found[n].dropna()) for n in found} for arm, found in rows]
    return table(means)


def staleness(c: Comparison) -> pd.DataFrame:
    """The age in steps of the weights behind each step's adversarial images."""

    def ages(arm: Arm) -> str:
        steps = [run.steps for run in arm.runs if "weight_version" in run.steps]
        age = [age for s in steps for age in (s["step"] - s["weight_version"]).dropna()]
        shares = pd.Series(age, dtype=float).value_counts(normalize=True).sort_index()
        return ", ".join(f"{age:.0f}: {100 * share:.1f} %" for age, share in shares.items()) or NONE

    return arm_table(c, {"staleness: share of steps": ages})


def probes(c: Comparison) -> pd.DataFrame:
    """What the staleness probe found: means over the probes of all runs of an arm."""
    rows: dict[tuple[Any, ...], dict[str, str]] = {}
    names = {"kept": "loss increase", "relative_error": "prediction error"}
    for arm in c.arms:
        found_of_arm = probe_table(line for run in arm.runs for line in run.probes)
        for found in found_of_arm.to_dict("records"):
            start = c.row(arm) | {"tau": f"{found['tau']}", "predictor": found["predictor"]}
            row = rows.setdefault(tuple(start.values()), start) if found["tau"] else {}
            for field, name in names.items():
                row[f"{name}, %, {found['phase']}"] = number(100 * found[field], ".0f")
    return table([*rows.values()])


def settings(c: Comparison) -> pd.DataFrame:
    """The settings that differ between the arms, each at its largest x."""
    arms = {name: arm.runs[0].settings for name, arm in c.latest.items() if arm.runs}
    names = varying(list(arms.values()))
    return table([{"setting": n} | {a: show(n, s.get(n)) for a, s in arms.items()} for n in names])


def runs(c: Comparison) -> pd.DataFrame:
    rows = []
    for arm, run in ((a, run) for a in c.arms for run in a.runs):
        reached = number(100 * arm.values().get(run.seed, math.nan), ".2f")
        row = {"seed": f"{run.seed}", "test accuracy, %": reached, "status": run.status}
        rows.append(c.row(arm) | row | {"folder": run.path.name})
    return table([*rows, *({"status": f"failed: {f.error}", "folder": f.run} for f in c.failed)])


def origin(c: Comparison) -> pd.DataFrame:
    """Machines, versions and commits of the runs."""
    kept = ("machine.", "versions.", "version", "git.")
    headers = [flatten(run.header) for arm in c.arms for run in arm.runs]
    made = [{k: f"{v}" for k, v in found.items() if k.startswith(kept)} for found in headers]
    return table([*{f"{one}": one for one in made}.values()])
