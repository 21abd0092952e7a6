"""conadv bench: its statistics on made-up numbers, bursts on one and two ranks, every benchmark once, its messages."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import binom

from conadv import Comm, ConadvError
from conadv.bench import attack_cost, data, engine, harness, norm, optim, output
from conadv.bench.harness import Case, Measured, Sample, combine, measure, order, row
from conadv.bench.options import AttackCostArgs
from conadv.bench.stats import median_interval
from conadv.cli.program import main
from conadv.distributed.teams import make_teams

from .ranks.pool import Ranks

TINY = {
    "model": "resnet8",
    "width": 2,
    "image_size": 8,
    "batches": (4,),
    "rounds": 1,
    "burst": 3,
    "dropped": 1,
}


# ---- statistics


@pytest.mark.parametrize("n", [6, 7, 10, 15, 20, 41])
def test_interval_is_the_narrowest_that_covers(n: int) -> None:
    # Red when: the sum in _coverage goes up to `place`, or the interval stops one place too early.
    found = median_interval(list(range(n)))
    place = int(found.low)
    assert found.high == n - 1 - place
    assert found.coverage == pytest.approx(1 - 2 * binom.cdf(place, n, 0.5))
    assert found.coverage >= 0.95 > 1 - 2 * binom.cdf(place + 1, n, 0.5)


def test_interval_covers_the_median_of_a_skewed_distribution() -> None:
    # Red when: the interval is one place narrower on both sides.
    draw = random.Random(0)
    found = [median_interval([draw.expovariate(1) for _ in range(15)]) for _ in range(4000)]
    hits = sum(interval.low < 0.6931 < interval.high for interval in found) / len(found)
    assert hits == pytest.approx(found[0].coverage, abs=4 * (0.035 * 0.965 / 4000) ** 0.5)


def test_few_values_say_what_they_cover() -> None:
    # Red when: coverage is the level that was asked for.
    assert (median_interval([3, 1, 2]).low, median_interval([3, 1, 2]).high) == (1, 3)
    assert [median_interval(range(n)).coverage for n in (1, 2, 3, 5)] == [0.0, 0.5, 0.75, 0.9375]


def test_ratio_is_taken_within_a_round() -> None:
    # Red when: ratio is the ratio of the medians (2.5 here).
    mine, theirs = [1.0, 20.0, 5.0], [2.0, 1.0, 10.0]
    results = {
        "a": [Measured(s, {"p": s / 2}, {}) for s in mine],
        "b": [Measured(s, {}, {}) for s in theirs],
    }
    found = row("a", Case(Sample, "b", {"x": 1}), results)
    assert (found.median_ms, found.min_ms, found.ratio) == (5000.0, 1000.0, 0.5)
    assert (found.ratio_low, found.ratio_high, found.coverage) == (0.5, 20.0, 0.75)
    assert (found.phases_ms, found.samples_ms, found.labels) == (
        {"p": 2500.0},
        [1000.0, 20000.0, 5000.0],
        {"x": 1},
    )


def test_the_slowest_learner_counts_and_idle_ranks_do_not() -> None:
    # Red when: the time is rank 0's or the mean; an attack rank's phases go into the learners' mean.
    samples = [
        Sample(1.0, {"a": 1.0}),
        Sample(3.0, {"a": 2.0, "b": 1.0}),
        Sample(None, {"a": 9.0}),
        Sample(None),
    ]
    assert combine(samples) == Measured(3.0, {"a": 1.5, "b": 0.5}, {"a": 9.0})


# ---- the harness


def test_every_round_has_every_case_once_in_an_order_of_its_own() -> None:
    # Red when: the order is that of the dictionary, or the seed does not matter.
    seen: list[str] = []
    cases = {
        name: Case(lambda name=name: seen.append(name) or Sample(1.0), "a") for name in "abcde"
    }
    rows = measure(cases, 4, seed=3, warmup=2)
    rounds = [seen[i : i + 5] for i in range(0, len(seen), 5)]
    assert [sorted(names) for names in rounds] == [list("abcde")] * 6
    assert rounds == [order("abcde", 3, number) for number in range(6)]
    assert len({tuple(names) for names in rounds}) > 3
    assert order("abcde", 4, 0) != order("abcde", 3, 0)
    assert [len(found.samples_ms) for found in rows] == [4] * 5  # the warm-up is not among them


def test_order_does_not_depend_on_the_machine() -> None:
    # Red when: the order comes from hash(), which differs between processes.
    assert ["".join(order("abcd", 0, number)) for number in range(4)] == [
        "adbc",
        "abcd",
        "badc",
        "dcab",
    ]


def test_goes_on_until_the_time_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    # Red when: --seconds has no effect, or the warm-up counts.
    now = [0.0]
    monkeypatch.setattr(harness.time, "monotonic", lambda: now[0])

    def run() -> Sample:
        now[0] += 10
        return Sample(1.0)

    assert len(measure({"a": Case(run, "a")}, 2, seconds=45)[0].samples_ms) == 5


def test_a_burst_leaves_out_its_first_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    # Red when: the clock starts before the dropped steps, or time is divided by all of them.
    now = [0.0]
    monkeypatch.setattr(attack_cost.time, "perf_counter", lambda: now[0])
    phases: dict[str, float] = {}

    def step(counts: bool) -> None:
        now[0] += 2.0 if counts else 100.0
        phases["a"] = phases.get("a", 0.0) + (1.0 if counts else 0.0)

    sample = attack_cost._timed_steps(
        options(burst=7, dropped=3), torch.device("cpu"), step, phases
    )
    assert sample == Sample(2.0, {"a": 1.0})


def test_bursts_of_one_engine_go_on_where_the_last_one_ended() -> None:
    # Red when: a burst starts at step 0 again, or its last step gets no future batch (which warns in the next).
    teams = make_teams(Comm(), 0)
    micro = attack_cost.micro_batches(options(), 4, [0], torch.device("cpu"))
    trained = attack_cost._engine(options(), teams, "conadv-lookahead", "inline")
    burst = attack_cost.LearnerBurst(options(), trained, micro)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = burst(True), burst(True)
    assert trained.version == 6
    assert 6 in trained.pending
    assert set(second.phases) >= {"attack", "gradient", "update"}
    assert sum(first.phases.values()) <= first.seconds * 1.001  # phases are those of counted steps


def test_an_attack_ranks_phases_leave_out_the_network() -> None:
    # Red when: "transfer", which runs beside the phases, is counted.
    spans = [
        [("attack", 0.0, 2.0), ("transfer", 0.0, 9.0)],
        [("attack", 3.0, 4.0), ("send", 4.0, 5.0)],
    ]
    assert attack_cost.mean_phases(spans) == {"attack": 1.5, "send": 0.5}


# ---- two ranks


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    pool = Ranks(2)
    yield pool
    pool.close()


def options(**changes: Any) -> AttackCostArgs:
    return AttackCostArgs(**{**TINY, **changes})


def orders(comm: Comm, seed: int) -> tuple[list[str], list[float]]:
    """The order in which this rank runs its cases, and the times that come out."""
    seen: list[str] = []

    def case(name: str) -> Case:
        return Case(lambda: seen.append(name) or Sample(1.0 + comm.rank), "a")

    rows = measure({name: case(name) for name in "abcd"}, 3, seed=seed, world=comm)
    return seen, [ms for found in rows for ms in found.samples_ms]


def test_all_ranks_run_the_cases_in_one_order(two: Ranks) -> None:
    # Red when: a rank's number goes into the seed of the order, or rank 0's time is the result.
    (first, times), (second, nothing) = two.run(orders, 5)
    assert first == second
    assert len(first) == 20
    assert times == [2000.0] * 12
    assert nothing == []


def bench(comm: Comm, attack_ranks: int, changes: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of attack-cost as plain values; rank 0's."""
    chosen = options(attack_ranks=attack_ranks, **changes)
    chosen.check()
    rows = measure(
        attack_cost.build(chosen, make_teams(comm, attack_ranks)),
        chosen.rounds,
        warmup=1,
        world=comm,
    )
    return [
        {"name": r.name, "to": r.yardstick, "phases": r.phases_ms, "servers": r.server_phases_ms}
        for r in rows
    ]


