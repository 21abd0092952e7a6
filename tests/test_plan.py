"""`conadv plan`: the cost model by hand, its limits by property, the search by brute force, the
accuracy by record.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from benchmarks.plan_check import Case, predict
from conadv.cli.plan import Args, plan_of
from conadv.cli.program import main
from conadv.distributed.comm import Comm
from conadv.errors import ConadvError
from conadv.planning.cost_model import KINDS, LOSSES_BYTES, Layout, Message, Planner, curve, queue
from conadv.planning.measure import final_moments, fit, measure_phases, point
from conadv.planning.profile import PAYLOAD, Point, Workload, link_of, load, save
from conadv.planning.search import Rules, _layouts, best
from conadv.planning.timing import Sample

EXAMPLE = Path(__file__).parent / "golden" / "plan_profile.json"
PROFILE = load(EXAMPLE)
LINK = PROFILE.link
assert LINK is not None
LATENCY, PER_BYTE = 1e-4, 1e-9
WEIGHTS, IMAGE = 45_000_000, 12288


def planner(**link: Any) -> Planner:
    assert LINK is not None
    return Planner(PROFILE, LINK.model_copy(update=link))


def step(method: str, layout: Layout, tau: int = 1, **link: float) -> float:
    return replace(planner(**link), staleness=tau).predict(method, layout).step


def rank_sum(size: float, ranks: int = 2, per_byte: float = PER_BYTE) -> float:
    """A ring's all-reduce in the example, by the book."""
    return 2 * (ranks - 1) * LATENCY + 2 * (ranks - 1) / ranks * size * per_byte


# ---- the pieces


def test_a_curve_goes_through_its_points_and_on_along_its_ends() -> None:
    # Red when: the first segment's slope is used above the last point, or the floor below the first
    # is left out.
    def at(size: float, *points: tuple[int, float]) -> float:
        made = [Point(micro_batch=n, gradient=s, attack=s, rest=s) for n, s in points]
        return float(np.interp(size, *curve(tuple(made), "gradient")))

    three = (10, 1.0), (20, 3.0), (40, 4.0)
    sizes, seconds = (10, 15, 20, 30, 40, 60), [1.0, 2.0, 3.0, 3.5, 4.0, 5.0]
    assert [at(size, *three) for size in sizes] == pytest.approx(seconds)
    assert at(5, *three) == pytest.approx(0.5)  # along the segment 0: less than in proportion
    assert at(5, (10, 1.0), (20, 1.2)) == pytest.approx(0.9)
    assert at(20, (10, 1.0)) == pytest.approx(2.0)
    assert at(2, (1, 2.0), (2, 1.5), (4, 3.0)) == 2.0  # it never falls with size


def test_messages_hide_behind_work_and_take_of_its_processor() -> None:
    # Red when: a message may leave before it is ready, two are under way at once, or work loses for
    # what travels after it.
    assert queue(10.0, [Message(4.0, 3.0), Message(5.0, 2.0)]) == (9.0, 0.0)
    assert queue(10.0, [Message(4.0, 3.0), Message(9.0, 4.0, 2.0)]) == (13.0, 0.5)
    assert queue(8.0, [Message(0.0, 6.0, 2.0)]) == (6.0, 2.0)
    assert queue(8.0, []) == (0.0, 0.0)


def test_all_reduce_is_a_ring_and_nccl_may_take_a_tree() -> None:
    # Red when: the factor 2 (N - 1) / N or the number of steps is changed, or the tree is left out.
    assert planner().all_reduce(1e6, 2).seconds == pytest.approx(2 * 1e-4 + 1e-3)
    assert planner().all_reduce(1e6, 8).seconds == pytest.approx(14 * 1e-4 + 1.75e-3)
    nccl = planner(algorithm="ring-or-tree")
    assert nccl.all_reduce(1e6, 8).seconds == pytest.approx(6 * 1e-4 + 2e-3)
    assert nccl.all_reduce(1e9, 8).seconds == pytest.approx(14 * 1e-4 + 1.75)
    busy = planner(busy_seconds_per_byte=4e-10).all_reduce(1e6, 8)
    assert busy.busy == pytest.approx(1.75e6 * 4e-10)


