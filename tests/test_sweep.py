"""Sweeps: the spec's checks, the plan, the choice on validation images, and runs that fail, stop and go on."""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from conadv.cli.program import main
from conadv.config.schema import Config, dump_yaml
from conadv.engine import NonFiniteError
from conadv.errors import ConadvError
from conadv.sweep import command
from conadv.sweep.cells import Plan, expand
from conadv.sweep.choose import Result, at_edge, choose, only_edges
from conadv.sweep.command import _schedule
from conadv.sweep.display import Display, Lines, Workload, duration
from conadv.sweep.document import document
from conadv.sweep.estimate import Estimate, relative_cost
from conadv.sweep.folder import Folder
from conadv.sweep.pool import Outcome, Source, Work
from conadv.sweep.spec import load_spec, parse_spec
from conadv.training.observer import Silent

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
        "tune": {"seeds": [100], "settings": {"optim.lr": [1, 2]}},
        "confirm": {"seeds": [0, 1]},
    }
    return {**spec, **changes}


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


def train_here(source: Source, work: Work, workers: int, display: Display) -> None:
    """run_pool without processes, which take seconds to start."""
    while (job := source.next()) is not None:
        begin = time.monotonic()
        display.started(0, job.label, job.config)
        outcome = Outcome(0.0)
        try:
            work(job, Silent())
        except Exception as error:
            outcome = Outcome(
                time.monotonic() - begin, str(error), isinstance(error, NonFiniteError)
            )
        source.done(job, outcome)
        display.finished(0, outcome.seconds, outcome.error)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs are trained in this process, by one thread as in a worker."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(command, "run_pool", train_here)
    yield
    torch.set_num_threads(threads)


def fake(folder: Folder, name: str, config: Config, **summary: Any) -> None:
    """A finished run with made-up results."""
    path = folder.path(name)
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(dump_yaml(config))
    full = {
        "validation_accuracy": 0.5,
        "validation_loss": 1.0,
        "test_accuracy": 0.5,
        "seconds": 1.0,
        **summary,
    }
    (path / "summary.json").write_text(json.dumps(full))


# ---- the spec


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"arm": {}}, "Did you mean 'arms'"),
        ({"base": {**TINY, "optim.lrr": 1}}, "Did you mean 'optim.lr'"),
        ({"base": {**TINY, "epochs": -1}}, "epochs = -1"),
        ({"arms": {"LARS": {"method": "nois"}}, "controls": []}, "'noise'"),
        ({"baseline": "LAR"}, "Did you mean 'LARS'"),
        ({"controls": ["noise"]}, "Did you mean '+ noise'"),
        ({"base": {**TINY, "seed": 3}}, "tune.seeds"),
        ({"confirm": {"seeds": [5, 100]}}, "Seed 100"),
        ({"confirm": {"seeds": [5, 5]}}, "twice"),
        ({"confirm": {"seeds": []}}, "at least 1"),
        ({"grid": {}, "arms": {"LARS": {"global_batch_size": 20, "grid": {}}}}, "Unknown key"),
        ({"grid": {"optim.lr": [1]}}, "axis"),
        (
            {"arms": {"LARS": {"global_batch_size": 20}, "+ noise": {}}},
            "in its settings and in its grid",
        ),
        (
            {"tune": {"seeds": [100], "settings": {"global_batch_size": [1, 2]}}},
            "in the grid and tuned",
        ),
        ({"arms": {"LARS": {"optim.lr": 3}, "+ noise": {}}}, "in its settings and tuned"),
        (
            {"tune": {"seeds": [100], "settings": {"optim.lr": {20: [1, 2]}}}},
            "no list for global_batch_size 80",
        ),
        (
            {
                "grid": {"global_batch_size": [{20: 80}]},
                "tune": {"seeds": [100], "settings": {"optim.lr": {20: [1, 2], 80: [1]}}},
            },
            "no list for global_batch_size {20: 80}",
        ),
        (
            {"tune": {"seeds": [100], "settings": {"optim.lr": {20: [1, 2], 80: [1]}}}},
            "Unequal trials",
        ),
        ({"arms": {"LARS": {"tune": {"optim.lr": [1, 2, 3]}}, "+ noise": {}}}, "Unequal trials"),
        ({"tune": {"seeds": [100], "settings": {"optim.lr": [1, 1]}}}, "same trial"),
        (
            {"tune": {"seeds": [100], "settings": {"optim.lr": [1]}, "by": "test_accuracy"}},
            "tune.by",
        ),
        ({"base": {**TINY, "data.validation_images": None}}, "Give data.validation_images"),
        (
            {"arms": {"a b": {}, "A-b": {"method": "noise"}}, "baseline": None, "controls": []},
            "Rename",
        ),
        ({"arms": {"LARS": {"staleness": 2}}, "controls": []}, "no effect"),
    ],
)
def test_wrong_specs_are_refused(changes: dict[str, Any], says: str) -> None:
    # Red when: the check that a row is about is taken out.
    with pytest.raises(ConadvError) as caught:
        plan(**changes)
    assert says in str(caught.value)


