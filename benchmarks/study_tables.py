"""Tables and sentences of the pages about studies, from the summary.json that `conadv report` wrote for each."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

QUESTIONS = {
    "tuned": "Was the baseline tuned?",
    "attack_or_images": "Is it the attack, or just the extra images?",
    "at_equal_cost": "At equal cost?",
}


def table(head: list[str], rows: list[list[str]], texts: int | None = None) -> str:
    """Markdown; the columns after the first ``texts`` are numbers, to the right."""
    rule = ["---" if texts is None or number < texts else "---:" for number in range(len(head))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *rows))


def section(studies: Path, name: str, what: str) -> str:
    """``what``: questions, made, kept, or a table of the report; "accuracy 500": it where its first column is 500."""
    summary = json.loads((studies / name / "summary.json").read_text())
    if what == "questions":
        return questions(summary)
    if what == "made":
        return made(summary)
    if what == "kept":
        return kept(summary["tables"]["staleness"])
    kind, _, where = what.partition(" ")
    return report_table(summary["tables"][kind], where)


def questions(summary: dict[str, Any]) -> str:
    said = [summary["lead"], *(f"**{asked}** {' '.join(summary[name])}" for name, asked in QUESTIONS.items())]
    return "\n\n".join(map(escape, said))


def made(summary: dict[str, Any]) -> str:
    """Seeds, command, machine and versions in one sentence."""
    seeds = sorted({len(cell["seeds"]) for cell in summary["cells"]})
    commits = ", ".join(dict.fromkeys(found.partition("commit ")[2][:7] for found in summary["git"]))
    count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    facts = "; ".join([*summary["machines"], *summary["software"]])
    return f"{count} seeds, mean ± standard deviation; `{summary['command']}` at commit {commits}; {escape(facts)}."


def report_table(content: dict[str, Any], where: str = "") -> str:
    """A table of the report, or its rows at one x, without the columns that then say the same in every row."""
    head, rows = content["head"], content["rows"]
    texts = content["texts"]
    if where:
        rows = [row[1:] for row in rows if slug(row[0]) == where]
        head, texts = head[1:], texts - 1
    if not rows:
        raise SystemExit(f"No rows at {where!r} in the table with the columns {', '.join(head)}.")
    return table([escape(name) for name in head], [[escape(cell) for cell in row] for row in rows], texts)


def kept(content: dict[str, Any], predictors: tuple[str, ...] = ("stale", "momentum")) -> str:
    """The staleness table turned: a row for every arm and phase, its loss increase at each tau and predictor."""
    mark = "loss increase, "
    phases = {name.removeprefix(mark): column for column, name in enumerate(content["head"]) if name.startswith(mark)}
    cells = {(row[0], row[2], int(row[1]), phase): row[at] for row in content["rows"] for phase, at in phases.items()}
    points = [(each, tau) for each in predictors for tau in sorted({tau for _, by, tau, _ in cells if by == each})]
    head = ["arm", "phase", *(f"{by}, tau = {tau}" for by, tau in points)]
    arms = dict.fromkeys(row[0] for row in content["rows"])
    rows = [[arm, phase, *(cells[arm, by, tau, phase] for by, tau in points)] for arm in arms for phase in phases]
    return table([escape(name) for name in head], [[escape(cell) for cell in row] for row in rows], 2)


def slug(text: str) -> str:
    """What of a cell can stand in a mark: 1,000 as 1000, "+ ConAdv, tau = 1" as ConAdv-tau-1."""
    return "-".join(re.findall(r"\w+", text.replace(",", "" if text[:1].isdigit() else " ")))


def escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