@given(st.floats(0, 1e-2), st.floats(1e-10, 1e-7), st.integers(1, 20))
def test_a_fit_finds_what_made_the_times(latency: float, per_byte: float, steps: int) -> None:
    # Red when: the rows of the least squares are not divided by t, or steps is taken as 1.
    sent = [1e3, 1e5, 1e6, 1e7]
    found = fit(sent, [steps * latency + size * per_byte for size in sent], steps)
    assert found == pytest.approx((latency, per_byte), rel=1e-3, abs=1e-9)


# ---- a step by hand


def test_one_device_adds_up_its_phases() -> None:
    # Red when: rest is counted per micro-batch, or the attack is left out.
    steps = {
        "vanilla": 0.08 * 2 + 0.01,
        "multiview": 0.16 * 2 + 0.01,
        "noise": (0.16 + 0.0025) * 2 + 0.01,
        "disadv": (0.16 + 0.05) * 2 + 0.01,
        "conadv": (0.16 + 0.05) * 2 + 0.01,
        "conadv-lookahead": (0.16 + 0.05) * 2 + 0.008 + 0.01,  # weights are predicted once per step
        "recycle": (0.166 + 0.00125) * 2 + 0.01,
    }
    assert {method: step(method, Layout(1, 0, 20, 2)) for method in steps} == pytest.approx(steps)


def by_hand(
    attack_before: float, attack_after: float, micro_batches: int = 1, per_byte: float = PER_BYTE
) -> float:
    """Two ranks, 32 images per pass: 0.22 per micro-batch, buckets ready at half and at the end of
    the last pass.
    """
    gradient, last = 0.22 * micro_batches, 0.11
    first_end = gradient - last / 2 + rank_sum(20e6, per_byte=per_byte)
    second_end = max(gradient, first_end) + rank_sum(25e6, per_byte=per_byte)
    losses = rank_sum(LOSSES_BYTES, per_byte=per_byte)
    return attack_before + max(gradient + attack_after, second_end + losses) + 0.01


def test_buckets_leave_in_the_last_pass_and_the_attack_hides_them() -> None:
    # Red when: buckets leave at the begin of the gradient phase, disadv's attack is put after the
    # gradient, the passes of a micro-batch are taken as one, or work beside a sum loses nothing.
    layout = Layout(2, 0, 32, 1)
    for method, before, after in (
        ("disadv", 0.07, 0.0),
        ("conadv", 0.0, 0.07),
        ("noise", 0.004, 0.0),
        ("conadv-lookahead", 0.0, 0.078),
    ):
        assert step(method, layout) == pytest.approx(by_hand(before, after)), method
    slow = step("conadv", layout, seconds_per_byte=5e-9)  # the first bucket delays the second
    assert slow == pytest.approx(by_hand(0.0, 0.07, per_byte=5e-9))
    twice = planner().predict("conadv", Layout(2, 0, 32, 2))
    assert twice.step == pytest.approx(by_hand(0.0, 0.14, 2))
    assert twice.gradient + twice.attack + twice.wait + twice.rest == pytest.approx(twice.step)
    shared = step("conadv", layout, busy_seconds_per_byte=1e-10)  # all sums lie beside the attack
    sent = 45e6 + LOSSES_BYTES
    assert shared - by_hand(0.0, 0.07) == pytest.approx(sent * 1e-10)


def test_attack_ranks_work_beside_their_learners() -> None:
    # Red when: the share is not rounded up, tau does not divide the chain, or weights are not sent.
    message = LATENCY + WEIGHTS * PER_BYTE
    for learners, share in ((3, 2), (7, 4)):  # the learners are slower, then the attack ranks are
        layout = Layout(learners, 2, 32, 1)
        chain = message + share * 0.07 + LATENCY + share * 32 * IMAGE * PER_BYTE
        ready = 0.22 - 0.055
        assert max(message, ready) + rank_sum(20e6, learners) < 0.22  # the second leaves at once
        sums = rank_sum(25e6, learners) + rank_sum(LOSSES_BYTES, learners)
        learner = 0.22 + sums + 0.01
        assert (learner > chain) == (learners == 3)
        assert step("conadv", layout) == pytest.approx(max(learner, chain))
    later, soon = (step("conadv", layout, tau, latency=1.0) for tau in (4, 1))
    assert later <= soon
    few = planner().predict("conadv", Layout(8, 1, 32, 1))  # one for too many makes them wait
    assert few.step > 8 * 0.07
    assert few.receive > 0
    phases = few.gradient + few.attack + few.wait + few.rest + few.receive
    assert phases == pytest.approx(few.step)
    assert planner().predict("conadv", Layout(8, 4, 32, 1)).receive == 0


