"""Attack ranks: learners get the bits that they would have made themselves, whoever attacks."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conadv import Comm, ConadvError, Sequential, Vanilla
from conadv.distributed.message import ALIGNMENT, Message
from conadv.distributed.teams import Teams, roles, shares
from conadv.engine.execution import Choice, Execution, choose
from conadv.training.loop import train
from conadv.training.record import read_lines

from ..helpers import same
from ..test_methods import ATTACK, CASES
from ..test_training import METHODS, config, without_times
from . import attack_jobs as jobs
from .attack_jobs import LATE, Case
from .jobs import with_attack_ranks
from .pool import Ranks
from .test_runs import forget_after, same_weights

CPU = torch.device("cpu")


def numbers(records: list[dict[str, Any]]) -> list[Any]:
    """What records say, without times."""
    times = ("phases", "seconds", "spans")
    return [{k: v for k, v in record.items() if k not in times} for record in records]


def alone(case: Case) -> Any:
    return jobs.training(Comm(), 0, replace(case, lost=None, gate=None))


def assert_alike(found: Any, want: Any) -> None:
    assert numbers(found.records) == numbers(want.records)
    assert same(found.weights, want.weights)


BF16 = {"channels_last": True, "precision": "bf16"}


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(share=0.25, mix="replace"),
        Case(share=0.5, late="skip"),
        Case(tau=2, lookahead="last-update"),
        Case(tau=3, lookahead=True, options={"pending_dtype": "uint8", "fuse_views": True}),
        Case("channels last", options=BF16),
        Case("buffers", tau=2, lookahead=True),
    ],
    ids=str,
)
def test_one_learner_and_one_attack_rank_are_inline_bitwise(two: Ranks, case: Case) -> None:
    # Red when: the weights that travel are those after the update; an attack rank keys its draws by
    # its own count of batches; images are decoded to float32 whatever they were; the look-ahead is
    # asked for one step less; a learner expects whole micro-batches where a share is attacked.
    learner, served = two.run(jobs.training, 1, case)
    tau = case.tau
    assert served == list(range(tau, 6))
    assert_alike(learner, alone(case))
    versions = [record["weight_version"] for record in learner.records]
    assert versions == [t - tau if t >= tau else t for t in range(6)]


@pytest.mark.parametrize(("attack_ranks", "micro"), [(1, 4), (2, 2), (2, 4)])
def test_any_split_is_one_process(three: Ranks, attack_ranks: int, micro: int) -> None:
    # Red when: attack ranks share out micro-batches by rank instead of by number; a learner takes
    # images in the order in which they come; the weights of one attack rank come from another
    # version.
    case = Case("no norm", 2, True, micro, options={"fuse_views": True})
    answers = three.run(jobs.training, attack_ranks, case)
    learners, served = answers[: 3 - attack_ranks], answers[3 - attack_ranks :]
    want = alone(case)
    assert served == [list(range(2, 6))] * attack_ranks
    assert all(same(learner.weights, learners[0].weights) for learner in learners)
    # four gradients of two learners are summed two and two, not one after the other
    exact = micro == len(learners) or len(learners) == 1
    rtol, atol = (0.0, 0.0) if exact else (1e-10, 1e-12)
    for key, value in want.weights.items():
        assert torch.allclose(learners[0].weights[key], value, rtol=rtol, atol=atol)
    versions = [[r["weight_version"] for r in one.records] for one in (learners[0], want)]
    assert versions[0] == versions[1]


def test_state_saved_while_images_are_under_way_resumes_inline_bitwise(two: Ranks) -> None:
    # Red when: state_dict() does not wait for what is under way (the resumed run then attacks those
    # batches itself).
    case = Case(tau=3, lookahead=True, micro=1, save_at=4)
    learner, _ = two.run(jobs.training, 1, case)
    rest = jobs.resumed(case, learner.saved)
    assert_alike(rest, learner._replace(records=learner.records[4:]))


def test_late_images_are_skipped(three: Ranks, tmp_path: Path) -> None:
    # Red when: "skip" waits; learners decide alone (they then train on other views and hang);
    # images that come late are taken for those of the next step; the exchange does not go on with
    # the newest weights afterwards.
    case = Case("no norm", steps=9, late="skip", gate=tmp_path / "gate")
    learners = three.run(jobs.training, 1, case)[:2]
    for learner in learners:
        assert_alike(learner, learners[0])
    late = [record["step"] for record in learners[0].records if record["late"]]
    # step LATE was not attacked in time, the next one not either, and the one behind it was not
    # asked for
    assert late == [LATE, LATE + 1, LATE + 2]
    for record in learners[0].records:
        assert record["late"] == ("adv" not in record["losses"])
        assert record["weight_version"] == (None if record["late"] else max(record["step"] - 1, 0))


@pytest.mark.parametrize("who", [0, 1])
def test_a_dead_peer_is_named(who: int) -> None:
    # Red when: a wait for a message has no peer in its error.
    with Ranks(2, timeout=10.0) as pool:
        pool.start(jobs.training, 1, Case("no norm", steps=100, lost=(who, "killed")))
        kind, (name, message, _) = pool.answer(1 - who)
    assert (kind, name) == ("error", "ConadvError")
    assert f"Rank {1 - who} of 2: communication failed in phase" in message
    assert "'receive'" in message or "'send'" in message
    assert f"Rank {who} was at the other end" in message


def test_a_learner_that_fails_ends_its_attack_ranks(two: Ranks) -> None:
    # Red when: close(failed=True) sends what close() sends.
    assert two.run(jobs.learner_fails) == [False, False]


@pytest.mark.parametrize(
    ("what", "message"),
    [("steps", "was asked for step 1"), ("micro-batches", "has micro-batches [0] of the global")],
)
def test_other_data_than_the_learners(what: str, message: str) -> None:
    with Ranks(2, timeout=5.0) as pool:
        assert message in pool.errors(jobs.other_data, what)[1]


def test_what_is_trained_stays_during_a_run_with_attack_ranks() -> None:
    # Red when: the message is filled with the weights that there are (its parts change places).
    with Ranks(2, timeout=5.0) as pool:
        error = pool.errors(jobs.frozen_learner)[0]
    assert "The parameter '0.bias' was frozen or unfrozen during training" in error


@pytest.mark.parametrize(
    ("what", "messages"),
    [
        ("no learner", ["at least one rank must be left to learn"]),
        ("no attack", ["Attack ranks: no effect with Noise"]),
        ("late", ["late 'never' is not"]),
        ("comm", ["give TrainStep comm=teams.comm"]),
        ("running", ["no running statistics"]),
        ("roles", ["serve() is for attack ranks", "An attack rank has no steps of its own"]),
    ],
)
def test_mistakes(two: Ranks, what: str, messages: list[str]) -> None:
    for message, error in zip(
        messages * (2 // len(messages)), two.errors(jobs.wrong, what), strict=True
    ):
        assert message in error


def test_a_learner_with_other_micro_batches_than_its_own(two: Ranks) -> None:
    # Red when: the check is removed: nobody would attack this micro-batch.
    (kind, error), other = two.answers(jobs.wrong_share)
    assert (kind, error[0], other) == ("error", "ConadvError", ("value", None))
    assert "Rank 0 has micro-batches [1] of the global batch, its share is [0" in error[1]


def test_whole_runs(two: Ranks, tmp_path: Path) -> None:
    # Red when: the attack rank reads the batches from the first step on; an attack rank writes into
    # the run; a resumed attack rank begins at step 0; a checkpoint lacks the images under way,
    # which one process then attacks itself.
    changes, out = METHODS["conadv-tau2"], tmp_path / "ranks"
    assert two.run(with_attack_ranks, out, changes, 1)[1] == {}
    summary = train(config(**changes), tmp_path / "inline")
    lines, want = (read_lines(tmp_path / which / "record.jsonl") for which in ("ranks", "inline"))
    assert without_times(lines) == without_times(want)
    assert same_weights(out, tmp_path / "inline")
    found = json.loads((out / "summary.json").read_text())
    assert (found["executor"], found["attack_ranks"], found["ranks"]) == ("ranks", 1, 1)
    assert found["test_loss"] == summary["test_loss"]
    assert (lines[0]["ranks"], lines[0]["execution"]["learners"]) == (2, 1)
    check_spans(lines, summary["staleness"])

    shutil.copytree(out, tmp_path / "copy")
    for cut in (out, tmp_path / "copy"):
        forget_after(cut, 3)
    two.run(with_attack_ranks, out, changes, 1, True)
    assert without_times(read_lines(out / "record.jsonl")) == without_times(want)
    train(config(**changes), tmp_path / "copy", resume=True)
    for resumed in (out, tmp_path / "copy"):
        assert same_weights(resumed, tmp_path / "inline")


def check_spans(lines: list[dict[str, Any]], tau: int) -> None:
    """Four steps have spans, on both ranks, on one clock: no image is taken before it was made."""
    steps = {line["step"]: line for line in lines if line["type"] == "step"}
    assert [bool(line["spans"]) for line in steps.values()] == [True] * 4 + [False] * 2
    served = [line for line in lines if line["type"] == "timeline"]
    told = [(line["rank"], line["role"], line["step"]) for line in served]
    assert told == [(1, "attack", step) for step in range(tau, min(tau + 4, 6))]
    for line in served:
        assert all(0 <= start <= end for _, start, end in line["spans"])
        (attacked,) = (end for phase, _, end in line["spans"] if phase == "attack")
        spans = {phase: (start, end) for phase, start, end in steps[line["step"]]["spans"]}
        if spans:  # the clocks of two processes agree to a round trip
            assert attacked <= spans["receive"][1] + 0.05


def test_clock_offset(two: Ranks) -> None:
    # Red when: the sign is wrong, or both clocks would seem apart by the trip.
    for shift in (0.0, 100.0):
        assert two.run(jobs.offset, shift) == [0.0, pytest.approx(shift, abs=0.5)]


@pytest.mark.parametrize(
    ("arguments", "learners", "attackers"),
    [
        ((2, 1, 2), (0,), (1,)),
        ((4, 1, 4), (0, 1, 2), (3,)),
        ((8, 2, 4), (0, 1, 2, 4, 5, 6), (3, 7)),  # two hosts: one on each
        ((8, 1, 4), tuple(range(7)), (7,)),
        ((6, 2, 4), (0, 1, 2, 3), (4, 5)),  # hosts of different size
        ((3, 0, 3), (0, 1, 2), ()),
    ],
)
def test_roles(
    arguments: tuple[int, int, int], learners: tuple[int, ...], attackers: tuple[int, ...]
) -> None:
    assert roles(*arguments) == (learners, attackers)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5))
def test_shares_are_even_and_the_feeder_owns_the_first_micro_batch(
    learners: int, attackers: int, count: int
) -> None:
    # Red when: shares overlap or leave a gap; the feeder is taken in another way than the shares.
    if attackers > learners * count:
        with pytest.raises(ConadvError, match="nothing to do"):
            shares(learners * count, attackers)
        return
    parts = shares(learners * count, attackers)
    assert [index for part in parts for index in part] == list(range(learners * count))
    sizes = {len(part) for part in parts}
    assert max(sizes) - min(sizes) <= 1
    world, ranks = Comm(0, learners + attackers), tuple(range(learners + attackers))
    teams = Teams(world, world, ranks[:learners], ranks[learners:])
    feeders = [teams.feeder(number) for number in range(attackers)]
    assert feeders == [part[0] // count for part in parts]


def test_a_message_keeps_shapes_types_and_layout() -> None:
    # Red when: parts overlap; the memory order is lost; tags share bytes with the first part.
    tensors = [
        torch.randn(2, 3, 5, 5).contiguous(memory_format=torch.channels_last),
        torch.randn(7, dtype=torch.float64),
        torch.randint(0, 255, (3, 1), dtype=torch.uint8),
        torch.randn(()),
    ]
    message = Message([tensor.to("meta") for tensor in tensors], CPU)
    message.fill((1, 2, -3, 2**40, 5), tensors)
    assert message.tags == [1, 2, -3, 2**40, 5]
    for part, tensor in zip(message.parts, tensors, strict=True):
        assert torch.equal(part, tensor)
        assert (part.dtype, part.stride()) == (tensor.dtype, tensor.stride())
        assert part.data_ptr() % ALIGNMENT == 0


def test_choice_of_an_executor() -> None:
    # Red when: attack ranks are taken without a future attack; "auto" says inline in spite of
    # attack ranks.
    conadv = CASES["conadv"]()
    assert choose(Execution(), conadv).name == "inline"
    assert choose(Execution(), Vanilla()).name == "inline"
    assert choose(Execution(attack_ranks=2), conadv).name == "ranks"
    assert choose(Execution("stream"), conadv) == Choice("stream", "asked for")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"executor": "ranks"}, "does not fit"),
        ({"executor": "inline", "attack_ranks": 1}, "does not fit"),
        ({"late": "skip"}, "no effect"),
        ({"on_attack_loss": "continue"}, "no effect"),
        ({"attack_ranks": 1, "late": "skip", "on_attack_loss": "continue"}, "does not go with"),
        ({"attack_ranks": -1}, "0 or more"),
    ]
    for settings, message in wrong:
        with pytest.raises(ConadvError, match=message):
            Execution(**settings)
    for execution, method in (
        (Execution(attack_ranks=1), Sequential(ATTACK)),
        (Execution("stream"), Vanilla()),
    ):
        with pytest.raises(ConadvError, match="no effect"):
            choose(execution, method)
