"""Write a report: one self-contained HTML page, the same in Markdown, and summary.json."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import pandas as pd
import yaml
from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure

from conadv import __version__
from conadv.analysis.style import to_png
from conadv.errors import ConadvError, printable
from conadv.report import tables
from conadv.report.accuracy_figure import draw_accuracy, draw_cost
from conadv.report.comparison import Comparison, compare, read_sweep
from conadv.report.figure_style import STYLE, look, to_svg
from conadv.report.load import RECORD, find_runs, load_run
from conadv.report.settings import show
from conadv.report.sharpness import draw_sharpness
from conadv.report.training_curves_figure import draw_curves
from conadv.safe_io import write_atomic

FOLDER = Path(__file__).parent
SECTIONS: dict[str, tuple[Callable[[Comparison], Any], ...]] = {
    "Accuracy": (draw_accuracy, tables.accuracy),
    "Differences": (tables.differences,),
    "Cost": (draw_cost, tables.costs),
    "Tuning": (tables.tuning,),
    "Training": (draw_curves,),
    "Measured staleness": (tables.staleness,),
    "Staleness": (tables.probes,),
    "Sharpness": (draw_sharpness, tables.sharpness),
    "Settings": (tables.settings,),
    "Runs": (tables.runs,),
    "Made with": (tables.origin,),
}


class Section(NamedTuple):
    """One part of the page. picture: the PNG of its figure, below the report's folder."""

    title: str
    picture: str
    figures: list[Figure]
    tables: list[pd.DataFrame]
    note: str


@dataclass(frozen=True)
class Report:
    """What a report says. ``notes``: what to know before trusting the numbers."""

    comparison: Comparison
    command: str | None
    sections: list[Section]
    notes: list[str]

    @property
    def summary(self) -> pd.DataFrame:
        """The table of arms."""
        return tables.accuracy(self.comparison)

    def to_json(self) -> dict[str, Any]:
        """Accuracies and differences in [0, 1], times in seconds, null for what is unknown."""
        c = self.comparison
        shown = ("name", "role", "x", "method", "planned", "diverged", "chosen", "edge")
        arms = [{name: getattr(arm, name) for name in shown} for arm in c.arms]
        for row, arm in zip(arms, c.arms, strict=True):
            row["results"] = json.loads(arm.results.to_json())
        pairs = [
            {"x": a.x, "arm": a.name, "minus": b.name, **found._asdict(), "p_holm": p}
            for a, b, found, p in c.contrasts()
        ]
        made = {
            s.title: {"head": [*frame], "rows": frame.to_numpy().tolist()}
            for s in self.sections
            for frame in s.tables
        }
        facts = {"title": c.title, "version": __version__, "command": self.command}
        return {**facts, "notes": self.notes, "arms": arms, "differences": pairs, "tables": made}

    def html(self) -> str:
        """The page as text; values are escaped, and nothing outside the page is referred to."""
        loader = PackageLoader("conadv", "report")
        environment = Environment(loader=loader, autoescape=True, trim_blocks=True)
        environment.filters |= {"looks": looks, "svg": to_svg}
        colours = {n: look(self.comparison, a)["color"] for n, a in self.comparison.latest.items()}
        style = (FOLDER / "style.css").read_text(encoding="utf-8")
        with mpl.rc_context(STYLE):
            page = environment.get_template("page.html.j2")
            return page.render(report=self, style=style, colours=colours)

    def markdown(self) -> str:
        lines = [f"# {escape(self.comparison.title)}", *(f"* {note}" for note in self.notes)]
        for section in self.sections:
            lines += [f"## {section.title}", section.note]
            lines += [f"![{section.title}]({section.picture})" for _ in section.figures]
            lines += map(markdown_table, section.tables)
        return "\n\n".join(lines) + "\n"


def looks(cell: str) -> str:
    """Classes of a cell: numbers right; intervals without 0 and choices at an edge coloured."""
    interval = re.match(r"[^\[]*\[([+−])[^,]*, \1", cell)
    found = "" if re.match(r"[+−<]? ?\d|–", cell) else "text"
    found += {"+": " higher", "−": " lower"}[interval[1]] if interval else ""
    return found + " edge" * cell.endswith("at the edge") + " long" * (len(cell) > 45)


def markdown_table(frame: pd.DataFrame) -> str:
    head, *rows = ([escape(cell) for cell in row] for row in ([*frame], *frame.to_numpy()))
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *rows))


