"""A signal that reaches one rank stops all of them after the same step."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import pytest

from conadv.training.checkpoint import steps
from conadv.training.record import read_lines

from ..test_training import without_times
from . import jobs
from .pool import Ranks
from .test_runs import same_weights

SETTINGS: dict[str, Any] = {
    "method": "conadv",
    "staleness": 2,
    "global_batch_size": 192,
    "micro_batch_size": 32,
    "epochs": 3,
    "eval__every_epochs": None,
    "checkpoint__every_epochs": None,
}
CASES = {
    "a learner": (2, 0, signal.SIGINT, 130),
    "an attack rank": (2, 1, signal.SIGTERM, 143),
}


@pytest.mark.parametrize("name", CASES)
def test_one_ranks_signal_is_everybodys(name: str, three: Ranks, tmp_path: Path) -> None:
    # Red when: the request does not ride on the sum (the ranks then wait for each other), the code
    # is not agreed on, or an attack rank's request does not travel with its images.
    rank, attack, number, code = CASES[name]
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    answers = three.run(jobs.stopped_run, cut, SETTINGS, rank, int(number), attack)
    assert [answer[0] for answer in answers] == [code] * 3
    learners = answers[: 3 - attack]
    (at,) = {int(re.findall(r"after (\d+) steps", text)[0]) for _, text in learners}
    assert 4 <= at <= 8
    assert steps(cut / "checkpoints") == [at]
    assert three.run(jobs.train_again, cut, SETTINGS, attack) == [None] * 3
    assert three.run(jobs.train_again, whole, SETTINGS, attack) == [None] * 3
    lines = [read_lines(out / "record.jsonl") for out in (cut, whole)]
    assert without_times(lines[0]) == without_times(lines[1])
    assert [line["step"] for line in lines[0] if line["type"] == "stop"] == [at]
    assert same_weights(cut, whole)
