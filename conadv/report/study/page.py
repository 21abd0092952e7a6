"""Write the report of a sweep: report.html, report.md, summary.json and the figures as PNG."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from conadv import __version__
from conadv.errors import ConadvError, printable
from conadv.report import figures as plain
from conadv.report import settings, words
from conadv.report.compare import Comparison, compare
from conadv.report.html import check_out, escape_markdown, write
from conadv.report.load import SUMMARY
from conadv.report.study import answers, probes, sharpness, tables
from conadv.report.study.contrast import differences
from conadv.report.study.cost import cost
from conadv.report.study.figures import accuracy_figure, cost_figure, line_look
from conadv.report.study.gallery import Gallery, gallery
from conadv.report.study.staleness_figures import staleness_course_figure, staleness_figure
from conadv.report.study.sweep import Cell, Study, load_sweep
from conadv.report.summary import finite, run_list


@dataclass(frozen=True)
class Picture:
    """One figure of the page: where its PNG goes below the report's folder, and its form in the HTML."""

    name: str
    title: str
    how_to_read: str
    figure: Figure
    raster: bool = False

    @property
    def file(self) -> str:
        return f"figures/{self.name}.png"

    @cached_property
    def png(self) -> bytes:
        return plain.to_png(self.figure, 160)

    @property
    def markup(self) -> Markup:
        if not self.raster:
            svg = Markup(plain.to_svg(self.figure, self.title))
            self.figure.set_layout_engine(
                "none"
            )  # the PNG has the same layout, which is slow to find
            return svg
        data = base64.b64encode(self.png).decode()
        return Markup('<img alt="{}" src="data:image/png;base64,{}">').format(self.title, data)


@dataclass(frozen=True)
class StudySummary:
    """What the report of a sweep says. ``folder`` is where it lies."""

    study: Study
    folder: Path
    command: str | None = None

    @property
    def title(self) -> str:
        return self.study.title

    @cached_property
    def comparison(self) -> Comparison:
        """Every line at its largest x, for curves and settings."""
        lines = self.study.lines
        runs = [(run, line) for line in lines for run in self.study.last(line).runs]
        base = answers.baseline_cell(self.study)
        names = {str(run.path): line for run, line in runs}
        return compare(
            [run for run, _ in runs], names, base.line if base and base.line in lines else lines[0]
        )

    @property
    def notes(self) -> list[str]:
        """What a reader must know before trusting the numbers."""
        found = []
        missing = sum(cell.planned - len(cell.finished) for cell in self.study.cells)
        if missing:
            found.append(
                f"The sweep is not complete: {missing} of its runs are not finished and not counted."
            )
        if self.study.failed:
            found.append(
                f"Runs that failed: {len(self.study.failed)}. They are listed below and count nowhere."
            )
        broken = [
            f"{cell.line} at {answers.place(self.study, cell.x)}, {cell.divergence}"
            for cell in self.study.cells
            if cell.diverged
        ]
        if broken:
            found.append(f"No mean and no interval where a run diverged: {'; '.join(broken)}.")
        if any(len(cell.finished) == 1 for cell in self.study.cells):
            found.append("Some arms have one seed only: no spread and no interval is known there.")
        found.append(
            "Seconds are fair only if the runs had the machine to themselves; gradient images always are."
        )
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``json.dumps(..., allow_nan=False)``; accuracies and differences in [0, 1]."""
        study = self.study
        document: dict[str, Any] = finite(
            {
                "title": self.title,
                "version": __version__,
                "command": self.command,
                "lead": answers.lead(study),
                "baseline": study.baseline,
                "controls": list(study.controls),
                "tuned": answers.tuned(study),
                "attack_or_images": answers.attack_or_images(study),
                "at_equal_cost": answers.at_equal_cost(study),
                "robust": answers.robustness(study),
                "analysed_robust": answers.analysed_robustness(study),
                "cells": [_cell(cell) for cell in study.cells],
                "differences": _differences(study),
                "tables": {
                    name: _cells(made)
                    for name, made in {
                        "answers": _answers(study),
                        "staleness": tables.staleness(study),
                        **_made(study),
                    }.items()
                },
                "machines": words.machines(self.comparison),
                "software": words.distinct(self.comparison, "versions"),
                "git": words.distinct(self.comparison, "git"),
                "notes": self.notes,
                "failed": [{"run": run, "error": error} for run, error in study.failed],
            }
        )
        return document


def _answers(study: Study) -> tables.Table:
    """The referee's table: the adversarial arms at the largest x, or all where none attacks."""
    rows = [[answers.Mark(line), *marks] for line, marks in answers.rows(study)]
    return tables.Table(answers.head(study), rows, texts=1)


