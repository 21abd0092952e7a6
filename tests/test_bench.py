"""conadv bench, conadv plan --measure and benchmarks/: statistics on made-up numbers, everything
once on 1 or 2 ranks.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import binom
from torch.utils.benchmark import Timer

from benchmarks import micro
from conadv.cli.bench import AttackCostArgs
from conadv.cli.program import main
from conadv.distributed.comm import Comm
from conadv.distributed.teams import make_teams
from conadv.planning import attack_cost, data_loading, timing
from conadv.planning.data_loading import Loading
from conadv.planning.profile import load
from conadv.planning.timing import Case, Row, Sample, burst, measure, median_interval, row
from conadv.planning.trial import Shape, Trial, with_method

from .ranks.pool import Ranks

# ---- statistics


def test_interval_is_the_narrowest_that_covers() -> None:
    # Red when: another quantile or level is asked for; an interval that is not there becomes NaN.
    for n in (6, 7, 10, 15, 20, 41):
        found = median_interval(list(range(n)))
        place = int(found.low)
        assert found.high == n - 1 - place
        assert 1 - 2 * binom.cdf(place, n, 0.5) >= 0.95 > 1 - 2 * binom.cdf(place + 1, n, 0.5)
    assert median_interval([3, 1, 2]) == (2, 1, 3)


def test_ratio_is_taken_within_a_round() -> None:
    # Red when: ratio is the ratio of the medians (2.5 here).
    def rounds(*seconds: float) -> list[list[Sample]]:
        return [[Sample(s, {"p": s / 2})] for s in seconds]

    results = {"a": rounds(1.0, 20.0, 5.0), "b": rounds(2.0, 1.0, 10.0)}
    found = row("a", Case(Sample, "b", {"x": 1}), results)
    assert (found.median_ms, found.min_ms, found.ratio) == (5000.0, 1000.0, 0.5)
    assert (found.ratio_low, found.ratio_high, found.phases_ms) == (0.5, 20.0, {"p": 2500.0})
    assert (found.samples_ms, found.labels) == ([1000.0, 20000.0, 5000.0], {"x": 1})


def test_the_slowest_learner_counts_and_idle_ranks_do_not() -> None:
    # Red when: the time is rank 0's or the mean; an attack rank's phases go into the learners'
    # mean.
    learners = [Sample(1.0, {"a": 1.0}), Sample(3.0, {"a": 2.0, "b": 1.0})]
    found = row(
        "a", Case(Sample, "a"), {"a": [[*learners, Sample(None, {"a": 9.0}), Sample(None)]]}
    )
    assert found.median_ms == 3000.0
    assert (found.phases_ms, found.server_phases_ms) == ({"a": 1500.0, "b": 500.0}, {"a": 9000.0})


def test_a_burst_leaves_out_its_first_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    # Red when: the warm-up counts in the phases, or Timer makes more or fewer calls than WARMUP
    # says.
    calls: list[int] = []

    def step() -> dict[str, float]:
        calls.append(len(calls))
        return {"a": 100.0 if len(calls) <= timing.WARMUP else 2.0}

    sample = burst(step, 7)
    assert len(calls) == timing.WARMUP + 7
    assert sample.phases == {"a": 2.0}
    monkeypatch.setattr(Timer, "_timeit", lambda self, number: 3.5 * number)
    assert burst(step, 7).seconds == 3.5
    assert burst(lambda: torch.ones(1), 1).phases == {}


# ---- the cost of an attack

TINY = AttackCostArgs(model="resnet8", width=2, image_size=8).config()


def bench(comm: Comm, attack_ranks: int, *methods: str, **options: Any) -> list[Row]:
    """The rows of attack-cost on one batch of 4; rank 0's."""
    teams, shape = make_teams(comm, attack_ranks), Shape(3, 8, 10)
    options = {"methods": methods, "batches": (4,), "steps": 1, **options}
    return attack_cost.attack_cost(TINY, shape, teams, 1, **options)


