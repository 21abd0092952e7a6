"""Put the record of finished sweeps into the repository: numbers to results/studies/, figures to docs/img/studies/.

    python benchmarks/publish_study.py SWEEP...
    python benchmarks/publish_study.py --again NAME...

SWEEP is the folder that `conadv sweep` wrote. Its report is made anew; `results/studies/NAME/` gets `sweep.json` (the
spec, every trial and choice), `summary.json` (the report's numbers and tables), `runs.jsonl` (one line per run) and,
where runs were analysed, `analysis.jsonl`. Of the figures those are taken that a page shows. `benchmarks/readme.py`
draws the pages from these.

With --again the report is made anew from what is published of the study NAME (a folder of results/studies/): for a
report that says or draws something new, when the sweep's folder is gone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import study_flatness
import study_records

from conadv.report.study import write_sweep_report

ROOT = Path(__file__).resolve().parent.parent
FIELDS = (
    *(
        "seed",
        "lr",
        "eps",
        "steps",
        "train_loss",
        "train_accuracy",
        "validation_loss",
        "validation_accuracy",
    ),
    *("test_loss", "test_accuracy", "robust_accuracy", "seconds", "step_seconds_median"),
    "gradient_images_per_clean_image",
)


def publish(sweep: Path) -> Path:
    """Copy what the pages need of one sweep, and return the folder of its numbers."""
    document = json.loads((sweep / "sweep.json").read_text())
    name = str(document["name"]).replace("_", "-")
    write_sweep_report(sweep, command=f"conadv sweep studies/{document['spec_path']}")
    numbers, pictures = (
        ROOT / "results" / "studies" / name,
        ROOT / "docs" / "img" / "studies" / name,
    )
    for folder in (numbers, pictures):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    for file in ("sweep.json", "summary.json"):
        shutil.copy(sweep / file, numbers / file)
    lines = [
        json.dumps(run_line(run))
        for run in sorted((sweep / "runs").iterdir())
        if (run / "summary.json").is_file()
    ]
    (numbers / "runs.jsonl").write_text("\n".join(lines) + "\n")
    if analysed := study_flatness.lines(sweep):
        (numbers / study_flatness.FILE).write_text(
            "".join(f"{json.dumps(line)}\n" for line in analysed)
        )
    copy_pictures(sweep, name)
    return numbers


def again(name: str) -> Path:
    """Make the report of a published study anew, and return the folder of its numbers."""
    numbers = ROOT / "results" / "studies" / name
    with tempfile.TemporaryDirectory() as place:
        study_records.restore(numbers, Path(place))
        summary = study_records.report_again(numbers, Path(place))
        copy_pictures(Path(place), name)
    (numbers / "summary.json").write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
    return numbers


def copy_pictures(sweep: Path, name: str) -> None:
    """Put the figures of a report that a page shows to docs/img/studies/."""
    for picture in sorted((sweep / "figures").glob("*.png")):
        if wanted(f"{name}/{picture.name}"):
            shutil.copy(picture, ROOT / "docs" / "img" / "studies" / name / picture.name)


def wanted(picture: str) -> bool:
    """Whether a page shows it. Never the gallery: its images belong to the data set and are not ours to pass on."""
    pages = (ROOT / "docs").rglob("*.md")
    return "gallery" not in picture and any(
        f"img/studies/{picture}" in page.read_text() for page in pages
    )


def run_line(run: Path) -> dict[str, Any]:
    """The results of one run, without what its configuration says anyway."""
    summary = json.loads((run / "summary.json").read_text())
    return {
        "run": run.name,
        **{name: summary[name] for name in FIELDS if summary.get(name) is not None},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "given", nargs="+", metavar="SWEEP", help="a sweep's folder, with --again a study's name"
    )
    parser.add_argument("--again", action="store_true", help="from what is published already")
    options = parser.parse_args()
    for given in options.given:
        print(again(given) if options.again else publish(Path(given)))


if __name__ == "__main__":
    main()
