"""The demo: which runs it plans, and that they become a report."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conadv.cli import demo
from conadv.cli.demo import ARMS, plan
from conadv.cli.program import main
from conadv.config.resolve import resolve

from .test_sweep import train_here


def test_plan() -> None:
    # Red when: an arm trains something else than its name says, or the seed or the epochs do not
    # arrive.
    runs = plan(2, epochs=8)
    assert [(arm, run.config.seed) for arm, run in runs] == [
        (arm, seed) for seed in range(2) for arm in ARMS
    ]
    assert len({run.name for _, run in runs}) == 14
    resolved = [resolve(run.config) for _, run in runs[:7]]
    assert [
        (c.method, c.staleness, c.lookahead, c.global_batch_size, c.optim.name) for c in resolved
    ] == [
        ("vanilla", None, False, 32, "sgd"),
        ("vanilla", None, False, 898, "lars"),
        ("multiview", None, False, 898, "lars"),
        ("noise", None, False, 898, "lars"),
        ("disadv", None, False, 898, "lars"),
        ("conadv", 1, False, 898, "lars"),
        ("conadv", 1, True, 898, "lars"),
    ]
    assert [c.schedule.warmup_epochs for c in resolved] == pytest.approx([0.2, *[0.8] * 6])


def test_demo_ends_in_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = {arm: ARMS[arm] for arm in (demo.BASELINE, "+ random-sign noise")}
    monkeypatch.setattr(demo, "ARMS", few)
    monkeypatch.setattr(demo, "run_pool", train_here)
    options = "--seeds 2 --jobs 1 --epochs 1 --out".split()
    assert main(["demo", *options, str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "4 of 4 runs" in out
    assert "random-sign-noise-seed1: " in out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(few) <= set(json.dumps(summary).replace('"', "\n").splitlines())
    assert (tmp_path / "full-batch-lars-seed1" / "summary.json").is_file()
    assert (tmp_path / "report.html").is_file()


def test_workers_end_with_a_killed_demo(tmp_path: Path) -> None:
    # Red when: _end_with_parent is not started: the workers go on to the end of their runs.
    options = "-m conadv demo --seeds 1 --epochs 2000 --jobs 1 --out".split()
    command = [sys.executable, *options, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            records = _wait_for(lambda: list(tmp_path.glob("*/record.jsonl")))
        finally:
            process.kill()
    _wait_for(lambda: _silent_for(records, 2.0))


def _wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.2)
    return value


def _silent_for(records: list[Path], seconds: float) -> bool:
    before = [path.stat().st_size for path in records]
    time.sleep(seconds)
    return before == [path.stat().st_size for path in records]
