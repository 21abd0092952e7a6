"""torchrun --max-restarts: a run whose rank is killed goes on from its last checkpoint to the same
bits.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from conadv import ConadvError
from conadv.config.files import dump_yaml
from conadv.config.resolve import resolve
from conadv.distributed.rendezvous import rendezvous
from conadv.training.checkpoint import steps
from conadv.training.loop import train
from conadv.training.record import read_lines
from conadv.training.run_dir import RunDir

from ..test_training import config, weights, without_times
from . import jobs
from .launch import ONE_HOST, kill, started, torchrun, until, workers
from .pool import Ranks
from .test_runs import same_weights

SETTINGS: dict[str, Any] = {
    "method": "conadv",
    "staleness": 2,
    "epochs": 4,
    "eval__every_epochs": None,
}


@pytest.mark.skipif(sys.platform != "linux", reason="finds the worker to kill in /proc")
def test_a_killed_rank_is_made_up_for_by_a_restart(two: Ranks, tmp_path: Path) -> None:
    # Red when: a restarted attempt finds its own run in the way; starts from the beginning; forgets
    # images that wait.
    out, log = tmp_path / "cut", tmp_path / "log"
    (tmp_path / "config.yaml").write_text(dump_yaml(config(**SETTINGS)))
    program = ["--config", tmp_path / "config.yaml", "--out", out, "--comm-timeout", 60]
    command = torchrun([*ONE_HOST, "--max-restarts", 1], *program)
    with started(command, log, GLOO_SOCKET_IFNAME="lo") as launcher:
        until(lambda: len(steps(out / "checkpoints")) >= 2, 180, "the second checkpoint")
        kill(workers(launcher.pid)[1])
        assert launcher.wait(240) == 0, log.read_text()
    lines = read_lines(out / "record.jsonl")
    resumed = [line["step"] for line in lines if line["type"] == "resume"]
    assert len(resumed) == 1
    assert 2 <= resumed[0] < 12
    assert f"started again: going on from step {resumed[0]}" in log.read_text()

    two.run(jobs.train_run, tmp_path / "whole", SETTINGS)
    assert without_times(lines) == without_times(read_lines(tmp_path / "whole" / "record.jsonl"))
    assert same_weights(out, tmp_path / "whole")


def test_what_a_restart_does_with_what_it_finds(tmp_path: Path) -> None:
    # Red when: --overwrite of the first attempt deletes what it has trained; a restart takes a run
    # of other settings for its own, or of another launcher; one that was killed before its first
    # checkpoint cannot start again.
    settings = resolve(config(steps=4, epochs=None))
    run = RunDir(tmp_path)
    run.start(settings)  # killed before the first checkpoint
    train(settings, tmp_path, restarted=True)
    kept = weights(tmp_path)
    (run.checkpoints / "step_00000004.pt").unlink()
    for options in ({}, {"overwrite": True}):
        train(settings, tmp_path, restarted=True, **options)
        assert (
            next(line["step"] for line in read_lines(run.record) if line["type"] == "resume") == 3
        )
        assert all(torch.equal(kept[key], value) for key, value in weights(tmp_path).items())
    with pytest.raises(ConadvError, match="already holds a run"):
        train(config(steps=3, epochs=None), tmp_path, restarted=True)
    with pytest.raises(ConadvError, match="already holds a run"):
        train(settings, tmp_path)
    run.launcher.write_text("another launcher's\n")
    with pytest.raises(ConadvError, match="already holds a run"):
        train(settings, tmp_path, restarted=True)


def test_a_new_start_meets_under_a_prefix_that_no_old_one_has_used() -> None:
    # Red when: rank 0 does not show whom it has seen (rank 1 then takes the first start's prefix);
    # rank 1 does not look for a new prefix.
    store, limit = torch.distributed.HashStore(), timedelta(seconds=60)
    with ThreadPoolExecutor(2) as pool:
        for start in range(3):
            other = pool.submit(rendezvous, store, 1, 2, limit)
            # rank 1 comes first, and finds what the last start has left
            time.sleep(0.2 if start else 0.0)
            stores = [pool.submit(rendezvous, store, 0, 2, limit).result(60), other.result(60)]
            stores[0].set("start", str(start))
            assert stores[1].get("start") == str(start).encode()


def test_a_rank_that_does_not_come() -> None:
    # Red when: rank 1 waits for rank 0 without a limit.
    store = torch.distributed.HashStore()
    store.set("conadv/prefix", "old")
    for rank in (0, 1):
        with pytest.raises(torch.distributed.DistStoreError):
            rendezvous(store, rank, 2, timedelta(seconds=1))
