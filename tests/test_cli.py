"""The program as a user meets it: help without torch, exit codes, messages, and a run from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conadv.cli import program as cli
from conadv.cli.program import given_settings, main
from conadv.cli.progress import Live, Plain, for_terminal
from conadv.config import recipes
from conadv.types import StepRecord

SMALL = [
    *(
        "--model.width",
        "4",
        "--steps",
        "2",
        "--schedule.warmup-epochs",
        "0",
        "--global-batch-size",
        "128",
    ),
    *("--eval.robust-images", "32", "--eval.train-images", "64", "--quiet"),
]


def python(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, timeout=120, check=False
    )


HELP = [
    ["--help"],
    ["recipes"],
    ["train", "digits", "--help"],
    ["analyze", "--help"],
    ["--version"],
]


@pytest.mark.parametrize("args", HELP)
def test_help_does_not_import_torch(args: list[str]) -> None:
    # Red when: cli.py imports the trainer at the top.
    code = f"import sys; from conadv.cli.program import given_settings, main\ntry: main({args!r})\nexcept SystemExit: pass\n"
    done = python("-c", code + "print('TORCH' if 'torch' in sys.modules else 'FREE')")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "FREE"


def test_module_and_help() -> None:
    done = python("-m", "conadv", "--help")
    assert done.returncode == 0
    for command in ("recipes", "train", "eval", "analyze", "export", "report", "sweep", "demo"):
        assert f"\n  {command}" in done.stdout


def test_recipes_lists_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == [
        "digits",
        "cifar10",
        "fashion-mnist",
        "imagefolder",
    ]
    assert len(lines) == len(recipes.RECIPES)


def test_train_eval_export_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    assert main(["train", "digits", *SMALL, "--out", str(a)]) == 0
    args = [
        "--method",
        "conadv",
        "--lookahead",
        "--staleness",
        "1",
        "--eps",
        "16/255",
        "--lr",
        "1.5",
        "--seed",
        "3",
    ]
    assert main(["train", "digits", *SMALL, *args, "--out", str(b), "--tensorboard"]) == 0
    summary = json.loads((b / "summary.json").read_text())
    assert (summary["staleness"], summary["lookahead"], summary["seed"], summary["lr"]) == (
        1,
        True,
        3,
        1.5,
    )
    assert summary["eps"] == 16 / 255
    events = EventAccumulator(str(b / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [0, 1]
    assert capsys.readouterr().out == ""  # --quiet
    assert main(["eval", str(b)]) == 0
    assert f"{100 * summary['test_accuracy']:6.2f} %" in capsys.readouterr().out
    assert main(["export", str(b)]) == 0
    assert (b / "model.safetensors").is_file()
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "report.html")]) == 0
    assert "conadv" in capsys.readouterr().out
    assert "<svg" in (tmp_path / "report.html").read_text()
    again = tmp_path / "again"
    assert main(["train", "--config", str(b / "config.yaml"), "--out", str(again), "--quiet"]) == 0
    assert json.loads((again / "summary.json").read_text())["test_loss"] == summary["test_loss"]
    assert (
        main(["train", "--config", str(b / "config.yaml"), "--out", str(b), "--resume", "--quiet"])
        == 0
    )


def test_plain_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "digits", *SMALL[:-1], "--out", str(tmp_path / "a")]) == 0
    out = capsys.readouterr().out
    for text in (
        "global batch 128 = micro-batch 128",
        "norm",
        "step 2/2",
        "left 0 s",
        "test accuracy",
        "run directory",
    ):
        assert text in out


def test_plain_progress_is_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    # Red when: every step is a line, or the last is not.
    show = Plain(every=1000)
    show.start("title", 0, 5)
    for t in range(5):
        show.step(StepRecord(t, 0, 0.25, 1.5, {}, 1.0))
    show.evaluation(5, "test", 0.5, 0.75)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "title: steps 0 to 5",
        "step 1/5",
        "step 5/5",
        "step 5/5",
    ]
    assert "loss 1.5000  lr 0.25" in lines[1]
    assert "test accuracy 75.00 %" in lines[3]


def test_live_progress_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    show = for_terminal(quiet=False)
    assert isinstance(show, Live)
    show.loading("images", 1, 2)
    show.loading("images", 2, 2)
    show.start("title", 0, 2)
    show.message("[a message]")
    for t in range(2):
        show.step(StepRecord(t, 0, 0.25, 1.5, {}, 1.0))
    show.evaluation(2, "test", 0.5, 0.75)
    show.evaluation(2, "train", 0.1, 0.99)
    show.finish()
    out = capsys.readouterr().out
    for text in ("[a message]", "title", "2/2", "loss 1.500", "test 75.00 %"):
        assert text in out


def test_options_reach_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Red when: --overwrite, --resume, --device or --threads has no effect, or torchrun's count of restarts.
    seen: dict[str, object] = {}
    monkeypatch.setattr(
        "conadv.training.trainer.train",
        lambda config, out, **options: seen.update(options, out=out),
    )
    monkeypatch.setattr("torch.set_num_threads", lambda count: seen.update(threads=count))
    monkeypatch.setattr(
        "conadv.distributed.comm.pick_device", lambda name, local_rank: seen.update(device=name)
    )
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    args = [
        "--out",
        str(tmp_path),
        "--overwrite",
        "--resume",
        "--auto-resume",
        "--device",
        "cuda",
        "--threads",
        "3",
        "--quiet",
    ]
    args += [
        "--executor",
        "ranks",
        "--attack-ranks",
        "2",
        "--late",
        "skip",
        "--timeline-steps",
        "5",
    ]
    args += ["--on-attack-loss", "continue"]
    assert main(["train", "digits", *args]) == 0
    del seen["observer"], seen["comm"]
    assert asdict(seen.pop("execution")) == {
        "executor": "ranks",
        "attack_ranks": 2,
        "late": "skip",
        "on_attack_loss": "continue",
        "timeline_steps": 5,
    }
    flags = {"overwrite": True, "resume": True, "auto_resume": True, "restarted": True}
    assert seen == {"out": tmp_path, **flags, "device": "cuda", "threads": 3}


def test_ctrl_c_is_exit_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(_: object) -> None:
        raise KeyboardInterrupt(" after 3 steps; --resume goes on from step 2")

    monkeypatch.setitem(cli.COMMANDS, "recipes", stop)
    assert main(["recipes"]) == 130
    assert "interrupted after 3 steps; --resume" in capsys.readouterr().err


WRONG = {
    "no command": (["trian"], "Did you mean 'train'"),
    "no recipe": (["train", "--lr", "1"], "Name the recipe first"),
    "recipe": (["train", "digit"], "Did you mean 'digits'"),
    "staleness": (["train", "digits", "--staleness", "2"], "staleness has no effect"),
    "eps": (["train", "digits", "--method", "disadv", "--eps", "8"], "Did you mean 8/255"),
    "no data": (["train", "cifar10"], "--data DIR"),
    "missing data": (["train", "cifar10", "--data", "nowhere-at-all"], "nowhere-at-all"),
    "batch": (["train", "digits", "--global-batch-size", "4000"], "larger than the training set"),
    "warm-up": (["train", "digits", "--steps", "2"], "does not fit"),
    "threads": (["train", "digits", "--threads", "0"], "--threads 0"),
    "no run": (["eval", "nowhere-at-all"], "not a run directory"),
    "no analysis": (["analyze"], "at least one run"),
    "no run to analyze": (["analyze", "nowhere-at-all"], "not a run directory"),
    "grid": (["analyze", "nowhere-at-all", "--grid", "4"], "odd number"),
    "no export": (["export", "nowhere-at-all"], "not a run directory"),
    "both": (["train", "digits", "--config", "x.yaml"], "not both"),
    "given twice": (["train", "digits", "--epochs", "80", "--steps", "10"], "duration once"),
    "eps without effect": (["train", "digits", "--eps", "0.2"], "attack.eps has no effect"),
    "no report": (["report"], "at least one run"),
    "config": (["train", "--config"], "needs a file"),
    "seeds": (["demo", "--seeds", "0"], "--seeds"),
    "huge seed": (["train", "digits", "--seed", str(2**63)], "less than or equal to"),
    "huge threads": (
        ["train", "digits", "--threads", "1" + "0" * 20],
        "--threads 100000000000000000000 must be 1024",
    ),
    "threads to analyze": (
        ["analyze", "nowhere-at-all", "--threads", "0"],
        "--threads 0 must be 1 or more",
    ),
    "threads to plan": (
        ["plan", "x.json", "--measure", "all", "--workload.threads", "0"],
        "--threads 0 must be 1",
    ),
    "huge number": (
        ["analyze", "nowhere-at-all", "--images", str(10**400)],
        "must be 1000000000 or less",
    ),
    "workers": (["check", "nowhere-at-all", "--workers", "-1"], "--workers -1 must be 1 or more"),
    "jobs": (["sweep", "x.yaml", "--jobs", str(10**9)], "--jobs 1000000000 must be 1024 or less"),
    "rounds": (["bench", "data", "--rounds", str(2**64)], "--rounds 18446744073709551616 must be"),
    "no images": (
        ["bench", "attack-cost", "--image-size", "0"],
        "--image-size 0 must be 1 or more",
    ),
    "no classes": (["bench", "attack-cost", "--classes", "0"], "--classes 0 must be 1 or more"),
    "no rounds": (
        ["plan", "x.json", "--measure", "all", "--workload.rounds", "0"],
        "--rounds 0 must be 1 or more",
    ),
    "small images": (
        [
            "plan",
            "x.json",
            "--measure",
            "phases",
            "--workload.model",
            "vit_b_32",
            "--workload.image-size",
            "16",
        ],
        "cannot take 3 x 16 x 16 images",
    ),
    "not finite": (
        ["train", "digits", "--comm-timeout", "nan"],
        "--comm-timeout nan must be a finite number",
    ),
    "for ever": (
        ["watch", "nowhere-at-all", "--interval", "inf"],
        "--interval inf must be a finite number",
    ),
    "long timeout": (["train", "digits", "--comm-timeout", "1e300"], "at most 1e+07 seconds"),
    "nobody's data": (["train", "cifar10", "--data", "~nobodyhere/x"], "~nobodyhere/x: "),
}


@pytest.mark.parametrize("name", WRONG)
def test_users_errors_are_one_message_and_exit_2(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    args, message = WRONG[name]
    assert main(args) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []  # nothing is made, nothing is lost


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--lrr", "3"], "--lr"),
        (["--lr", "-3"], "greater than 0"),
        (["--eps", "4/0"], "4/255"),
        (["--method", "conad"], "conadv"),
        (["--global-batch-size", "0"], "greater than or equal to 1"),
        (["--eval.batch-size", str(2**63)], "less than or equal to 1000000000"),
        (["--optim.momentumm", "0.9"], "--optim.momentum"),
    ],
)
def test_bad_options_name_the_nearest(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: object = main(["train", "digits", *args])
    except SystemExit as stop:  # how tyro ends
        code = stop.code
    assert code == 2
    assert message in "".join(capsys.readouterr())


def test_given_settings() -> None:
    # Red when: an alias of an option is missing from the table.
    args = "--lr 1 --optim.weight-decay=3 --no-lookahead --data DIR --aug-view basic --out x --quiet --model m".split()
    names = {
        "optim.lr",
        "optim.weight_decay",
        "lookahead",
        "data.dir",
        "data.aug_view",
        "model.name",
    }
    assert given_settings(args) == names
    more = "--optimizer sgd --eps 1/255 --augment basic --download --data.no-download".split()
    assert given_settings(more) == {"optim.name", "attack.eps", "data.augment", "data.download"}


def test_default_folder_tells_runs_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "digits", *SMALL, "--method", "conadv", "--lookahead"]) == 0
    assert (
        tmp_path / "runs/digits/conadv-tau1-lookahead-lars-batch128-seed0/summary.json"
    ).is_file()
