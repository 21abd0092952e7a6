"""Weights & Biases beside TensorBoard: the same names, steps and values; really offline where wandb is installed."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conadv import ConadvError
from conadv.cli.program import main
from conadv.training import loggers
from conadv.training.observer import Guarded
from conadv.training.record import read_lines
from conadv.training.run_dir import RunDir
from conadv.types import StepRecord

RECORD = StepRecord(
    3, 0, 0.5, 2.0, {"clean": 1.5, "adv": 2.5}, 1.25, 2, {"attack": 0.1, "gradient": 0.2}
)


def test_both_loggers_write_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Red when: one logger has a name of its own, or evaluations come at another step. What wandb itself does with it
    # is the business of the test below.
    seen: dict[str, list[tuple[str, float, int]]] = {"wandb": [], "tensorboard": []}
    started: dict[str, Any] = {}
    run = SimpleNamespace(
        log=lambda values, step: seen["wandb"].extend(
            (name, value, step) for name, value in values.items()
        ),
        finish=lambda: started.update(finished=True),
    )
    fake = SimpleNamespace(Settings=dict, init=lambda **options: started.update(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    board = loggers.TensorBoard(tmp_path / "tensorboard")
    board._open = lambda: SimpleNamespace(  # type: ignore[assignment]
        add_scalar=lambda *values: seen["tensorboard"].append(values), close=lambda: None
    )
    both = Guarded(board, loggers.WandB(tmp_path / "wandb", {"seed": 3}))
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
    assert (started["mode"], started["config"], started["name"]) == (
        "offline",
        {"seed": 3},
        "digits conadv",
    )
    assert started["settings"]["symlink"] is False
    assert started["finished"]


def test_without_wandb_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConadvError, match=r"pip install '\.\[wandb\]'"):
        loggers.WandB(tmp_path, {})


def test_a_run_is_logged_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Red when: nothing is logged, or what wandb writes keeps the run from being opened again (links in the folder).
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    out = tmp_path / "run"
    args = "--model.width 4 --steps 2 --schedule.warmup-epochs 0 --method conadv --eval.robust-images 0 --quiet".split()
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
    """What wandb's own process has written, once the last evaluation is there (or after 30 seconds)."""
    end = time.monotonic() + 30
    while True:
        found = b"".join(path.read_bytes() for path in out.glob("wandb/**/*.wandb"))
        if b"test/accuracy" in found or time.monotonic() > end:
            return found
        time.sleep(0.2)