def test_attack_cost_on_two_learners(two: Ranks) -> None:
    # Red when: ddp is compared with noise; "no overlap" with the yardstick that overlaps.
    rows, _ = two.run(
        bench, 0, {"methods": ("vanilla", "noise", "conadv", "ddp"), "overlap": "both"}
    )
    assert [(r["name"], r["to"]) for r in rows] == [
        ("vanilla, batch 4", "noise, batch 4"),
        ("vanilla, batch 4, no overlap", "noise, batch 4, no overlap"),
        ("noise, batch 4", "noise, batch 4"),
        ("noise, batch 4, no overlap", "noise, batch 4, no overlap"),
        ("conadv, batch 4", "noise, batch 4"),
        ("conadv, batch 4, no overlap", "noise, batch 4, no overlap"),
        ("ddp, batch 4", "vanilla, batch 4"),
    ]
    assert all("wait" in r["phases"] for r in rows if not r["name"].startswith("ddp"))


def test_a_plain_loop_on_one_rank() -> None:
    # Red when: plain is compared with noise, or is built on several ranks, where nobody would sum its gradients.
    assert [
        (r["name"], r["to"]) for r in bench(Comm(), 0, {"methods": ("vanilla", "noise", "plain")})
    ][-1] == (
        "plain, batch 4",
        "vanilla, batch 4",
    )
    with pytest.raises(ConadvError, match="use ddp under torchrun"):
        attack_cost._check_ranks(options(methods=("vanilla", "noise", "plain")), Comm(0, 2))


