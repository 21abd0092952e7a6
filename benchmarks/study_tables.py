"""Tables and sentences of the pages about studies, from the summary.json that `conadv report` wrote for each."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import study_contrasts
import study_flatness
import study_records

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
    """``what``: questions, made, kept, held-out, primary, ranks, ratios, gain, predictors, or a table of the report.

    "accuracy 500" is the table where its first column is 500.
    """
    summary = json.loads((studies / name / "summary.json").read_text())
    if what == "questions":
        return questions(summary)
    if what == "made":
        return f"{made(summary)}{shared(studies, name)}"
    if what == "kept":
        return kept(summary["tables"]["staleness"])
    if what == "held-out":
        return drawn(*study_contrasts.held_out(summary))
    if what == "primary":
        return drawn(*study_contrasts.primary(summary))
    if what == "ranks":
        return drawn(
            *study_flatness.ranks(study_flatness.read(studies / name), "LARS, 3 times the epochs")
        )
    if what == "ratios":
        return drawn(*study_flatness.ratios(study_flatness.read(studies / name)))
    if what == "gain":
        rival = json.loads(
            (studies / "cifar10" / "summary.json").read_text()
        )  # the same settings, images and seeds
        return drawn(
            *study_contrasts.gain(
                summary, "ConAdv", ("LAMB", study_contrasts.accuracies(rival, "LAMB"))
            )
        )
    if what == "predictors":
        (head, rows), said = study_contrasts.predictors(summary)
        return f"{drawn(head, rows)}\n\n{said}"
    kind, _, where = what.partition(" ")
    return report_table(summary["tables"][kind], where) + footnote(summary, kind)


def drawn(head: list[str], rows: list[list[str]]) -> str:
    return table(
        [escape(name) for name in head], [[escape(cell) for cell in row] for row in rows], 1
    )


def footnote(summary: dict[str, Any], kind: str) -> str:
    """How the robust accuracy of a table was measured, below it."""
    said = summary.get({"accuracy": "robust", "sharpness": "analysed_robust"}.get(kind, ""))
    return f"\n\n{escape(said)}" if said else ""


def questions(summary: dict[str, Any]) -> str:
    said = [
        summary["lead"],
        *(f"**{asked}** {' '.join(summary[name])}" for name, asked in QUESTIONS.items()),
    ]
    return "\n\n".join(map(escape, said))


def made(summary: dict[str, Any]) -> str:
    """Seeds, command, machine and versions in one sentence."""
    seeds = sorted({len(cell["seeds"]) for cell in summary["cells"]})
    commits = ", ".join(dict.fromkeys(map(commit, summary["git"])))
    if "(dirty)" in commits:
        commits += "; dirty is with changes that were not committed"
    count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    facts = "; ".join([*summary["machines"], *summary["software"]])
    spread = "1 seed" if count == "1" else f"{count} seeds, mean ± standard deviation"
    return f"{spread}; `{summary['command']}` at commit {commits}; {escape(facts)}."


def commit(said: str) -> str:
    """ "commit 3ba97449..., dirty yes" as "3ba9744 (dirty)"."""
    short = said.partition("commit ")[2][:7]
    return f"{short} (dirty)" if said.endswith("dirty yes") else short


def shared(studies: Path, name: str) -> str:
    """Which runs of a study are those of others too: the same settings and seed are trained once."""
    own = {_identity(line) for line in study_records.lines(studies / name)}
    counts: Counter[str] = Counter()
    both = set()
    for other in sorted(
        path.name for path in studies.iterdir() if path.is_dir() and path.name != name
    ):
        common = own & {_identity(line) for line in study_records.lines(studies / other)}
        counts[other] += len(common)
        both |= common
    if not both:
        return ""
    where = ", ".join(f"{count} with {other}" for other, count in counts.most_common() if count)
    return f" Trained once for several studies: {len(both)} of its {len(own)} runs, tuning included ({where})."


def _identity(line: dict[str, Any]) -> tuple[Any, ...]:
    """No two trainings take the same time to the microsecond, and come out alike."""
    return line["seed"], line["steps"], line["seconds"], line["test_accuracy"], line["train_loss"]


def report_table(content: dict[str, Any], where: str = "") -> str:
    """A table of the report, or its rows at one x, without the columns that then say the same in every row."""
    head, rows = content["head"], content["rows"]
    texts = content["texts"]
    if where:
        rows = [row[1:] for row in rows if slug(row[0]) == where]
        head, texts = head[1:], texts - 1
    if not rows:
        raise SystemExit(f"No rows at {where!r} in the table with the columns {', '.join(head)}.")
    return table(
        [escape(name) for name in head], [[escape(cell) for cell in row] for row in rows], texts
    )


def kept(content: dict[str, Any], predictors: tuple[str, ...] = ("stale", "momentum")) -> str:
    """The staleness table turned: a row for every arm and phase, its loss increase at each tau and predictor."""
    mark = "loss increase, "
    phases = {
        name.removeprefix(mark): column
        for column, name in enumerate(content["head"])
        if name.startswith(mark)
    }
    cells = {
        (row[0], row[2], int(row[1]), phase): row[at]
        for row in content["rows"]
        for phase, at in phases.items()
    }
    points = [
        (each, tau)
        for each in predictors
        for tau in sorted({tau for _, by, tau, _ in cells if by == each})
    ]
    head = ["arm", "phase", *(f"{by}, tau = {tau}" for by, tau in points)]
    arms = dict.fromkeys(row[0] for row in content["rows"])
    rows = [
        [arm, phase, *(cells[arm, by, tau, phase] for by, tau in points)]
        for arm in arms
        for phase in phases
    ]
    return table(
        [escape(name) for name in head], [[escape(cell) for cell in row] for row in rows], 2
    )


def slug(text: str) -> str:
    """What of a cell can stand in a mark: 1,000 as 1000, "+ ConAdv, tau = 1" as ConAdv-tau-1."""
    return "-".join(re.findall(r"\w+", text.replace(",", "" if text[:1].isdigit() else " ")))


def escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
