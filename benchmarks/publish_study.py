"""Records of finished sweeps into the repository, and from them the tables and figures of pages.

    python benchmarks/publish_study.py SWEEP...    # a sweep's folder to results/studies/ and
    docs/img/studies/ python benchmarks/publish_study.py             # every table of README.md and
    docs/, every figure python benchmarks/publish_study.py --readme    # README.md alone python
    benchmarks/publish_study.py --check     # exit code 1 if a page has another table than the
    records

A page has a table between two marks, the first of which says what is drawn:

    <!-- table: win-cifar10 accuracy | on: validation_accuracy | columns: arm; seeds; cost -->
    <!-- end table -->

The kinds are accuracy, differences, costs and tuning (made from runs.jsonl and sweep.json),
sharpness and staleness (as summary.json has them), made (seeds, command, machine), and against.
Options: at (a value of the axis), on (the metric), columns (which), pairs (of differences: "A minus
B; C minus D"), to (of against: the arms that others are named after, such as "LARS; LAMB" for "LARS
+ ConAdv").

`bench NAME` draws results/benchmarks/NAME.json and says how it was made (bench_tables.py).
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import bench_tables
import matplotlib as mpl
import pandas as pd

from conadv.analysis.style import to_png
from conadv.report import tables, write_sweep_report
from conadv.report.accuracy_figure import draw_accuracy, draw_cost
from conadv.report.comparison import read_sweep
from conadv.report.figure_style import STYLE
from conadv.report.page import markdown_table

ROOT = Path(__file__).resolve().parent.parent
STUDIES, PICTURES = ROOT / "results" / "studies", ROOT / "docs" / "img" / "studies"
FIELDS = (
    *("seed", "lr", "eps", "steps", "train_loss", "train_accuracy", "validation_loss"),
    *("validation_accuracy", "test_loss", "test_accuracy", "robust_accuracy", "seconds"),
    *("step_seconds_median", "attack_seconds_share", "gradient_images_per_clean_image"),
)
MARK = re.compile(r"(<!-- table: (?P<what>[^\n]*) -->\n).*?(<!-- end table -->)", re.S)


study_of = functools.cache(read_sweep)
"""A study's folder -> what its records say; a page asks for each more than once."""


def publish(sweep: Path) -> None:
    """Keep sweep.json, the report's summary.json, a line per run, and the figures."""
    document = json.loads((sweep / "sweep.json").read_text())
    name = document["name"].replace("_", "-")
    write_sweep_report(sweep, command=f"conadv sweep studies/{document['spec_path']}")
    for folder in (STUDIES / name, PICTURES / name):
        folder.mkdir(parents=True, exist_ok=True)
    for file in ("sweep.json", "summary.json"):
        shutil.copy(sweep / file, STUDIES / name / file)
    lines = []
    for file in sorted((sweep / "runs").glob("*/summary.json")):
        found = json.loads(file.read_text())
        kept = {field: found[field] for field in FIELDS if found.get(field) is not None}
        lines.append(json.dumps({"run": file.parent.name, **kept}) + "\n")
    (STUDIES / name / "runs.jsonl").write_text("".join(lines))
    for picture in (sweep / "figures").glob("*.png"):
        shutil.copy(picture, PICTURES / name / picture.name)


def draw_figures() -> None:
    """The figures that can be made of the published records, where a study has them."""
    for folder in sorted(PICTURES.iterdir()):
        for file, draw in {"accuracy.png": draw_accuracy, "cost.png": draw_cost}.items():
            with mpl.rc_context(STYLE):
                figure = draw(study_of(STUDIES / folder.name))
            if figure and (folder / file).exists():
                (folder / file).write_bytes(to_png(figure, 160))


def section(what: str) -> str:
    """What stands between the marks of ``what``."""
    first, *rest = what.split(" | ")
    study, kind = first.split()
    options = dict(option.split(": ", 1) for option in rest)
    if study == "bench":
        frame, how = bench_tables.table(kind, options)
        return f"{markdown_table(frame)}\n\n{how}"
    summary = json.loads((STUDIES / study / "summary.json").read_text())
    if kind == "made":
        return made(summary)
    frame = table(STUDIES / study, kind, options, summary["tables"])
    if "at" in options:
        frame = frame[frame.iloc[:, 0] == options["at"]].iloc[:, 1:]
    frame = frame[options["columns"].split("; ")] if "columns" in options else frame
    if frame.empty:
        raise SystemExit(f"No rows for the mark {what!r}.")
    return markdown_table(frame)


def table(folder: Path, kind: str, options: dict[str, str], drawn: dict[str, Any]) -> pd.DataFrame:
    study, metric = study_of(folder), options.get("on", "test_accuracy")
    if kind in ("sharpness", "staleness"):
        found = drawn.get(kind) or drawn[kind.capitalize()]  # version 0.1 wrote small letters
        return pd.DataFrame(found["rows"], columns=found["head"])
    if kind == "differences":
        pairs = [tuple(p.split(" minus ")) for p in options.get("pairs", "").split("; ") if p]
        return tables.differences(study, pairs, metric)
    if kind in ("costs", "tuning"):
        return getattr(tables, kind)(study)
    frame, bases = tables.accuracy(study, metric), options.get("to", "").split("; ")
    if kind == "against":
        of = {a: study.latest[next(b for b in bases if a.name.startswith(b))] for a in study.arms}
        said = [tables.NONE if a is b else tables.points(a, b, metric) for a, b in of.items()]
        frame["against its optimizer alone"] = said
    return frame


def made(summary: dict[str, Any]) -> str:
    """Seeds, command, commits, machine and versions."""
    arms = summary.get("arms") or summary["cells"]  # version 0.1 wrote cells
    seeds = sorted({len(arm.get("seeds") or arm["results"]["steps"]) for arm in arms})
    facts = ["; ".join(row) for row in summary["tables"].get("Made with", {}).get("rows", [])]
    facts = facts or [*summary["git"], *summary["machines"], *summary["software"]]
    said = re.sub(r"\b([0-9a-f]{7})[0-9a-f]{33}\b", r"\1", "; ".join(facts))
    count = " to ".join(map(str, seeds[:: len(seeds) - 1 or 1]))
    return f"{count} seeds; `{summary['command']}`; {said}."


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("sweeps", nargs="*", type=Path, metavar="SWEEP")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--readme", action="store_true")
    options = parser.parse_args()
    for sweep in options.sweeps:
        publish(sweep)
    pages = [ROOT / "README.md", *([] if options.readme else sorted((ROOT / "docs").rglob("*.md")))]
    for page in pages:
        before = page.read_text()
        after = MARK.sub(lambda found: f"{found[1]}{section(found['what'])}\n{found[3]}", before)
        if after != before and options.check:
            raise SystemExit(f"{page.name} is not what results/ says: run {parser.prog}")
        page.write_text(after)
    if not options.check and not options.readme:
        draw_figures()


if __name__ == "__main__":
    main()