MANY = [number / 1000 for number in range(1, 1000)]
GRID = {"global_batch_size": [20], **dict.fromkeys(("optim.lr", "optim.eps", "adv_weight"), MANY)}


@pytest.mark.parametrize(
    "changes",
    [
        {
            "tune": {
                "seeds": [100],
                "settings": {"optim.lr": MANY, "optim.momentum": MANY, "optim.weight_decay": MANY},
            }
        },
        {"grid": GRID, "tune": None},
        {"confirm": {"seeds": list(range(20_000))}, "tune": None},
        {
            "arms": {f"arm {number}": {} for number in range(6_000)},
            "baseline": None,
            "controls": [],
            "tune": None,
        },
    ],
)
def test_a_spec_that_asks_for_too_many_runs_is_refused_before_it_fills_the_memory(
    changes: dict[str, Any],
) -> None:
    # Red when: the size is checked after the trials (the first two take all memory), or by cells alone.
    tracemalloc.start()
    try:
        with pytest.raises(ConadvError, match="More than 10,000 runs"):
            parse_spec(values(**changes))
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


def test_the_size_of_a_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    # Red when: seeds to tune on, or one of the factors, are not counted; the limit itself is refused.
    spec = parse_spec(values())
    runs = [
        name
        for cell in expand(spec).cells
        for trial in cell.trials
        for name in trial.tuning + trial.confirming
    ]
    assert sum(map(spec.num_runs, spec.arms)) == len(runs)
    monkeypatch.setattr("conadv.sweep.spec.MAX_RUNS", len(runs))
    parse_spec(values())
    monkeypatch.setattr("conadv.sweep.spec.MAX_RUNS", len(runs) - 1)
    with pytest.raises(ConadvError, match="More than"):
        parse_spec(values())


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    # Red when: load_spec uses yaml.SafeLoader, which keeps the second arm and drops the first without a word.
    path = tmp_path / "spec.yaml"
    path.write_text("name: a\narms:\n  LARS: {}\n  LARS: {method: noise}\n")
    with pytest.raises(ConadvError, match="'LARS' stands twice"):
        load_spec(path)


def test_repositorys_specs_are_valid() -> None:
    # Red when: a setting is misspelt in studies/*.yaml.
    for path in (ROOT / "studies").glob("*.yaml"):
        assert expand(load_spec(path)).cells, path


# ---- the plan


def test_cells_and_runs() -> None:
    # Red when: a grid value, a trial or a seed does not reach the config.
    made = plan()
    assert [(cell.arm, cell.settings) for cell in made.cells] == [
        (arm, {"global_batch_size": batch}) for arm in ("LARS", "+ noise") for batch in (20, 80)
    ]
    assert len(made.runs) == 2 * 2 * 2 * 3  # arms, batches, trials, seeds
    config = made.runs["noise-batch-80-lr-2-seed1"].config
    assert (config.method, config.global_batch_size, config.optim.lr, config.seed) == (
        "noise",
        80,
        2,
        1,
    )
    assert config.micro_batch_size == 80
    order = [
        (made.runs[name].config.global_batch_size, made.runs[name].config.method)
        for name in made.tuning(all_of(made))
    ]
    assert (
        order[:4] == [(20, "vanilla"), (20, "noise")] * 2
    )  # the arms of a seed and point side by side


def all_of(made: Plan) -> frozenset[int]:
    return frozenset(range(len(made.cells)))


def test_fractions_and_lists_per_batch() -> None:
    lists = {"optim.lr": {20: [1, 2], 80: [3, 4]}}
    arms = {"+ noise": {"settings": {"method": "noise", "attack.eps": "2/255"}}}
    made = plan(arms=arms, baseline=None, tune={"seeds": [7], "settings": lists})
    assert {run.config.attack.eps for run in made.runs.values()} == {2 / 255}
    assert [[trial.settings["optim.lr"] for trial in cell.trials] for cell in made.cells] == [
        [1, 2],
        [3, 4],
    ]


