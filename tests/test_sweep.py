"""Sweeps: the spec's checks, the plan, the choice, and runs that fail, stop and go on."""

from __future__ import annotations

import functools
import itertools
import json
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from conadv.cli import sweep as command
from conadv.cli.program import main
from conadv.config.files import dump_yaml
from conadv.config.schema import Config
from conadv.errors import ConadvError
from conadv.sweep import pool
from conadv.sweep.cells import Plan, Run, expand
from conadv.sweep.choose import Result, at_edge, choose, only_edges
from conadv.sweep.folder import Folder
from conadv.sweep.schedule import Schedule, forecast
from conadv.sweep.spec import load_spec, parse_spec
from conadv.training.loop import train
from conadv.training.observer import Observer
from conadv.types import StepRecord

ROOT = Path(__file__).parent.parent
TINY: dict[str, Any] = {
    "data.train_images": 120,
    "data.validation_images": 40,
    "model.width": 2,
    "epochs": 1,
    "schedule.warmup_epochs": 0,
    "eval.every_epochs": None,
    "eval.robust_images": 0,
    "checkpoint.every_epochs": None,
}


def values(**changes: Any) -> dict[str, Any]:
    """A spec of two arms at two batches: 8 tuning runs and 8 confirmation runs."""
    spec: dict[str, Any] = {
        "name": "tiny",
        "recipe": "digits",
        "base": TINY,
        "arms": {"LARS": {}, "+ noise": {"method": "noise"}},
        "baseline": "LARS",
        "controls": ["+ noise"],
        "grid": {"global_batch_size": [20, 80]},
        "tune": tune([1, 2]),
        "confirm": {"seeds": [0, 1]},
    }
    return {**spec, **changes}


def tune(lr: Any, **more: Any) -> dict[str, Any]:
    return {"seeds": [100], "settings": {"optim.lr": lr}, **more}


def plan(**changes: Any) -> Plan:
    return expand(parse_spec(values(**changes)))


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(values(**changes), sort_keys=False))
    return path


def read(out: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((out / "sweep.json").read_text())
    return document


def run(spec: Path, out: Path, *options: str) -> int:
    return main(["sweep", str(spec), "--out", str(out), "--jobs", "1", "--no-report", *options])


def train_here(next_run: Any, work: pool.Work, workers: int) -> Iterator[Any]:
    """run_pool without processes, which take seconds to start."""
    while (run := next_run()) is not None:
        yield [run], []
        yield [], [(run, pool._result(work, run))]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs are trained in this process, by one thread as in a worker."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(command, "run_pool", train_here)
    yield
    torch.set_num_threads(threads)


def fake(folder: Folder, run: Run, **summary: Any) -> None:
    """A finished run with made-up results."""
    path = folder.run_dir(run.name).path
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(dump_yaml(run.config))
    full = {"validation_accuracy": 0.5, "validation_loss": 1.0, "test_accuracy": 0.5, **summary}
    (path / "summary.json").write_text(json.dumps(full))


def tuning(made: Plan) -> list[Run]:
    return list(dict.fromkeys(made.runs[name] for phase, *_, name in made.order if phase == 0))


def faked(made: Plan, out: Path) -> dict[str, Any]:
    """sweep.json when all tuning runs have ended: LARS is best at lr 2, noise at 1 (but not on
    test).
    """
    folder = Folder(out)
    for each in tuning(made):
        good = (each.config.method == "vanilla") == (each.config.optim.lr == 2)
        accuracies = {"validation_accuracy": 0.8 + 0.1 * good, "test_accuracy": 0.9 - 0.1 * good}
        fake(folder, each, **accuracies)
    schedule = Schedule(made, folder, "tiny.yaml")
    schedule.load()
    return schedule.document()


# ---- the spec

ARM = {"arms": {"LARS": {"optim.lr": 3}, "+ noise": {}}}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"arm": {}}, "Did you mean 'arms'"),
    ({"name": "../x"}, "name is '../x': String should match"),
    ({"base": 5}, "base is 5: Input should be a valid dictionary"),
    ({"base": {**TINY, "optim.lrr": 1}}, "Did you mean 'optim.lr'"),
    ({"base": {**TINY, "epochs.x": 1}}, "Unknown setting 'epochs.x'"),
    ({"base": {**TINY, "epochs": -1}}, "epochs = -1"),
    ({"base": {**TINY, "seed": 3}}, "tune.seeds"),
    ({"base": {**TINY, "data.validation_images": None}}, "Give data.validation_images"),
    ({"arms": {"LARS": {"method": "nois"}}, "controls": []}, "'noise'"),
    ({"arms": {"LARS": {"staleness": 2}}, "controls": []}, "no effect"),
    ({"arms": {"a b": {}, "A-b": {"method": "noise"}}, "baseline": None, "controls": []}, "Rename"),
    ({"arms": {"LARS": {"global_batch_size": 20}, "+ noise": {}}}, "in settings and in grid"),
    ({"grid": {}, "arms": {"LARS": {"epochs": 2, "grid": {}}}}, "Unknown key"),
    ({"baseline": "LAR"}, "Did you mean 'LARS'"),
    ({"controls": ["noise"]}, "Did you mean '+ noise'"),
    ({"confirm": {"seeds": [5, 100]}}, "Seed 100"),
    ({"confirm": {"seeds": [5, 5]}}, "twice"),
    ({"confirm": {"seeds": []}}, "at least 1"),
    ({"grid": {"optim.lr": [1]}}, "axis"),
    ({"tune": {"seeds": [100], "settings": {"global_batch_size": [1, 2]}}}, "in grid and in tune"),
    (ARM, "in settings and in tune"),
    ({**ARM, "tune": tune([1], tune_on="LAR")}, "Did you mean 'LARS'"),
    ({"tune": tune({20: [1, 2]})}, "no list for global_batch_size 80"),
    ({"grid": {"global_batch_size": [{20: 80}]}, "tune": tune({20: [1]})}, "no list for"),
    ({"tune": tune({20: [1, 2], 80: [1]})}, "Unequal trials"),
    ({"arms": {"LARS": {"tune": {"optim.lr": [1, 2, 3]}}, "+ noise": {}}}, "Unequal trials"),
    ({"arms": {"LARS": {"tune": {}}, "+ noise": {}}, "tune": None}, "Give tune.seeds"),
    ({"tune": tune([1, 1])}, "twice"),
    ({"tune": tune([1], by="test_accuracy")}, "tune.by"),
    ({"base": {**TINY, "micro_batch_size": "auto"}}, "micro_batch_size auto"),
]


