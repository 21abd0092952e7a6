"""N ranks compute what one rank computes, whatever leaves when; and they end together."""

from __future__ import annotations

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
from .test_attack_ranks import numbers

ALONE = Comm()
FUSED = {"fuse_views": True}


def agree(answers: list[jobs.Answer]) -> bool:
    """Every rank has the same weights and records, to the last bit."""
    first = answers[0]
    return all(
        same(first[1], other[1]) and numbers(first[0]) == numbers(other[0]) for other in answers
    )


def assert_close(found: jobs.Answer, want: jobs.Answer, rtol: float) -> None:
    for key, value in want[1].items():
        assert torch.allclose(found[1][key], value, rtol=rtol, atol=rtol / 10), key


LARS_CASES = [(name, "lars") for name in ("conadv", "conadv-lookahead")]


@pytest.mark.parametrize(("name", "optimizer"), [*((name, "sgd") for name in CASES), *LARS_CASES])
def test_two_ranks_are_one_with_twofold_accumulation_bitwise(
    two: Ranks, name: str, optimizer: str
) -> None:
    # Red when: the loss is not divided by the ranks; a micro-batch's index restarts on every rank
    # (its draws are then another's); the initial weights are not rank 0's; .grad is not replaced by
    # the sum; LARS's trust ratio is taken from a gradient that is not summed yet. All views in one
    # pass: with a pass per view, four gradients per step would be summed in another order.
    answers = two.run(jobs.without_statistics, name, 2, FUSED, optimizer)
    want = jobs.without_statistics(ALONE, name, 2, FUSED, optimizer)
    assert agree([*answers, want])


@pytest.mark.parametrize(
    ("name", "count"), [("sam", 1), ("conadv", 2)]
)  # conadv draws by micro-batch
def test_class_weights_count_over_the_global_batch(two: Ranks, name: str, count: int) -> None:
    # Red when: each rank divides by its own weights, or the recorded loss is the mean of the
    # ranks'.
    weight = torch.tensor([1.0, 9.0, 0.1, 3.0, 0.0], dtype=torch.float64)
    options = FUSED | {"loss": torch.nn.CrossEntropyLoss(weight, ignore_index=3)}
    answers = two.run(jobs.without_statistics, name, 2, options)
    assert agree(answers)
    want = jobs.without_statistics(ALONE, name, count, options)
    assert_close(answers[0], want, 1e-10)
    losses = [[record["loss"] for record in records] for records, _ in (answers[0], want)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)


@pytest.mark.parametrize(
    ("name", "optimizer", "bucket_mib"),
    [("conadv-lookahead", "sgd", 1e-6), ("recycle", "lars", 25.0), ("sam", "sgd", 25.0)],
)
def test_what_is_trained_may_change_on_all_ranks(
    two: Ranks, name: str, optimizer: str, bucket_mib: float
) -> None:
    # Red when: gradients of an unfrozen layer stay each rank's own; a frozen layer's are zeros,
    # which LARS and momentum take for an update; look-ahead or a bucket knows the first set only.
    options = FUSED | {"bucket_mib": bucket_mib}
    answers = two.run(jobs.switched, name, optimizer, options)
    want = jobs.switched(ALONE, name, optimizer, options)
    assert agree([*answers, want])


@pytest.mark.parametrize("name", ["conadv-lookahead", "recycle"])
def test_bucket_size_changes_no_bit(two: Ranks, name: str) -> None:
    # Red when: a bucket leaves after its first gradient instead of its last; hooks watch every
    # pass, so that buckets leave in the first one; launch() forgets what is left. Two micro-batches
    # of two views per rank: four passes, of which the last alone may launch.
    options = {"fuse_views": False}
    answers = [
        answer
        for size in (1e-6, 1.0, 25.0)
        for answer in two.run(jobs.without_statistics, name, 4, options | {"bucket_mib": size})
    ]
    assert agree(answers)
    assert_close(answers[0], jobs.without_statistics(ALONE, name, 4, options), 1e-10)


def check_evaluation(pool: Ranks, batch: int) -> None:
    for attack in (None, PGD(0.1, 2, random_start=1.0, space=SPACE)):
        want = jobs.evaluation(ALONE, None, batch, attack)
        for result in pool.run(jobs.evaluation, None, batch, attack):
            assert (result.images, result.accuracy) == (23, want.accuracy)
            # the sum of a rank's losses is float32
            assert result.loss == pytest.approx(want.loss, rel=1e-6)


@pytest.mark.parametrize("batch", [5, 23])
def test_evaluation_is_shared_out_and_gives_the_result_of_one_rank(two: Ranks, batch: int) -> None:
    # Red when: draws are keyed by a rank's own count of batches; means are averaged instead of
    # sums.
    check_evaluation(two, batch)  # 23: one batch, so that one rank has nothing to do