def escape(value: object) -> str:
    """Text that Markdown shows as it is: no cell, markup or HTML begins in a value."""
    text = str(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"[\r\n]+", " ", text)
    return re.sub(r"([\\`*|~]|\](?=[(\[:])|\b_|_\b)", r"\\\1", text)


def make_report(comparison: Comparison, command: str | None = None) -> Report:
    """All sections that the records have data for."""
    notes = yaml.safe_load((FOLDER / "how_to_read.yaml").read_text(encoding="utf-8"))
    sections = []
    for title, makers in SECTIONS.items():
        with mpl.rc_context(STYLE):
            made = [make(comparison) for make in makers]
        figures = [one for one in made if isinstance(one, Figure)]
        frames = [one for one in made if isinstance(one, pd.DataFrame) and not one.empty]
        picture = f"figures/{title.lower().replace(' ', '-')}.png"
        if figures or frames:
            sections.append(Section(title, picture, figures, frames, notes[title]))
    return Report(comparison, command, sections, notes_on(comparison))


def notes_on(c: Comparison) -> list[str]:
    runs = [run for arm in c.arms for run in arm.runs]
    measured = [run for run in runs if (run.summary or {}).get("robust_accuracy") is not None]
    ways = {robust(run.config.get("eval") or {}) for run in measured}
    machines, versions = ({str(r.header.get(n)) for r in runs} for n in ("machine", "version"))
    unfinished, repeats = sum(a.unfinished for a in c.arms), sum(a.repeats for a in c.arms)
    dirty = "'dirty': True" in str([run.header.get("git") for run in runs])
    found = {
        f"Runs that are not finished and not counted: {unfinished}.": unfinished,
        f"Runs not used, since a later one has their arm and seed: {repeats}.": repeats,
        "Where a run diverged there is no mean and no verdict.": any(a.diverged for a in c.arms),
        "A single seed has no spread and no interval.": any(len(a.results) == 1 for a in c.arms),
        f"Robust accuracy: {'; '.join(sorted(ways))}.": any(ways),
        "The runs were made on different machines: do not compare their times.": len(machines) > 1,
        "The runs were made by different versions of conadv.": len(versions) > 1,
        "Some runs were made from code with uncommitted changes.": dirty,
    }
    return [note for note, applies in found.items() if applies]


def robust(evaluation: Mapping[str, Any]) -> str:
    """How robust accuracy was measured."""
    eps, steps, images = (evaluation.get(f"robust_{n}") for n in ("eps", "steps", "images"))
    return f"PGD with {steps} steps, eps {show('eps', eps)}, on at most {images} test images"


def write_report(
    paths: Iterable[str | Path],
    out: str | Path,
    *,
    names: Mapping[str, str] | None = None,
    baseline: str | None = None,
    title: str = "conadv report",
    command: str | None = None,
) -> Report:
    """Compare the runs at and below ``paths``; write ``out`` (.html), .md, summary.json and PNGs.

    names: run folder -> name of its arm; others are named after their settings. baseline: the arm
    that differences are taken to. command: how the runs were made.
    Raises ConadvError for folders without runs, an unknown baseline, and an ``out`` that cannot be
    written or lies in a run.
    """
    runs = [load_run(path) for path in find_runs(paths)]
    return _write(compare(runs, names, baseline, title), Path(out), command)


def write_sweep_report(
    sweep: str | Path,
    out: str | Path | None = None,
    *,
    baseline: str | None = None,
    command: str | None = None,
) -> Report:
    """The same for a sweep's folder, finished or not; ``out`` is report.html in it by default."""
    return _write(read_sweep(sweep, baseline), Path(out or Path(sweep) / "report.html"), command)


def _write(comparison: Comparison, out: Path, command: str | None) -> Report:
    if out.suffix != ".html" or (out.parent / RECORD).exists():
        raise ConadvError(f"{printable(out)}: name an .html file that does not lie in a run.")
    report = make_report(comparison, command)
    content = json.dumps(report.to_json(), indent=2, allow_nan=False) + "\n"
    try:
        (out.parent / "figures").mkdir(parents=True, exist_ok=True)
        write_atomic(out, report.html())
        write_atomic(out.with_suffix(".md"), report.markdown())
        write_atomic(out.with_name("summary.json"), content)
        for section in report.sections:
            for figure in section.figures:
                write_atomic(out.parent / section.picture, to_png(figure, 160))
    except OSError as error:
        raise ConadvError(f"Cannot write the report {printable(out)}: {error}") from error
    return report