def test_identical_runs_are_one_run() -> None:
    # Red when: _run names a run without looking for its config. The third arm is LARS by another name.
    arms = {"LARS": {}, "+ noise": {"method": "noise"}, "LARS again": {"label_smoothing": 0}}
    made = plan(arms=arms)
    assert len(made.runs) == 24
    assert made.cells[0].trials == made.cells[4].trials
    assert made.groups == (0, 1, 2, 3, 0, 1)


def test_shards_split_the_cells() -> None:
    # Red when: shard() goes by cells, so that cells that share runs part.
    made = plan(
        arms={"LARS": {}, "+ noise": {"method": "noise"}, "LARS again": {"label_smoothing": 0}}
    )
    parts = [made.shard(index, 3) for index in (1, 2, 3)]
    assert sorted(index for part in parts for index in part) == list(range(6))
    assert parts[0] == {0, 3, 4}  # 4 shares its runs with 0


def test_tune_on_takes_the_choice_of_one_arm(tmp_path: Path) -> None:
    # Red when: _with_source gives a cell its own index, or the other arm is tuned as well.
    tune = {"seeds": [100], "settings": {"optim.lr": [1, 2]}, "tune_on": "LARS"}
    made = plan(tune=tune)
    assert [cell.source for cell in made.cells] == [0, 1, 0, 1]
    assert len(made.tuning(all_of(made))) == 4
    folder = Folder(tmp_path)
    for name in made.tuning(all_of(made)):
        fake(
            folder,
            name,
            made.runs[name].config,
            validation_accuracy=made.runs[name].config.optim.lr / 10,
        )
    cell = document(_schedule(made, folder, all_of(made)), "tiny.yaml")["cells"][3]
    assert (cell["chosen"], cell["trials"], cell["tuned_on"]) == ({"optim.lr": 2}, [], "LARS")
    assert cell["runs"] == ["runs/noise-batch-80-lr-2-seed0", "runs/noise-batch-80-lr-2-seed1"]


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
    # Red when: max goes by the best seed, by loss first, or a diverged run is left out of its trial's mean.
    assert choose(trials) == best


def test_at_edge() -> None:
    # Red when: the comparison is with the first and last trial in place of the smallest and largest value.
    trials: list[dict[str, Any]] = [{"optim.lr": lr, "attack.eps": "2/255"} for lr in (4, 1, 2)]
    assert [at_edge(trials, trial) for trial in trials] == [["optim.lr"], ["optim.lr"], []]
    names = [{"optim.variant": name} for name in ("tf", "timm", "torch")]
    assert at_edge(names, names[0]) == []
    eps = [{"attack.eps": text} for text in ("1/255", "2/255", "4/255")]
    assert [at_edge(eps, trial) for trial in eps] == [["attack.eps"], [], ["attack.eps"]]


def test_two_values_have_no_inside() -> None:
    # Red when: a setting with two values is called at the edge, or one with three is said to have none but edges.
    trials = [{"optim.lr": lr, "sam_rho": rho} for lr in (1, 2, 4) for rho in (0.05, 0.1)]
    assert at_edge(trials, {"optim.lr": 4, "sam_rho": 0.1}) == ["optim.lr"]
    assert only_edges(trials) == ["sam_rho"]
    assert only_edges([{"optim.lr": 1}, {"optim.lr": 2}, {}]) == []


def test_the_choice_is_made_on_validation_never_on_test(tmp_path: Path) -> None:
    # Red when: Folder.result reads test_accuracy.
    made, folder = plan(), Folder(tmp_path)
    for name in made.tuning(all_of(made)):
        config = made.runs[name].config
        low, high = (0.8, 0.9) if config.method == "vanilla" else (0.9, 0.8)
        first = config.optim.lr == 1
        fake(
            folder,
            name,
            config,
            validation_accuracy=low if first else high,
            test_accuracy=high if first else low,
        )
    cells = document(_schedule(made, folder, all_of(made)), "tiny.yaml")["cells"]
    assert [cell["chosen"] for cell in cells] == [{"optim.lr": 2}] * 2 + [{"optim.lr": 1}] * 2
    assert [cell["at_edge"] for cell in cells] == [[]] * 4  # two values of the learning rate
    assert [trial["mean"] for trial in cells[0]["trials"]] == [0.8, 0.9]


