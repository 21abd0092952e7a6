"""Precise batch-norm statistics over several ranks, and a process group that somebody else has made."""

from __future__ import annotations

import pytest
import torch

from conadv import Comm, ConadvError

from ..helpers import same
from . import jobs
from .pool import Ranks


def test_ranks_agree_with_one(two: Ranks) -> None:
    # Red when: sums are not taken over the ranks; an attack's draws are keyed by a rank's own numbers.
    alone = jobs.recalibration(jobs.Comm(), 5)
    mine, theirs = two.run(jobs.recalibration, 5)
    assert same(mine, theirs)
    for name, value in alone.items():
        assert torch.allclose(mine[name].double(), value.double(), rtol=1e-9, atol=1e-12), name


def test_a_group_that_is_there_already_is_adopted(two: Ranks) -> None:
    assert two.run(jobs.adopted) == [(0, 2, 3.0), (1, 2, 3.0)]


def test_several_processes_without_a_group_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    # Red when: WORLD_SIZE is not looked at, and every process would train for itself.
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConadvError, match="no process group"):
        Comm.from_process_group("cpu")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert Comm.from_process_group("cpu").ranks == 1