def _cells(made: tables.Table) -> dict[str, Any]:
    """A table as the page shows it, for pages that are drawn from summary.json."""
    return {
        "head": list(made.head),
        "texts": made.texts,
        "rows": [[mark.text for mark in row] for row in made.rows],
    }


def _cell(cell: Cell) -> dict[str, Any]:
    names = ("test_accuracy", "train_accuracy", "robust_accuracy", "validation_accuracy")
    return {
        "arm": cell.arm,
        "settings": dict(cell.settings),
        "chosen": dict(cell.chosen),
        "at_edge": list(cell.at_edge),
        "trials": len(cell.trials),
        "seeds": [run.seed for run in cell.finished],
        "planned": cell.planned,
        "diverged": cell.diverged,
        **{name: asdict(value) if (value := cell.stat(name)) else None for name in names},
        "cost": asdict(cost(cell)),
    }


def _differences(study: Study) -> list[dict[str, Any]]:
    return [
        {
            "x": found.cell.x,
            "arm": found.cell.line,
            "minus": found.reference.line,
            **asdict(found.difference),
            "verdict": found.difference.verdict,
            "p_holm": found.adjusted,
        }
        for found in differences(study)
    ]


def write_sweep_report(
    sweep: str | Path,
    out: str | Path | None = None,
    *,
    baseline: str | None = None,
    command: str | None = None,
) -> StudySummary:
    """Report the sweep in the folder ``sweep``, finished or still going, and return what the report says.

    out: the .html file (default ``sweep``/report.html); the same name with .md, summary.json and figures/*.png lie
    beside it. baseline: another arm than the spec's to take differences to. command: how it was made, as given.
    Raises ConadvError where there is no readable sweep or no run yet, for an unknown baseline, and when the files
    cannot be written.
    """
    out = Path(sweep) / "report.html" if out is None else Path(out)
    check_out(out)
    summary = StudySummary(load_sweep(sweep, baseline), out.parent, command)
    shown = gallery(summary.study)
    pictures = draw(summary, shown)
    content = {
        **_content(summary),
        "gallery": shown.text,
        "pictures": {picture.name: picture for picture in pictures},
    }
    write(out, _html(summary, content))
    write(out.with_suffix(".md"), _markdown(content, out.name))
    write(out.with_name(SUMMARY), json.dumps(summary.to_json(), indent=2, allow_nan=False) + "\n")
    _write_pictures(out.parent, pictures)
    return summary


def draw(summary: StudySummary, shown: Gallery) -> list[Picture]:
    """Every figure that the records have data for."""
    found = []
    for name, title, how_to_read, make in _PICTURES:
        figure = make(summary)
        if figure is not None:
            found.append(Picture(name, title, how_to_read, figure))
    for number, cell in enumerate(_probed(summary.study), 1):
        found += _staleness(summary.study, cell, number)
    if shown.figure is not None:
        found.append(
            Picture(
                "gallery", "What the attack does to an image", shown.text, shown.figure, raster=True
            )
        )
    return found


def _probed(study: Study) -> list[Cell]:
    """The probed cell of each line with the largest x."""
    cells = {
        cell.line: cell for cell in sorted(probes.probed(study.cells), key=lambda cell: cell.x)
    }
    return [cells[line] for line in study.lines if line in cells]


def _staleness(study: Study, cell: Cell, number: int) -> list[Picture]:
    where = f"{cell.line}, {answers.place(study, cell.x)}"
    draws: list[tuple[str, str, str, Callable[..., Figure | None]]] = [
        (f"staleness-{number}", f"By tau: {where}", _BY_TAU, staleness_figure),
        (
            f"staleness-course-{number}",
            f"Over the training: {where}",
            _COURSE,
            staleness_course_figure,
        ),
    ]
    made = [(name, title, text, make(study, line=cell.line)) for name, title, text, make in draws]
    return [
        Picture(name, title, text, figure)
        for name, title, text, figure in made
        if figure is not None
    ]


_BY_TAU = (
    "What a gradient at older or predicted weights is worth at the weights of the step, by training phase. Lines are "
    "means over runs, bands go from the lowest to the highest run. The full line is the attack at the current weights "
    "(for the prediction error: a perfect prediction), the dotted one random signs."
)
_COURSE = "The same at every probed step, for the smallest and the largest tau; the shades are the phases."

