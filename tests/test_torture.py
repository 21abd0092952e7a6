"""The campaigns of benchmarks/torture.py in their short forms."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import torture, torture_links, torture_soak

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the campaigns need Linux")


def test_kill(tmp_path: Path) -> None:
    # Red when: pending batches are not saved; truncate keeps steps after the checkpoint; save writes to the final name.
    found = torture.run("kill", True, tmp_path)
    assert found["kills"] >= 6
    assert found == json.loads((tmp_path / "kill.json").read_text())


def test_corrupt(tmp_path: Path) -> None:
    # Red when: verify does not compare the digest.
    found = torture.run("corrupt", True, tmp_path)
    assert (found["mutations"], found["resumed_to_the_same_bits"]) == (40, 2)
    assert [file.name for file in tmp_path.iterdir()] == ["corrupt.json"]


def test_soak(tmp_path: Path) -> None:
    # Red when: the leak on purpose is left out; a line of the record is written in two halves a moment apart.
    found = torture.run("soak", True, tmp_path)
    assert found["reads_that_met_half_a_line"] == 0
    assert found["record_reads"] > 50
    assert found["display"]["share_of_time"] > 0
    assert all(
        found["control_growth"][name] > 2 * limit
        for name, limit in found["limits_of_growth"].items()
    )


def test_ranks(tmp_path: Path) -> None:
    # Red when: learners end with an attack rank that is lost; the record does not say so; a resumed run has other bits.
    found = torture.run("ranks", True, tmp_path)
    assert found["by_policy"] == {"continue": 1, "stop": 1}


@pytest.mark.skipif(
    shutil.which("ip") is None or os.geteuid() != 0,
    reason="network namespaces need root and iproute2",
)
def test_links(tmp_path: Path) -> None:
    # Red when: the link is not restored (the ranks then end with an error).
    try:
        with torture_links.hosts():
            pass
    except subprocess.CalledProcessError as error:
        pytest.skip(f"cannot make network namespaces here: {error.stderr.decode().strip()}")
    assert torture.run("links", True, tmp_path)["by_kind"] == {"five seconds, learners": 1}


def test_growth_is_that_of_the_second_half() -> None:
    # Red when: the first half, where a process warms up, counts; a single spike decides; a slope per step is returned.
    limits = torture_soak.LIMITS
    level = [
        (step, 1e8 + (1e8 if step == 70 else 0.0) - 1e6 * max(0, 40 - step), 20.0, 5.0)
        for step in range(100)
    ]
    assert torture_soak.not_flat(torture_soak.growth(level)) == []
    for place, name in enumerate(limits, start=1):
        steps = [list(each) for each in level]
        for each in steps:
            each[place] += 1.5 * limits[name] * each[0] / 50
        grown = torture_soak.growth([tuple(each) for each in steps])
        assert torture_soak.not_flat(grown) == [name]
        assert grown[name] == pytest.approx(1.5 * limits[name], rel=0.05)


def test_a_campaign_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    # Red when: a line that was cut off stays, or is counted.
    progress = torture.Progress(tmp_path)
    progress.add({"n": 1})
    (tmp_path / "trials.jsonl").open("a").write('{"n": 2, "ha')
    progress = torture.Progress(tmp_path)
    progress.add({"n": 3})
    assert torture.Progress(tmp_path).done == [{"n": 1}, {"n": 3}]


def test_what_all_short_forms_take_is_summed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Red when: the last one counts alone; a failed campaign is left out of a total that is written all the same.
    facts = {"form": "short", "time": "t", "versions": {}, "machine": {}, "git": {}}
    seconds = {name: 1.5 + number for number, name in enumerate(torture.campaigns())}

    def run(name: str, short: bool, folder: Path) -> dict[str, object]:
        assert name != failing
        return {"campaign": name, "seconds_of_the_last_start": seconds[name], **facts}

    monkeypatch.setattr(torture, "run", run)
    failing = "soak"
    assert torture.main(["all", "--short", "--out", str(tmp_path)]) == 1
    assert not (tmp_path / "short.json").exists()
    failing = ""
    assert torture.main(["all", "--short", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "short.json").read_text())
    assert (found["seconds"], found["seconds_in_all"]) == (seconds, sum(seconds.values()))


def test_every_campaign_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert torture.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == set(torture.campaigns()) >= {"kill", "corrupt"}
    assert all(len(line.split()) > 3 for line in lines)
