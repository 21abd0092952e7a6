"""N ranks compute what one rank computes, whatever leaves when; and they end together."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from conadv import PGD, Comm, ConadvError
from conadv.distributed.environment import processes_here

from ..helpers import same
from ..test_methods import CASES, SPACE
from . import jobs
from .pool import Ranks, free_port

ALONE = Comm()
TWO = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


def numbers(answer: jobs.Answer) -> list[Any]:
    """What a record says, without times."""
    return [
        {k: v for k, v in record.items() if k not in ("phases", "seconds", "spans")}
        for record in answer[0]
    ]


def agree(answers: list[jobs.Answer]) -> bool:
    """Every rank has the same weights and records, to the last bit."""
    first = answers[0]
    return all(
        same(first[1], other[1]) and numbers(first) == numbers(other) for other in answers[1:]
    )


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one_with_twofold_accumulation_bitwise(two: Ranks, name: str) -> None:
    # Red when: the loss is not divided by the ranks; a micro-batch's index restarts on every rank (its draws are then
    # another's); the initial weights are not rank 0's; .grad is not replaced by the sum.
    # All views in one pass: with a pass per view, four gradients per step would be summed in another order.
    answers = two.run(jobs.without_statistics, name, 2, {"fuse_views": True})
    want = jobs.without_statistics(ALONE, name, 2, {"fuse_views": True})
    assert agree(answers)
    assert numbers(answers[0]) == numbers(want)
    assert same(answers[0][1], want[1])


@pytest.mark.parametrize("name", ["disadv", "conadv-lookahead", "recycle"])
@pytest.mark.parametrize("bucket_mib", [1e-6, 25.0])
def test_bucket_size_and_overlap_change_no_bit(two: Ranks, name: str, bucket_mib: float) -> None:
    # Red when: a bucket leaves after its first gradient instead of its last; hooks watch every pass, so that buckets
    # leave in the first one; launch() forgets what is left.
    # Two micro-batches of two views per rank: four passes, of which the last alone may launch.
    answers = two.run(
        jobs.without_statistics, name, 4, {"fuse_views": False, "bucket_mib": bucket_mib}
    )
    want = two.run(jobs.without_statistics, name, 4, {"fuse_views": False, "bucket_mib": 1.0})
    assert agree(answers)
    assert same(answers[0][1], want[0][1])
    alone = jobs.without_statistics(ALONE, name, 4, {"fuse_views": False})
    for key, value in alone[1].items():
        assert torch.allclose(answers[0][1][key], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["conadv", "conadv-lookahead"])
def test_lars(two: Ranks, name: str) -> None:
    # Red when: the trust ratio is taken from a gradient that is not summed yet.
    answers = two.run(jobs.without_statistics, name, 2, {"fuse_views": True}, "lars")
    want = jobs.without_statistics(ALONE, name, 2, {"fuse_views": True}, "lars")
    assert agree(answers)
    assert numbers(answers[0]) == numbers(want)
    assert same(answers[0][1], want[1])


def test_four_ranks_are_one_up_to_rounding() -> None:
    # Red when: the sum over ranks is divided by anything but the ranks.
    four = Ranks(4)
    try:
        for name in ("noise", "conadv", "recycle"):
            answers = four.run(jobs.without_statistics, name, 4, {})
            want = jobs.without_statistics(ALONE, name, 4, {})
            assert agree(answers)
            losses, wanted = (
                [record["loss"] for record in answer[0]] for answer in (answers[0], want)
            )
            assert losses == pytest.approx(wanted, rel=1e-12)
            for key, value in want[1].items():
                assert torch.allclose(answers[0][1][key], value, rtol=1e-12, atol=1e-13)
        check_evaluation(four, batch=9)  # three batches: one rank has nothing to do
    finally:
        four.close()


def check_evaluation(pool: Ranks, batch: int) -> None:
    attack = PGD(0.1, 2, random_start=1.0, space=SPACE)
    for kind in (None, attack):
        want = jobs.evaluate_only(ALONE, batch, kind)
        for result in pool.run(jobs.evaluate_only, batch, kind):
            assert result.images == want.images == 23
            assert result.accuracy == want.accuracy
            assert result.loss == pytest.approx(
                want.loss, rel=1e-6
            )  # the sum of a rank's losses is float32


@pytest.mark.parametrize("batch", [5, 23])
def test_evaluation_is_shared_out_and_gives_the_result_of_one_rank(two: Ranks, batch: int) -> None:
    # Red when: draws are keyed by a rank's own count of batches; means are averaged instead of sums.
    check_evaluation(two, batch)


@pytest.mark.parametrize("fuse", [False, True])
def test_batchnorm_routes(two: Ranks, fuse: bool) -> None:
    # Red when: buffers are not broadcast before the evaluation (its result then differs between ranks).
    small = {"fuse_views": fuse, "bucket_mib": 1e-3}
    (mine, result), (theirs, other) = two.run(jobs.with_batchnorm, "conadv", small)
    weights = [name for name in mine[1] if "running" not in name]
    assert all(torch.equal(mine[1][name], theirs[1][name]) for name in weights)
    assert not torch.equal(
        mine[1]["bn1.running_mean"], theirs[1]["bn1.running_mean"]
    )  # each tracks its own images
    assert result == other
    large = two.run(jobs.with_batchnorm, "conadv", {"fuse_views": fuse})
    assert same(large[0][0][1], mine[1])


@pytest.mark.parametrize("name", ["vanilla", "conadv", "disadv"])
def test_buckets_leave_during_backward_and_the_attack_finds_them_under_way(
    two: Ranks, name: str
) -> None:
    # Red when: parameters that the last pass does not touch (the clean route's) share a bucket with those it does;
    # Inline waits before it prepares; wait() leaves a bucket out.
    for seen in two.run(jobs.launches, name, 4, {"bucket_mib": 1e-3}):
        assert seen["buckets"] > 5
        assert (
            seen["left during backward"] == seen["buckets"]
        )  # the last gradient has launched the last bucket
        assert seen["on the way while attacking"] == seen["buckets"]
        assert seen["waits"] == seen["buckets"] + 1  # and the losses


def test_setup_errors_of_one_rank_are_those_of_all(two: Ranks) -> None:
    # Red when: agreed() raises on the rank that failed alone (the other then hangs).
    kinds = two.answers(jobs.disagree)
    assert [(kind, what[0], what[1]) for kind, what in kinds] == [
        ("error", "ConadvError", "The folder /data is not here. (rank 1)")
    ] * 2


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_non_finite_on_one_rank_stops_both(two: Ranks, what: str) -> None:
    # Red when: the check looks at this rank's own losses instead of the sums.
    for kind, (name, message, _) in two.answers(jobs.non_finite, what):
        assert (kind, name) == ("error", "NonFiniteError")
        assert message.startswith(f"Step 2: the {what}")


def test_gradient_twice_without_an_update_is_an_error(two: Ranks) -> None:
    # Red when: what is in .grad already is summed over the ranks again.
    for kind, (name, message, _) in two.answers(jobs.gradient_twice):
        assert (kind, name) == ("error", "ConadvError")
        assert "cleared gradients" in message


@pytest.mark.parametrize("parameter", ["conv1.weight", "bn1.bias"])
def test_another_set_of_parameters_is_an_error(two: Ranks, parameter: str) -> None:
    # Red when: a gradient without a bucket stays local: one from the last pass, or (the clean route's) from another.
    for kind, (name, message, _) in two.answers(jobs.thawed, parameter):
        assert (kind, name) == ("error", "ConadvError")
        assert repr(parameter) in message


@pytest.mark.parametrize("how", ["exit", "silence"])
def test_a_rank_that_is_gone_ends_the_others_within_the_timeout(how: str) -> None:
    # Red when: a wait has no timeout, or its error comes out as torch's.
    pool = Ranks(2, timeout=3.0)
    try:
        begin = time.monotonic()
        for pipe in pool.pipes:
            pipe.send((jobs.dies, (how,)))
        kind, (name, message, _) = pool.answer(0, 20.0)
        assert time.monotonic() - begin < 15
        assert (kind, name) == ("error", "ConadvError")
        assert "Rank 0 of 2" in message
        assert "of step 2" in message
        assert "'wait'" in message or "'gradient'" in message
    finally:
        pool.close()


def test_a_rank_that_fails_alone_ends_the_others() -> None:
    # Red when: close() waits for a rank that will not come.
    pool = Ranks(2, timeout=2.0)
    try:
        (kind, what), (other, _) = pool.answers(jobs.fails_alone, timeout=20.0)
        assert (kind, what[0], other) == ("error", "ConadvError", "value")
        assert "start all ranks again with --resume" in what[1]
    finally:
        pool.close()


@pytest.mark.parametrize(
    ("environment", "timeout", "message"),
    [
        ({"WORLD_SIZE": "two"}, 1.0, "WORLD_SIZE is 'two'"),
        ({}, 0.0, "--comm-timeout 0"),
        ({**TWO, "RANK": "0"}, 1.0, "phase 'setup'"),
        ({"WORLD_SIZE": "0"}, 1.0, "WORLD_SIZE is '0', not a number from 1"),
        ({"WORLD_SIZE": "-2"}, 1.0, "WORLD_SIZE is '-2'"),
        ({"WORLD_SIZE": "9" * 5000}, 1.0, "WORLD_SIZE is '999"),
        (TWO, 1.0, "RANK is not set"),
        ({**TWO, "RANK": "5"}, 1.0, "RANK is '5', not a number from 0 to 1"),
        ({**TWO, "RANK": "-1"}, 1.0, "RANK is '-1'"),
        ({**TWO, "RANK": "x\x1b[1m"}, 1.0, r"RANK is 'x\\\\x1b"),
        (
            {**TWO, "RANK": "0", "LOCAL_RANK": "2"},
            1.0,
            "LOCAL_RANK is '2', not a number from 0 to 1",
        ),
        ({**TWO, "RANK": "0", "LOCAL_RANK": "-1"}, 1.0, "LOCAL_RANK is '-1'"),
        ({**TWO, "RANK": "0", "MASTER_ADDR": ""}, 1.0, "MASTER_ADDR is not set"),
        ({**TWO, "RANK": "0", "MASTER_PORT": ""}, 1.0, "MASTER_PORT is not set"),
        ({**TWO, "RANK": "0", "MASTER_PORT": "99999"}, 1.0, "MASTER_PORT is '99999'"),
        *(({}, bad, "--comm-timeout") for bad in (float("nan"), float("inf"), 1e300, -1.0)),
    ],
)
def test_environments_that_cannot_work(
    environment: dict[str, str], timeout: float, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Red when: from_environment gives RANK 5 of 2 to torch, or asks `timeout <= 0`, which NaN is not.
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConadvError, match=message):
        Comm.from_environment("cpu", timeout)


@pytest.mark.parametrize("value", ["x", "0", "-1"])
def test_processes_of_a_host_are_a_number(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Red when: int(os.environ["LOCAL_WORLD_SIZE"]).
    monkeypatch.setenv("LOCAL_WORLD_SIZE", value)
    with pytest.raises(ConadvError, match=f"LOCAL_WORLD_SIZE is '{value}', not a number from 1"):
        processes_here()
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert processes_here(3) == 3


def test_each_rank_gets_its_own_of_rank_0s_values(two: Ranks) -> None:
    # Red when: every rank gets the first value, or all values travel to all.
    assert two.run(jobs.scattered) == ["for 0", "for 1"]
    assert ALONE.scatter_objects(["for 0"]) == "for 0"


def test_waiting_images_of_all_ranks_are_those_of_one_in_their_order(two: Ranks) -> None:
    # Red when: micro-batches are ordered by number and not by rank first, or a rank sends one message with all.
    (gathered, largest), (elsewhere, _) = two.run(jobs.gathered_pending)
    images, labels = (gathered["5"][part] for part in ("images", "labels"))
    assert [int(image[0]) for image in images] == [0, 1, 10, 11]
    assert [int(label[0]) for label in labels] == [0, 1, 10, 11]
    assert gathered["5"]["weight_version"] == 4
    assert elsewhere["5"]["images"] == []
    assert largest == 1000


def test_plain_values_do_not_travel_through_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    # Red when: a process group on CUDA has NCCL alone (object collectives then put all bytes on the GPU).
    made: list[str] = []
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda backend, **_: made.append(backend)
    )
    monkeypatch.setattr(
        torch.distributed, "new_group", lambda members, limit, backend: made.append(backend)
    )
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda url, timeout: iter([(None, 0, 2)]))
    monkeypatch.setattr(
        "conadv.distributed.comm.rendezvous", lambda store, rank, ranks, limit: store
    )
    monkeypatch.setattr("conadv.distributed.comm.RollCall", lambda store, rank, ranks, place: None)
    monkeypatch.setattr(
        "conadv.distributed.comm.pick_device", lambda name, local_rank: torch.device("cuda", 0)
    )
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29500",
    }.items():
        monkeypatch.setenv(name, value)
    Comm.from_environment("cuda").new_group([0])
    assert made == ["cpu:gloo,cuda:nccl"] * 2


def test_one_process_starts_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    # Red when: from_environment initialises torch.distributed for a world of one.
    monkeypatch.setenv("WORLD_SIZE", "1")
    comm = Comm.from_environment("cpu")
    assert (comm.rank, comm.ranks, comm.backend, torch.distributed.is_initialized()) == (
        0,
        1,
        None,
        False,
    )


def test_the_recorded_norm_is_that_of_the_gradients_that_are_applied(two: Ranks) -> None:
    # Red when: norms that were taken while waiting stay although the gradients were clipped since; a norm is left out.
    for recorded, wanted, clipped in two.run(jobs.clipped):
        assert recorded == wanted
        assert clipped == pytest.approx(0.125, rel=1e-5)


@pytest.mark.parametrize(
    ("job", "message"),
    [(jobs.reentrant, "twice in one pass"), (jobs.no_wait, "Call wait() before optimizer.step()")],
)
def test_gradients_that_are_under_way_are_left_alone(job: Any, message: str) -> None:
    # Red when: a second portion is added to a bucket that has left (ranks drift apart); advance() does not look.
    pool = Ranks(2, timeout=5.0)
    try:
        for kind, (name, text, _) in pool.answers(job):
            assert (kind, name) == ("error", "ConadvError")
            assert message in text
    finally:
        pool.close()


def test_ranks_with_other_settings_than_rank_0_say_so(two: Ranks, tmp_path: Path) -> None:
    # Red when: settings are not compared: the ranks would train on batches of different orders.
    for kind, (name, text, _) in two.answers(jobs.other_settings, tmp_path / "run"):
        assert (kind, name) == ("error", "ConadvError")
        assert "other settings than rank 0: seed: 0 -> 1. (rank 1)" in text
    assert not (tmp_path / "run").exists()


def test_ranks_leave_a_step_out_together(two: Ranks) -> None:
    # Red when: ranks judge by their own loss, or rank 0 does not give its running statistics back.
    answers = two.run(jobs.skipped, "skip")
    for found, before, after, later in answers:
        assert found == [None, None, "the loss of the clean view is nan", None]
        assert same(before, after)
        assert not same(after, later)
    weights = [
        {name: value for name, value in answer[3].items() if "running" not in name}
        for answer in answers
    ]
    assert same(*weights)
    kinds = {(kind, what[0], what[1]) for kind, what in two.answers(jobs.skipped, "stop")}
    assert len(kinds) == 1, [k[2] for k in kinds]
    (told,) = kinds
    assert told[:2] == ("error", "NonFiniteError")
    assert "The images of the clean view hold infinite or NaN values" in told[2]
