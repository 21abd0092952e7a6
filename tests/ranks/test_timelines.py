"""The timelines of real runs on two ranks: what the analysis takes for granted about records holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from conadv.analysis import Timeline, hidden_attack, hidden_communication, timeline
from conadv.analysis.intervals import length
from conadv.analysis.shares import on_network
from conadv.training.record import read_lines

from . import jobs
from .pool import Ranks


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    pool = Ranks(2)
    yield pool
    pool.close()


def timeline_of(two: Ranks, out: Path, method: str) -> Timeline:
    two.run(jobs.train_run, out, {"method": method})
    return timeline(read_lines(out / "record.jsonl"))


def test_an_attack_before_the_gradient_is_not_hidden(two: Ranks, tmp_path: Path) -> None:
    # Red when: "network" spans begin before their launch, or belong to another step, or the shares count all attacks.
    found = timeline_of(two, tmp_path, "disadv")
    hidden = hidden_attack(found)
    assert hidden is not None
    assert hidden.share < 0.01


def test_both_ranks_tell_of_the_same_buckets(two: Ranks, tmp_path: Path) -> None:
    # Red when: `on_network` takes each rank's own launch (the two lengths are then equal).
    found = timeline_of(two, tmp_path, "conadv")
    assert [(lane.rank, lane.role) for lane in found.lanes] == [(0, "learner"), (1, "learner")]
    first, second = (lane.step_n[lane.phase_n == "network"].tolist() for lane in found.lanes)
    assert first == second  # the n-th bucket of a step is the same one on all ranks
    assert set(first) == set(range(6))
    together = on_network(found)
    launched = sum(length(lane.of("network")) for lane in found.lanes)
    assert 0 < sum(map(length, together.values())) < launched
    ends = [together[lane.rank][:, 1] for lane in found.lanes]
    assert np.abs(ends[0] - ends[1]).max() < 0.5  # seconds: one clock
    communication = hidden_communication(found)
    assert communication is not None
    assert 0 <= communication.share <= 1
