"""conadv doctor: each finding is absent on a good machine and there on the one that it is for."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from conadv.cli import doctor
from conadv.cli.doctor import Device, Facts, findings
from conadv.cli.program import main

GPU = Device("H", bf16=True, free_gib=79, total_gib=80)
GOOD = Facts(
    environment={"torch_version": "2.9.1"},
    usable_cores=16.0,
    threads=16,
    driver=True,
    cuda_build="13.0",
    cuda=(GPU, GPU),
    backends=("gloo", "nccl"),
    interfaces=("lo", "eth0"),
    shm_gib=16.0,
    disk_gib=100.0,
    variables={},
)
CPU: dict[str, Any] = {"cuda": (), "driver": False}
CASES: list[tuple[dict[str, Any], str, str]] = [
    ({"cuda": ()}, "wrong", "sees no device"),
    ({"cuda": (), "variables": {"CUDA_VISIBLE_DEVICES": ""}}, "note", "hides all"),
    ({"cuda": (replace(GPU, bf16=False), GPU)}, "slow", "cuda:0 (H) has no bf16"),
    ({"cuda": (replace(GPU, free_gib=1), GPU)}, "slow", "1.0 of 80.0 GiB"),
    ({"cuda": (replace(GPU, free_gib=0), GPU)}, "wrong", "refuses"),
    ({"backends": ("gloo",)}, "wrong", "no NCCL"),
    ({**CPU, "backends": ()}, "wrong", "no gloo and no NCCL"),
    ({"variables": {"CUDA_LAUNCH_BLOCKING": "1"}}, "slow", "CUDA_LAUNCH_BLOCKING"),
    ({"threads": 17}, "slow", "OMP_NUM_THREADS to 16"),
    ({**CPU, "threads": 4}, "note", "4 thread(s)"),
    ({"shm_gib": 0.06}, "wrong", "0.06 GiB free"),
    ({"disk_gib": 1.0}, "slow", "1.00 GiB of disk"),
    ({"disk_gib": 0.01}, "wrong", "0.01 GiB of disk"),
    ({"variables": {"GLOO_SOCKET_IFNAME": "ib0"}}, "wrong", "not an interface"),
]


def test_a_device_that_refuses_is_a_finding_and_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    # Red when: an error of mem_get_info ends the command.
    def refuse(index: int) -> tuple[int, int]:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable")

    about = SimpleNamespace(name="H", major=9, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: about)
    monkeypatch.setattr(torch.cuda, "mem_get_info", refuse)
    assert list(doctor._devices()) == [Device("H", True, 0.0, 80.0)]


@pytest.mark.parametrize(("change", "level", "words"), CASES)
def test_each_finding(change: dict[str, Any], level: str, words: str) -> None:
    # Red when: its rule is taken out, or its level changes.
    ((found, what, todo),) = findings(replace(GOOD, **change))
    assert found == level
    assert words in f"{what}: {todo}"


def test_a_good_machine_has_no_findings() -> None:
    # Red when: a rule speaks without a reason.
    for variables in (
        {"NCCL_SOCKET_IFNAME": "eth", "GLOO_SOCKET_IFNAME": "eth0"},
        {"NCCL_SOCKET_IFNAME": "^docker"},
        {"CUDA_LAUNCH_BLOCKING": "0"},
    ):
        assert findings(replace(GOOD, variables=variables)) == []
    assert findings(replace(GOOD, **CPU)) == []


def test_the_worst_comes_first_and_control_characters_are_escaped() -> None:
    variables = {"GLOO_SOCKET_IFNAME": "\x1b[2J"}
    bad = replace(GOOD, disk_gib=0.0, threads=99, variables=variables)
    bad = replace(bad, environment={"os": "\x1b[2J"})
    assert [level for level, *_ in findings(bad)] == ["wrong", "wrong", "slow"]
    for width in (60, 80, 120):
        out = io.StringIO()
        doctor.show(bad, findings(bad), Console(file=out, width=width))
        assert "\x1b" not in out.getvalue()
        assert max(map(len, out.getvalue().splitlines())) <= width


def test_this_machine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # Red when: --json is not JSON, or the exit code does not follow from the findings.
    code = main(["doctor", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert code == any(finding["level"] == "wrong" for finding in said["findings"])
    assert said["facts"]["environment"]["torch_version"] == torch.__version__
    monkeypatch.setattr(doctor, "look", lambda folder: replace(GOOD, shm_gib=0.0))
    assert main(["doctor"]) == 1
    assert "1 wrong, 0 slow, 0 note" in capsys.readouterr().out
