"""The program as a user meets it: help without torch, exit codes, messages, and a run from the
command line.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conadv.cli import recipes as recipes_command
from conadv.cli import train
from conadv.cli.program import COMMANDS, main
from conadv.cli.progress import Live, Plain, for_terminal
from conadv.config import recipes
from conadv.types import StepRecord

SMALL = (
    "--model.width 4 --steps 2 --schedule.warmup-epochs 0 --global-batch-size 128 "
    "--eval.robust-images 32 --eval.train-images 64 --quiet"
).split()
TORCH_FREE = [[], ["recipes"], ["train"], ["train", "digits", "--help"], ["--version"]]
TORCH_FREE += [[name, "--help"] for name in COMMANDS if name not in ("train", "doctor")]


def test_help_does_not_import_torch() -> None:
    # Red when: a command's module imports what computes at its top.
    code = f"""
import contextlib, io, sys
from conadv.cli.program import main
for args in {TORCH_FREE!r}:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main(args)
    if "torch" in sys.modules:
        sys.exit(f"{{args}} imported torch")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for command in COMMANDS:
        assert any(line.startswith(f"  {command} ") for line in lines)
    assert max(map(len, lines)) <= 100
    for args in (["recipes"], ["train"]):
        assert main(args) == 0
        out = capsys.readouterr().out
        assert all(f"\n  {name}" in f"\n{out}" for name in recipes.RECIPES)


def test_help_of_a_recipe_fits_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    # Red when: an option of the short list is renamed, or the list outgrows a terminal.
    assert main(["train", "digits", "--help"]) == 0
    short = capsys.readouterr().out.splitlines()
    assert len(short) <= 22
    assert max(map(len, short)) <= 80
    with pytest.raises(SystemExit):
        main(["train", "digits", "--help-all"])
    everything = capsys.readouterr().out
    assert all(option in everything for option in train.SET_FIRST)
    assert "--schedule.power" in everything


def test_train_eval_export_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    b = tmp_path / "b"
    assert main(["train", "digits", *SMALL[:-1], "--out", str(tmp_path / "a")]) == 0
    out = capsys.readouterr().out
    for text in ("micro-batch 128", "norm", "step 2/2", "test accuracy", "run directory"):
        assert text in out
    args = "--method conadv --lookahead --staleness 1 --eps 16/255 --lr 1.5 --seed 3".split()
    assert main(["train", "digits", *SMALL, *args, "--out", str(b), "--tensorboard"]) == 0
    summary = json.loads((b / "summary.json").read_text())
    expected = {"staleness": 1, "lookahead": True, "seed": 3, "lr": 1.5, "eps": 16 / 255}
    assert {name: summary[name] for name in expected} == expected
    events = EventAccumulator(str(b / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [0, 1]
    assert capsys.readouterr().out == ""  # --quiet
    assert main(["eval", str(b)]) == 0
    assert f"{100 * summary['test_accuracy']:6.2f} %" in capsys.readouterr().out
    assert main(["export", str(b)]) == 0
    assert (b / "model.safetensors").is_file()
    assert main(["watch", str(b)]) == 0
    shown = capsys.readouterr().out
    assert "2/2" in shown
    assert "cannot be read" not in shown
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "report.html")]) == 0
    assert "conadv" in capsys.readouterr().out
    again, saved = tmp_path / "again", str(b / "config.yaml")
    assert main(["train", "--config", saved, "--out", str(again), "--quiet"]) == 0
    assert json.loads((again / "summary.json").read_text())["test_loss"] == summary["test_loss"]
    assert main(["train", "--config", saved, "--out", str(b), "--resume", "--quiet"]) == 0


def test_plain_progress_is_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    # Red when: every step is a line, or the last is not.
    show = Plain(every=1000)
    show.start("title", 0, 5)
    for t in range(5):
        show.step(StepRecord(t, 0, 0.25, 1.5, {}, 1.0))
    show.evaluation(5, "test", 0.5, 0.75)
    lines = capsys.readouterr().out.splitlines()
    heads = ["title: steps 0 to 5", "step 1/5", "step 5/5", "step 5/5"]
    assert [line.split("  ")[0] for line in lines] == heads


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
    show.finish()
    out = capsys.readouterr().out
    for text in ("[a message]", "title", "2/2", "1.500", "75.00 %"):
        assert text in out


