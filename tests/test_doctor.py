"""conadv doctor: each rule is silent on a good machine and speaks on the one that it is for."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from conadv.cli.program import main
from conadv.doctor import facts as doctor_facts
from conadv.doctor.command import show
from conadv.doctor.facts import Cuda, Facts, Interface, look, usable_cores
from conadv.doctor.findings import RULES, findings

GIB = 2**30
GPU = Cuda("H", (9, 0), 80 * GIB, 79 * GIB, (1,))
GOOD = Facts(
    versions={"python": "3.11.7", "torch": "2.9.1", "torchvision": "0.24.1"},
    extras={"tensorboard": "2.20", "wandb": "0.20"},
    system="Linux x86_64",
    processor="a processor",
    cores=16,
    usable_cores=16.0,
    threads=16,
    cpu_flags=("avx2", "avx512_bf16"),
    onednn=True,
    memory_free=64 * GIB,
    allocator="glibc",
    cuda_built="13.0",
    nvidia_driver=True,
    cuda=(GPU, replace(GPU, peers=(0,))),
    backends=("gloo", "nccl"),
    interfaces=(Interface("lo", True, None), Interface("eth0", True, 100_000)),
    shm=(16 * GIB, 16 * GIB),
    disk_free=100 * GIB,
    open_files=65536,
    variables={},
)
CPU: dict[str, Any] = {"cuda": (), "nvidia_driver": False}
CASES: list[tuple[dict[str, Any], str, str]] = [
    ({"versions": {"torch": "2.14.1", "torchvision": "0.24.1"}}, "wrong", "0.29"),
    ({"versions": {"torch": "2.8.0", "torchvision": "0.23.0"}}, "wrong", "older than 2.9"),
    (
        {"extras": {"wandb": None, "timm": "1.0"}},
        "note",
        "pip install '.[wandb]' in conadv's checkout",
    ),
    ({"cuda": ()}, "wrong", "sees no device"),
    ({"cuda": (), "cuda_built": None}, "wrong", "without CUDA"),
    ({"cuda": (), "variables": {"CUDA_VISIBLE_DEVICES": ""}}, "note", "hides all"),
    ({"cuda": (replace(GPU, capability=(7, 5)), GPU)}, "slow", "no bf16"),
    ({"cuda": (replace(GPU, free=GIB), GPU)}, "slow", "1.0 of 80.0 GiB"),
    ({"cuda": (replace(GPU, free=0), GPU)}, "wrong", "cannot be used"),
    ({"cuda": (GPU, replace(GPU, name="T"))}, "slow", "devices differ"),
    ({"cuda": (replace(GPU, peers=()), GPU)}, "slow", "no peer access for cuda:0:"),
    ({"backends": ("gloo",)}, "wrong", "no NCCL"),
    ({"backends": ()}, "wrong", "neither gloo nor NCCL"),
    ({"variables": {"CUDA_LAUNCH_BLOCKING": "1"}}, "slow", "every kernel waits"),
    ({"variables": {"NCCL_P2P_DISABLE": "1"}}, "slow", "NCCL_P2P_DISABLE"),
    ({"threads": 17}, "slow", "OMP_NUM_THREADS=16"),
    ({**CPU, "threads": 4}, "note", "4 thread(s) of 16"),
    ({**CPU, "cpu_flags": ("avx2",)}, "slow", "no bf16 in hardware"),
    ({**CPU, "onednn": False}, "slow", "channels_last gains nothing"),
    ({"allocator": "other"}, "slow", "LD_PRELOAD"),
    ({"shm": None}, "wrong", "no /dev/shm"),
    ({"shm": (64 * 2**20, 60 * 2**20)}, "wrong", "60 MiB free"),
    ({"disk_free": GIB}, "slow", "1.00 GiB of disk"),
    ({"disk_free": 1000}, "wrong", "0.00 GiB of disk"),
    ({"memory_free": GIB}, "slow", "1.00 GiB of memory"),
    ({"open_files": 256}, "slow", "256 files"),
    ({"variables": {"GLOO_SOCKET_IFNAME": "ib0"}}, "wrong", "no such interface"),
    (
        {"interfaces": (Interface("lo", True, None), Interface("eth0", True, 1000))},
        "note",
        "1 Gbit/s",
    ),
]


def test_a_device_that_refuses_is_a_finding_and_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    # Red when: an error of mem_get_info ends the command.
    def refuse(index: int) -> tuple[int, int]:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable")

    for name, answer in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "mem_get_info": refuse,
        "get_device_properties": lambda index: SimpleNamespace(total_memory=80 * GIB),
        "get_device_capability": lambda index: (9, 0),
        "get_device_name": lambda index: "H",
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    (device,) = doctor_facts._cuda()
    assert (device.memory, device.free) == (80 * GIB, 0)


def test_a_good_machine_has_no_findings() -> None:
    # Red when: a rule speaks without a reason, for one of its limits (>= for >).
    assert findings(GOOD) == []
    assert findings(replace(GOOD, **CPU)) == []
    names = {"NCCL_SOCKET_IFNAME": "eth", "GLOO_SOCKET_IFNAME": "eth0"}
    assert findings(replace(GOOD, variables=names)) == []
    assert findings(replace(GOOD, variables={"NCCL_SOCKET_IFNAME": "^docker"})) == []


@pytest.mark.parametrize(("change", "level", "words"), CASES)
def test_each_finding(change: dict[str, Any], level: str, words: str) -> None:
    # Red when: its rule is taken out of RULES, or its level changes.
    found = findings(replace(GOOD, **change))
    assert [finding.level for finding in found if words in finding.what + finding.todo] == [level]
    assert len(found) == 1
    assert found[0].todo


def test_every_rule_has_a_case() -> None:
    # Red when: a rule without a case is added.
    speaking = {
        rule for rule in RULES for change, _, _ in CASES if list(rule(replace(GOOD, **change)))
    }
    assert speaking == set(RULES)


def test_the_worst_comes_first_and_control_characters_are_escaped() -> None:
    bad = replace(
        GOOD,
        disk_free=0,
        threads=99,
        extras={"timm": None},
        variables={"GLOO_SOCKET_IFNAME": "\x1b[2J"},
    )
    levels = [finding.level for finding in findings(bad)]
    assert levels == ["wrong", "wrong", "slow", "note"]
    out = io.StringIO()
    show(bad, findings(bad), Console(file=out, width=80))
    assert "\x1b" not in out.getvalue()
    assert "2 wrong, 1 slow, 1 note" in out.getvalue()
    assert max(map(len, out.getvalue().splitlines())) <= 80


def test_this_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Red when: --json is not JSON, or the exit code does not follow from the findings.
    monkeypatch.chdir(tmp_path)
    assert 0 < usable_cores() <= look(tmp_path).cores
    code = main(["doctor", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert code == any(finding["level"] == "wrong" for finding in said["findings"])
    assert said["facts"]["versions"]["torch"]
    monkeypatch.setattr("conadv.doctor.command.look", lambda folder: replace(GOOD, backends=()))
    assert main(["doctor"]) == 1
    assert "1 wrong, 0 slow, 0 note" in capsys.readouterr().out
