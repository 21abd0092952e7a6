"""Write a report: one self-contained HTML file, the same table as Markdown, and summary.json beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from conadv.errors import ConadvError, printable
from conadv.report import figures, settings, table, words
from conadv.report.compare import Comparison, compare
from conadv.report.load import RECORD, SUMMARY, find_runs, load_run
from conadv.report.summary import Summary, run_list
from conadv.training.record import write_atomic


def write_report(
    paths: Iterable[str | Path],
    out: str | Path,
    *,
    names: Mapping[str, str] | None = None,
    baseline: str | None = None,
    title: str = "conadv report",
    command: str | None = None,
) -> Summary:
    """Compare the runs at and below ``paths`` and write ``out`` (.html), the same name with .md, and summary.json.

    names: run folder -> arm name (None names arms after their settings). baseline: the label of the arm that
    differences are taken to. command: how the runs were made, shown as given.
    Raises ConadvError for folders without runs, an unknown baseline, an ``out`` that is no .html file or that lies
    inside a run (whose own summary.json would be lost), and when the files cannot be written.
    """
    out = Path(out)
    check_out(out)
    runs = [load_run(path) for path in find_runs(paths)]
    summary = Summary(title, compare(runs, names, baseline), out.parent, command)
    write(out, render_html(summary))
    write(out.with_suffix(".md"), render_markdown(summary, out.name))
    write(out.with_name(SUMMARY), json.dumps(summary.to_json(), indent=2, allow_nan=False) + "\n")
    return summary


def render_html(summary: Summary) -> str:
    """The page as text. Whatever comes from a run is escaped; nothing outside the page is referred to."""
    environment = Environment(
        loader=PackageLoader("conadv", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    style = Markup((Path(__file__).parent / "style.css").read_text(encoding="utf-8"))
    drawings = [(card, Markup(card.svg)) for card in figures.draw_all(summary.comparison)]
    keys = [look.colour for look in figures.looks(summary.comparison)]
    return environment.get_template("report.html.j2").render(
        **_content(summary), style=style, drawings=drawings, keys=keys
    )


def render_markdown(summary: Summary, html_name: str) -> str:
    """The sentences, the table and the run list as Markdown; figures are in the HTML file it names."""
    environment = Environment(
        loader=PackageLoader("conadv", "report"),
        autoescape=False,  # every value goes through finalize instead
        finalize=escape_markdown,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("report.md.j2").render(**_content(summary), html_name=html_name)


def escape_markdown(value: object) -> str:
    """Text that Markdown shows as it is: no table cell, markup or HTML begins in a value."""
    text = re.sub(r"[\r\n]+", " ", str(value))
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*|\[\]~]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", text)


def _content(summary: Summary) -> dict[str, Any]:
    """What both templates show."""
    comparison = summary.comparison
    return {
        "title": summary.title,
        "command": summary.command,
        "lead": words.lead(comparison),
        "baseline": comparison.baseline.label,
        "glossary": words.glossary(comparison),
        "findings": words.findings(comparison),
        "robust": words.robustness(comparison.runs),
        "notes": words.notes(comparison),
        "columns": table.COLUMNS,
        "rows": table.rows(comparison),
        "differing": _differing(comparison),
        "labels": [arm.label for arm in comparison.arms],
        "common": [
            (name, settings.show(name, value)) for name, value in sorted(comparison.common.items())
        ],
        "machines": words.machines(comparison),
        "versions": words.distinct(comparison, "versions"),
        "run_versions": words.distinct(comparison, "version"),
        "git": words.distinct(comparison, "git"),
        "runs": run_list(comparison, summary.folder),
    }


def _differing(comparison: Comparison) -> list[tuple[str, list[str]]]:
    return [
        (name, [settings.show(name, arm.settings.get(name)) for arm in comparison.arms])
        for name in comparison.differing
    ]


def check_out(out: Path) -> None:
    """ConadvError for a file that is no .html or would lie in a run."""
    if out.suffix != ".html":
        raise ConadvError(
            f"The report's file must end in .html, not {out.name!r}: the other files are named after it."
        )
    if (out.parent / RECORD).exists():
        raise ConadvError(
            f"{printable(out.parent)} is a run, and the report would overwrite its {SUMMARY}. Choose a file in "
            "another folder."
        )


def write(path: Path, text: str) -> None:
    """Write one of a report's files, and its folder if need be. Raises ConadvError if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text)
    except OSError as error:
        raise ConadvError(f"Cannot write the report's file {printable(path)}: {error}") from error