@pytest.mark.parametrize(("changes", "says"), WRONG)
def test_wrong_specs_are_refused(changes: dict[str, Any], says: str) -> None:
    # Red when: the check that a row is about is taken out.
    with pytest.raises(ConadvError) as caught:
        plan(**changes)
    assert says in str(caught.value)


MANY = [number / 1000 for number in range(1, 1000)]
THREE = dict.fromkeys(("optim.lr", "optim.momentum", "optim.weight_decay"), MANY)


@pytest.mark.parametrize(
    "changes",
    [
        {"tune": {"seeds": [100], "settings": THREE}},
        {"grid": {"global_batch_size": [20], **THREE}, "tune": None},
        {"confirm": {"seeds": list(range(20_000))}, "tune": None},
        {"arms": {f"arm {n}": {} for n in range(6000)}, "baseline": None, "controls": []},
    ],
    ids=["trials", "cells", "seeds", "arms"],
)
def test_too_many_runs_are_refused_before_they_fill_the_memory(changes: dict[str, Any]) -> None:
    # Red when: combinations are made before they are counted, or one factor is not counted.
    tracemalloc.start()
    try:
        with pytest.raises(ConadvError, match="More than 10,000 runs"):
            parse_spec(values(**changes))
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


def test_the_size_of_a_sweep_is_its_number_of_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    # Red when: tuning seeds or trials are not counted; the limit itself is refused.
    for limit in (24, 23):  # 24 = arms x batches x trials x seeds
        monkeypatch.setattr("conadv.sweep.spec.MAX_RUNS", limit)
        with pytest.raises(ConadvError, match="More than") if limit < 24 else nullcontext():
            assert len(plan().runs) == 24


