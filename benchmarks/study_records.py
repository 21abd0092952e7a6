"""A published study back as the folder of a sweep, so that today's report can be made of runs whose folders are gone.

What `benchmarks/publish_study.py` keeps of a run is its results; its configuration follows from the spec. The curves,
the probe and the analysis are not kept: what a report made of them when it was published stays as it was.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from conadv.config.files import dump_yaml
from conadv.config.schema import Config
from conadv.report.study import write_sweep_report
from conadv.sweep.cells import expand
from conadv.sweep.spec import parse_spec

Json = dict[str, Any]
KEPT = ("command", "version", "machines", "software", "git", "analysed_robust")
KEPT_TABLES = ("staleness", "sharpness")


def lines(study: Path) -> list[Json]:
    """The runs of a published study, tuning runs included."""
    return [json.loads(line) for line in (study / "runs.jsonl").read_text().splitlines()]


def restore(study: Path, folder: Path) -> None:
    """Make ``folder`` a sweep's with the confirmation runs of the published ``study``."""
    document, summary = (
        json.loads((study / file).read_text()) for file in ("sweep.json", "summary.json")
    )
    plan, found = expand(parse_spec(document["spec"])), {line["run"]: line for line in lines(study)}
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(study / "sweep.json", folder)
    for cell, reported in zip(document["cells"], summary["cells"], strict=True):
        for name in cell["runs"]:
            short = Path(name).name
            _write(folder / name, plan.runs[short].config, found[short], reported["cost"])


def _write(run: Path, config: Config, line: Json, cost: Json) -> None:
    run.mkdir(parents=True, exist_ok=True)  # two arms with the same settings share their runs
    header = {
        "type": "header",
        "seed": config.seed,
        "recipe": config.recipe,
        "steps": line["steps"],
    }
    (run / "record.jsonl").write_text(json.dumps(header) + "\n")
    (run / "config.yaml").write_text(dump_yaml(config))
    rate = cost["total"] / line["seconds"]
    rates = {
        "clean_images_per_second": rate / cost["per_image"],
        "gradient_images_per_second": rate,
    }
    (run / "summary.json").write_text(json.dumps({**line, **rates}))


def report_again(study: Path, folder: Path) -> Json:
    """Report the restored ``folder`` and return its summary.json, with what cannot be made again as it was published.

    The test accuracies must be those that were published, or something else was restored.
    """
    write_sweep_report(folder)
    before, after = (json.loads((place / "summary.json").read_text()) for place in (study, folder))
    accuracies = [
        [cell["test_accuracy"]["values"] for cell in summary["cells"]]
        for summary in (before, after)
    ]
    if accuracies[0] != accuracies[1]:
        raise SystemExit(
            f"The runs of {study.name} are not those that its summary.json was made of."
        )
    after |= {name: before.get(name, after[name]) for name in KEPT}
    after["tables"] |= {name: before["tables"][name] for name in KEPT_TABLES}
    return after