_PICTURES: tuple[tuple[str, str, str, Callable[[StudySummary], Figure | None]], ...] = (
    (
        "accuracy",
        "Test accuracy by batch",
        "Faint: one mark per seed. Full: the mean, with one sample standard deviation up and down; no mean where a run "
        "diverged. Arms at the same batch stand side by side.",
        lambda summary: accuracy_figure(summary.study),
    ),
    (
        "cost",
        "Test accuracy at equal cost",
        "One panel per batch; the cost is that of the whole training. A gradient image is one forward-backward pass on "
        "one image, whatever its view, or one input gradient of the attack, which is somewhat cheaper. Where arms cost "
        "the same, the later marks are smaller. The dashed line is the best accuracy for that cost or less.",
        lambda summary: cost_figure(summary.study),
    ),
    (
        "sharpness",
        "Sharpness",
        "One mark per seed, the tick is the mean, each arm at its largest batch; all on the clean route. Below: the "
        "loss along one random filter-normalised direction, mean over seeds.",
        lambda summary: sharpness.sharpness_figure(summary.study),
    ),
    (
        "curves",
        "Training",
        f"Each arm at its largest batch. {plain.CURVES}",
        lambda summary: plain.curves(summary.comparison),
    ),
    (
        "learning-rate",
        "Learning rate",
        "As recorded at every step, each arm at its largest batch.",
        lambda summary: plain.lr_schedule(summary.comparison),
    ),
)


def _content(summary: StudySummary) -> dict[str, Any]:
    """What both templates show."""
    study, comparison = summary.study, summary.comparison
    return {
        "title": summary.title,
        "command": summary.command,
        "lead": answers.lead(study),
        "where": answers.place(study, study.largest),
        "called": study.called(study.largest).capitalize(),
        "tuned": answers.tuned(study),
        "attack": answers.attack_or_images(study),
        "equal": answers.at_equal_cost(study),
        "robust": answers.robustness(study),
        "analysed_robust": answers.analysed_robustness(study),
        "head": answers.head(study),
        "rows": answers.rows(study),
        "glossary": words.glossary(comparison),
        "tables": _made(study),
        "tests": len(differences(study)),
        "tuning_runs": sum(len(trial.validation) for cell in study.cells for trial in cell.trials),
        "notes": summary.notes,
        "failed": study.failed,
        "differing": [
            (name, [settings.show(name, arm.settings.get(name)) for arm in comparison.arms])
            for name in comparison.differing
        ],
        "labels": [arm.label for arm in comparison.arms],
        "common": [
            (name, settings.show(name, value)) for name, value in sorted(comparison.common.items())
        ],
        "machines": words.machines(comparison),
        "versions": words.distinct(comparison, "versions"),
        "run_versions": words.distinct(comparison, "version"),
        "git": words.distinct(comparison, "git"),
        "runs": _runs(summary),
    }


_TABLES: dict[str, Callable[[Study], tables.Table]] = {
    "accuracy": tables.accuracy,
    "differences": tables.contrasts,
    "costs": tables.costs,
    "tuning": tables.tuning,
    "sharpness": tables.sharp,
}


def _made(study: Study) -> dict[str, tables.Table]:
    return {name: make(study) for name, make in _TABLES.items()}


def _runs(summary: StudySummary) -> list[dict[str, Any]]:
    """The confirmation runs of every cell, with the value of the axis."""
    listed = []
    for cell in summary.study.cells:
        for run in run_list(
            compare(cell.runs, {str(run.path): cell.line for run in cell.runs}), summary.folder
        ):
            listed.append({**run, "where": answers.place(summary.study, cell.x)})
    return listed


def _html(summary: StudySummary, content: dict[str, Any]) -> str:
    environment = Environment(
        loader=PackageLoader("conadv", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    style = Markup((Path(__file__).parent.parent / "style.css").read_text(encoding="utf-8"))
    colours = {line: line_look(summary.study, line).colour for line in summary.study.lines}
    return environment.get_template("study.html.j2").render(**content, style=style, colours=colours)


def _markdown(content: dict[str, Any], html_name: str) -> str:
    environment = Environment(
        loader=PackageLoader("conadv", "report"),
        autoescape=False,  # every value goes through finalize instead
        finalize=escape_markdown,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("study.md.j2").render(**content, html_name=html_name)


def _write_pictures(folder: Path, pictures: list[Picture]) -> None:
    for picture in pictures:
        target = folder / picture.file
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(picture.png)
        except OSError as error:
            raise ConadvError(
                f"Cannot write the report's figure {printable(target)}: {error}"
            ) from error
