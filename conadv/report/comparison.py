"""Arms to compare: from run directories, from a sweep's folder, or from published records."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from conadv.errors import ConadvError, printable, unknown
from conadv.report.load import RECORD, Run, load_run
from conadv.report.settings import attacks, labels, part
from conadv.report.stats import Difference, holm, paired_difference
from conadv.safe_io import inside
from conadv.sweep.choose import at_edge, only_edges
from conadv.training import documents

SWEEP, BATCH = "sweep.json", "global_batch_size"
RESULTS = (
    *("test_accuracy", "validation_accuracy", "train_accuracy", "robust_accuracy", "test_loss"),
    *("seconds", "step_seconds_median", "attack_seconds_share", "steps", BATCH),
    "gradient_images_per_clean_image",
)
EQUAL_COST = 1.005  # schedules round to whole steps, so costs this close count as equal


@dataclass(frozen=True, eq=False)
class Arm:
    """Runs that differ by their seed alone, at one point of the axis.

    results: a row per finished run, indexed by seed; columns RESULTS (fields of summary.json:
    accuracies in [0, 1], times in seconds) and ``gradient_images`` of the whole training. role:
    baseline, control or tested. x: the value on the axis, None without one. grid: the values of all
    axes. edge: where the choice of tuned settings lies in what was tried. repeats: runs that are
    not used, since a later one has their seed.
    """

    name: str
    results: pd.DataFrame
    method: str
    runs: Sequence[Run] = ()
    planned: int = 0
    diverged: int = 0
    role: str = "tested"
    x: float | None = None
    grid: Mapping[str, Any] = field(default_factory=dict)
    trials: Sequence[documents.Trial] = ()
    chosen: Mapping[str, Any] = field(default_factory=dict)
    edge: str = ""
    repeats: int = 0

    @property
    def attacks(self) -> bool:
        return attacks(self.method)

    @property
    def unfinished(self) -> int:
        return self.planned - len(self.results)

    @property
    def divergence(self) -> str:
        """What stands in place of a mean; empty where no run diverged."""
        return f"{self.diverged} of {self.planned} diverged" if self.diverged else ""

    @property
    def medians(self) -> pd.Series:
        """Over the seeds, of every column of ``results``; NaN for what is unknown."""
        return self.results.median()

    def values(self, metric: str = "test_accuracy") -> pd.Series:
        """One value per seed."""
        return self.results[metric].dropna()

    def mean(self) -> float:
        """Of test accuracy; NaN where a run diverged: the other seeds would be the lucky ones."""
        return math.nan if self.diverged else float(self.results["test_accuracy"].mean())

    def minus(self, other: Arm, metric: str = "test_accuracy") -> Difference | None:
        """The paired difference; without interval and p where a run of either diverged."""
        found = paired_difference(self.values(metric), other.values(metric))
        broken = found and (self.diverged or other.diverged)
        return Difference(found.n, found.mean) if found and broken else found

    def comparable(self, other: Arm) -> bool:
        """Whether the two are at the same point of the axes that both have."""
        both = self.grid.keys() & other.grid.keys()
        return self.x == other.x and all(self.grid[name] == other.grid[name] for name in both)


@dataclass(frozen=True)
class Comparison:
    """Everything that a report shows: arms in the order of ``axis``, a setting, or without one."""

    title: str
    arms: Sequence[Arm]
    axis: str | None = None
    failed: Sequence[documents.Failure] = ()

    @property
    def points(self) -> list[float | None]:
        """The values on the axis, ascending."""
        return list(dict.fromkeys(arm.x for arm in self.arms))

    def at(self, x: float | None) -> list[Arm]:
        return [arm for arm in self.arms if arm.x == x]

    @property
    def latest(self) -> dict[str, Arm]:
        """The arm of each name at its largest x."""
        return {arm.name: arm for arm in self.arms}

    def place(self, x: float | None) -> str:
        """A point of the axis in words, e.g. "batch 500"; empty without an axis."""
        return part(self.axis, f"{x:,g}") if self.axis else ""

    def row(self, arm: Arm) -> dict[str, str]:
        """The first cells of an arm's row in a table."""
        place, _, x = self.place(arm.x).rpartition(" ")
        return ({place: x} if len(self.points) > 1 else {}) | {"arm": arm.name}

    def baseline(self, arm: Arm) -> Arm | None:
        """The baseline that ``arm`` is compared with; None for a baseline itself."""
        found = (b for b in self.arms if b.role == "baseline" != arm.role and arm.comparable(b))
        return next(found, None)

    def contrasts(
        self, pairs: Collection[tuple[str, str]] = (), metric: str = "test_accuracy"
    ) -> Iterable[tuple[Arm, Arm, Difference, float | None]]:
        """(arm, reference, paired difference, Holm's p among all at the same x).

        pairs: (arm, reference) by name; without, every arm against the baseline and every tested
        arm against every control.
        """
        for x in self.points:
            asked = [
                (a, b, a.minus(b, metric))
                for b in sorted(self.at(x), key=lambda b: b.role != "baseline")
                for a in self.at(x)
                if ((a.name, b.name) in pairs if pairs else _asked(a, b)) and a.comparable(b)
            ]
            adjusted = iter(holm([found.p for *_, found in asked if found and found.p is not None]))
            for a, b, found in asked:
                if found:
                    yield a, b, found, None if found.p is None else next(adjusted)

    def equal_cost(self, arm: Arm) -> Arm | None:
        """The best arm at the same x that does not attack and costs no more in total.

        Picking it by test accuracy favours it over ``arm``. An arm with a diverged run is not one.
        """
        limit = EQUAL_COST * arm.medians.gradient_images
        rivals = [a for a in self.at(arm.x) if a is not arm and not a.attacks and a.mean() > 0]
        rivals = [a for a in rivals if a.medians.gradient_images <= limit]
        return max(rivals, key=Arm.mean, default=None)