def test_attack_cost_with_an_attack_rank(two: Ranks) -> None:
    # Red when: an attack rank serves a step less than the learners make; all cases talk on one line (both hang until
    # the timeout); the attack rank's phases are not in the result.
    changes = {
        "methods": ("noise", "noise-busy", "conadv", "conadv-lookahead", "recycle"),
        "rounds": 3,
    }
    rows, _ = two.run(bench, 1, changes)
    assert [r["name"].replace(", batch 4", "") for r in rows] == [
        *("noise", "noise, attack ranks busy", "conadv", "conadv, ranks"),
        *("conadv + look-ahead", "conadv + look-ahead, ranks", "recycle"),
    ]
    served = {r["name"]: r for r in rows if r["servers"]}
    assert set(served) == {"conadv, batch 4, ranks", "conadv + look-ahead, batch 4, ranks"}
    for found in served.values():
        assert set(found["servers"]) >= {"receive", "attack", "send"}
        assert {"send", "receive"} <= set(found["phases"])


def launched(comm: Comm, overlap: bool) -> tuple[int, list[float]]:
    """How many buckets had left when backward was over, and the weights after three steps."""
    micro = attack_cost.micro_batches(options(), 4, [comm.rank], comm.device)
    trained = attack_cost._engine(options(), make_teams(comm, 0), "noise", "inline")
    reducer, seen = trained._reducer, [0]
    assert reducer is not None
    launch = reducer.launch

    def watched() -> None:
        seen[0] = len(reducer._handles)
        launch()

    reducer.launch = watched  # type: ignore[method-assign]
    attack_cost.LearnerBurst(options(), trained, micro)(overlap)
    return seen[0], torch.cat([p.detach().flatten() for p in trained.model.parameters()]).tolist()


def test_overlap_changes_when_gradients_leave_and_nothing_else(two: Ranks) -> None:
    # Red when: reducer.overlap is not asked before buckets leave.
    (early, weights), (late, same) = two.run(launched, True)[0], two.run(launched, False)[0]
    assert early > 0
    assert late == 0
    assert weights == same


# ---- every benchmark once

