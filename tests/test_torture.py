"""Three campaigns of benchmarks/torture in their short forms, and that campaigns can fail.

`make torture` runs all of them in full; what the others try has tests of its own in every test run.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import torture
from benchmarks.torture import fuzz, soak

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the campaigns need Linux")


def test_kill(tmp_path: Path) -> None:
    # Red when: pending batches are not saved; truncate keeps steps after the checkpoint; save
    # writes to the final name.
    found = torture.run("kill", True, tmp_path)
    assert found["kills"] >= 2
    assert found["runs"] == 2
    assert found == json.loads((tmp_path / "kill.json").read_text())


def test_corrupt(tmp_path: Path) -> None:
    # Red when: verify does not compare the digest.
    found = torture.run("corrupt", True, tmp_path)
    assert (found["mutations"], found["resumed_to_the_same_bits"]) == (20, 1)
    assert [file.name for file in tmp_path.iterdir()] == ["corrupt.json"]


def test_fuzz(tmp_path: Path) -> None:
    # Red when: any reader raises something else than ConadvError, or a command ends with another
    # code than 0, 1, 2.
    found = torture.run("fuzz", True, tmp_path)
    assert found["inputs"] >= 600
    assert all(target["accepted"] for target in found["targets"].values())


def test_fuzz_finds_a_reader_that_crashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The control: an error that is no ConadvError.
    fuzz.make_base(tmp_path / "base")
    monkeypatch.setitem(fuzz.READERS, "args", ("args", lambda file: int(file.read_bytes())))
    with pytest.raises(AssertionError, match="args: ValueError"):
        fuzz.trial(list(fuzz.READERS).index("args"), tmp_path)


def test_changes_reach_every_place_and_leave_the_original() -> None:
    # Red when: changed gives its argument back, or only looks at the first level.
    value = {"a": [1, {"b": 2}], "c": "x"}
    found = [fuzz.changed(value, random.Random(seed)) for seed in range(300)]
    assert value == {"a": [1, {"b": 2}], "c": "x"}
    assert any("c" not in each for each in found)
    assert any(each.get("a") == [1, {"b": None}] for each in found)


def test_growth_is_that_of_the_second_half() -> None:
    # Red when: the first half, where a process warms up, counts; a single spike decides; a slope
    # per step is returned.
    level = [
        (step, 1e8 + (1e8 if step == 70 else 0.0) - 1e6 * max(0, 40 - step), 20.0, 5.0)
        for step in range(100)
    ]
    assert soak.not_flat(soak.growth(level)) == []
    for place, (name, limit) in enumerate(soak.LIMITS.items(), start=1):
        steps = [list(each) for each in level]
        for each in steps:
            each[place] += 1.5 * limit * each[0] / 50
        samples: Any = [tuple(each) for each in steps]
        grown = soak.growth(samples)
        assert soak.not_flat(grown) == [name]
        assert grown[name] == pytest.approx(1.5 * limit, rel=0.05)


def test_a_campaign_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    # Red when: a line that was cut off stays, or is counted; a trial is done twice.
    def trial(number: int) -> dict[str, int]:
        return {"n": number}

    torture.trials(tmp_path, 1, trial)
    (tmp_path / "trials.jsonl").open("a").write('{"n": 1, "ha')
    assert torture.trials(tmp_path, 3, trial) == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert torture.trials(tmp_path, 3, lambda _: {}) == [{"n": 0}, {"n": 1}, {"n": 2}]
