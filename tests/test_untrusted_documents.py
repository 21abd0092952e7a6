"""Values of JSON files that no reader expects: errors that name the file, the field and what to do, and no crash."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from conadv import safe_io
from conadv.cli.analyze import read as read_analysis
from conadv.cli.program import main
from conadv.cli.watch import View
from conadv.errors import ConadvError
from conadv.report.comparison import read_sweep
from conadv.report.load import load_run
from conadv.report.sharpness import analysis
from conadv.sweep.cells import Run
from conadv.sweep.folder import Folder
from conadv.training import documents

from .report_records import analysis as analysis_document
from .report_records import make_config, probe_lines, write_run, write_sweep

LARGE = "1" + "0" * 400


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sweep(tmp_path_factory.mktemp("sweep"), seeds=1, probes=False)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_run(tmp_path / "run", make_config(), accuracy=0.9)
    return tmp_path / "run"


def changed(path: Path, *keys: Any, value: Any) -> None:
    """Put ``value`` where ``keys`` lead in a JSON file; text is put there as it is."""
    document = json.loads(path.read_text())
    part = document
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = "HERE" if isinstance(value, str) else value
    path.write_text(json.dumps(document).replace('"HERE"', str(value)))


# Numbers and nesting


@pytest.mark.parametrize(
    "text", [LARGE, "-" + LARGE, "1" * 21, "[" * 33 + "]" * 33, '{"a":' * 33 + "1" + "}" * 33]
)
def test_numbers_and_nesting_that_readers_could_not_take_are_no_json(text: str) -> None:
    # Red when: parse_json calls json.loads without _whole, or does not look at _depth.
    with pytest.raises(ValueError, match=r"more than 20 digits|too deeply"):
        safe_io.parse_json(text)


def test_every_number_and_depth_that_conadv_writes_is_json() -> None:
    # Red when: a limit is below what a seed may be, or below the depth of a list of lists.
    values = [2**64 - 1, -(2**63), 0.1, [[[1], [2]]] * 50]
    assert safe_io.parse_json(json.dumps(values)) == values
    assert safe_io.parse_json("[" * 32 + "]" * 32) == json.loads("[" * 32 + "]" * 32)


@pytest.mark.parametrize("field", ["loss", "step", "lr"])
def test_a_record_with_a_number_beyond_all_measure_is_an_error(field: str, run: Path) -> None:
    # Red when: parse_json takes whole numbers of any length (float() of one raises OverflowError).
    line = json.dumps({"type": "step", "step": 99, field: "HERE"}).replace('"HERE"', LARGE)
    with (run / "record.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ConadvError, match="digits"):
        load_run(run)


# summary.json

SUMMARIES: dict[str, tuple[str, Any]] = {
    "ranks is text": ("ranks", '"x"'),
    "ranks is a list": ("ranks", [1]),
    "no ranks": ("ranks", 0),
    "accuracy is text": ("test_accuracy", '"1"'),
    "accuracy above 1": ("test_accuracy", 2.0),
    "true accuracy": ("test_accuracy", True),
    "negative seconds": ("seconds", -1.0),
    "no images a second": ("clean_images_per_second", 0.0),
    "huge time": ("step_seconds_median", 1e300),
}


@pytest.mark.parametrize("name", SUMMARIES)
def test_a_summary_that_cannot_be_is_an_error(name: str, run: Path) -> None:
    # Red when: _read_summary does not call checked.
    field, value = SUMMARIES[name]
    changed(run / "summary.json", field, value=value)
    with pytest.raises(
        ConadvError,
        match=rf"summary\.json is not what conadv writes: {field} is .*Leave the run out",
    ):
        load_run(run)


def test_a_sweep_checks_the_summaries_it_goes_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Red when: Folder.result takes what a summary says.
    monkeypatch.setattr("conadv.training.run_dir.RunDir.changes", lambda *_: [])
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    (folder / "config.yaml").touch()
    (folder / "summary.json").write_text('{"validation_accuracy": "x"}')
    with pytest.raises(ConadvError, match=r"validation_accuracy is 'x'.*Delete .* to run it again"):
        Folder(tmp_path).result(Run("a", None))  # type: ignore[arg-type]


# sweep.json

SWEEPS: dict[str, tuple[tuple[Any, ...], Any]] = {
    "cells is a number": (("cells",), 5),
    "a cell is a number": (("cells",), [1]),
    "axis is a mapping": (("axis",), {}),
    "controls is a number": (("controls",), 5),
    "spec is text": (("spec",), '"x"'),
    "failed is a number": (("failed",), 5),
    "a failure is text": (("failed",), ["x"]),
    "title is a list": (("spec", "title"), []),
    "tune is a list": (("spec", "tune"), []),
    "tuning seeds is a number": (("spec", "tune", "seeds"), 5),
    "no arm": (("cells", 0, "arm"), None),
    "settings is a list": (("cells", 0, "settings"), []),
    "a setting is a mapping": (("cells", 0, "settings", "global_batch_size"), {}),
    "runs are numbers": (("cells", 0, "runs"), [1]),
    "trials is text": (("cells", 0, "trials"), '"x"'),
    "validation is text": (("cells", 0, "trials", 0, "validation"), ["0"]),
    "tuned_on is a number": (("cells", 0, "tuned_on"), 3),
    "diverged is a number": (("failed",), [{"run": "runs/x", "error": "e", "diverged": 3}]),
    "name is huge": (("name",), LARGE),
}


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_that_cannot_be_is_an_error(name: str, sweep: Path, tmp_path: Path) -> None:
    # Red when: read_sweep returns what json.loads gives.
    shutil.copytree(sweep, tmp_path / "sweep")
    keys, value = SWEEPS[name]
    changed(tmp_path / "sweep" / "sweep.json", *keys, value=value)
    with pytest.raises(ConadvError, match=r"sweep\.json(: 1| is not what conadv writes)"):
        read_sweep(tmp_path / "sweep")
    with pytest.raises(ConadvError, match=r"sweep\.json(: 1| is not)"):
        View(tmp_path / "sweep").planned()
    assert main(["report", str(tmp_path / "sweep"), "--out", str(tmp_path / "report.html")]) == 2


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parent.parent / "results" / "studies").glob("*/sweep.json"))
)
def test_the_sweeps_of_the_studies_are_readable(path: Path) -> None:
    # Red when: a field's type or range is narrower than what `conadv sweep` writes.
    assert documents.read_sweep(path).cells


# analysis.json

ANALYSES: dict[str, tuple[tuple[Any, ...], Any]] = {
    "hessian is text": (("hessian",), '"x"'),
    "eigenvalues is a number": (("hessian", "eigenvalues"), 5),
    "sharpness is a list": (("sharpness",), []),
    "a value is text": (("sharpness", "sam", "value"), '"x"'),
    "losses are text": (("landscape_1d", "train_loss"), ["x"] * 5),
    "a loss too few": (("landscape_1d", "test_loss"), [1.0] * 4),
    "alphas is a number": (("landscape_1d", "alphas"), 5),
    "loss is text": (("loss",), '"x"'),
}


@pytest.mark.parametrize("name", ANALYSES)
def test_an_analysis_that_cannot_be_is_an_error(name: str, run: Path) -> None:
    # Red when: either reader does not call checked; Line does not compare lengths.
    (run / "analysis.json").write_text(json.dumps({**analysis_document(3.0), "options": {}}))
    keys, value = ANALYSES[name]
    assert analysis(load_run(run))["loss"] == read_analysis(run).loss
    changed(run / "analysis.json", *keys, value=value)
    for read in (lambda: analysis(load_run(run)), lambda: read_analysis(run)):
        with pytest.raises(
            ConadvError, match=r"analysis\.json is not what conadv writes.*conadv analyze"
        ):
            read()


# Probes

PROBES: dict[str, list[dict[str, Any]]] = {
    "one line": probe_lines(5)[:1],
    "another line": probe_lines(5)[2:3],
    "a type alone": [{"type": "probe", "step": 1}],
    "phase unknown": [{**line, "phase": "x"} for line in probe_lines(5)],
    "tau is text": [{**line, "tau": "x"} for line in probe_lines(5)],
    "no loss": [{**line, "loss_increase": None} for line in probe_lines(5)],
}


@pytest.mark.parametrize("name", PROBES)
def test_probes_that_cannot_be_are_errors(
    name: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Red when: table keeps a probe without "noise"; the command or the report does not check the lines' fields.
    with (run / "record.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in PROBES[name])
    assert main(["staleness", str(run)]) == 2
    assert str(run / "record.jsonl") in capsys.readouterr().err
    if len(PROBES[name][0]) < 5 or len(PROBES[name]) > 1:
        with pytest.raises(ConadvError, match="probe"):
            load_run(run)


def test_a_probe_that_was_cut_off_is_left_out() -> None:
    # Red when: a probe without "noise" is kept.
    from conadv.analysis.staleness import table

    assert table([*probe_lines(10), *probe_lines(20)[:1]]).equals(table(probe_lines(10)))


# Pipes


@pytest.mark.timeout(60)
def test_a_pipe_in_place_of_a_record_is_not_waited_for(run: Path) -> None:
    # Red when: watch opens whatever lies there (the test then hangs until its time is up).
    (run / "record.jsonl").unlink()
    os.mkfifo(run / "record.jsonl")
    assert main(["watch", str(run.parent), "--once"]) == 0