def test_limit_names_what_would_help() -> None:
    # Red when: limit() takes the largest remaining step instead of the smallest.
    links = {"arithmetic": {}, "link": {"seconds_per_byte": 1e-7}, "latency": {"latency": 0.01}}
    for name, link in links.items():
        now = planner(**link)
        assert now.limit(now.predict("noise", Layout(64, 0, 32, 1))) == name


def test_memory_by_hand() -> None:
    # Red when: buckets, the look-ahead copy or the waiting images are left out.
    copies = {"vanilla": 4, "noise": 4, "conadv": 4, "conadv-lookahead": 5}
    images = {"vanilla": 1, "noise": 2, "conadv": 3, "conadv-lookahead": 3}
    activations = 32 * 500_000
    for method, count in copies.items():
        expected = count * WEIGHTS + images[method] * 64 * IMAGE + activations
        assert planner().device_bytes(method, Layout(2, 0, 32, 2)) == expected
    attack_rank = (
        3 * WEIGHTS + 2 * 6000 * 32 * IMAGE + activations
    )  # which makes 6000 micro-batches
    assert planner().device_bytes("conadv", Layout(6000, 1, 32, 1)) == attack_rank


# ---- limits

methods = st.sampled_from(sorted(KINDS))
layouts = st.builds(Layout, st.integers(1, 4096), st.just(0), st.integers(1, 64), st.integers(1, 8))
per_byte = st.floats(1e-11, 1e-6)


@given(methods, layouts, per_byte, st.floats(0.01, 1), st.floats(0, 1e-9))
def test_more_bandwidth_or_less_latency_is_never_slower(
    method: str, layout: Layout, slow: float, factor: float, busy: float
) -> None:
    link = {"seconds_per_byte": slow, "busy_seconds_per_byte": busy}
    most = step(method, layout, **link) * (1 + 1e-9)
    assert step(method, layout, **link | {"seconds_per_byte": slow * factor}) <= most
    assert step(method, layout, **link, latency=LATENCY * factor) <= most


@given(layout=layouts, speed=per_byte)
def test_the_attack_of_conadv_costs_between_nothing_and_its_time(
    layout: Layout, speed: float
) -> None:
    # Red when: the attack is put before the gradient and beside it (paid twice), or left out.
    now = planner(seconds_per_byte=speed)
    without, inside = (now.predict(method, layout) for method in ("multiview", "disadv"))
    conadv = now.predict("conadv", layout)
    assert without.step * (1 - 1e-9) <= conadv.step <= inside.step * (1 + 1e-9)
    assert inside.step - without.step == pytest.approx(conadv.attack)


@given(layout=layouts, ranks=st.integers(1, 64))
def test_more_attack_ranks_are_never_slower_while_each_learner_feeds_one(
    layout: Layout, ranks: int
) -> None:
    few = replace(layout, attack_ranks=min(ranks, layout.learners))
    more = replace(layout, attack_ranks=layout.learners)
    assert step("conadv", more) <= step("conadv", few) * (1 + 1e-9)


# ---- the search