def _asked(arm: Arm, reference: Arm) -> bool:
    if reference.role == "baseline":
        return arm.role != "baseline"
    return reference.role == "control" and arm.role == "tested"


def _results(rows: Mapping[int, Mapping[str, Any]]) -> pd.DataFrame:
    """seed -> summary.json as the table ``Arm.results``."""
    table = pd.DataFrame.from_dict(rows, orient="index").reindex(columns=[*RESULTS]).astype(float)
    images = table["gradient_images_per_clean_image"] * table["steps"] * table[BATCH]
    return table.assign(gradient_images=images).sort_index()


def _arm(name: str, runs: Sequence[Run]) -> Arm:
    """One run per seed, the latest finished one. Names may hold anything, so they are escaped."""
    order = sorted(runs, key=lambda run: (run.summary is not None, str(run.header.get("time"))))
    latest = {run.seed: run for run in order}
    used = [latest[seed] for seed in sorted(latest)]
    results = _results({run.seed: run.summary for run in used if run.summary})
    arm = Arm(printable(name), results, str(used[0].config["method"]), used, len(used))
    return replace(arm, repeats=len(runs) - len(used))


def compare(
    runs: Sequence[Run],
    names: Mapping[str, str] | None = None,
    baseline: str | None = None,
    title: str = "conadv report",
) -> Comparison:
    """Group runs by their settings into arms.

    names: run folder -> name of its arm. baseline: an arm's name; None takes the vanilla arm with
    the largest global batch, or the first arm.
    Raises ConadvError for an unknown baseline.
    """
    given = {Path(folder).resolve(): name for folder, name in (names or {}).items()}
    groups: dict[str, list[Run]] = {}
    for run in runs:
        key = given.get(run.path.resolve()) or repr(sorted(run.settings.items(), key=str))
        groups.setdefault(key, []).append(run)
    own = labels([group[0].settings for group in groups.values()])
    labelled = zip(own, groups.values(), strict=True)
    arms = [_arm(given.get(group[0].path.resolve(), label), group) for label, group in labelled]
    plain = [arm for arm in arms if arm.method == "vanilla"] or arms[:1]
    largest = max(plain, key=lambda arm: arm.runs[0].settings.get(BATCH) or 0)
    chosen = baseline or largest.name
    if chosen not in {arm.name for arm in arms}:
        raise unknown("baseline arm", chosen, [arm.name for arm in arms])
    return Comparison(title, [replace(a, role="baseline") if a.name == chosen else a for a in arms])


