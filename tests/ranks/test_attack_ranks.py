"""Attack ranks compute what one process computes, keep to tau, and end together with the learners."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conadv import Comm, ConadvError, Sequential, Vanilla
from conadv.distributed.message import ALIGNMENT, Message
from conadv.distributed.teams import Teams, make_teams, roles, shares
from conadv.engine.execution import Choice, Execution, choose
from conadv.training.loop import train
from conadv.training.record import read_lines

from ..helpers import same, state
from ..test_methods import ATTACK, make
from ..test_training import METHODS, config, without_times
from . import attack_jobs as jobs
from .pool import Ranks
from .test_runs import forget_after, same_weights

CPU = torch.device("cpu")


def numbers(answer: Any) -> list[Any]:
    """What a record says, without times."""
    return [
        {k: v for k, v in record.items() if k not in ("phases", "seconds", "spans")}
        for record in answer[0]
    ]


def inline(model: str, tau: int, lookahead: bool | str, micro: int, options: dict[str, Any]) -> Any:
    return jobs.training(Comm(), 0, model, tau, lookahead, micro, options)


@pytest.mark.parametrize(
    ("model", "tau", "lookahead", "options"),
    [
        ("batchnorm", 1, False, {}),
        ("batchnorm", 1, True, {}),
        ("batchnorm", 2, "last-update", {}),
        ("batchnorm", 3, False, {"pending_dtype": "uint8"}),
        ("batchnorm", 2, True, {"pending_dtype": "float16", "fuse_views": True}),
        ("channels_last", 1, False, {"channels_last": True, "precision": "bf16"}),
        ("batchnorm", 1, False, {"late": "skip"}),
    ],
)
def test_one_learner_and_one_attack_rank_are_inline_bitwise(
    two: Ranks, model: str, tau: int, lookahead: bool | str, options: dict[str, Any]
) -> None:
    # Red when: the weights that travel are those after the update; an attack rank keys its draws by its own count of
    # batches; images are decoded to float32 whatever they were; the look-ahead is asked for one step less.
    learner, served = two.run(jobs.training, 1, model, tau, lookahead, 2, options)
    skips = options.get("late") == "skip"
    want = inline(
        model, tau, lookahead, 2, {name: value for name, value in options.items() if name != "late"}
    )
    if skips and any(record["late"] for record in learner[0]):
        pytest.skip("an attack rank was late on a busy machine: nothing to compare")
    assert served == list(range(tau, 6))
    assert numbers(learner) == numbers(want)
    assert same(learner[1], want[1])
    assert [record["weight_version"] for record in learner[0]] == [
        max(t - tau, 0) if t >= tau else t for t in range(6)
    ]


def test_images_that_are_not_attacked(two: Ranks) -> None:
    # Red when: a learner expects whole micro-batches.
    learner, served = two.run(jobs.shared, 1, "wait")
    want = jobs.shared(Comm(), 0, "wait")
    assert served == list(range(1, 8))
    assert numbers(learner) == numbers(want)
    assert same(learner[1], want[1])


@pytest.mark.parametrize(("attack_ranks", "micro"), [(1, 2), (1, 4), (2, 2), (2, 4)])
@pytest.mark.parametrize(("tau", "lookahead"), [(1, False), (2, True)])
def test_any_split_is_one_process(
    three: Ranks, attack_ranks: int, micro: int, tau: int, lookahead: bool
) -> None:
    # Red when: attack ranks share out micro-batches by rank instead of by number; a learner takes images in the order
    # in which they come; the weights of one attack rank come from another version.
    answers = three.run(
        jobs.training, attack_ranks, "no norm", tau, lookahead, micro, {"fuse_views": True}
    )
    learners = answers[: 3 - attack_ranks]
    want = inline("no norm", tau, lookahead, micro, {"fuse_views": True})
    assert answers[3 - attack_ranks :] == [list(range(tau, 6))] * attack_ranks
    for learner in learners:
        assert same(learner[1], learners[0][1])
    # four gradients of two learners are summed two and two, not one after the other
    exact = micro == len(learners) or len(learners) == 1
    for key, value in want[1].items():
        assert torch.allclose(
            learners[0][1][key], value, rtol=0 if exact else 1e-10, atol=0 if exact else 1e-12
        )
    assert [r["weight_version"] for r in learners[0][0]] == [r["weight_version"] for r in want[0]]


@pytest.mark.parametrize(("tau", "at"), [(1, 2), (3, 4)])
def test_state_saved_while_images_are_under_way_resumes_inline_bitwise(
    two: Ranks, tau: int, at: int
) -> None:
    # Red when: state_dict() does not wait for what is under way (the resumed run then attacks those batches itself).
    (records, final, (saved, model, optimizer)), _ = two.run(jobs.interrupted, tau, at)
    teams = make_teams(Comm(), 0)
    engine = jobs.engine_for(teams, "batchnorm", tau, True)
    engine.model.load_state_dict(model)
    engine.optimizer.load_state_dict(optimizer)
    engine.load_state_dict(saved)
    rest = jobs.learn(engine, teams, "batchnorm", 1, 6, first=at)
    assert numbers((rest, None)) == numbers((records[at:], None))
    assert same(state(engine.model), final)


@pytest.mark.parametrize("attack_ranks", [1, 2])
def test_late_images_are_waited_for_or_skipped(three: Ranks, attack_ranks: int) -> None:
    # Red when: "skip" waits; learners decide alone (they then train on other views and hang); the images that come late
    # are taken for those of the next step.
    waiting = three.run(jobs.slow_attacker, attack_ranks, "wait", 0.4)
    prompt = three.run(jobs.slow_attacker, attack_ranks, "wait", 0.0)
    for slow, fast in zip(waiting[: 3 - attack_ranks], prompt, strict=False):
        assert numbers(slow) == numbers(fast)
        assert not any(record["late"] for record in slow[0])
    skipping = three.run(jobs.slow_attacker, attack_ranks, "skip", 0.4)[: 3 - attack_ranks]
    assert all(
        numbers(other) == numbers(skipping[0]) and same(other[1], skipping[0][1])
        for other in skipping
    )
    for record in skipping[0][0]:
        assert record["late"] == ("adv" not in record["losses"])
        assert record["weight_version"] == (None if record["late"] else max(record["step"] - 1, 0))
    assert skipping[0][0][3]["late"]
    assert not skipping[0][0][11]["late"]  # and it goes on with the newest weights afterwards


@pytest.mark.parametrize(("who", "phases"), [(0, ("receive", "send")), (1, ("receive", "send"))])
def test_a_dead_peer_is_named(who: int, phases: tuple[str, ...]) -> None:
    # Red when: a wait for a message has no peer in its error.
    pool = Ranks(2, timeout=10.0)
    try:
        for pipe in pool.pipes:
            pipe.send((jobs.someone_dies, (who,)))
        kind, (name, message, _) = pool.answer(1 - who, 25.0)
        assert (kind, name) == ("error", "ConadvError")
        assert f"Rank {1 - who} of 2: communication failed in phase" in message
        assert any(repr(phase) in message for phase in phases)
        assert f"Rank {who} was at the other end" in message
    finally:
        pool.close()


def test_a_learner_that_fails_ends_its_attack_ranks(two: Ranks) -> None:
    # Red when: close(failed=True) sends what close() sends.
    assert two.run(jobs.learner_fails) == [False, False]


@pytest.mark.parametrize(
    ("what", "message"),
    [("steps", "was asked for step 1"), ("micro-batches", "has micro-batches [0], its share is")],
)
def test_other_data_than_the_learners(what: str, message: str) -> None:
    pool = Ranks(2, timeout=5.0)
    try:
        learner, attacker = pool.answers(jobs.other_data, what, timeout=20.0)
        assert attacker[0] == "error"
        assert message in attacker[1][1]
        assert (learner[0], learner[1][0]) == ("error", "ConadvError")
    finally:
        pool.close()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no learner", "at least one rank must be left to learn"),
        ("no attack", "Attack ranks have nothing to do with Noise"),
        ("late", "late 'never' is not"),
        ("comm", "give TrainStep comm=teams.comm"),
        ("running", "no running statistics"),
        ("roles", ""),
    ],
)
def test_mistakes(two: Ranks, what: str, message: str) -> None:
    answers = two.answers(jobs.wrong, what)
    assert [(kind, error[0]) for kind, error in answers] == [("error", "ConadvError")] * 2
    wanted = (
        [message] * 2
        if message
        else ["serve() is for attack ranks", "An attack rank has no steps of its own"]
    )
    assert all(text in error[1] for text, (_, error) in zip(wanted, answers, strict=True))


def test_a_learner_with_other_micro_batches_than_its_own(two: Ranks) -> None:
    # Red when: the check is removed: nobody would attack this micro-batch.
    (kind, error), other = two.answers(jobs.wrong_share)
    assert (kind, error[0], other) == ("error", "ConadvError", ("value", None))
    assert "Rank 0 was given micro-batches [1] of the global batch, not [0]" in error[1]


@pytest.mark.parametrize("name", ["conadv-tau2", "three-routes"])
def test_whole_runs(two: Ranks, name: str, tmp_path: Path) -> None:
    # Red when: the attack rank reads the batches from the first step on; an attack rank writes into the run; a resumed
    # attack rank begins at step 0.
    changes = METHODS[name]
    assert two.run(jobs.run, tmp_path / "ranks", changes, 1)[1] == {}
    summary = train(config(**changes), tmp_path / "inline")
    lines, want = (read_lines(tmp_path / which / "record.jsonl") for which in ("ranks", "inline"))
    assert without_times(lines) == without_times(want)
    assert same_weights(tmp_path / "ranks", tmp_path / "inline")
    found = json.loads((tmp_path / "ranks" / "summary.json").read_text())
    assert (found["executor"], found["attack_ranks"], found["ranks"]) == ("ranks", 1, 1)
    assert found["test_loss"] == summary["test_loss"]
    header = lines[0]
    assert (header["ranks"], header["execution"]["executor"], header["execution"]["learners"]) == (
        2,
        "ranks",
        1,
    )
    check_spans(lines, summary["staleness"])

    forget_after(tmp_path / "ranks", 3)
    two.run(jobs.run, tmp_path / "ranks", changes, 1, True)
    assert without_times(read_lines(tmp_path / "ranks" / "record.jsonl")) == without_times(want)
    assert same_weights(tmp_path / "ranks", tmp_path / "inline")


def check_spans(lines: list[dict[str, Any]], tau: int) -> None:
    """Four steps have spans, on both ranks, on one clock: no image is taken before it was made."""
    steps = {line["step"]: line for line in lines if line["type"] == "step"}
    assert [bool(line["spans"]) for line in steps.values()] == [True] * 4 + [False] * 2
    served = [line for line in lines if line["type"] == "timeline"]
    assert [(line["rank"], line["role"], line["step"]) for line in served] == [
        (1, "attack", step) for step in range(tau, min(tau + 4, 6))
    ]
    for line in served:
        (attacked,) = (end for phase, _, end in line["spans"] if phase == "attack")
        spans = {phase: (start, end) for phase, start, end in steps[line["step"]]["spans"]}
        if spans:
            assert attacked <= spans["receive"][1] + 0.005
        assert all(0 <= start <= end < 60 for _, start, end in line["spans"])


def test_resume_of_a_run_with_attack_ranks_on_one_process(two: Ranks, tmp_path: Path) -> None:
    # Red when: the checkpoint of a run with attack ranks lacks the images under way.
    changes = METHODS["conadv-tau2"]
    two.run(jobs.run, tmp_path / "run", changes, 1)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    forget_after(tmp_path / "copy", 3)
    train(config(**changes), tmp_path / "copy", resume=True)
    assert same_weights(tmp_path / "run", tmp_path / "copy")


def test_clock_offset(two: Ranks) -> None:
    # Red when: the sign is wrong, or the round trip is not halved (both clocks would seem apart by the trip).
    assert two.run(jobs.offset, 0.0) == [0.0, pytest.approx(0.0, abs=0.02)]
    assert two.run(jobs.offset, 100.0) == [0.0, pytest.approx(100.0, abs=0.02)]


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
    world = Comm(0, learners + attackers)
    teams = Teams(
        world, world, tuple(range(learners)), tuple(range(learners, learners + attackers))
    )
    assert [teams.feeder(number) for number in range(attackers)] == [
        part[0] // count for part in parts
    ]


def test_a_parcel_keeps_shapes_types_and_layout() -> None:
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
    # Red when: attack ranks are taken without a future attack; "auto" says inline in spite of attack ranks.
    conadv = make(jobs.method(1, False)).method
    assert choose(Execution(), conadv, CPU).name == "inline"
    assert choose(Execution(), Vanilla(), CPU) == Choice(
        "inline", "the method attacks no future batch: there is nothing to move"
    )
    assert choose(Execution(attack_ranks=2), conadv, CPU).name == "ranks"
    assert choose(Execution("stream"), conadv, torch.device("cuda")) == Choice(
        "stream", "asked for"
    )
    for wrong in (
        {"executor": "ranks"},
        {"executor": "inline", "attack_ranks": 1},
        {"late": "skip"},
    ):
        with pytest.raises(ConadvError):
            Execution(**wrong)
    for execution, method in (
        (Execution(attack_ranks=1), Sequential(ATTACK)),
        (Execution(attack_ranks=1), jobs.method(0, False)),
        (Execution("stream"), conadv),
    ):
        with pytest.raises(ConadvError):
            choose(execution, method, CPU)
    with pytest.raises(ConadvError, match="no effect"):
        choose(Execution("stream"), Vanilla(), torch.device("cuda"))


def test_timeline_steps_and_attack_ranks_are_counts() -> None:
    for wrong in ({"attack_ranks": -1}, {"timeline_steps": -1}):
        with pytest.raises(ConadvError, match="0 or more"):
            Execution(**wrong)