def all_layouts(method: str, devices: int, global_batch: int, largest: int) -> list[Layout]:
    found = []
    for learners in range(1, devices + 1):
        local, rest = divmod(global_batch, learners)
        if rest or not local:
            continue
        micro = max(size for size in range(1, min(local, largest) + 1) if local % size == 0)
        most = min(devices - learners, global_batch // micro) if KINDS[method].stale else 0
        found += [Layout(learners, ranks, micro, local // micro) for ranks in range(most + 1)]
    return found


@settings(max_examples=25, deadline=None)
@example(method="conadv-lookahead", devices=34, global_batch=197, speed=6.501535153674602e-09)
@given(
    method=methods,
    devices=st.integers(1, 40),
    global_batch=st.integers(1, 400),
    speed=st.floats(1e-10, 1e-8),
)
def test_the_search_finds_what_brute_force_finds(
    method: str, devices: int, global_batch: int, speed: float
) -> None:
    # Red when: _splits skips a share, or of equal layouts the one with more devices is taken.
    now = planner(seconds_per_byte=speed)
    found = best(now, method, devices, global_batch).prediction
    steps = {
        layout: float(f"{now.predict(method, layout).step:.9g}")
        for layout in all_layouts(method, devices, global_batch, 32)
    }
    shortest = min(steps.values())
    assert found.step == pytest.approx(shortest)
    fewest = min(layout.devices for layout, seconds in steps.items() if seconds == shortest)
    assert found.layout.devices == fewest


def test_the_search_through_many_devices_stays_small() -> None:
    # Red when: _splits looks at every number of attack ranks.
    assert len(list(_layouts(planner(), "conadv", 4096, 32768, Rules()))) < 2000


def test_rules_are_kept() -> None:
    # Red when: memory or a fixed micro-batch is ignored; cost_of takes the step for "cost", too.
    def layout(batch: int, **rules: Any) -> Layout:
        return best(planner(), "conadv", 8, batch, Rules(**rules)).prediction.layout

    assert layout(256, micro_batch=8, executor="inline") == Layout(8, 0, 8, 4)
    assert layout(240, attack_ranks=3).attack_ranks == 3
    assert layout(256, executor="ranks").attack_ranks > 0
    memory = 4 * WEIGHTS + 8 * 600_000
    small = best(planner(), "noise", 8, 256, Rules(executor="inline", memory=memory))
    assert small.limit == "memory"
    assert small.prediction.layout.micro_batch < 32
    rules = Rules(executor="ranks", objective="cost")
    found = best(planner(), "conadv", 16, 512, rules).prediction
    split = [layout for layout in all_layouts("conadv", 16, 512, 32) if layout.attack_ranks]
    costs = [planner().predict("conadv", each).device_seconds_per_image for each in split]
    assert found.device_seconds_per_image == pytest.approx(min(costs))
    fastest = best(planner(), "conadv", 16, 512, replace(rules, objective="speed")).prediction
    assert found.layout != fastest.layout


@pytest.mark.parametrize(
    ("method", "devices", "batch", "rules", "message"),
    [
        ("noise", 4, 32, Rules(executor="ranks"), "nothing to do with noise"),
        ("disadv", 4, 32, Rules(attack_ranks=1), "nothing to do with disadv"),
        ("noise", 3, 32, Rules(executor="inline"), "does not divide over 3 device(s)"),
        ("noise", 2, 32, Rules(micro_batch=5), "with this executor, micro-batch"),
        ("conadv", 1, 32, Rules(executor="ranks"), "over 1 device(s)"),
        ("noise", 2, 32, Rules(memory=1000), "memory"),
        ("noise", 2, 64, Rules(micro_batch=32, memory=150_000_000), "memory"),
        ("nois", 2, 32, Rules(), "Did you mean 'noise'"),
    ],
)
def test_what_does_not_fit_says_why(
    method: str, devices: int, batch: int, rules: Rules, message: str
) -> None:
    with pytest.raises(ConadvError, match=re.escape(message)):
        best(planner(), method, devices, batch, rules)


# ---- the file


def changed(path: str, value: Any) -> str:
    content = json.loads(EXAMPLE.read_text())
    *parents, last = path.split(".")
    part: Any = content
    for name in parents:
        part = part[int(name) if name.isdigit() else name]
    part[last] = value
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "--measure all"),
        ("{", "Expecting"),
        (changed("format", 2), "format"),
        (changed("methods.noise.points", []), "methods.noise.points"),
        (changed("link.latency", -1), "link.latency"),
        (changed("methods.noise.points.1.rest", math.nan), "NaN"),
        (changed("methods.noise.buckets.0.ready", 1.5), "methods.noise.buckets.0.ready"),
        (changed("methods.noise.points.1.micro_batch", 8), "rising, different micro_batch"),
    ],
)
def test_a_bad_profile_is_an_error_that_names_the_place(
    tmp_path: Path, text: str | None, message: str
) -> None:
    path = tmp_path / "deep" / "profile.json"
    save(PROFILE, path)
    assert load(path) == PROFILE
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(ConadvError, match=re.escape(message)):
        load(path)