def is_sweep(path: str | Path) -> bool:
    return (Path(path) / SWEEP).is_file()


def read_sweep(path: str | Path, baseline: str | None = None) -> Comparison:
    """A sweep's folder, finished or still going, or published records: sweep.json and runs.jsonl.

    baseline: another arm than the spec's.
    Raises ConadvError for an unreadable sweep.json, without a confirmation run, and for an unknown
    baseline.
    """
    path = Path(path)
    sweep = documents.read_sweep(path / SWEEP)
    known = {cell.arm for cell in sweep.cells}
    if baseline and baseline not in known:
        raise unknown("baseline arm", baseline, known)
    roles = dict.fromkeys(sweep.controls, "control") | {baseline or sweep.baseline: "baseline"}
    diverged = {failure.run for failure in sweep.failed if failure.diverged}
    arms = []
    for cell in sweep.cells:
        arm = _confirmed(path, sweep, cell)
        others = [c for c in sweep.cells if c.arm == cell.tuned_on and c.settings == cell.settings]
        source = cell if cell.trials or not others else others[0]
        more = [part(n, v) for n, v in cell.settings.items() if n != sweep.axis]
        # an arm without the axis in its own grid has the value in its configuration
        own = arm.runs[0].settings if arm.runs else {}
        x: Any = cell.settings.get(sweep.axis, own.get(sweep.axis))
        made = replace(
            arm,
            name=", ".join([cell.arm, *more]),
            role=roles.get(cell.arm, "tested"),
            planned=len(cell.runs),
            diverged=len(diverged.intersection(cell.runs)),
            trials=cell.trials,
            chosen=cell.chosen,
            edge=_edge(source, cell.chosen),
            x=float(x or 0),
            grid=cell.settings,
        )
        arms.append(made)
    arms = [arm for arm in arms if len(arm.runs) + len(arm.results) + arm.diverged]
    if not arms:
        raise ConadvError(f"{printable(path)} has no confirmation run yet. Let the sweep go on.")
    arms.sort(key=lambda arm: arm.x or 0)
    title = sweep.spec.title or sweep.name or path.name
    return Comparison(title, arms, sweep.axis, sweep.failed)


def _confirmed(path: Path, sweep: documents.Sweep, cell: documents.Cell) -> Arm:
    """The confirmation runs of a cell: run directories, or lines of runs.jsonl."""
    folders = [inside(path, name) for name in cell.runs]
    if runs := [load_run(folder) for folder in folders if (folder / RECORD).is_file()]:
        return _arm(cell.arm, runs)
    published = path / "runs.jsonl"
    lines = published.read_text().splitlines() if published.is_file() else []
    rows = [row for row in map(json.loads, lines) if f"runs/{row['run']}" in cell.runs]
    own = sweep.spec.arms.get(cell.arm, {}).get("settings", {})
    method = str((sweep.spec.base | own | cell.settings).get("method", "vanilla"))
    return Arm(cell.arm, _results({row["seed"]: cell.settings | row for row in rows}), method)


def _edge(source: documents.Cell, chosen: Mapping[str, Any]) -> str:
    """Two values have nothing but edges, so such settings are named apart."""
    tried = [trial.settings for trial in source.trials]
    edges, pairs = at_edge(tried, chosen), only_edges(tried)
    short = ", ".join(name.rpartition(".")[2] for name in edges or pairs)
    return f"{short} at the edge" if edges else f"two values of {short}" if pairs else "inside"
