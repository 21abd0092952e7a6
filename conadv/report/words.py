"""What the comparison says, in sentences that a reader who was not there can follow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from conadv.methods import METHODS
from conadv.report.compare import Arm, Comparison
from conadv.report.load import Run
from conadv.report.settings import part, show
from conadv.report.stats import Difference
from conadv.report.table import points

TAU = "staleness: the adversarial images of a step were made at the weights of tau steps before."
LOOKAHEAD = "attacks at predicted weights instead of the stale ones."


def glossary(comparison: Comparison) -> list[tuple[str, str]]:
    """(term, meaning) for the methods that occur."""
    used = dict.fromkeys(str(arm.settings.get("method")) for arm in comparison.arms)
    terms = [(name, METHODS[name].summary) for name in used if name in METHODS]
    if any(arm.settings.get("staleness") is not None for arm in comparison.arms):
        terms.append(("tau", TAU))
    if any(arm.settings.get("lookahead") for arm in comparison.arms):
        terms.append(("look-ahead", LOOKAHEAD))
    return terms


def lead(comparison: Comparison) -> str:
    """What was compared, in one sentence built from the data."""
    arms, common = comparison.arms, comparison.common
    model = show("", common.get("model.name", "several networks"))
    data = show("", common.get("data.source", "several data sets"))
    facts = [
        part(name, common[name])
        for name in ("epochs", "steps", "global_batch_size")
        if name in common
    ]
    if "global_batch_size" in comparison.differing:
        sizes = [int(arm.settings["global_batch_size"]) for arm in arms]
        facts.append(f"global batches from {min(sizes)} to {max(sizes)}")
    facts.append(_seed_words(arms))
    if len(arms) == 1:
        return f"One way of training {model} on {data} ({arms[0].label}): {', '.join(facts)}."
    return (
        f"{len(arms)} ways (arms) of training {model} on {data} are compared: {', '.join(facts)}."
    )


def _seed_words(arms: Iterable[Arm]) -> str:
    counts = [len(arm.finished) for arm in arms]
    low, high = min(counts), max(counts)
    each = f"{low}" if low == high else f"{low} to {high}"
    return f"{each} finished seed{'s' if high != 1 else ''} {'per arm' if len(counts) > 1 else ''}".strip()


def findings(comparison: Comparison) -> list[str]:
    """One sentence per arm that has a difference to the baseline."""
    return [
        f"{arm.label}: {finding(arm.difference, comparison.baseline.label)}"
        for arm in comparison.arms
        if arm.difference is not None
    ]


def finding(difference: Difference, baseline: str) -> str:
    """The verdict on one paired difference."""
    if difference.low is None or difference.high is None:
        return f"{points(difference.mean)} points against {baseline} on one common seed, which says nothing of the spread."
    interval = f"{points(difference.mean)} points, 95 % interval {points(difference.low)} to {points(difference.high)}"
    count = f"{difference.n} seeds"
    if difference.low == difference.high:
        return f"not distinguishable from {baseline}: all {count} differ by the same {points(difference.mean)} points."
    if difference.verdict == "not distinguishable":
        return f"not distinguishable from {baseline} with these {count} ({interval})."
    return f"{difference.verdict} than {baseline} with {count} ({interval})."


def notes(comparison: Comparison) -> list[str]:
    """What a reader must know before trusting the numbers. Empty if there is nothing."""
    return [*_run_notes(comparison), *_arm_notes(comparison), *_comparison_notes(comparison)]


def _run_notes(comparison: Comparison) -> list[str]:
    found = []
    unfinished = sum(len(arm.unfinished) for arm in comparison.arms)
    if unfinished:
        found.append(
            f"Unfinished runs: {unfinished}. The list of runs has them, the table's numbers do not."
        )
    replaced = sum(len(arm.replaced) for arm in comparison.arms)
    if replaced:
        found.append(
            f"Runs that repeat the settings and seed of another run: {replaced}. Of each such group the latest "
            "finished one is used."
        )
    broken = [run for run in comparison.runs if run.problems]
    if broken:
        found.append(
            f"Runs that could not be read in full: {len(broken)}. The list of runs says why."
        )
    return found


def _arm_notes(comparison: Comparison) -> list[str]:
    found = []
    for arm in comparison.arms:
        if arm.mixed:
            found.append(f"{arm.label} mixes runs with different settings: {', '.join(arm.mixed)}.")
        late = arm.staleness
        if late and late.unexpected:
            total = sum(late.measured.values())
            found.append(
                f"{arm.label}: in {late.unexpected} of {total} steps the adversarial batch was not "
                f"{late.configured} step(s) old, as configured."
            )
    single = [arm.label for arm in comparison.arms if len(arm.finished) == 1]
    if single:
        found.append(f"One seed only, so no spread is known: {'; '.join(single)}.")
    return found


def _comparison_notes(comparison: Comparison) -> list[str]:
    found = []
    tests = sum(arm.difference is not None and arm.difference.n > 1 for arm in comparison.arms)
    if tests > 1:
        found.append(
            f"Each of the {tests} intervals holds on its own at 95 %. Among many comparisons, one in twenty excludes "
            "0 by chance."
        )
    if "eval.robust_eps" in comparison.differing:
        found.append(
            "Robust accuracy was measured with different eps, so that column is not comparable."
        )
    if "global_batch_size" in comparison.differing:
        found.append(
            "Step times belong to different global batches, so a step is not the same amount of work: compare the "
            "training times."
        )
    if len(machines(comparison)) > 1:
        found.append("The runs were made on different machines, so times are not comparable.")
    if len(distinct(comparison, "version")) > 1:
        found.append("The runs were made by different versions of conadv.")
    if any(
        isinstance(git := run.header.get("git"), dict) and git.get("dirty")
        for run in comparison.runs
    ):
        found.append("Some runs were made from code with uncommitted changes.")
    return found


def robustness(runs: Iterable[Run]) -> str:
    """How robust accuracy was measured, from the runs' configurations; empty where it was not."""
    measured = [run for run in runs if (run.summary or {}).get("robust_accuracy") is not None]
    ways = dict.fromkeys(_attacked(run.config.get("eval") or {}) for run in measured)
    return f"Robust accuracy: {'; '.join(ways)}." if ways else ""


def _attacked(evaluation: Mapping[str, Any]) -> str:
    eps, steps, images = (evaluation.get(f"robust_{name}") for name in ("eps", "steps", "images"))
    return pgd(eps, steps, f"at most {show('', images)}")


def pgd(eps: Any, steps: Any, images: Any) -> str:
    """e.g. "PGD with 10 steps, eps 1/255, on 500 test images"."""
    return f"PGD with {show('', steps)} steps, eps {show('eps', eps)}, on {show('', images)} test images"


def distinct(comparison: Comparison, name: str) -> list[str]:
    """The distinct values of one header field over all runs, in words."""
    values = (run.header.get(name) for run in comparison.runs)
    return list(dict.fromkeys(_in_words(value) for value in values if value is not None))


def machines(comparison: Comparison) -> list[str]:
    return distinct(comparison, "machine")


def _in_words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(
            f"{key} {_in_words(item)}" for key, item in value.items() if item is not None
        )
    return show("", value)