def test_a_link_may_be_given() -> None:
    # Red when: bits and bytes are mixed up, or a given link may outrun the processors that move its
    # bytes.
    found = link_of(PROFILE, 10.0, 5.0)
    assert found is not None
    assert (found.seconds_per_byte, found.latency) == pytest.approx((0.8e-9 / PAYLOAD, 5e-6))
    assert link_of(PROFILE, None, None) is LINK
    busy = PROFILE.model_copy(update={"link": planner(busy_seconds_per_byte=1e-9).link})
    slowest = link_of(busy, 1000.0, None)
    assert slowest is not None
    assert slowest.seconds_per_byte == 1e-9
    bare = PROFILE.model_copy(update={"link": None})
    assert link_of(bare, 10.0, 5.0) is not None
    for profile, gbit, latency in ((bare, 10.0, None), (PROFILE, 0.0, None), (PROFILE, None, -1.0)):
        with pytest.raises(ConadvError, match="--link-gbit"):
            link_of(profile, gbit, latency)


# ---- measuring


def test_a_point_is_the_median_over_rounds_of_the_mean_over_ranks() -> None:
    # Red when: ranks and rounds are mixed up, or the rest contains a phase.
    def sample(seconds: float) -> Sample:
        return Sample(seconds, {"gradient": 0.5 * seconds, "attack": 0.25 * seconds})

    found = point(8, [list(map(sample, pair)) for pair in ((1, 3), (8, 8), (4, 4))])
    assert (found.gradient, found.attack, found.rest) == (2.0, 1.0, 1.0)


def test_a_profile_of_a_tiny_network_on_one_process() -> None:
    # Red when: the last pass is taken to begin with the gradient phase, or parameters that it does
    # not touch are late.
    names = {"model": "resnet8", "width": 4, "optimizer": "sgd", "precision": "fp32"}
    images = {"image_size": 8, "channels": 1, "num_classes": 10, "channels_last": False}
    profile = measure_phases(Workload(**names, **images), [2, 4], 1, Comm())
    assert profile is not None
    assert set(profile.methods) == {"vanilla", "noise", "conadv", "conadv-lookahead", "recycle"}
    sizes = [[point.micro_batch for point in m.points] for m in profile.methods.values()]
    assert sizes == [[2, 4]] * 5
    conadv, vanilla = profile.methods["conadv"], profile.methods["vanilla"]
    assert (conadv.passes, vanilla.passes) == (2, 1)
    assert sum(bucket.bytes for bucket in conadv.buckets) == profile.sizes.weights
    assert conadv.buckets[-1].ready > 0
    assert vanilla.buckets[0].ready > 0
    assert profile.sizes.optimizer_state == profile.sizes.weights
    assert profile.sizes.image == 64 * 4
    assert profile.sizes.activations_per_image > 8 * 8 * 4 * 4  # a feature map of the first stage
    assert Planner(profile).predict("conadv", Layout(1, 0, 4, 1)).step > 0


def test_final_moments_are_shares_of_the_last_pass() -> None:
    # Red when: the first touch counts instead of the last, or the pass begins with the phase.
    touch = [("2", 2.0), ("0", 3.0), ("3", 2.5), ("2", 6.0), ("1", 7.0), ("0", 8.0)]
    spans = [("gradient", 1.0, 9.0), *((f"touched {name}", at, at) for name, at in touch)]
    assert final_moments(spans, 2) == pytest.approx({2: 1 / 4, 0: 3 / 4, 1: 1 / 2, 3: 0.0})
    one_pass = [("gradient", 1.0, 5.0), ("touched 1", 3.0, 3.0), ("touched 0", 4.0, 4.0)]
    assert final_moments(one_pass, 1) == pytest.approx({1: 0.5, 0: 0.75})


# ---- what was recorded


