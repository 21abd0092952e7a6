"""The comparison as one JSON document, ``summary.json`` of a report: every number of the table and where it is from.

Accuracies and shares are in [0, 1], times in seconds, differences in [0, 1] too (0.01 is one percentage point).
What is not known is null; numbers are never NaN or infinite.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from conadv import __version__
from conadv.report import words
from conadv.report.compare import Arm, Comparison
from conadv.report.load import Run


@dataclass(frozen=True)
class Summary:
    """What a report says. ``folder`` is where it lies: the paths of runs are given relative to it."""

    title: str
    comparison: Comparison
    folder: Path
    command: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``json.dumps(..., allow_nan=False)``."""
        comparison = self.comparison
        document = {
            "title": self.title,
            "version": __version__,
            "command": self.command,
            "lead": words.lead(comparison),
            "baseline": comparison.baseline.label,
            "arms": [_arm(arm) for arm in comparison.arms],
            "findings": words.findings(comparison),
            "notes": words.notes(comparison),
            "common_settings": comparison.common,
            "differing_settings": list(comparison.differing),
            "machines": words.machines(comparison),
            "versions": words.distinct(comparison, "versions"),
            "run_versions": words.distinct(comparison, "version"),
            "git": words.distinct(comparison, "git"),
            "runs": run_list(comparison, self.folder),
        }
        plain: dict[str, Any] = finite(document)
        return plain


def run_list(comparison: Comparison, folder: Path) -> list[dict[str, Any]]:
    """One entry per run: path relative to ``folder``, arm, seed, status in words, results."""
    return [
        _run(run, arm, folder, used=index < len(arm.runs))
        for arm in comparison.arms
        for index, run in enumerate((*arm.runs, *arm.replaced))
    ]


def _run(run: Run, arm: Arm, folder: Path, *, used: bool) -> dict[str, Any]:
    results = run.summary or {}
    return {
        "path": Path(os.path.relpath(run.path.resolve(), folder.resolve())).as_posix(),
        "arm": arm.label,
        "recipe": run.header.get("recipe") or run.config.get("recipe"),
        "seed": run.seed,
        "used": used and run.finished,
        "status": status(run) if used else f"{status(run)}; not used, a later run repeats it",
        "started": run.started or None,
        "test_accuracy": results.get("test_accuracy"),
        "problems": list(run.problems),
    }


def status(run: Run) -> str:
    """finished, or how far an unfinished run came and what its last evaluation said."""
    if run.finished:
        return "finished"
    planned = run.header.get("steps")
    text = f"unfinished: {run.steps_done}" + (f" of {planned}" if planned else "") + " steps"
    if "accuracy" in run.evals and "step" in run.evals:
        text += f", {100 * run.evals['accuracy'][-1]:.2f} % test accuracy after step {run.evals['step'][-1]:.0f}"
    return f"{text}; stopped by: {run.stopped_by}" if run.stopped_by else text


def _arm(arm: Arm) -> dict[str, Any]:
    difference = arm.difference
    return {
        "label": arm.label,
        "settings": arm.settings,
        "seeds": [run.seed for run in arm.finished],
        "unfinished_seeds": [run.seed for run in arm.unfinished],
        **{name: asdict(value) if value else None for name, value in arm.metrics.items()},
        "difference": {**asdict(difference), "verdict": difference.verdict} if difference else None,
        "staleness": asdict(arm.staleness) if arm.staleness else None,
    }


def finite(value: Any) -> Any:
    """The same values with null for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