@pytest.mark.parametrize("path", sorted((ROOT / "studies").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_studies_plan_the_runs_that_were_published(path: Path) -> None:
    # Red when: a setting is misspelt; a run gets another name or setting (0.1's folders could not
    # be resumed); the order of cells or trials changes.
    made = expand(load_spec(path))
    published = ROOT / "results" / "studies" / path.stem.replace("_", "-") / "sweep.json"
    cells = json.loads(published.read_text())["cells"] if published.is_file() else []
    there = [cell for cell in cells if cell["arm"] in made.spec.arms]
    assert bool(there) == published.is_file()
    for cell, known in zip(made.cells, there, strict=False):
        assert cell.arm == known["arm"]
        confirmed = [[f"runs/{name}" for name in trial.confirming] for trial in cell.trials]
        assert known["runs"] in (*confirmed, [])
        if cell.source is not None and known["trials"]:
            tried = [[f"runs/{name}" for name in trial.tuning] for trial in cell.trials]
            assert tried == [trial["runs"] for trial in known["trials"]]


# ---- the plan


def test_cells_and_runs() -> None:
    # Red when: a grid value, a trial or a seed does not reach the config; the arms run one by one.
    made = plan()
    assert [(cell.arm, cell.settings) for cell in made.cells] == [
        (arm, {"global_batch_size": batch}) for arm in ("LARS", "+ noise") for batch in (20, 80)
    ]
    config = made.runs["noise-batch-80-lr-2-seed1"].config
    assert (config.method, config.global_batch_size, config.optim.lr) == ("noise", 80, 2)
    assert (config.seed, config.micro_batch_size) == (1, 80)
    order = [(run.config.global_batch_size, run.config.method) for run in tuning(made)]
    assert order[:4] == [(20, "vanilla"), (20, "noise")] * 2
    confirming = [(seed, cell) for phase, seed, *_, trial, cell, _ in made.order if phase > trial]
    assert confirming == [(seed, cell) for seed in (0, 1) for cell in (0, 2, 1, 3)]


def test_fractions_and_lists_per_batch() -> None:
    arms = {"+ noise": {"settings": {"method": "noise", "attack.eps": "2/255"}}}
    made = plan(arms=arms, baseline=None, tune=tune({20: [1, 2], 80: [3, 4]}))
    assert {run.config.attack.eps for run in made.runs.values()} == {2 / 255}
    tried = [[trial.settings["optim.lr"] for trial in cell.trials] for cell in made.cells]
    assert tried == [[1, 2], [3, 4]]


def test_identical_runs_are_one_run() -> None:
    # Red when: a run is named without looking for its config. The last arm is LARS by another name.
    arms = {"LARS": {}, "+ noise": {"method": "noise"}, "LARS again": {"label_smoothing": 0}}
    made = plan(arms=arms)
    assert len(made.runs) == 24
    assert made.cells[0].trials == made.cells[4].trials


def test_tune_on_takes_the_choice_of_one_arm(tmp_path: Path) -> None:
    # Red when: a cell is its own source, or the other arm is tuned as well.
    made = plan(tune=tune([1, 2], tune_on="LARS"))
    assert [cell.source for cell in made.cells] == [0, 1, 0, 1]
    assert len(tuning(made)) == 4
    cell = faked(made, tmp_path)["cells"][3]
    assert (cell["chosen"], cell["trials"], cell["tuned_on"]) == ({"optim.lr": 2}, [], "LARS")
    assert cell["runs"] == [f"runs/noise-batch-80-lr-2-seed{seed}" for seed in (0, 1)]
    elsewhere = {"settings": {"method": "noise"}, "grid": {"global_batch_size": [40]}}
    with pytest.raises(ConadvError, match="has no cell there"):
        plan(arms={"LARS": {}, "+ noise": elsewhere}, tune=tune([1, 2], tune_on="LARS"))


# ---- the choice


def good(accuracy: float, loss: float = 1.0) -> Result:
    return Result(accuracy, loss)


BAD = Result(error="loss is nan", diverged=True)


@pytest.mark.parametrize(
    ("trials", "best"),
    [
        ([[good(0.8), good(0.9)], [good(0.9), good(0.9)], [good(0.95), good(0.7)]], 1),
        ([[good(0.9, 2.0)], [good(0.9, 1.0)], [good(0.9, 1.5)]], 1),
        ([[good(0.9)], [good(0.9)]], 0),
        ([[good(0.9), BAD], [good(0.1), good(0.1)]], 1),
        ([[BAD], [BAD]], None),
        ([[good(0.9)], [None]], None),
        ([[good(0.9)], [Result(error="disk full")]], None),
    ],
    ids=["mean", "tie-loss", "tie-first", "diverged", "all-diverged", "missing", "failed"],
)
def test_choose(trials: list[list[Result | None]], best: int | None) -> None:
    # Red when: max goes by the best seed, by loss first, or leaves a diverged run out of the mean.
    assert choose(trials) == best


def test_choices_at_an_edge() -> None:
    # Red when: the first and last trial count in place of the smallest and largest value; a
    # setting with two values, which has no inside, is called at the edge.
    trials = [{"lr": lr, "rho": rho, "name": "tf"} for lr in (4, 1, 2) for rho in (0.05, 0.1)]
    assert [at_edge(trials, trial) for trial in trials] == [["lr"]] * 4 + [[]] * 2
    assert only_edges(trials) == ["rho"]
    assert only_edges([{"lr": 1}, {"lr": 2}, {}]) == []


def test_the_choice_is_made_on_validation_never_on_test(tmp_path: Path) -> None:
    # Red when: Folder.result reads test_accuracy.
    cells = faked(plan(), tmp_path)["cells"]
    assert [cell["chosen"]["optim.lr"] for cell in cells] == [2, 2, 1, 1]
    assert [trial["mean"] for trial in cells[0]["trials"]] == [0.8, pytest.approx(0.9)]


def test_the_time_left() -> None:
    # Red when: costs are not divided among the workers, a failed run gives a speed, or one run
    # ends before its own time.
    runs = [Run(name, Config(epochs=epochs)) for epochs, name in enumerate("abcd", 1)]
    done = {"a": Result(seconds=5.0), "b": Result(error="x", seconds=1.0)}
    assert forecast(runs, {"b": done["b"]}, {}, 1)[1] is None
    assert forecast(runs, done, {}, 1) == (pytest.approx(0.3), pytest.approx(5.0 * 7))
    assert forecast(runs, done, {}, 7)[1] == pytest.approx(5.0 * 4)
    going = {"d": (0.5, 20.0)}  # half of 4 in 20 s, beside 1 in 5 s
    assert forecast(runs, done, going, 1)[1] == pytest.approx(25 / 3 * 5)
    noisy = Run("e", Config(epochs=1, method="noise"))
    assert noisy.cost == 2 * runs[0].cost


# ---- whole sweeps


@pytest.mark.usefixtures("here")
def test_the_example_from_start_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Red when: finished runs keep their checkpoints, the lines lose their count, a finished run is
    # run again, or the dry run writes.
    example = yaml.safe_load((ROOT / "studies" / "example.yaml").read_text())
    example["base"] |= {name: TINY[name] for name in TINY if "images" not in name}
    spec, out = tmp_path / "example.yaml", tmp_path / "out"
    spec.write_text(yaml.safe_dump(example, sort_keys=False))
    assert run(spec, out, "--dry-run") == 0
    assert "24 runs in all, 0 of them done" in capsys.readouterr().out
    assert not out.exists()
    assert main(["sweep", str(spec), "--out", str(out), "--jobs", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for number, line in enumerate(lines[:24], 1):
        assert f", {number} of 24 runs" in line
    done = read(out)
    assert len(done["cells"]) == 6
    assert done["failed"] == []
    for cell in done["cells"]:
        summaries = [json.loads((out / path / "summary.json").read_text()) for path in cell["runs"]]
        assert [summary["seed"] for summary in summaries] == cell["seeds"] == [0, 1]
        assert {summary["lr"] for summary in summaries} == {cell["chosen"]["optim.lr"]}
        assert cell["chosen"] == best(cell["trials"])["settings"]
    assert (out / "report.html").is_file()
    kept = {path.name for path in (out / "runs" / "lars-batch-50-lr-2-seed100").iterdir()}
    assert kept == {"config.yaml", "record.jsonl", "summary.json"}
    before = times(out)
    assert run(spec, out, "--dry-run") == run(spec, out) == 0
    assert times(out) == before
    assert "24 of them done" in capsys.readouterr().out


def best(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """By the rule in words: accuracy, then loss, then order."""
    return max(trials, key=lambda trial: (trial["mean"], -trial["validation_loss"][0]))


def times(out: Path) -> dict[Path, float]:
    return {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*")}


def results(out: Path) -> dict[str, float]:
    summaries = sorted(out.glob("runs/*/summary.json"))
    return {path.parent.name: json.loads(path.read_text())["test_loss"] for path in summaries}


class Interrupted(Observer):
    """Ends everything in the last step of a run."""

    def step(self, record: StepRecord) -> None:
        if record.step == 2:
            raise KeyboardInterrupt


@pytest.mark.usefixtures("here")
def test_a_killed_sweep_goes_on_to_the_same_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Red when: an interrupted run counts as finished, or a run is resumed from nothing. Bitwise.
    base = {**TINY, "epochs": 3, "checkpoint.every_epochs": 1}
    spec = write(tmp_path, base=base, controls=[], grid={"global_batch_size": [60]})
    whole, out = tmp_path / "whole", tmp_path / "killed"
    assert run(spec, whole, "--quiet") == 0
    runs = itertools.count(1)

    def third_is_cut_off(config: Config, path: Path, **options: Any) -> None:
        cut_off = {"observer": Interrupted()} if next(runs) == 3 else {}
        train(config, path, **options, **cut_off)

    with monkeypatch.context() as patch:
        patch.setattr("conadv.training.loop.train", third_is_cut_off)
        assert run(spec, out, "--quiet") == 130
    assert len(results(out)) == 2
    assert run(spec, out, "--quiet") == 0
    assert results(out) == results(whole)
    assert read(out) == read(whole)
    records = [path.read_text() for path in out.glob("runs/*/record.jsonl")]
    assert sum('"type": "resume"' in text for text in records) == 1


def test_ctrl_c_is_clean(tmp_path: Path) -> None:
    # Red when: the workers are not ended (they train to the end), or write tracebacks.
    spec, out = write(tmp_path, base={**TINY, "epochs": 5000}), tmp_path / "out"
    # a background job inherits SIGINT ignored; a terminal's foreground job does not
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    line = [sys.executable, "-m", "conadv", "sweep", str(spec), "--out", str(out), "--jobs", "2"]
    with subprocess.Popen([*line, "--quiet"], stderr=subprocess.PIPE, preexec_fn=heed) as process:
        try:
            deadline = time.monotonic() + 200
            while process.poll() is None and not list(out.glob("runs/*/record.jsonl")):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert errors.decode() == "conadv: interrupted; the same command continues the sweep\n"


@pytest.mark.usefixtures("here")
def test_failures_are_recorded_and_tried_again_only_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Red when: a failure stops the sweep, a diverged trial is chosen, a failed run is run again
    # unasked, or the traceback of a failure gets into sweep.json.
    changes = {"controls": [], "tune": tune([1, 1.0e30]), "grid": {"global_batch_size": [20]}}
    arms = {"LARS": {}, "broken": {"settings": {"model.name": "vgg11"}}}
    spec = write(tmp_path, arms=arms, base={**TINY, "model.width": None}, **changes)
    out = tmp_path / "out"
    assert run(spec, out) == 0
    said = capsys.readouterr().out
    assert "diverged" in said
    assert "no choice for broken" in said
    done = read(out)
    assert {(item["run"], item["diverged"]) for item in done["failed"]} == {
        ("runs/lars-batch-20-lr-1e30-seed100", True),
        ("runs/broken-batch-20-lr-1-seed100", False),
        ("runs/broken-batch-20-lr-1e30-seed100", False),
    }
    assert not any("\n" in item["error"] for item in done["failed"])
    lars, broken = done["cells"]
    assert lars["chosen"] == {"optim.lr": 1}
    assert lars["trials"][1]["mean"] is None
    assert len(results(out)) == 3
    assert (broken["chosen"], broken["runs"]) == ({}, [])
    before = times(out)
    assert run(spec, out, "--quiet") == 0
    assert times(out) == before
    assert run(spec, out, "--quiet", "--retry-failed") == 0
    again = {path.parent.name for path, when in times(out).items() if before.get(path) != when}
    assert again == {item["run"].removeprefix("runs/") for item in done["failed"]}
    assert read(out) == done


def test_a_run_with_other_settings_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Red when: Folder.result takes any summary for the run's own.
    made, folder = plan(), Folder(tmp_path / "out")
    fake(folder, tuning(made)[0])
    assert run(write(tmp_path, base={**TINY, "epochs": 2}), folder.out) == 2
    assert "epochs: 1.0 -> 2.0" in capsys.readouterr().err


def test_one_sweep_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Red when: the lock is not taken.
    out = tmp_path / "out"
    with Folder(out).lock() as lock:
        lock.take()
        assert run(write(tmp_path), out) == 2
    assert "Another sweep is at work" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", [".sweep.json.lock", "runs", "sweep.json", "runs/lars-batch-20-lr-1-seed100"]
)
def test_a_sweep_refuses_links_in_its_folder(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Red when: load or lock does not look for links: files elsewhere would be read or written.
    outside, out = tmp_path / "outside", tmp_path / "out"
    outside.mkdir()
    (out / name).parent.mkdir(parents=True)
    (out / name).symlink_to(outside / "new")
    assert run(write(tmp_path), out, "--dry-run") == run(write(tmp_path), out) == 2
    assert "is a link" in capsys.readouterr().err
    assert not any(outside.iterdir())