ROW = {
    *(
        "name",
        "median_ms",
        "min_ms",
        "yardstick",
        "ratio",
        "ratio_low",
        "ratio_high",
        "coverage",
        "samples_ms",
    ),
    *("phases_ms", "server_phases_ms", "labels"),
}
SMALL_DATA = ["--batch", "8", "--images", "16", "--photo-size", "64", "--image-size", "32"]
BENCHES = {
    "attack-cost": [
        "--model",
        "resnet8",
        "--width",
        "2",
        "--image-size",
        "8",
        "--batches",
        "2",
        "4",
        "--burst",
        "2",
    ],
    "engine": [],
    "norm": [],
    "optim": [],
    "data": SMALL_DATA,
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workloads that take milliseconds."""
    monkeypatch.setattr(engine, "WORKLOADS", {"tiny": engine.Workload(8, 1, 8, 4)})
    monkeypatch.setattr(norm, "COUNT", 2)
    monkeypatch.setattr(optim.torchvision.models, "resnet50", lambda: torch.nn.Linear(4, 4))
    monkeypatch.setattr(data, "PER_CLASS", 2)


@pytest.mark.parametrize("what", BENCHES)
@pytest.mark.usefixtures("small")
def test_each_benchmark_writes_json_and_a_table(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Red when: a field of a row or of the facts is renamed; a path of this machine gets into the file.
    out = tmp_path / "new" / "result.json"
    args = ["bench", what, *BENCHES[what], "--rounds", "1", "--threads", "1", "--out", str(out)]
    args += ["--dropped", "1"] if what == "attack-cost" else []
    monkeypatch.setattr("sys.argv", ["conadv", *args])
    assert main(args) == 0
    shown = capsys.readouterr().out
    content = json.loads(out.read_text())
    assert {"bench", "command", "date", "machine", "versions", "git", "options", "tables"} <= set(
        content
    )
    assert (content["bench"], content["options"]["rounds"], content["machine"]["threads"]) == (
        what,
        1,
        1,
    )
    assert content["command"].startswith(f"conadv bench {what}")
    assert str(tmp_path) not in out.read_text()
    (rows,) = content["tables"].values()
    names = {found["name"] for found in rows}
    for found in rows:
        assert set(found) >= ROW
        assert found["yardstick"] in names
        assert found["name"] in shown
        assert len(found["samples_ms"]) == 1
        assert found["ratio_low"] <= found["ratio"] <= found["ratio_high"]
    if what == "attack-cost":
        check_attack_cost(content, rows)
    if what == "data" and rows[0]["peak_mib"] is not None:
        assert all(found["peak_mib"] >= found["start_mib"] > 10 for found in rows)


def check_attack_cost(content: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    assert content["ranks"] == {"learners": 1, "attack_ranks": 0, "backend": None}
    assert [found["labels"]["local_batch_size"] for found in rows] == [2] * 6 + [4] * 6
    conadv = next(found for found in rows if found["name"] == "conadv + look-ahead, batch 4")
    assert conadv["yardstick"] == "noise, batch 4"
    assert conadv["images_per_second"] == pytest.approx(4000 / conadv["median_ms"])
    assert set(conadv["phases_ms"]) >= {"attack", "gradient", "update"}
    plain = sum(
        p.numel() for p in attack_cost.network(options(), None, torch.device("cpu")).parameters()
    )
    assert rows[0]["labels"]["gradient_bytes"] == 4 * plain


@pytest.mark.parametrize(
    "args", [["--source", "digits"], ["--source", "cifar10", "--num-workers", "1"]]
)
@pytest.mark.usefixtures("small")
def test_data_of_other_sources(
    args: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Red when: the plain loader is asked for a folder of digits.
    monkeypatch.setattr(data, "_in_fresh_process", data.peak_memory)  # which imports torch twice
    assert (
        main(
            [
                "bench",
                "data",
                *args,
                "--rounds",
                "1",
                "--batch",
                "8",
                "--images",
                "16",
                "--augment",
                "basic",
            ]
        )
        == 0
    )
    assert "torchvision, DataLoader" in capsys.readouterr().out


def test_both_loaders_give_batches_of_the_same_kind(tmp_path: Path) -> None:
    # Red when: the plain loader's images are floats, or of another size.
    chosen = data.DataArgs(batch=8, images=16, photo_size=64, image_size=32)
    with data.with_images(chosen) as found:
        ours = next(data.ours(found)(1)).micro[0]
        ((theirs, labels),) = next(data.plain(found)(1))
    x = ours.views["clean"]
    assert (
        (x.shape, x.dtype)
        == (theirs.shape, theirs.dtype)
        == (torch.Size([8, 3, 32, 32]), torch.uint8)
    )
    assert ours.y_N.shape == labels.shape
    assert found.data is not None
    assert not found.data.exists()


@pytest.mark.parametrize("make", [data.ours, data.plain])
def test_a_step_has_all_its_micro_batches(make: Any) -> None:
    # Red when: the plain loader yields single batches, or the images of a step count one micro-batch.
    chosen = data.DataArgs(source="digits", batch=8, accumulation=3, images=50)
    steps = list(make(chosen)(2))
    assert [len(getattr(step, "micro", step)) for step in steps] == [3, 3]
    taken: list[int] = []
    data.timed_batches(lambda count: iter(taken.append(count) or range(count)), chosen)()
    assert taken == [1 + 3]  # one to start with, then 50 images of 24 each
    row = harness.Row("x", 100.0, 100.0, "x", 1.0, 1.0, 1.0, 0.95, [100.0], {}, {}, {})
    assert data.rates(row, chosen) == {"images_per_second": 240.0}


def test_a_pause_is_part_of_the_time() -> None:
    # Red when: nobody pauses, or the pause comes once and not after each step.
    chosen = data.DataArgs(source="digits", batch=8, images=24, pause=0.02)
    assert data.timed_batches(lambda count: iter(range(count)), chosen)().seconds >= 0.02


def test_command_leaves_out_where_the_result_went() -> None:
    # Red when: the value after --out stays.
    assert (
        output.command_line(["bench", "norm", "--out", "/a/b.json", "--rounds", "3"])
        == "conadv bench norm --rounds 3"
    )
    assert output.command_line(["bench", "norm", "--out=/a/b.json"]) == "conadv bench norm"


# ---- messages

WRONG = {
    "what": (["nrm"], "Did you mean 'norm'"),
    "rounds": (["norm", "--rounds", "0"], "--rounds 0 must be 1 or more"),
    "photo size": (["data", "--photo-size", "7"], "--photo-size 7 must be 8 or more"),
    "threads": (["engine", "--threads", "0"], "--threads 0"),
    "out": (["optim", "--out", "."], "is a folder"),
    "burst": (["attack-cost", "--burst", "2", "--dropped", "2"], "--dropped 2"),
    "batch": (["attack-cost", "--batches", "0"], "--batches 0"),
    "no yardstick": (
        ["attack-cost", "--methods", "conadv", "--model", "resnet8"],
        "add that to --methods",
    ),
    "no attack ranks": (["attack-cost", "--executors", "ranks"], "--attack-ranks M"),
    "busy": (["attack-cost", "--methods", "noise", "noise-busy"], "needs --attack-ranks"),
    "one rank": (["attack-cost", "--attack-ranks", "1"], "at least one rank must be left to learn"),
    "ddp": (["attack-cost", "--methods", "vanilla", "noise", "ddp"], "2 ranks or more"),
    "overlap": (["attack-cost", "--overlap", "off"], "no effect on one learner"),
    "stream": (["attack-cost", "--executors", "stream"], "needs a CUDA device"),
    "size": (
        ["attack-cost", "--model", "vit_b_32", "--image-size", "16"],
        "cannot take 3 x 16 x 16 images",
    ),
    "model": (["attack-cost", "--model", "resnet19"], "Did you mean 'resnet1"),
    "digits": (["data", "--source", "digits", "--data", "x"], "--data has no effect"),
    "data": (["data", "--data", "nowhere-at-all"], "nowhere-at-all"),
}


@pytest.mark.parametrize("name", WRONG)
def test_users_errors(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    args, message = WRONG[name]
    assert main(["bench", *args]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_bench_alone_lists_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 0
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines() if line.startswith("  ")] == list(
        BENCHES
    )


def test_what_a_checkpoint_costs_is_spread_over_the_steps_between_two() -> None:
    # Red when: the share is of the turn instead of the steps between two checkpoints, or unfinished turns are passed.
    from benchmarks.checkpoint_cost import Turn, costs

    def turns(extra: float, wait: float = 0.0) -> list[Turn]:
        return [Turn(base + extra, 0.0, wait) for base in (1.0, 2.0, 1.0, 2.0, 1.0, 2.0)]

    found = costs(
        {"none": turns(0), "foreground": turns(0.2), "background": turns(0.05)}, steps=10, every=50
    )
    assert found["added_to_a_step"]["foreground"]["high"] == pytest.approx(0.2 / 5)
    assert found["added_to_a_step"]["background"]["low"] == pytest.approx(0.05 / 10)
    assert found["seconds_of_a_checkpoint"]["background"]["median"] == pytest.approx(0.05)
    assert found["step_seconds"]["none"] == pytest.approx(0.15)
    assert found["under_limit"] is True
    late = costs(
        {"none": turns(0), "foreground": turns(0), "background": turns(0, wait=0.1)},
        steps=10,
        every=50,
    )
    assert late["unfinished_turns"] == 6
    assert late["under_limit"] is None
    assert (
        costs({"none": turns(0), "foreground": turns(0), "background": turns(1)}, 10, 50)[
            "under_limit"
        ]
        is False
    )