def test_options_reach_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Red when: --overwrite, --resume, --device or --threads has no effect, or torchrun's count of
    # restarts.
    seen: dict[str, Any] = {}
    monkeypatch.setattr(
        "conadv.training.loop.train",
        lambda config, out, **options: seen.update(options, out=out),
    )
    monkeypatch.setattr("torch.set_num_threads", lambda count: seen.update(threads=count))
    monkeypatch.setattr(
        "conadv.distributed.comm.pick_device", lambda name, local_rank: seen.update(device=name)
    )
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    flags = "--overwrite --resume --auto-resume --device cuda --threads 3 --quiet"
    placed: dict[str, Any] = {"executor": "ranks", "attack_ranks": 2, "late": "skip"}
    placed |= {"on_attack_loss": "stop", "timeline_steps": 5}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in placed.items()]
    assert main(["train", "digits", "--out", str(tmp_path), *flags.split(), *options]) == 0
    del seen["observer"], seen["comm"]
    assert asdict(seen.pop("execution")) == placed
    on = dict.fromkeys(("overwrite", "resume", "auto_resume", "restarted"), True)
    assert seen == {"out": tmp_path, **on, "device": "cuda", "threads": 3}


def test_ctrl_c_is_exit_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(_: object) -> None:
        raise KeyboardInterrupt(" after 3 steps; --resume goes on from step 2")

    monkeypatch.setattr(recipes_command, "command", stop)
    assert main(["recipes"]) == 130
    assert "interrupted after 3 steps; --resume" in capsys.readouterr().err


WRONG = {  # a command line that cannot work: what is said
    "trian": "Did you mean 'train'",
    "train --lr 1": "Name the recipe first",
    "train digit": "Did you mean 'digits'",
    "train digits --staleness 2": "staleness has no effect",
    "train digits --method disadv --eps 8": "Did you mean 8/255",
    "train digits --method conadv --attack.every 2": "a setting of conadv 0.1",
    "train cifar10": "--data DIR",
    "train cifar10 --data nowhere-at-all": "nowhere-at-all",
    "train cifar10 --data ~nobodyhere/x": "~nobodyhere/x: ",
    "train digits --global-batch-size 4000": "larger than the training set",
    "train digits --steps 2": "does not fit",
    "train digits --threads 0": "greater than or equal to 1",
    "train digits --threads 100000000000000000000": "less than or equal to",
    f"train digits --seed {2**63}": "less than or equal to",
    "train digits --comm-timeout nan": "finite number",
    "train digits --comm-timeout 1e300": "at most 1e+07 seconds",
    "train digits --config x.yaml": "not both",
    "train digits --epochs 80 --steps 10": "duration once",
    "train digits --eps 0.2": "attack.eps has no effect",
    "train --config": "needs a file",
    "eval nowhere-at-all": "not a run directory",
    "export nowhere-at-all": "not a run directory",
    "analyze": "at least one run",
    "analyze nowhere-at-all": "not a run directory",
    "report": "at least one run",
    "demo --seeds 0": "seeds",
    "sweep x.yaml --jobs 1000000000": "jobs",
    "check nowhere-at-all --workers -1": "workers",
}


@pytest.mark.parametrize("line", WRONG)
def test_users_errors_are_one_message_and_exit_2(
    line: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 2
    error = capsys.readouterr().err
    assert WRONG[line] in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []  # nothing is made, nothing is lost


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--lrr", "3"], "--lr"),
        (["--lr", "-3"], "greater than 0"),
        (["--eps", "4/0"], "4/255"),
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


def test_default_folder_tells_runs_apart() -> None:
    config = train.resolve(train.replace(recipes.get("digits"), method="conadv", lookahead=True))
    assert str(train.default_out(config)) == "runs/digits/conadv-tau1-lookahead-lars-batch898-seed0"
