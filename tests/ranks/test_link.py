"""A link that goes silent between two hosts (network namespaces): all processes end."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from benchmarks.torture.links import HOSTS, hosts, silence
from conadv.config.files import dump_yaml
from conadv.training.checkpoint import load_newest, steps

from ..test_training import config
from .launch import started, torchrun, until

TIMEOUT = 15  # seconds: a busy machine gets through a step, and through the rendezvous


@pytest.fixture
def two_hosts() -> Iterator[list[str]]:
    """Two namespaces with an address each, joined by devices called "wire"; gone afterwards."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and iproute2")
    with ExitStack() as stack:
        try:
            names = stack.enter_context(hosts())
        except subprocess.CalledProcessError as error:
            pytest.skip(f"cannot make network namespaces here: {error.stderr.decode().strip()}")
        yield names


def test_a_silent_link_ends_all_ranks_and_leaves_the_checkpoint(
    two_hosts: list[str], tmp_path: Path
) -> None:
    # Red when: the diagnosis waits for a store behind the silent link without a limit.
    settings = {"method": "conadv", "staleness": 1, "epochs": 500, "eval__every_epochs": None}
    out = tmp_path / "run"
    (tmp_path / "config.yaml").write_text(dump_yaml(config(**settings)))
    logs = [tmp_path / "log0", tmp_path / "log1"]
    program = ["--config", tmp_path / "config.yaml", "--out", out, "--comm-timeout", TIMEOUT]
    with ExitStack() as stack:
        launchers = []
        for node, name in enumerate(two_hosts):
            options = ["--nnodes", 2, "--node-rank", node, "--nproc-per-node", 1]
            options += ["--master-addr", HOSTS[0], "--master-port", 29400]
            command = ["ip", "netns", "exec", name, *torchrun(options, *program)]
            launcher = started(command, logs[node], GLOO_SOCKET_IFNAME="wire")
            launchers.append(stack.enter_context(launcher))
        until(lambda: len(steps(out / "checkpoints")) >= 3, 180, "the third checkpoint")
        silence(two_hosts)
        # the timeout, at most 5 s for the diagnosis, and the launchers' own end
        until(lambda: None not in [each.poll() for each in launchers], 180, "both launchers' end")
    # the launcher of rank 0 keeps the store
    found = ("No word within 3 s from rank 1", "so has the store at MASTER_ADDR")
    for rank, (log, missing) in enumerate(zip(logs, found, strict=True)):
        said = log.read_text(errors="replace")
        assert f"conadv: Rank {rank} of 2: communication failed in phase" in said, said
        assert "exitcode  : 2" in said
        assert missing in said
    state = load_newest(out / "checkpoints", torch.device("cpu"))
    assert state["step"] == steps(out / "checkpoints")[-1] >= 3