@pytest.mark.parametrize("fuse", [False, True])
def test_batchnorm_routes(two: Ranks, fuse: bool) -> None:
    # Red when: buffers are not broadcast before the evaluation (its result then differs between
    # ranks).
    options = {"fuse_views": fuse, "bucket_mib": 1e-3}
    (mine, result), (theirs, other) = two.run(jobs.with_batchnorm, "conadv", options)
    for name, value in mine[1].items():
        # each rank tracks the statistics of its own images, of which a route has two buffers and a
        # counter
        own = "running_mean" in name or "running_var" in name
        assert torch.equal(value, theirs[1][name]) is not own or "routes" in name, name
    assert result == other
    large = two.run(jobs.with_batchnorm, "conadv", {"fuse_views": fuse})
    assert same(large[0][0][1], mine[1])


@pytest.mark.parametrize("name", ["vanilla", "conadv", "disadv"])
def test_buckets_leave_during_backward_and_the_attack_finds_them_under_way(
    two: Ranks, name: str
) -> None:
    # Red when: parameters that the last pass does not touch (the clean route's) share a bucket with
    # those it does; Inline waits before it prepares; wait() leaves a bucket out.
    for seen in two.run(jobs.launches, name, 4, {"bucket_mib": 1e-3}):
        assert (buckets := seen["buckets"]) > 5
        # the last gradient has launched the last bucket
        assert seen["left during backward"] == seen["on the way while attacking"] == buckets
        assert seen["waits"] == buckets + 1  # and the losses


def test_ranks_leave_a_step_out_together(two: Ranks) -> None:
    # Red when: ranks judge by their own loss, or rank 0 does not give its running statistics back.
    answers = two.run(jobs.skipped, "skip")
    weights = []
    for found, before, after, later in answers:
        assert found == [None, None, "the loss of the clean view is nan", None]
        assert same(before, after)
        assert not same(after, later)
        weights.append({name: value for name, value in later.items() if "running" not in name})
    assert same(*weights)
    told = {(kind, what[0], what[1]) for kind, what in two.answers(jobs.skipped, "stop")}
    ((kind, name, message),) = told
    assert (kind, name) == ("error", "NonFiniteError")
    assert "The images of the clean view hold infinite or NaN values" in message


# ---- errors


@pytest.mark.parametrize(
    ("job", "args", "message"),
    [
        (jobs.disagree, (), "The folder /data is not here. (rank 1)"),
        (jobs.gradient_twice, (), "cleared gradients"),
        (jobs.uneven, (), "batches of different sizes"),
        (
            jobs.switched_alone,
            ("2", False),
            "'2.weight' is trained on some ranks and frozen on others",
        ),
        (jobs.frozen_alone, (), "'2.weight' is trained on some ranks and frozen on others"),
        (jobs.sync_batchnorm, (), "The layer 'bn1' is a SyncBatchNorm on the cpu"),
        (jobs.sync_over, (1,), "over 2 processes, but 1 of them"),
        (jobs.no_comm, (), "every rank would train for itself"),
        (jobs.environment_again, (), "takes init_process_group's place"),
    ],
)
def test_an_error_is_that_of_all_ranks(two: Ranks, job: Any, args: Any, message: str) -> None:
    # Red when: agreed() raises on the rank that failed alone (the other then hangs), or a check is
    # removed.
    for error in two.errors(job, *args):
        assert message in error
    two.run(jobs.sync_over, 2)


def test_non_finite_on_one_rank_stops_both(two: Ranks) -> None:
    # Red when: the check looks at this rank's own gradient instead of the sums.
    for kind, (name, message, _) in two.answers(jobs.non_finite):
        assert (kind, name) == ("error", "NonFiniteError")
        assert message.startswith("Step 2: the gradient")


@pytest.mark.parametrize(
    ("job", "message"),
    [(jobs.reentrant, "twice in one pass"), (jobs.no_wait, "Call wait() before optimizer.step()")],
)
def test_gradients_that_are_under_way_are_left_alone(job: Any, message: str) -> None:
    # Red when: a second portion is added to a bucket that has left (ranks drift apart); advance()
    # does not look.
    with Ranks(2, timeout=5.0) as pool:
        assert all(message in error for error in pool.errors(job))


def test_ranks_with_other_settings_than_rank_0_say_so(two: Ranks, tmp_path: Path) -> None:
    # Red when: settings are not compared: the ranks would train on batches of different orders.
    for error in two.errors(jobs.other_settings, tmp_path / "run"):
        assert "other settings than rank 0: seed: 0 -> 1. (rank 1)" in error
    assert not (tmp_path / "run").exists()


