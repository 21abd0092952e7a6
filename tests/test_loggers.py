"""Weights & Biases beside TensorBoard: the same names, steps and values, once each, whatever was
killed.

Really offline where wandb is installed.
"""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conadv import ConadvError
from conadv.cli.program import main
from conadv.training import loggers
from conadv.training.loop import train
from conadv.training.observer import Guarded, Observer
from conadv.training.record import read_lines
from conadv.training.run_dir import RunDir
from conadv.types import StepRecord

from .test_training import config

RECORD = StepRecord(
    3, 0, 0.5, 2.0, {"clean": 1.5, "adv": 2.5}, 1.25, 2, {"attack": 0.1, "gradient": 0.2}
)


class Fakes:
    """What both programs were given: (name, value, step), and the runs that wandb began."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: dict[str, list[tuple[str, float, int]]] = {"wandb": [], "tensorboard": []}
        self.runs: list[dict[str, Any]] = []
        monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Settings=dict, init=self.init))
        monkeypatch.delenv("WANDB_MODE", raising=False)

    def init(self, **options: Any) -> Any:
        self.seen["wandb"].clear()  # its files are made anew
        self.runs.append(options)
        return SimpleNamespace(log=self.log, finish=lambda: self.runs[-1].update(finished=True))

    def log(self, values: dict[str, float], step: int) -> None:
        self.seen["wandb"] += [(name, value, step) for name, value in values.items()]

    def board(self, folder: str) -> Any:
        self.seen["tensorboard"].clear()
        add = lambda *values: self.seen["tensorboard"].append(values)  # noqa: E731
        return SimpleNamespace(add_scalar=add, close=lambda: None)

    def both(self, out: Path) -> Guarded:
        board = loggers.TensorBoard(out / "tensorboard")
        board._make = self.board  # type: ignore[assignment]
        return Guarded(board, loggers.WandB(out / "wandb", {"seed": 3}))


def test_both_loggers_write_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Red when: one logger has a name of its own, or evaluations come at another step. What wandb
    # itself does with it is the business of the test below.
    fakes = Fakes(monkeypatch)
    both, seen = fakes.both(tmp_path), fakes.seen
    both.finish()  # before the start there is nothing to close
    both.start("digits conadv", 0, 4)
    both.step(RECORD)
    both.evaluation(4, "test", 0.5, 0.75)
    both.evaluation(4, "train", 0.1, 0.9)
    both.finish()
    assert seen["wandb"] == seen["tensorboard"]
    assert ("train/losses/adv", 2.5, 3) in seen["wandb"]
    assert ("train/staleness", 1, 3) in seen["wandb"]
    assert ("test/accuracy", 0.75, 4) in seen["wandb"]
    assert ("train_eval/loss", 0.1, 4) in seen["wandb"]  # "train/loss" is that of a step
    (run,) = fakes.runs
    assert (run["mode"], run["config"], run["name"]) == ("offline", {"seed": 3}, "digits conadv")
    assert run["settings"]["symlink"] is False
    assert run["finished"]


class Killed(BaseException):
    """No handler of the run catches it."""


class Kill(Observer):
    def __init__(self, at: int) -> None:
        self.at = at

    def step(self, record: Any) -> None:
        if record.step == self.at:
            raise Killed


class Lives:
    """A run of six steps that is killed twice, with a checkpoint after every third step."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.settings = config(method="conadv", checkpoint__every_epochs=1)

    def live(self, logs: Observer, kill_at: int = -1) -> None:
        watching = Guarded(logs, Kill(kill_at))
        with suppress(Killed):
            train(self.settings, self.out, auto_resume=True, observer=watching)

    def expected(self) -> set[tuple[str, float, int]]:
        """Of the record: the loss of every step, and every evaluation."""
        lines = read_lines(self.out / "record.jsonl")
        steps = {("train/loss", x["loss"], x["step"]) for x in lines if x["type"] == "step"}
        groups = {"train": "train_eval"}
        return steps | {
            (f"{groups.get(x['split'], x['split'])}/loss", x["loss"], x["step"])
            for x in lines
            if x["type"] == "eval"
        }


def test_each_step_is_logged_once_after_two_kills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Red when: a resume appends to the log of the killed run; what a kill has lost of it is not
    # made up for; the evaluation before the checkpoint is dropped with the steps behind it; the id
    # changes.
    lives, fakes = Lives(tmp_path / "run"), Fakes(monkeypatch)
    for kill_at in (4, 5, -1):
        lives.live(fakes.both(lives.out), kill_at)
    want = lives.expected()
    assert sorted(step for name, _, step in want if name == "train/loss") == list(range(6))
    for name, points in fakes.seen.items():
        assert len(points) == len({(tag, step) for tag, _, step in points}), name
        assert {point for point in points if point[0].endswith("/loss")} == want, name
    assert len({run["id"] for run in fakes.runs}) == 1
    assert {run["resume"] for run in fakes.runs} == {"allow"}
    train(lives.settings, lives.out, overwrite=True, observer=fakes.both(lives.out))
    assert fakes.runs[-1]["id"] != fakes.runs[0]["id"]


def test_tensorboard_shows_each_step_once_after_two_kills(tmp_path: Path) -> None:
    # Red when: the event files of the killed run stay, or are all that there is of its steps.
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    lives = Lives(tmp_path / "run")
    for kill_at in (4, 5, -1):
        lives.live(loggers.TensorBoard(lives.out / "tensorboard"), kill_at)
    found = reader.EventAccumulator(str(lives.out / "tensorboard")).Reload()
    names = {name for name, _, _ in lives.expected()}
    points = [(name, x.value, x.step) for name in names for x in found.Scalars(name)]
    key = lambda point: (point[0], point[2])  # noqa: E731
    want = sorted(lives.expected(), key=key)
    assert [key(point) for point in sorted(points, key=key)] == [key(point) for point in want]
    values = [point[1] for point in sorted(points, key=key)]
    assert values == pytest.approx([point[1] for point in want])


def test_without_wandb_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConadvError, match=r"pip install '\.\[wandb\]'"):
        loggers.WandB(tmp_path, {})


def test_a_run_is_logged_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Red when: nothing is logged, or what wandb writes keeps the run from being opened again (links
    # in the folder).
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    out = tmp_path / "run"
    options = "--model.width 4 --steps 2 --schedule.warmup-epochs 0 --eval.robust-images 0 --quiet"
    args = ["--method", "conadv", *options.split()]
    assert main(["train", "digits", *args, "--out", str(out), "--wandb"]) == 0
    written = _written(out)
    for line in read_lines(out / "record.jsonl"):
        for name in (*line.get("losses", {}), *line.get("phases", {})):
            assert name.encode() in written
    for name in ("train/loss", "train/lr", "train/losses/adv", "seconds/attack", "test/accuracy"):
        assert name.encode() in written
    assert RunDir(out).open().method == "conadv"
    assert main(["train", "digits", *args, "--out", str(out), "--resume", "--wandb"]) == 0


def _written(out: Path) -> bytes:
    """What wandb's own process has written, once the last evaluation is there (or after 30
    seconds).
    """
    end = time.monotonic() + 30
    while True:
        found = b"".join(path.read_bytes() for path in out.glob("wandb/**/*.wandb"))
        if b"test/accuracy" in found or time.monotonic() > end:
            return found
        time.sleep(0.2)