# ---- time left


def test_estimate() -> None:
    # Red when: a kind's own mean is not used, or the speed of the others is not.
    configs = {name: run.config for name, run in plan().runs.items()}
    plain, noise = configs["lars-batch-80-lr-1-seed0"], configs["noise-batch-80-lr-1-seed0"]
    assert relative_cost(noise) == 2 * relative_cost(plain)
    estimate = Estimate()
    assert not estimate.known
    estimate.going(plain, 0.5, 5.0)
    assert (estimate.seconds(plain), estimate.seconds(noise)) == (10.0, 20.0)
    estimate.finished(plain, 6.0)
    other = configs["lars-batch-80-lr-2-seed1"]
    assert estimate.seconds(other) == 6.0
    assert estimate.seconds(noise) == pytest.approx(12.0)
    assert estimate.left([noise, noise], [(plain, 0.5)], 2) == pytest.approx(13.5)
    assert estimate.left([noise], [], 8) == pytest.approx(12.0)
    work = Workload(lambda: [noise], 1, estimate, done=1, seconds=6.0)
    assert work.share() == pytest.approx(6 / 18)
    assert [duration(s) for s in (45, 700, 11_100)] == ["45 s", "12 min", "3 h 05 min"]


def test_a_run_that_failed_at_once_tells_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    # Red when: the time left is said before any run gave a speed (it was 1456 hours).
    config = Config(epochs=1)
    display = Lines(Workload(lambda: [config], 1))
    display.started(0, "a", config)
    display.finished(0, 0.1, "no data")
    display.started(1, "b", config)
    display.finished(1, 2.0, None)
    assert capsys.readouterr().out.splitlines() == [
        "[1/2] a: failed: no data",
        "[2/3] b: 2.0 s, about 2 s left",
    ]


# ---- whole sweeps


