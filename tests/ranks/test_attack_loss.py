"""--on-attack-loss continue: learners go on without failed attack ranks, to the same bits."""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conadv import Comm
from conadv.config.files import dump_yaml
from conadv.distributed.teams import Teams
from conadv.engine.attack_ranks.failed import FailedRank, FailedRanks
from conadv.training.checkpoint import steps
from conadv.training.loop import train
from conadv.training.record import read_lines

from ..test_training import METHODS, config, without_times
from . import attack_jobs as jobs
from .attack_jobs import Case
from .launch import kill, started, torchrun, until, workers
from .pool import Ranks, free_port
from .test_attack_ranks import alone, assert_alike
from .test_runs import forget_after, same_weights

UINT8 = {"pending_dtype": "uint8"}


def lose(
    ranks: int, attack_ranks: int, case: Case, how: str = "killed", timeout: float = 60.0
) -> Any:
    """What the ranks return that are left after the last one is lost, out of eight steps."""
    case = replace(case, steps=8, may_lose=True, lost=(ranks - 1, how))
    with Ranks(ranks, timeout) as pool:
        pool.start(jobs.training, attack_ranks, case)
        found = [pool.answer(rank) for rank in range(ranks - 1)]
        assert all(kind == "value" for kind, _ in found), found
        if how == "killed":
            assert pool.answer(ranks - 1) == ("ended", 7)
    return [value for _, value in found]


def test_the_bits_of_a_run_that_lost_nothing() -> None:
    # Red when: what was under way is attacked at the present weights; the version tag is that of
    # the step; the kept weights are not a copy; images made here are not stored as those that
    # travel; settle() forgets them.
    case = Case(tau=3, lookahead="last-update", steps=8, save_at=5, options=UINT8)
    (learner,) = lose(2, 1, case)
    assert_alike(learner, alone(case))
    (failed,) = learner.failed
    assert (failed.rank, failed.attack_rank) == (0, 1)
    assert 2 <= failed.step <= 3 + case.tau
    assert failed.reason
    rest = jobs.resumed(case, learner.saved)
    assert_alike(rest, learner._replace(records=learner.records[5:]))


def test_attack_ranks_that_are_left_go_on() -> None:
    # Red when: the first loss ends the others; a lost rank is sent weights again; micro-batches
    # are mixed up.
    case = Case(lookahead=True, steps=8)
    learner, served = lose(3, 2, case)
    assert_alike(learner, alone(case))
    assert served == list(range(1, 8))
    assert [failed.attack_rank for failed in learner.failed] == [2]


def test_a_silent_attack_rank_is_given_up_by_all_learners(three: Ranks) -> None:
    # Red when: a wait for a lost rank has no limit of its own (the other learner's sum then runs
    # out first); learners sum in the world's group; a learner that does not feed the attack rank
    # keeps no weights.
    case = Case("no norm", tau=2, steps=8)
    whole = three.run(jobs.training, 1, case)[:2]
    cut = lose(3, 1, case, how="stopped", timeout=12.0)
    for rank in range(2):
        assert_alike(cut[rank], whole[rank])
        assert whole[rank].failed == []
        (failed,) = cut[rank].failed
        assert (failed.rank, failed.attack_rank) == (rank, 2)
        assert failed.reason == "no word within 6 s"


def test_one_that_has_failed_is_neither_waited_for_nor_told_of_again() -> None:
    # Red when: the limit is the process group's own timeout, or holds for a rank that has failed.
    asked: list[float] = []

    def handle(error: BaseException | None) -> Any:
        return SimpleNamespace(failure=lambda seconds: asked.append(seconds) or error)

    world = Comm(0, 3, timeout=600.0)
    failed = FailedRanks(Teams(world, world, (0,), (1, 2), may_lose=True))
    for error, step in ((None, 4), (TimeoutError(), 5), (TimeoutError(), 6)):
        assert failed.is_through(handle(error), 1, step) == (error is None)
    assert not failed.is_through(handle(RuntimeError("Gone.\nMore")), 2, 7)
    assert asked == [300.0, 300.0, 0.0, 300.0]
    want = [FailedRank(5, 0, 1, "no word within 300 s"), FailedRank(7, 0, 2, "Gone.")]
    assert (failed.take(), failed.take()) == (want, [])


