"""--on-attack-loss continue: learners go on without attack ranks that are lost, to the same bits."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from conadv import Comm, ConadvError
from conadv.config.files import dump_yaml
from conadv.distributed.teams import make_teams
from conadv.engine.attack_ranks.failed import FailedRank
from conadv.engine.execution import Execution
from conadv.training.checkpoint import steps
from conadv.training.loop import train
from conadv.training.record import read_lines

from ..helpers import same, state
from ..test_training import METHODS, config, without_times
from . import attack_jobs as jobs
from .launch import TORCHRUN, kill, started, until, workers
from .pool import Ranks, free_port
from .test_attack_ranks import numbers
from .test_runs import forget_after, same_weights

STEPS = 8
SILENCE = 4.0


@contextmanager
def pool_of(ranks: int, timeout: float = 30.0) -> Iterator[Ranks]:
    pool = Ranks(ranks, timeout=timeout)
    try:
        yield pool
    finally:
        pool.close()


def lose(
    ranks: int, attack_ranks: int, *case: Any, how: str = "killed", timeout: float = 30.0
) -> list[Any]:
    """What ``losing`` returns on every rank that is left."""
    with pool_of(ranks, timeout) as pool:
        for pipe in pool.pipes:
            pipe.send((jobs.losing, (attack_ranks, *case, how)))
        found = [pool.answer(rank, 60.0) for rank in range(ranks - 1)]
        assert all(kind == "value" for kind, _ in found), found
        if how == "killed":
            assert pool.answer(ranks - 1, 10.0) == ("ended", 7)
    return [value for _, value in found]


def one_process(model: str, tau: int, lookahead: bool | str, options: dict[str, Any]) -> Any:
    teams = make_teams(Comm(), 0)
    engine = jobs.engine_for(teams, model, tau, lookahead, **options)
    return jobs.learn(engine, teams, model, 2, STEPS), state(engine.model)


@pytest.mark.parametrize(
    ("tau", "lookahead", "options"),
    [(1, False, {}), (3, True, {"pending_dtype": "uint8"}), (2, "last-update", {})],
)
def test_the_bits_of_a_run_that_lost_nothing(
    tau: int, lookahead: bool | str, options: dict[str, Any]
) -> None:
    # Red when: what was under way is attacked at the present weights; the version tag is that of the step; the kept
    # weights are not a copy; images made here are not stored as those that travel; settle() forgets them.
    case = ("batchnorm", tau, lookahead, options)
    ((records, final, losses, saved),) = lose(2, 1, *case)
    want = one_process(*case)
    assert numbers((records, None)) == numbers(want)
    assert same(final, want[1])
    (loss,) = losses
    assert (loss.rank, loss.attack_rank) == (0, 1)
    assert 2 <= loss.step <= 3 + tau
    assert "[/" not in loss.reason
    assert loss.reason

    teams = make_teams(Comm(), 0)
    engine = jobs.engine_for(teams, *case[:3], **options)
    for part, values in zip((engine, engine.model, engine.optimizer), saved, strict=True):
        part.load_state_dict(values)
    rest = jobs.learn(engine, teams, "batchnorm", 2, STEPS, first=5)
    assert numbers((rest, None)) == numbers((want[0][5:], None))
    assert same(state(engine.model), final)


def test_attack_ranks_that_are_left_go_on() -> None:
    # Red when: the first loss ends the others; a lost rank is sent weights again; micro-batches are mixed up.
    case = ("batchnorm", 1, True, {})
    (records, final, losses, _), served = lose(3, 2, *case)
    want = one_process(*case)
    assert numbers((records, None)) == numbers(want)
    assert same(final, want[1])
    assert served == list(range(1, STEPS))
    assert [loss.attack_rank for loss in losses] == [2]


def test_learners_have_a_group_of_their_own() -> None:
    # Red when: learners sum in the world's group; a learner that does not feed the attack rank keeps no weights.
    case = ("no norm", 2, False, {})
    with pool_of(3) as pool:
        kept = pool.run(jobs.losing, 1, *case, "kept")
    for rank, (whole, cut) in enumerate(zip(kept, lose(3, 1, *case), strict=False)):
        assert numbers(cut) == numbers(whole)
        assert same(cut[1], whole[1])
        assert whole[2] == []
        assert [(loss.rank, loss.attack_rank) for loss in cut[2]] == [(rank, 2)]


@pytest.mark.parametrize("late", ["wait", "skip"])
def test_a_silent_attack_rank_is_given_up_in_time(late: str) -> None:
    # Red when: a wait for a lost rank has no limit of its own (the other learner's sum then runs out first); with
    # "skip", a lost rank counts as one that is late.
    begin = time.monotonic()
    answers = lose(3, 1, "no norm", 1, False, {"late": late}, how="stopped", timeout=SILENCE)
    assert time.monotonic() - begin < 40
    for records, _, losses, _ in answers:
        assert len(records) == STEPS
        (loss,) = losses
        assert isinstance(loss, FailedRank)
        assert re.search(
            "no word within 2 s|[Tt]imed out", loss.reason
        )  # gloo's limit, if a busy machine lets it pass
        assert records[-1]["weight_version"] == STEPS - 2
        assert late == "skip" or not any(record["late"] for record in records)


def test_settings_without_effect() -> None:
    # Red when: either check is removed.
    with pytest.raises(ConadvError, match="there are none to lose"):
        Execution(on_attack_loss="continue")


def test_a_whole_run_and_its_resume(two: Ranks, tmp_path: Path) -> None:
    # Red when: the end of a run involves the world; no line says what was lost; a resumed run, here with an attack rank
    # again, or one without any, does not go on.
    settings = {**METHODS["conadv-tau2"], "checkpoint__every_epochs": 1.0}
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    two.run(jobs.lose_of_a_run, whole, settings, 1, False)
    with pool_of(2) as pool:
        for pipe in pool.pipes:
            pipe.send((jobs.lose_of_a_run, (cut, settings, 1, True)))
        kind, summary = pool.answer(0, 60.0)
    assert kind == "value", summary
    lines = read_lines(cut / "record.jsonl")
    assert without_times(lines) == without_times(read_lines(whole / "record.jsonl"))
    assert same_weights(cut, whole)
    assert lines[0]["execution"]["on_attack_loss"] == "continue"
    (loss,) = (line for line in lines if line["type"] == "attack_loss")
    assert (loss["rank"], loss["attack_rank"]) == (0, 1)
    assert summary["attack_ranks_lost"] == 1
    assert json.loads((whole / "summary.json").read_text())["attack_ranks_lost"] == 0

    shutil.copytree(cut, tmp_path / "inline")
    for out, go_on in (
        (cut, lambda out: two.run(jobs.lose_of_a_run, out, settings, 1, False)),
        (tmp_path / "inline", lambda out: train(config(**settings), out, resume=True)),
    ):
        forget_after(out, 3)
        go_on(out)
        assert same_weights(out, whole)
        assert without_times(read_lines(out / "record.jsonl")) == without_times(lines)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the attack rank in /proc")
def test_under_torchrun_attack_ranks_have_an_agent_of_their_own(tmp_path: Path) -> None:
    # Red when: the world's roles are dealt out per agent; the learners' agent hears of the attack rank's end.
    out = tmp_path / "run"
    settings = {"method": "conadv", "staleness": 2, "epochs": 6, "eval__every_epochs": 2}
    (tmp_path / "config.yaml").write_text(dump_yaml(config(**settings)))
    program = [
        "-m",
        "conadv",
        "train",
        "--config",
        tmp_path / "config.yaml",
        "--out",
        out,
        "--device",
        "cpu",
    ]
    program += ["--attack-ranks", 1, "--on-attack-loss", "continue", "--comm-timeout", 30]
    port, logs = free_port(), [tmp_path / "learners", tmp_path / "attack"]
    with ExitStack() as stack:
        agents = []
        for node, log in enumerate(logs):
            torchrun = [*TORCHRUN, "--nnodes", 2, "--node-rank", node, "--nproc-per-node", 1]
            torchrun += ["--master-addr", "127.0.0.1", "--master-port", port]
            agents.append(
                stack.enter_context(started([*torchrun, *program], log, GLOO_SOCKET_IFNAME="lo"))
            )
        until(lambda: len(steps(out / "checkpoints")) >= 2, 120, "the second checkpoint")
        kill(workers(agents[1].pid)[1])
        assert agents[1].wait(30) == 1
        # the learners' agent then waits up to 300 s for the other one before it ends with 0: its worker has ended
        until(lambda: 0 not in workers(agents[0].pid), 120, "the end of the learner")
        assert agents[0].poll() in (None, 0)
    lines = read_lines(out / "record.jsonl")
    assert json.loads((out / "summary.json").read_text())["attack_ranks_lost"] == 1
    train(config(**settings), tmp_path / "inline")
    assert without_times(lines) == without_times(read_lines(tmp_path / "inline" / "record.jsonl"))
    assert same_weights(out, tmp_path / "inline")


def test_one_torchrun_for_all_is_refused(tmp_path: Path) -> None:
    # Red when: the check of the launchers is removed.
    command = [
        *TORCHRUN,
        "--standalone",
        "--nproc-per-node",
        2,
        "-m",
        "conadv",
        "train",
        "digits",
        "--steps",
        4,
    ]
    command += [
        "--method",
        "conadv",
        "--attack-ranks",
        1,
        "--on-attack-loss",
        "continue",
        "--out",
        tmp_path / "run",
    ]
    log = tmp_path / "log"
    with started(command, log, GLOO_SOCKET_IFNAME="lo") as torchrun:
        assert torchrun.wait(120) == 1
    assert (
        log.read_text().count(
            "conadv: --on-attack-loss continue has no effect where one torchrun starts"
        )
        == 1
    )