TWO = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "RANK": "0"}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        *(
            ({"WORLD_SIZE": value}, f"WORLD_SIZE is '{value[:40]}', not a number from 1")
            for value in ("two", "0", "-2", "9" * 5000)
        ),
        (TWO, "phase 'setup'"),
        # Red when: a launcher that torch does not read is passed over: every task trains alone.
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "3"}, "Slurm says that there are 8 processes"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun says"),
        ({"PMI_SIZE": "2"}, "mpiexec says"),
        ({"RANK": "1"}, "RANK is set and WORLD_SIZE is not"),
        ({**TWO, "RANK": ""}, "RANK is not set"),
        ({**TWO, "RANK": "5"}, "RANK is '5', not a number from 0 to 1"),
        ({**TWO, "RANK": "-1"}, "RANK is '-1'"),
        ({**TWO, "RANK": "x\x1b[1m"}, r"RANK is 'x\\\\x1b"),
        ({**TWO, "LOCAL_RANK": "2"}, "LOCAL_RANK is '2', not a number from 0 to 1"),
        ({**TWO, "LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1'"),
        ({**TWO, "MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({**TWO, "MASTER_PORT": ""}, "MASTER_PORT is not set"),
        ({**TWO, "MASTER_PORT": "99999"}, "MASTER_PORT is '99999'"),
        *(({"timeout": value}, "--comm-timeout") for value in ("nan", "inf", "1e300", "-1", "0")),
    ],
)
def test_environments_that_cannot_work(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Red when: from_environment gives RANK 5 of 2 to torch, or asks `timeout <= 0`, which NaN is
    # not.
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConadvError, match=message):
        Comm.from_environment("cpu", float(environment.get("timeout", 1.0)))


def test_one_process_may_be_asked_for_in_a_job_of_many_tasks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Red when: the way out that the error names does not work, or torchrun's variables do not
    # count.
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert Comm.from_environment("cpu").ranks == 1
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert Comm.from_environment("cpu").ranks == 1


@pytest.mark.parametrize("value", ["x", "0", "-1"])
def test_processes_of_a_host_are_a_number(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Red when: int(os.environ["LOCAL_WORLD_SIZE"]).
    monkeypatch.setenv("LOCAL_WORLD_SIZE", value)
    with pytest.raises(ConadvError, match=f"LOCAL_WORLD_SIZE is '{value}', not a number from 1"):
        processes_here()
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert processes_here(3) == 3


# ---- collectives


def test_each_rank_gets_its_own_of_rank_0s_values(two: Ranks) -> None:
    # Red when: every rank gets the first value, or all values travel to all.
    assert two.run(jobs.scattered) == ["for 0", "for 1"]
    assert ALONE.scatter_objects(["for 0"]) == "for 0"


def test_waiting_images_of_all_ranks_are_those_of_one_in_their_order(two: Ranks) -> None:
    # Red when: micro-batches are ordered by number and not by rank first, or a rank sends one
    # message with all.
    (gathered, largest), (elsewhere, _) = two.run(jobs.gathered_pending)
    for part in ("images", "labels"):
        assert [int(each[0]) for each in gathered["5"][part]] == [0, 1, 10, 11]
    assert gathered["5"]["weight_version"] == 4
    assert elsewhere["5"]["images"] == []
    assert largest == 1000


def test_plain_values_do_not_travel_through_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    # Red when: a process group on CUDA has NCCL alone (object collectives then put all bytes on the
    # GPU).
    made: list[str] = []
    dist, comm = "torch.distributed", "conadv.distributed.comm"
    for name, stand_in in {
        f"{dist}.init_process_group": lambda backend, **_: made.append(backend),
        f"{dist}.new_group": lambda members, limit, backend: made.append(backend),
        f"{dist}.rendezvous": lambda url, timeout: iter([(None, 0, 2)]),
        f"{comm}.rendezvous": lambda store, rank, ranks, limit: store,
        f"{comm}.RollCall": lambda store, rank, ranks, place: None,
        f"{comm}.pick_device": lambda name, local_rank: torch.device("cuda", 0),
        "torch.cuda.set_device": lambda device: None,
    }.items():
        monkeypatch.setattr(name, stand_in)
    for name, value in TWO.items():
        monkeypatch.setenv(name, value)
    Comm.from_environment("cuda").new_group([0])
    assert made == ["cpu:gloo,cuda:nccl"] * 2


def test_one_process_starts_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    # Red when: from_environment initialises torch.distributed for a world of one.
    monkeypatch.setenv("WORLD_SIZE", "1")
    comm = Comm.from_environment("cpu")
    assert (comm.rank, comm.ranks, comm.backend) == (0, 1, None)
    assert not torch.distributed.is_initialized()


def test_precise_statistics_of_two_ranks_are_those_of_one(two: Ranks) -> None:
    # Red when: sums are not taken over the ranks; an attack's draws are keyed by a rank's own
    # numbers.
    alone = jobs.recalibration(ALONE, 5)
    mine, theirs = two.run(jobs.recalibration, 5)
    assert same(mine, theirs)
    for name, value in alone.items():
        assert torch.allclose(mine[name].double(), value.double(), rtol=1e-9, atol=1e-12), name


def test_a_group_that_is_there_already_is_adopted(
    two: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Red when: WORLD_SIZE is not looked at, and every process would train for itself.
    assert two.run(jobs.adopted) == [(0, 2, 3.0), (1, 2, 3.0)]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConadvError, match="no process group"):
        Comm.from_process_group("cpu")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert Comm.from_process_group("cpu").ranks == 1
