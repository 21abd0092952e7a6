"""The table of arms: one set of cells for HTML, Markdown and the terminal, so that all three say the same."""

from __future__ import annotations

from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from conadv.errors import printable_lines
from conadv.report.compare import Arm, Comparison
from conadv.report.stats import Difference, Stat

NONE = "–"
MINUS = "−"

COLUMNS = (
    "arm",
    "seeds",
    "test accuracy, %",
    "difference, points [95\u00a0%]",
    "robust accuracy, %",
    "train accuracy, %",
    "step time (×\u00a0baseline)",
    "training time",
    "attack share, %",
)
_DIFFERENCE = 3
_NEEDS_WIDTH = {
    "attack share, %": 100,
    "robust accuracy, %": 130,
    "train accuracy, %": 130,
    "training time": 130,
}


@dataclass(frozen=True)
class Row:
    """The cells of one arm, in the order of COLUMNS; ``cells[0]`` is its label."""

    cells: tuple[str, ...]
    is_baseline: bool
    verdict: str


def rows(comparison: Comparison) -> list[Row]:
    """One row per arm. Accuracies in percent, times in words, a dash for what is not known."""
    return [_row(arm, comparison.baseline) for arm in comparison.arms]


def _row(arm: Arm, baseline: Arm) -> Row:
    is_baseline = arm.label == baseline.label
    metrics = arm.metrics
    cells = (
        arm.label,
        seeds(arm),
        percent(metrics["test_accuracy"]),
        "baseline" if is_baseline else difference(arm.difference),
        percent(metrics["robust_accuracy"]),
        percent(metrics["train_accuracy"]),
        step_time(arm, baseline),
        NONE
        if arm.median("train_seconds") is None
        else duration(arm.median("train_seconds") or 0.0),
        NONE
        if arm.median("attack_share") is None
        else f"{100 * (arm.median('attack_share') or 0.0):.1f}",
    )
    return Row(cells, is_baseline, arm.difference.verdict if arm.difference else "")


def seeds(arm: Arm) -> str:
    """How many seeds are finished, of how many where some are not."""
    return f"{len(arm.finished)} of {len(arm.runs)}" if arm.unfinished else f"{len(arm.finished)}"


def percent(value: Stat | None) -> str:
    """Mean and sample standard deviation in percent; no spread for a single seed."""
    if value is None:
        return NONE
    spread = "" if value.std is None else f" ± {100 * value.std:.2f}"
    return f"{100 * value.mean:.2f}{spread}"


def points(value: float) -> str:
    """A difference of two accuracies in percentage points, with its sign."""
    text = f"{100 * value:+.2f}"
    return text.replace("-", MINUS)


def difference(value: Difference | None) -> str:
    """Mean and interval in points; without an interval when fewer than two seeds are in both arms."""
    if value is None:
        return NONE
    if value.low is None or value.high is None:
        return f"{points(value.mean)} (1 pair)"
    return f"{points(value.mean)} [{points(value.low)}, {points(value.high)}]"


def step_time(arm: Arm, baseline: Arm) -> str:
    """Median seconds of a step and how many times the baseline's that is."""
    own, other = arm.median("step_seconds"), baseline.median("step_seconds")
    if own is None:
        return NONE
    return f"{duration(own)} ({own / other:.2f}×)" if other else duration(own)


def duration(seconds: float) -> str:
    """Seconds in words with three significant digits: 12.3 ms, 4.56 s, 78.9 min, 12.3 h."""
    for limit, unit, factor in ((1.0, "ms", 1e3), (120.0, "s", 1.0), (7200.0, "min", 1 / 60)):
        if seconds < limit:
            return f"{_three_digits(seconds * factor)} {unit}"
    return f"{_three_digits(seconds / 3600)} h"


def _three_digits(value: float) -> str:
    return (
        f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
    )


def arms_table(comparison: Comparison, title: str | None = None, width: int = 160) -> Table:
    """The arms table for a terminal of ``width`` characters; columns that can wait are left out of a narrow one.

    The baseline is bold, a difference whose interval excludes 0 is green (higher) or red (lower).
    """
    shown = [index for index, name in enumerate(COLUMNS) if width >= _NEEDS_WIDTH.get(name, 0)]
    table = Table(
        title=title, header_style="bold", box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True
    )
    for index in shown:
        header = Text(COLUMNS[index].replace(", ", "\n").replace(" (", "\n(").replace(" [", "\n["))
        if index == 0:
            table.add_column(header, min_width=14, overflow="fold")
        else:
            table.add_column(header, justify="right", no_wrap=True)
    for row in rows(comparison):
        # Text, not str: a label with square brackets must not be read as markup
        cells = [Text(printable_lines(cell)) for cell in row.cells]
        cells[_DIFFERENCE].stylize({"higher": "green", "lower": "red"}.get(row.verdict, ""))
        table.add_row(*(cells[index] for index in shown), style="bold" if row.is_baseline else None)
    return table