def test_predictions_are_as_accurate_as_when_they_were_checked() -> None:
    # Red when: any rule of the model changes a prediction by more than rounding.
    folder = Path(__file__).parent.parent / "results" / "plan"
    recorded = json.loads((folder / "plan_check.json").read_text())
    errors = []
    for row in recorded["rows"]:
        planner, found = predict(Case(**row["case"]), folder)
        assert 1e3 * found.step == pytest.approx(row["predicted_ms"], rel=1e-6), row["name"]
        assert planner.limit(found) == row["limit"]
        errors.append(abs(1e3 * found.step / row["measured_ms"] - 1))
    *others, worst = sorted(errors)
    assert len(errors) == 25
    assert statistics.median(errors) < 0.051
    assert max(others) < 0.137
    assert worst < 0.264  # three processes on two cores, of which the model knows nothing


# ---- the command


def test_rows_say_what_is_extrapolated_and_what_is_hidden() -> None:
    # Red when: a side of the measured range is not asked, or hidden counts what the step still
    # waits for.
    options = {"devices": "1,2,4", "global_batch_size": "64", "executor": "inline"}
    args = Args(EXAMPLE, method="noise,conadv,disadv", **options)
    by = {(row.method, row.devices): row for row in plan_of(args)[1]}
    assert [by["noise", count].extrapolated for count in (1, 2, 4)] == [(), (), ("ranks",)]
    given = plan_of(replace(args, link_gbit=1.0, micro_batch_size=4))[1]
    assert given[-1].extrapolated == ("batch", "ranks", "link")
    assert by["noise", 1].overhead == 1.0
    assert by["conadv", 1].overhead == pytest.approx(0.59 / 0.458)
    assert (by["noise", 1].hidden, by["conadv", 1].hidden, by["disadv", 2].hidden) == (None, 0, 0)
    slow = planner(seconds_per_byte=1e-7)  # the sum takes far longer than the attack
    assert slow.hidden(slow.predict("conadv", Layout(2, 0, 32, 1))) == pytest.approx(1)
    served = planner().predict("conadv", Layout(8, 4, 32, 1))
    assert planner().hidden(served) == pytest.approx(1)


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    status = main(["plan", str(EXAMPLE), *args])
    return status, *capsys.readouterr()


@pytest.mark.parametrize("width", ["80", "140"])
def test_the_command_prints_a_table_and_writes_figure_and_rows(
    width: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Red when: a row is missing, the total is that of other steps, or a narrow table is too wide.
    monkeypatch.setenv("COLUMNS", width)
    figure, rows = tmp_path / "plan.png", tmp_path / "plan.json"
    options = f"--link-gbit 100 --latency-us 10 --steps 500 --price 2 --devices 3,8 --json {rows}"
    status, out, err = run(capsys, *options.split(), "--figure", str(figure))
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= int(width)
    assert "…" not in out
    assert {"total", "step", "method", "cost"} <= set(out.split())
    assert figure.read_bytes().startswith(b"\x89PNG")
    written = json.loads(rows.read_text())["rows"]
    assert len(written) == 2 * len(KINDS)
    assert all(row["total_seconds"] == 500 * row["prediction"]["step"] for row in written)
    assert all(row["images_per_second"] > 0 for row in written)
    status, out, _ = run(capsys, *"--devices 3,4 --executor inline".split())
    assert status == 0  # what does not exist is left out
    assert "does not divide over 3" in " ".join(out.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--devices 0", "must be 1 to"),
        ("--devices one", "not a list of numbers"),
        (f"--global-batch-size {'9' * 26}", "1 to 4194304"),
        ("--micro-batch-size 0", "--micro-batch-size 0 must be 1 or more"),
        ("--memory-gib nan", "--memory-gib nan must be a finite number"),
        ("--memory-gib -1", "--memory-gib -1"),
        ("--method conad", "Did you mean 'conadv'"),
        ("--method noise --attack-ranks 2", "nothing to do with noise"),
        ("--staleness 0", "disadv"),
        ("--latency-us -1", "--latency-us"),
        ("--measure link", "A link is between ranks"),
    ],
)
def test_mistakes_end_with_a_message(
    capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    status, _, err = run(capsys, *options.split())
    assert status == 2
    assert message in err