def test_a_whole_run_and_its_resume(two: Ranks, tmp_path: Path) -> None:
    # Red when: the end of a run involves the world; no line says what was lost; a resumed run, here
    # with an attack rank again, or one without any, does not go on.
    settings = {**METHODS["conadv-tau2"], "checkpoint__every_epochs": 1.0}
    cut, whole, inline = (tmp_path / name for name in ("cut", "whole", "inline"))
    two.run(jobs.lose_of_a_run, whole, settings, 1, False)
    with Ranks(2) as pool:
        pool.start(jobs.lose_of_a_run, cut, settings, 1, True)
        kind, summary = pool.answer(0)
    assert kind == "value", summary
    lines = read_lines(cut / "record.jsonl")
    assert without_times(lines) == without_times(read_lines(whole / "record.jsonl"))
    assert same_weights(cut, whole)
    assert lines[0]["execution"]["on_attack_loss"] == "continue"
    (loss,) = (line for line in lines if line["type"] == "attack_loss")
    assert (loss["rank"], loss["attack_rank"]) == (0, 1)
    lost = [summary, json.loads((whole / "summary.json").read_text())]
    assert [each["attack_ranks_lost"] for each in lost] == [1, 0]

    shutil.copytree(cut, inline)
    for out in (cut, inline):
        forget_after(out, 3)
    two.run(jobs.lose_of_a_run, cut, settings, 1, False)
    train(config(**settings), inline, resume=True)
    for out in (cut, inline):
        assert same_weights(out, whole)
        assert without_times(read_lines(out / "record.jsonl")) == without_times(lines)


LOSING = ["--method", "conadv", "--attack-ranks", "1", "--on-attack-loss", "continue"]


@pytest.mark.skipif(sys.platform != "linux", reason="finds the attack rank in /proc")
def test_under_torchrun_attack_ranks_have_an_agent_of_their_own(tmp_path: Path) -> None:
    # Red when: the world's roles are dealt out per agent; the learners' agent hears of the attack
    # rank's end.
    out, inline = tmp_path / "run", tmp_path / "inline"
    settings = {"method": "conadv", "staleness": 2, "epochs": 6, "eval__every_epochs": 2}
    (tmp_path / "config.yaml").write_text(dump_yaml(config(**settings)))
    program = ["--config", tmp_path / "config.yaml", "--out", out, *LOSING, "--comm-timeout", 60]
    address = ["--master-addr", "127.0.0.1", "--master-port", free_port()]
    with ExitStack() as stack:
        agents = []
        for node in range(2):
            node_options = ["--nnodes", 2, "--node-rank", node, "--nproc-per-node", 1, *address]
            command, log = torchrun(node_options, *program), tmp_path / f"log{node}"
            agents.append(stack.enter_context(started(command, log, GLOO_SOCKET_IFNAME="lo")))
        until(lambda: len(steps(out / "checkpoints")) >= 2, 180, "the second checkpoint")
        kill(workers(agents[1].pid)[1])
        assert agents[1].wait(120) == 1
        # the learners' agent then waits up to 300 s for the other one before it ends with 0: its
        # worker has ended
        until(lambda: 0 not in workers(agents[0].pid), 180, "the end of the learner")
        assert agents[0].poll() in (None, 0)
    assert json.loads((out / "summary.json").read_text())["attack_ranks_lost"] == 1
    train(config(**settings), inline)
    lines = [without_times(read_lines(path / "record.jsonl")) for path in (out, inline)]
    assert lines[0] == lines[1]
    assert same_weights(out, inline)


def test_one_torchrun_for_all_is_refused(two: Ranks) -> None:
    # Red when: the check of the launchers is removed.
    for error in two.errors(jobs.one_agent):
        assert "no effect where one torchrun starts learners and attack ranks" in error