def test_bursts_of_one_engine_go_on_where_the_last_one_ended() -> None:
    # Red when: a burst starts at step 0 again, or its last step gets no future batch (which warns
    # in the next).
    config, teams = with_method(TINY, "conadv-lookahead"), make_teams(Comm(), 0)
    trial = Trial(config, Shape(3, 8, 10), Comm(), 4)
    run = attack_cost._burst(trial, teams, "inline", 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        samples = [run(True), run(True)]
    assert trial.engine.version == 2 * (timing.WARMUP + 2)
    assert set(samples[1].phases) >= {"attack", "gradient", "update"}


def test_an_attack_ranks_phases_leave_out_the_network() -> None:
    # Red when: "transfer", which runs beside the phases, is counted.
    spans = [("attack", 0.0, 2.0), ("transfer", 0.0, 9.0), ("attack", 3.0, 4.0), ("send", 4.0, 5.0)]
    assert attack_cost.seconds_of(spans) == {"attack": 3.0, "send": 1.0}


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    pool = Ranks(2)
    yield pool
    pool.close()


def orders(comm: Comm) -> tuple[list[str], list[float]]:
    """The order in which this rank runs its cases, and the times that come out."""
    seen: list[str] = []

    def case(name: str) -> Case:
        return Case(lambda: seen.append(name) or Sample(1.0 + comm.rank), "a")

    rows = measure({name: case(name) for name in "abcde"}, 3, comm)
    return seen, [ms for found in rows for ms in found.samples_ms]


def test_every_round_has_every_case_once_in_one_order_on_all_ranks(two: Ranks) -> None:
    # Red when: the order is that of the dictionary, comes from hash() or the rank; the warm-up
    # counts; rank 0's time is the result.
    (first, times), (second, nothing) = two.run(orders)
    assert first == second
    rounds = ["".join(first[i : i + 5]) for i in range(0, len(first), 5)]
    assert [sorted(names) for names in rounds] == [list("abcde")] * 4
    assert rounds[:2] == ["cbaed", "cdeab"]
    assert times == [2000.0] * 15
    assert nothing == []


def measuring(comm: Comm, path: Path) -> int:
    """`conadv plan --measure all` as one of several processes."""
    tiny = "model resnet8 width 4 image-size 8 rounds 1 batches 2".split()
    options = [f"--workload.{word}" if i % 2 == 0 else word for i, word in enumerate(tiny)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Comm, "from_environment", lambda device: comm)
        patch.setattr(comm, "close", lambda: None)
        patch.setenv("LOCAL_WORLD_SIZE", "2")
        return main(["plan", str(path), "--measure", "all", *options])


def test_two_processes_measure_a_profile_with_a_link(two: Ranks, tmp_path: Path) -> None:
    # Red when: a rank other than the first writes, or the ranks do not make the same number of
    # timed sums (it hangs).
    path = tmp_path / "profile.json"
    assert two.run(measuring, path) == [0, 0]
    profile = load(path)
    assert profile.processes == 2
    assert profile.link is not None
    assert (profile.link.ranks, profile.link.algorithm) == (2, "ring")
    assert profile.link.busy_seconds_per_byte > 0
    assert main(["plan", str(path), "--devices", "1,2,4", "--global-batch-size", "16"]) == 0


def overlapping(comm: Comm) -> list[Any]:
    return bench(comm, 0, "noise", "conadv", overlaps=(True, False))


def serving(comm: Comm) -> list[Any]:
    methods = ("noise", "conadv", "conadv-lookahead", "recycle")
    return bench(comm, 1, *methods, executors=("inline", "ranks"))


def test_attack_cost_on_two_learners(two: Ranks) -> None:
    # Red when: "no overlap" is compared with the yardstick that overlaps.
    rows, _ = two.run(overlapping)
    assert [(r.name, r.yardstick) for r in rows] == [
        ("noise, batch 4", "noise, batch 4"),
        ("noise, batch 4, no overlap", "noise, batch 4, no overlap"),
        ("conadv, batch 4", "noise, batch 4"),
        ("conadv, batch 4, no overlap", "noise, batch 4, no overlap"),
    ]
    assert all("wait" in r.phases_ms for r in rows)
    assert [r.labels["overlap"] for r in rows] == [True, False, True, False]


def test_attack_cost_with_an_attack_rank(two: Ranks) -> None:
    # Red when: an attack rank serves a step less than the learners make, or all cases talk on one
    # channel (both hang until the timeout); the attack rank's phases are not in the result.
    rows, _ = two.run(serving)
    assert [r.name.replace(", batch 4", "") for r in rows] == [
        *("noise", "conadv", "conadv, ranks"),
        *("conadv + look-ahead", "conadv + look-ahead, ranks", "recycle"),
    ]
    served = [r for r in rows if r.server_phases_ms]
    assert [r.name for r in served] == [r.name for r in rows if r.name.endswith("ranks")]
    for found in served:
        assert set(found.server_phases_ms) >= {"receive", "attack", "send"}
        assert {"send", "receive"} <= set(found.phases_ms)


# ---- every benchmark once

ROW = {
    *("name", "median_ms", "min_ms", "yardstick", "ratio", "ratio_low", "ratio_high", "samples_ms"),
    *("phases_ms", "server_phases_ms", "labels"),
}
SMALL = {
    "attack-cost": "--model resnet8 --width 2 --image-size 8 --batches 2 4 --burst 1 "
    "--methods noise conadv vanilla recycle-replace",
    "data": "--batch 8 --images 16 --photo-size 64 --image-size 32",
    "engine": "",
    "norm": "",
    "optim": "",
}


@pytest.mark.parametrize("what", SMALL)
def test_each_benchmark_writes_json_and_a_table(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Red when: a field of a row or of the facts is renamed; a path of this machine gets into the
    # file.
    monkeypatch.setattr(micro, "WORKLOADS", {"tiny": (8, 1, 8, 4)})
    monkeypatch.setattr(micro, "HALF", 2)
    monkeypatch.setattr(micro.torchvision.models, "resnet50", lambda: torch.nn.Linear(4, 4))
    out = tmp_path / "new" / "result.json"
    args = [what, *SMALL[what].split(), "--rounds", "1", "--out", str(out)]
    ours = what in ("attack-cost", "data")
    args = ["bench", *args] if ours else args
    monkeypatch.setattr("sys.argv", ["conadv", *args])
    assert not (main(args) if ours else micro.main())
    shown = capsys.readouterr().out
    content = json.loads(out.read_text())
    facts = {"bench", "command", "date", "machine", "versions", "git", "options", "tables"}
    assert facts <= set(content)
    assert (content["bench"], content["options"]["rounds"]) == (what, 1)
    assert str(tmp_path) not in out.read_text()
    (rows,) = content["tables"].values()
    for found in rows:
        assert set(found) >= ROW
        assert found["yardstick"] in {found["name"] for found in rows}
        assert found["name"] in shown
        assert len(found["samples_ms"]) == 1
    if what == "attack-cost":
        assert content["ranks"] == {"learners": 1, "attack_ranks": 0, "backend": None}
        assert [found["labels"]["local_batch_size"] for found in rows] == [2] * 4 + [4] * 4
        last = rows[-1]
        assert last["yardstick"] == "vanilla, batch 4"
        assert last["images_per_second"] == pytest.approx(4000 / last["median_ms"])


def test_both_loaders_give_batches_of_the_same_kind() -> None:
    # Red when: the plain loader's images are floats, of another size, or a step has one
    # micro-batch.
    with data_loading.random_photographs(64, 8) as folder:
        options = {"dir": folder, "image_size": 32, "augment": "basic"}
        settings = data_loading.DataConfig(source="folder", **options)
        loading = Loading(settings, batch=8, accumulation=3)
        ours = next(data_loading.ours(loading)(1)).micro
        theirs = next(data_loading.plain(loading)(1))
    assert [micro.views["clean"].shape for micro in ours] == [x.shape for x, _ in theirs]
    assert {x.dtype for x, _ in theirs} == {ours[0].views["clean"].dtype} == {torch.uint8}
    assert not folder.exists()


def test_a_pause_is_part_of_the_time() -> None:
    # Red when: nobody pauses, the pause comes once, or the images of a step count one micro-batch.
    taken: list[int] = []
    loading = Loading(data_loading.DataConfig(), batch=8, accumulation=3, images=50, pause=0.02)
    run = data_loading.timed(lambda count: iter(taken.append(count) or range(count)), loading)
    assert run().seconds >= 0.02
    assert taken == [1 + 3]  # one to start with, then 50 images of 24 each


WRONG = {
    "photo size": ("data --photo-size 7", "--photo-size 7 must be 8 or more"),
    "out": ("data --out .", "is a folder"),
    "no yardstick": ("attack-cost --methods conadv --model resnet8", "--methods needs 'noise' too"),
    "no attack ranks": ("attack-cost --executors ranks", "ranks executor needs attack ranks"),
    "one rank": ("attack-cost --attack-ranks 1", "at least one rank must be left to learn"),
    "overlap": ("attack-cost --overlap off", "no effect on one learner"),
    "stream": ("attack-cost --executors stream", "needs a CUDA device"),
    "data": ("data --data nowhere-at-all", "nowhere-at-all"),
}


@pytest.mark.parametrize("name", WRONG)
def test_users_errors(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command, message = WRONG[name]
    assert main(["bench", *command.split()]) == 2
    assert message in capsys.readouterr().err