def test_the_example_from_start_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Red when: tidy is not called, the lines lose their count, or a finished run is run again.
    spec, out = ROOT / "studies" / "example.yaml", tmp_path / "out"
    assert run(spec, out, "--dry-run") == 0
    assert "24 runs in all, 0 of them done" in capsys.readouterr().out
    assert not out.exists()
    assert run(spec, out, "--max-minutes", "0") == 0
    assert "24 run(s) are left" in capsys.readouterr().out
    assert main(["sweep", str(spec), "--out", str(out), "--jobs", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("]")[0] for line in lines[:24]] == [
        f"[{number}/24" for number in range(1, 25)
    ]
    assert "left" in lines[0]
    done = read(out)
    assert len(done["cells"]) == 6
    assert done["failed"] == []
    for cell in done["cells"]:
        summaries = [json.loads((out / path / "summary.json").read_text()) for path in cell["runs"]]
        assert [summary["seed"] for summary in summaries] == cell["seeds"] == [0, 1]
        assert {summary["lr"] for summary in summaries} == {cell["chosen"]["optim.lr"]}
        assert cell["chosen"] == cell["trials"][choice(cell)]["settings"]
        assert [trial["mean"] for trial in cell["trials"]] == [
            trial["validation"][0] for trial in cell["trials"]
        ]
    assert (out / "report.html").is_file()
    kept = {path.name for path in (out / "runs" / "lars-batch-50-lr-2-seed100").iterdir()}
    assert kept == {"config.yaml", "record.jsonl", "summary.json"}
    before = times(out)
    assert run(spec, out) == 0
    assert times(out) == before


def choice(cell: dict[str, Any]) -> int:
    """The best trial by the rule in words: accuracy, then loss, then order."""
    trials = cell["trials"]
    return max(
        range(len(trials)), key=lambda i: (trials[i]["mean"], -trials[i]["validation_loss"][0], -i)
    )


def times(out: Path) -> dict[Path, float]:
    return {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*")}


def results(out: Path) -> dict[str, float]:
    return {
        path.parent.name: json.loads(path.read_text())["test_loss"]
        for path in sorted(out.glob("runs/*/summary.json"))
    }


@pytest.mark.usefixtures("here")
def test_a_killed_sweep_goes_on_to_the_same_end(tmp_path: Path) -> None:
    # Red when: an interrupted run counts as finished, or a run is resumed from nothing. Bitwise.
    base = {**TINY, "epochs": 3, "checkpoint.every_epochs": 1}
    arms = {"LARS": {}, "+ ConAdv": {"method": "conadv"}}
    spec = write(tmp_path, base=base, arms=arms, controls=[], grid={"global_batch_size": [10]})
    whole, out = tmp_path / "whole", tmp_path / "killed"
    assert run(spec, whole, "--quiet") == 0
    line = [
        sys.executable,
        "-m",
        "conadv",
        "sweep",
        str(spec),
        "--out",
        str(out),
        "--jobs",
        "2",
        "--no-report",
    ]
    with subprocess.Popen([*line, "--quiet"]) as process:
        try:
            wait_for(lambda: len(list(out.glob("runs/*/summary.json"))) >= 2, process)
            records = "runs/*/record.jsonl"
            wait_for(
                lambda: any(not (p.parent / "summary.json").exists() for p in out.glob(records)),
                process,
            )
        finally:
            process.kill()
    assert len(results(out)) < 8
    time.sleep(0.5)  # the workers end with their parent
    assert run(spec, out, "--quiet") == 0
    assert results(out) == results(whole)
    assert read(out) == read(whole)


def wait_for(condition: Any, process: subprocess.Popen[bytes], seconds: float = 200.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        assert process.poll() is None, "the sweep ended before it was stopped"
        time.sleep(0.02)


def test_ctrl_c_is_clean(tmp_path: Path) -> None:
    # Red when: the workers are not terminated (they train to the end), or write tracebacks.
    spec, out = write(tmp_path, base={**TINY, "epochs": 5000}), tmp_path / "out"
    line = [
        sys.executable,
        "-m",
        "conadv",
        "sweep",
        str(spec),
        "--out",
        str(out),
        "--jobs",
        "2",
        "--quiet",
    ]
    # a background job inherits SIGINT ignored; a terminal's foreground job does not
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(line, stderr=subprocess.PIPE, preexec_fn=heed) as process:
        try:
            wait_for(lambda: list(out.glob("runs/*/record.jsonl")), process)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 130
    assert (
        errors.decode() == "conadv: interrupted; the same command goes on where the sweep stopped\n"
    )


@pytest.mark.usefixtures("here")
def test_failures_are_recorded_and_tried_again_only_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Red when: a failure stops the sweep, a diverged trial is chosen, or a failed run is run again unasked.
    tune = {"seeds": [100], "settings": {"optim.lr": [1, 1.0e30]}}
    arms = {"LARS": {}, "broken": {"settings": {"model.name": "vgg11"}}}
    spec = write(
        tmp_path,
        arms=arms,
        controls=[],
        tune=tune,
        grid={"global_batch_size": [20]},
        base={**TINY, "model.width": None},
    )
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
    name = made.tuning(all_of(made))[0]
    fake(folder, name, made.runs[name].config)
    assert run(write(tmp_path, base={**TINY, "epochs": 2}), folder.out) == 2
    assert "epochs: 1.0 -> 2.0" in capsys.readouterr().err


def test_one_sweep_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Red when: the lock is not taken.
    spec, out = write(tmp_path), tmp_path / "out"
    with Folder(out).locked("sweep.json"):
        assert run(spec, out, "--max-minutes", "0") == 2
    assert "Another sweep is at work" in capsys.readouterr().err
    assert run(spec, out, "--max-minutes", "0", "--quiet") == 0


@pytest.mark.parametrize("options", [["--jobs", "0"], ["--shard", "3/2"], ["--max-minutes", "-1"]])
def test_impossible_options(
    tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", str(write(tmp_path)), "--out", str(tmp_path / "out"), *options]) == 2
    assert options[0] in capsys.readouterr().err


@pytest.mark.usefixtures("here")
def test_shards_come_together(tmp_path: Path) -> None:
    # Red when: a shard leaves out a cell, or the last command runs anything again.
    spec, out = write(tmp_path, tune=None, confirm={"seeds": [0]}), tmp_path / "out"
    for shard in ("1/2", "2/2"):
        assert run(spec, out, "--quiet", "--shard", shard) == 0
    assert not (out / "sweep.json").exists()
    before = times(out)
    assert len(results(out)) == 4
    assert run(spec, out, "--quiet") == 0
    assert times(out) == before
    assert [len(cell["runs"]) for cell in read(out)["cells"]] == [1] * 4
