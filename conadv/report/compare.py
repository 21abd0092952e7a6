"""Runs -> arms -> comparison: pure functions, no files, no drawing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from conadv.errors import ConadvError, printable, unknown
from conadv.report.load import Run
from conadv.report.settings import Settings, choices, effective, labels, varying
from conadv.report.stats import Difference, Stat, paired_difference, stat

# Name here -> name in a run's summary.json. Accuracies and shares in [0, 1], times in seconds.
METRICS = {
    "test_accuracy": "test_accuracy",
    "robust_accuracy": "robust_accuracy",
    "train_accuracy": "train_accuracy",
    "step_seconds": "step_seconds_median",
    "train_seconds": "seconds",
    "attack_share": "attack_seconds_share",
}


@dataclass(frozen=True)
class Staleness:
    """Weight versions of one arm's adversarial batches, over all its steps.

    ``configured``: tau of the method, None if unknown. ``measured``: staleness -> number of steps. ``unexpected``:
    steps with another staleness than tau; the first tau steps are not counted, nothing older exists for them.
    """

    configured: int | None
    measured: Mapping[int, int]
    unexpected: int


@dataclass(frozen=True)
class Arm:
    """Runs that differ only by seed, one per seed, in the order of the seeds.

    Only finished runs enter ``metrics`` and ``difference`` (test accuracy minus the baseline's).
    ``replaced`` holds runs that repeat the arm and seed of a run in ``runs`` and are not used.
    """

    label: str
    settings: Settings
    runs: tuple[Run, ...]
    replaced: tuple[Run, ...]
    metrics: Mapping[str, Stat | None]
    difference: Difference | None = None
    staleness: Staleness | None = None
    mixed: tuple[str, ...] = ()

    @property
    def finished(self) -> tuple[Run, ...]:
        return tuple(run for run in self.runs if run.finished)

    @property
    def unfinished(self) -> tuple[Run, ...]:
        return tuple(run for run in self.runs if not run.finished)

    def median(self, metric: str) -> float | None:
        value = self.metrics[metric]
        return value.median if value else None


@dataclass(frozen=True)
class Comparison:
    """Everything a report says. ``baseline`` is one of ``arms``.

    ``common``: flat settings with the one value they have in all arms that use them; ``differing``: the others' names.
    """

    arms: tuple[Arm, ...]
    baseline: Arm
    common: Settings
    differing: tuple[str, ...]

    @property
    def runs(self) -> tuple[Run, ...]:
        """Every run, those that are not used included."""
        return tuple(run for arm in self.arms for run in (*arm.runs, *arm.replaced))


def compare(
    runs: Sequence[Run], names: Mapping[str, str] | None = None, baseline: str | None = None
) -> Comparison:
    """Group ``runs`` into arms and compare every arm's test accuracy with the baseline's, paired by seed.

    names: run folder -> name of its arm, for callers that know what they compare; other runs are grouped by their
    settings. baseline: an arm's label; None takes the vanilla arm with the largest global batch, or the first arm.
    Raises ConadvError without runs, for a name of a folder that is no run given, and for an unknown baseline.
    """
    if not runs:
        raise ConadvError(
            "There is no run to report. Give run folders, or folders that contain runs."
        )
    arms = _arms(runs, names or {})
    chosen = _choose_baseline(arms, baseline)
    values = _values(chosen, "test_accuracy")
    compared = [
        arm
        if arm is chosen
        else _with(arm, paired_difference(_values(arm, "test_accuracy"), values))
        for arm in arms
    ]
    settings = [arm.settings for arm in arms]
    differing = choices(settings)
    used = {name: value for arm in settings for name, value in arm.items() if value is not None}
    common = {name: value for name, value in used.items() if name not in differing}
    return Comparison(tuple(compared), chosen, common, tuple(differing))


def _with(arm: Arm, difference: Difference | None) -> Arm:
    return Arm(**{**vars(arm), "difference": difference})


def _values(arm: Arm, metric: str) -> Mapping[int, float]:
    value = arm.metrics[metric]
    return value.values if value else {}


def _arms(runs: Sequence[Run], names: Mapping[str, str]) -> list[Arm]:
    """Arms in the order of their first run."""
    given = _resolve_names(runs, names)
    groups: dict[str, list[Run]] = {}
    for run in runs:
        key = given.get(run.path.resolve()) or repr(
            sorted(_settings(run).items(), key=lambda item: item[0])
        )
        groups.setdefault(key, []).append(run)
    members = list(groups.values())
    automatic = labels([_settings(group[0]) for group in members])
    found: list[Arm] = []
    for group, label in zip(members, automatic, strict=True):
        name = given.get(group[0].path.resolve())
        found.append(
            _arm(name or _unused(label, {*given.values(), *(arm.label for arm in found)}), group)
        )
    return found


def _settings(run: Run) -> Settings:
    return effective(run.config, run.ranks)


def _resolve_names(runs: Sequence[Run], names: Mapping[str, str]) -> dict[Path, str]:
    known = {run.path.resolve() for run in runs}
    given = {Path(folder).resolve(): name for folder, name in names.items()}
    for folder, name in given.items():
        if folder not in known:
            raise ConadvError(
                f"The arm name {name!r} is for {printable(folder)}, which is not among the runs of this report."
            )
        if not name.strip():
            raise ConadvError(
                f"The arm name for {printable(folder)} is empty. Give it a name, or leave it out."
            )
    return given


def _unused(label: str, taken: Collection[str]) -> str:
    while label in taken:
        label += " (other settings)"
    return label


def _arm(label: str, group: Sequence[Run]) -> Arm:
    chosen: dict[int, Run] = {}
    for run in sorted(group, key=lambda run: (run.finished, run.started)):
        chosen[run.seed] = run
    used = tuple(chosen[seed] for seed in sorted(chosen))
    settings = [_settings(run) for run in group]
    return Arm(
        label=label,
        settings=_settings(used[0]),
        runs=used,
        replaced=tuple(run for run in group if all(run is not kept for kept in used)),
        metrics={name: stat(_metric(used, key)) for name, key in METRICS.items()},
        staleness=_staleness(used),
        mixed=tuple(varying(settings)),
    )


def _metric(runs: Sequence[Run], key: str) -> dict[int, float]:
    found = {run.seed: (run.summary or {}).get(key) for run in runs}
    return {
        s: float(value)
        for s, value in found.items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    }


def _choose_baseline(arms: Sequence[Arm], label: str | None) -> Arm:
    if label is not None:
        match = next((arm for arm in arms if arm.label == label), None)
        if match is None:
            raise unknown("baseline arm", label, [arm.label for arm in arms])
        return match
    vanilla = [arm for arm in arms if arm.settings.get("method") == "vanilla"]
    return max(vanilla or arms[:1], key=lambda arm: arm.settings.get("global_batch_size") or 0)


_BY_CONSTRUCTION = {"disadv": 0, "recycle": 1}


def _configured(run: Run) -> int | None:
    """tau: what the staleness of an adversarial batch should be; None where nothing says."""
    tau = run.config.get("staleness")
    return tau if isinstance(tau, int) else _BY_CONSTRUCTION.get(str(run.config.get("method")))


def _staleness(runs: Sequence[Run]) -> Staleness | None:
    """None for an arm whose steps name no weight version."""
    counts: Counter[int] = Counter()
    unexpected = 0
    for run in runs:
        if "weight_version" not in run.steps:
            continue
        made = ~np.isnan(run.steps["weight_version"])  # null where no weights made the batch
        steps = run.steps["step"][made]
        measured = steps - run.steps["weight_version"][made]
        counts.update(map(int, measured))
        if (tau := _configured(run)) is not None:
            unexpected += int(np.sum((measured != tau) & (steps >= tau)))
    return (
        Staleness(_configured(runs[0]), dict(sorted(counts.items())), unexpected)
        if counts
        else None
    )
