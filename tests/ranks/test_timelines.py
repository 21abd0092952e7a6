"""The timelines of real runs on two ranks hold what the analysis takes for granted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from conadv.analysis.shares import covered, hidden_attack, hidden_communication, on_network
from conadv.analysis.timeline import Timeline, timeline
from conadv.training.record import read_lines

from . import jobs
from .pool import Ranks


def timeline_of(two: Ranks, out: Path, method: str) -> Timeline:
    two.run(jobs.train_run, out, {"method": method})
    return timeline(read_lines(out / "record.jsonl"))


def test_an_attack_before_the_gradient_is_not_hidden(two: Ranks, tmp_path: Path) -> None:
    # Red when: "network" spans begin before their launch, or belong to another step, or the shares
    # count all attacks.
    found = timeline_of(two, tmp_path, "disadv")
    hidden = hidden_attack(found)
    assert hidden is not None
    assert hidden.share < 0.01


def test_both_ranks_tell_of_the_same_buckets(two: Ranks, tmp_path: Path) -> None:
    # Red when: `on_network` takes each rank's own launch (the two lengths are then equal).
    found = timeline_of(two, tmp_path, "conadv")
    assert (found.ranks("learner"), found.ranks("attack")) == ([0, 1], [])
    own = found.spans[found.spans["phase"] == "network"]
    first, second = (own.loc[own["rank"] == rank, "step"].tolist() for rank in (0, 1))
    assert first == second  # the n-th bucket of a step is the same one on all ranks
    assert set(first) == set(range(6))
    together = on_network(found.spans)

    def total(spans: pd.DataFrame) -> float:
        times = ["start", "end"]
        return sum(covered(mine[times].to_numpy()) for _, mine in spans.groupby("rank"))

    assert 0 < total(together) < total(own)
    ends = [together.loc[together["rank"] == rank, "end"].to_numpy() for rank in (0, 1)]
    assert np.abs(ends[0] - ends[1]).max() < 10  # seconds: one clock, however busy the machine
    communication = hidden_communication(found)
    assert communication is not None
    assert 0 <= communication.share <= 1
