"""Records -> timelines: shares that were worked out by hand, traces that viewers accept, pictures, and bad records.

The records are written by ``record``: the lines of docs/record.md with made-up times, in milliseconds.
"""

from __future__ import annotations

import io
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from conadv.analysis import Timeline, hidden_attack, hidden_communication, summary, timeline, trace
from conadv.analysis.intervals import difference, intersection, length, lengths_by_group, union
from conadv.analysis.picture import picture, shown, to_png, window
from conadv.cli import program as cli
from conadv.cli import timeline as program
from conadv.errors import ConadvError
from conadv.training.record import BESIDE, read_lines
from conadv.training.trainer import train

from .test_trainer import config

Spans = list[tuple[str, float, float]]
STEP = 100.0  # milliseconds from one step to the next

# Both have launched the first bucket at 40 and the second at 50. So gradients are on rank 0's network from 40 to 75
# (35 ms), 10 ms of it in "wait", and its whole attack lies beside that; on rank 1's from 40 to 60 (20 ms), never in
# "wait", which comes later, and 5 of the attack's 20 ms come after it.
FIRST: Spans = [
    ("data", 0, 5),
    ("gradient", 5, 45),
    ("attack", 45, 65),
    ("wait", 65, 75),
    ("update", 75, 85),
]
FIRST += [("network", 35, 55), ("network", 50, 75)]
SECOND: Spans = [
    ("data", 0, 5),
    ("gradient", 5, 45),
    ("attack", 45, 65),
    ("wait", 65, 66),
    ("update", 66, 76),
]
SECOND += [("network", 40, 50), ("network", 45, 60)]


def seconds(spans: Spans, begin: float) -> list[list[Any]]:
    return [
        [name, round((begin + a) / 1e3, 6), round((begin + b) / 1e3, 6)] for name, a, b in spans
    ]


def record(
    learners: Sequence[Spans], attackers: Sequence[Spans] = (), steps: int = 20, **header: Any
) -> list[Any]:
    """The same spans in every step, STEP apart; rank 0 in "step" lines, the others in "timeline" lines."""
    config = {"method": "conadv", "staleness": 1}
    execution = {
        "executor": "inline",
        "learners": len(learners),
        "attack_ranks": len(attackers),
        "late": "wait",
    }
    lines: list[Any] = [{"type": "header", "config": config, "execution": {**execution, **header}}]
    for t in range(steps):
        staleness = 1 if t else None
        lines.append(
            {
                "type": "step",
                "step": t,
                "staleness": staleness,
                "spans": seconds(learners[0], STEP * t),
            }
        )
    for rank, spans in enumerate([*learners[1:], *attackers], 1):
        role = "learner" if rank < len(learners) else "attack"
        for t in range(steps):
            line = {"type": "timeline", "rank": rank, "role": role, "step": t}
            lines.append({**line, "spans": seconds(spans, STEP * t)})
    return lines


def write(path: Path, lines: Sequence[Any]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "record.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# ---- intervals

cells = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)).map(sorted), max_size=12)


def array(pairs: Sequence[Sequence[int]]) -> np.ndarray:
    return np.array(pairs, dtype=np.float64).reshape(-1, 2)


def unit_cells(intervals: np.ndarray) -> set[int]:
    return {cell for start, end in intervals.tolist() for cell in range(int(start), int(end))}


def is_canonical(intervals: np.ndarray) -> bool:
    flat = intervals.ravel()
    return bool((np.diff(flat) > 0).all())


@given(cells, cells)
def test_interval_sets_are_sets(a: list[list[int]], b: list[list[int]]) -> None:
    # Red when: ends come before starts at one moment, a depth is off by one, or `difference` forgets its last gap.
    x, y = array(a), array(b)
    both, common, rest = union(x, y), intersection(x, y), difference(x, y)
    assert unit_cells(both) == unit_cells(x) | unit_cells(y)
    assert unit_cells(common) == unit_cells(x) & unit_cells(y)
    assert unit_cells(rest) == unit_cells(x) - unit_cells(y)
    assert all(map(is_canonical, (both, common, rest)))
    assert length(x) == len(unit_cells(x))
    assert length(common) + length(rest) == length(x)


@given(cells, st.integers(1, 5), st.randoms(use_true_random=False))
def test_length_by_group(a: list[list[int]], count: int, random: Any) -> None:
    # Red when: the groups are not moved apart far enough (`apart` without the 1.0), or not at all.
    group = np.array([random.randrange(count) for _ in a], dtype=np.int64)
    expected = [length(array(a)[group == g]) for g in range(count)]
    np.testing.assert_allclose(lengths_by_group(array(a), group, count), expected, atol=1e-9)


# ---- shares


def test_communication_by_hand() -> None:
    # Red when: buckets are added instead of united (40 ms), "wait" counts as work, ranks are averaged (6/7), or a
    # bucket is on the network before both have launched it (30/40).
    hidden = hidden_communication(timeline(record([FIRST, SECOND])))
    assert hidden is not None
    assert hidden.by_rank == pytest.approx({0: 25 / 35, 1: 20 / 20})
    assert hidden.share == pytest.approx(45 / 55)
    assert (hidden.seconds, hidden.exposed, hidden.delay) == pytest.approx((0.0275, 0.005, 0.0005))


def test_a_slower_learner_hides_nothing_by_hand() -> None:
    # Red when: the attack of the faster rank, from 40 to 60, counts as hidden before the other has launched, at 50.
    fast: Spans = [
        ("gradient", 0, 40),
        ("attack", 40, 60),
        ("wait", 60, 70),
        ("update", 70, 80),
        ("network", 30, 70),
    ]
    slow: Spans = [
        ("gradient", 0, 55),
        ("attack", 55, 75),
        ("wait", 75, 76),
        ("update", 76, 86),
        ("network", 50, 70),
    ]
    found = timeline(record([fast, slow]))
    attack, communication = hidden_attack(found), hidden_communication(found)
    assert attack is not None
    assert communication is not None
    assert attack.by_rank == pytest.approx({0: 10 / 20, 1: 15 / 20})
    assert attack.delay == pytest.approx(0.010 / 2)
    assert communication.by_rank == pytest.approx({0: 10 / 20, 1: 1})
    assert communication.delay == pytest.approx(0.001 / 2)
    alone = hidden_attack(
        timeline([line for line in record([fast, slow]) if line["type"] != "timeline"])
    )
    assert alone is not None
    assert alone.share == 1.0  # of a run that was killed there is nothing to compare with


def test_buckets_are_matched_within_their_step() -> None:
    # Red when: buckets are numbered through the run: after a step that rank 1 lacks, they no longer match.
    lines = [
        line for line in record([FIRST, SECOND]) if (line.get("rank"), line.get("step")) != (1, 5)
    ]
    hidden = hidden_communication(timeline(lines))
    assert hidden is not None
    assert hidden.by_rank == pytest.approx(
        {0: (17 * 25 + 30) / (17 * 35 + 40), 1: 1}
    )  # in step 5 its own launches


def test_own_attack_by_hand() -> None:
    # Red when: all of an attack counts as hidden, or only what is beside "wait" does.
    hidden = hidden_attack(timeline(record([FIRST, SECOND])))
    assert hidden is not None
    assert hidden.by_rank == pytest.approx({0: 1.0, 1: 15 / 20})
    assert hidden.share == pytest.approx(35 / 40)
    assert hidden.beside == pytest.approx({"network": 0.0175, "gradient": 0.0})
    assert hidden.exposed == pytest.approx(0.0025)


def test_attack_on_a_second_stream_by_hand() -> None:
    # Red when: what lies beside network and gradient counts twice (5 ms), or the gradient does not count.
    spans: Spans = [
        ("gradient", 5, 45),
        ("attack", 20, 60),
        ("network", 40, 50),
        ("update", 60, 70),
    ]
    hidden = hidden_attack(timeline(record([spans], executor="stream")))
    assert hidden is not None
    assert hidden.beside == pytest.approx({"network": 0.010, "gradient": 0.020})
    assert hidden.share == pytest.approx(30 / 40)


def test_attack_ranks_by_hand() -> None:
    # Red when: the learners' waiting is added up, "wait" counts, "send" does not, or the share is not clipped.
    def learner(receive: float) -> Spans:
        blocked: Spans = [("send", 0, 1), ("receive", 1, 1 + receive)]
        return [*blocked, ("gradient", 1 + receive, 60), ("wait", 60, 79), ("update", 79, 80)]

    def attacker(attack: float) -> Spans:
        return [("receive", 0, 10), ("attack", 10, 10 + attack), ("send", 10 + attack, 11 + attack)]

    hidden = hidden_attack(timeline(record([learner(3), learner(7)], [attacker(20), attacker(40)])))
    assert hidden is not None
    assert hidden.share == pytest.approx(1 - 6 / 30)
    assert hidden.by_rank == pytest.approx({0: 1 - 4 / 30, 1: 1 - 8 / 30})
    worse = hidden_attack(timeline(record([learner(50)], [attacker(20)])))
    assert worse is not None
    assert (worse.share, worse.exposed) == pytest.approx((0.0, 0.051))


def test_steps_are_those_of_learners() -> None:
    # Red when: the steps that attack ranks work for, tau further, count as steps of the run.
    lines = record([FIRST], [[("attack", 0, 40)]], steps=20)
    ahead = [
        {**line, "step": line["step"] + 2} if line["type"] == "timeline" else line for line in lines
    ]
    assert timeline(ahead).steps == range(20)


def test_one_process_hides_nothing() -> None:
    # Red when: an attack without a network beside it counts as hidden.
    found = timeline(record([[("gradient", 0, 50), ("attack", 50, 70), ("update", 70, 80)]]))
    assert hidden_communication(found) is None
    hidden = hidden_attack(found)
    assert hidden is not None
    assert hidden.share == 0.0
    assert hidden_attack(timeline(record([[("gradient", 0, 50), ("update", 50, 60)]]))) is None


def test_warm_up_does_not_count() -> None:
    # Red when: `steady` is all steps, or leaves out a step less than tau + 1 and a tenth.
    slow: Spans = [("attack", 0, 60), ("gradient", 60, 90), ("update", 90, 95)]
    lines = record([FIRST, SECOND], steps=40)
    for line in lines:
        if line["type"] != "header" and line["step"] < 4:
            line["spans"] = seconds(slow, STEP * line["step"])
    found = timeline(lines)
    assert found.steady == range(4, 40)
    hidden = hidden_attack(found)
    assert hidden is not None
    assert hidden.share == pytest.approx(35 / 40)
    lines[0]["config"]["staleness"] = 7
    assert timeline(lines).steady == range(8, 40)
    assert timeline(record([FIRST], steps=2)).steady == range(2)  # nothing else is there


def test_phase_table_by_hand() -> None:
    # Red when: overlapping buckets are added, a step lasts until the next one, or the network is part of the extent.
    sends: Spans = [("receive", 0, 30), ("attack", 30, 100), ("transfer", 90, 130)]
    learner, attacker = summary(timeline(record([FIRST, SECOND], [sends])))
    assert (learner.role, learner.ranks, learner.steps, attacker.role) == (
        "learner",
        2,
        18,
        "attack",
    )
    assert learner.median == pytest.approx((0.085 + 0.076) / 2)
    assert learner.between == pytest.approx((0.015 + 0.024) / 2)
    medians = {row.phase: row.median for row in learner.phases}
    assert list(medians) == ["data", "gradient", "wait", "attack", "update", "network"]
    assert medians["network"] == pytest.approx((0.040 + 0.020) / 2)
    shares = {row.phase: row.share for row in learner.phases}
    assert shares["gradient"] == pytest.approx((40 / 85 + 40 / 76) / 2)
    assert sum(share for name, share in shares.items() if name not in BESIDE) == pytest.approx(1)
    assert {row.phase: row.share for row in attacker.phases} == pytest.approx(
        {"receive": 0.3, "attack": 0.7, "transfer": 0.4}
    )


# ---- the record


def test_a_resumed_run_has_one_clock_per_part() -> None:
    # Red when: the parts are laid over each other, the shorter one is taken, or a part keeps the other's ranks.
    first = record([FIRST, SECOND], steps=4)
    second = [{**line, "step": line["step"] + 4} for line in record([SECOND], steps=10)[1:]]
    found = timeline(
        [*first, {"type": "resume", "step": 4, "execution": {"executor": "stream"}}, *second]
    )
    assert (found.resumed, found.steps, len(found.lanes)) == (4, range(4, 14), 1)
    assert found.setting("execution", "executor") == "stream"
    again = [{"type": "resume", "step": 4, "ranks": 1}, *second[:3]]
    found = timeline([*first, *again])
    assert (found.resumed, found.steps, len(found.lanes)) == (None, range(4), 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda line: line.update(spans={"a": 1}), "spans must be a list"),
        (lambda line: line.update(spans=[["wait", 1.0]]), r"must be \[phase, start, end\]"),
        (lambda line: line.update(spans=[[["wait"], 1.0, 2.0]]), "no name of a phase"),
        (lambda line: line.update(spans=[["\x1b[31m$x", 1.0, 2.0]]), "no name of a phase"),
        (lambda line: line.update(spans=[["wait", 2.0, 1.0]]), "start <= end"),
        (lambda line: line.update(spans=[["wait", True, 2.0]]), "start <= end"),
        (lambda line: line.update(spans=[["wait", "1", 2.0]]), "start <= end"),
        (lambda line: line.update(spans=[["wait", 0.0, float("nan")]]), "start <= end"),
        (lambda line: line.update(spans=[["wait", 0.0, 10**400]]), "start <= end"),
        (lambda line: line.update(step=-1), "step must be a whole number"),
        (lambda line: line.update(step=1.5), "step must be a whole number"),
        (lambda line: line.update(step=10**30), "step must be a whole number"),
        (lambda line: line.pop("rank"), "rank must be a whole number"),
        (lambda line: line.update(rank=[1]), "rank must be a whole number"),
        (lambda line: line.update(role={"x": 1}), "role must be one of learner, attack"),
        (lambda line: line.update(role="attack"), "rank 1 is attack here and learner above"),
        (lambda line: line.pop("type"), "no line of a conadv record"),
    ],
)
def test_bad_lines_are_named(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    # Red when: the check that the message belongs to is taken out (each of them ends in another error, or in none).
    lines = record([FIRST, SECOND], steps=3)
    change(lines[5])
    with pytest.raises(ConadvError, match=rf"^the record, line 6: .*{message}"):
        timeline(lines, "the record")


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.just("attack"),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)
span_likes = st.lists(
    st.one_of(st.tuples(st.just("wait"), anything, anything).map(list), anything), max_size=3
)
fields = dict.fromkeys(
    ("step", "rank", "role", "staleness", "late", "config", "execution"), anything
)
kinds = st.sampled_from(["header", "step", "timeline", "resume", "eval"])


@settings(deadline=None, max_examples=60)
@given(
    st.fixed_dictionaries({"type": kinds}, optional={**fields, "spans": span_likes | anything}),
    st.integers(0, 6),
)
def test_no_record_ends_in_a_traceback(line: dict[str, Any], place: int) -> None:
    # Red when: any check of a type is taken out.
    lines = record([FIRST, SECOND], steps=3)
    lines[place] = {**lines[place], **line}
    try:
        found = timeline(lines)
    except ConadvError:
        return
    list(program.text(found))
    check_trace(trace(found))
    window(found)


def test_records_without_spans_say_what_to_do() -> None:
    # Red when: a record of an older version, or one of --timeline-steps 0, gives an empty timeline.
    for spans in ({}, {"spans": []}):
        with pytest.raises(ConadvError, match="--timeline-steps 200"):
            timeline([{"type": "header"}, {"type": "step", "step": 0, **spans}])
    with pytest.raises(ConadvError, match="no line of a conadv record"):
        timeline([[1, 2]])


def test_headers_may_hold_anything() -> None:
    # Red when: the method is looked up in METHODS itself, or a setting without asking whether its group is a dict.
    lines = record([FIRST])
    for header in (
        {},
        {"config": 3, "execution": []},
        {"config": {"method": ["x"], "staleness": "1"}},
    ):
        lines[0] = {"type": "header", **header}
        assert "1 learner" in next(iter(program.text(timeline(lines))))


# ---- the trace


def check_trace(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Fields and types of the Trace Event Format, metadata first, sorted by start, and spans of a thread that nest."""
    assert found["displayTimeUnit"] in ("ms", "ns")
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    events = found["traceEvents"]
    kinds = "".join(event["ph"] for event in events)
    assert kinds == "M" * kinds.count("M") + "X" * kinds.count("X")
    named = {
        (event["pid"], event.get("tid"))
        for event in events
        if event["name"] in ("process_name", "thread_name")
    }
    complete = [event for event in events if event["ph"] == "X"]
    for event in complete:
        assert all(isinstance(event[key], int) for key in ("ts", "dur", "pid", "tid"))
        assert event["ts"] >= 0
        assert event["dur"] >= 0
        assert all(isinstance(event[key], str) and event[key] for key in ("name", "cat"))
        assert {(event["pid"], None), (event["pid"], event["tid"])} <= named
    assert [event["ts"] for event in complete] == sorted(event["ts"] for event in complete)
    owner = {(event["tid"], event["pid"]) for event in complete}
    assert len(owner) == len({tid for tid, _ in owner})
    for tid in {event["tid"] for event in complete}:
        check_nesting([event for event in complete if event["tid"] == tid])
    return complete


def check_nesting(events: list[dict[str, Any]]) -> None:
    open_until: list[int] = []
    for event in events:
        while open_until and open_until[-1] <= event["ts"]:
            open_until.pop()
        end = event["ts"] + event["dur"]
        assert not open_until or end <= open_until[-1], "partial overlap within a thread"
        open_until.append(end)


def test_trace_by_hand() -> None:
    # Red when: times are in milliseconds, not shifted to the first span, or threads of two ranks share an id.
    found = timeline(record([FIRST, SECOND], steps=3))
    complete = check_trace(trace(found))
    assert len(complete) == 3 * 14
    assert [(e["ts"], e["dur"]) for e in complete if e["name"] == "attack" and e["pid"] == 1] == [
        (45_000, 20_000),
        (145_000, 20_000),
        (245_000, 20_000),
    ]
    assert {e["args"]["step"]: e["args"].get("staleness") for e in complete} == {
        0: None,
        1: 1,
        2: 1,
    }
    names = {
        e["args"]["name"]
        for e in trace(found)["traceEvents"]
        if e["name"] in ("process_name", "thread_name")
    }
    assert names == {"rank 0 (learner)", "rank 1 (learner)", "compute", "network", "network 2"}


def test_the_trace_check_can_fail() -> None:
    def event(start: int, end: int) -> dict[str, Any]:
        return {"ts": start, "dur": end - start}

    check_nesting([event(0, 10), event(2, 5), event(5, 10), event(10, 11)])
    with pytest.raises(AssertionError, match="partial overlap"):
        check_nesting([event(0, 10), event(5, 11)])


names = st.sampled_from(
    ["data", "gradient", "attack", "wait", "update", "network", "transfer", "other_phase"]
)
moments = st.integers(-5_000_000, 5_000_000)
any_spans = st.lists(
    st.tuples(names, st.tuples(moments, moments).map(sorted)), min_size=1, max_size=30
)


@settings(deadline=None)
@given(st.lists(any_spans, min_size=1, max_size=3))
def test_any_record_gives_a_valid_trace(ranks: list[list[tuple[str, list[int]]]]) -> None:
    # Red when: `rows` takes the first row always, or microseconds are cut instead of rounded.
    lines: list[Any] = []
    for rank, spans in enumerate(ranks):
        plain = [[name, start / 1e6, end / 1e6] for name, (start, end) in spans]
        lines.append(
            {"type": "timeline", "rank": rank, "role": "learner", "step": rank, "spans": plain}
        )
    complete = check_trace(trace(timeline(lines)))
    first = min(start for spans in ranks for _, (start, _) in spans)
    expected = Counter(
        (rank + 1, name, start - first, end - start)
        for rank, spans in enumerate(ranks)
        for name, (start, end) in spans
    )
    assert Counter((e["pid"], e["name"], e["ts"], e["dur"]) for e in complete) == expected


def test_an_attack_on_a_second_stream_has_its_own_thread() -> None:
    # Red when: the attack shares the gradient's track (it then lies on "compute 2").
    spans: Spans = [("gradient", 5, 45), ("attack", 20, 60), ("update", 60, 70)]
    events = trace(timeline(record([spans])))["traceEvents"]
    assert [e["args"]["name"] for e in events if e["name"] == "thread_name"] == [
        "compute",
        "attack stream",
    ]


# ---- the picture


def test_the_window_is_typical() -> None:
    # Red when: the window is the first stretch, or may begin in the warm-up.
    lines = record([FIRST], steps=40)
    for line in lines[1:]:
        if line["step"] % 10 == 5:  # an evaluation after every tenth step
            line["spans"] = [
                [name, start, end + (0.05 if name == "update" else 0)]
                for name, start, end in line["spans"]
            ]
    assert window(timeline(lines)) == range(20, 24)
    assert window(timeline(record([FIRST], steps=3))) == range(2, 3)


def test_picture_opens_with_the_right_size(tmp_path: Path) -> None:
    # Red when: ranks beyond MOST are drawn too, or the figure's height does not follow the number of rows.
    def size(found: Timeline) -> tuple[int, int]:
        image = Image.open(io.BytesIO(to_png(picture(found, window(found), "a $title"))))
        image.load()
        return image.size

    one, two, many = (size(timeline(record([FIRST] * ranks, steps=8))) for ranks in (1, 2, 40))
    assert one[0] == two[0] == many[0] == 1300
    assert 150 < one[1] < two[1] < many[1] < 1400


def test_picture_labels() -> None:
    # Red when: attack bars do not say whom they are for, the wait for a slower rank is drawn as network, or phases
    # that nobody can see (a microsecond) are in the legend.
    fast: Spans = [("data", 0, 0.001), ("gradient", 5, 60), ("update", 79, 80), ("network", 30, 70)]
    slow: Spans = [("gradient", 5, 60), ("update", 79, 80), ("network", 50, 70)]
    found = timeline(
        record([fast, slow], [[("receive", 0, 10), ("attack", 10, 40)]], executor="ranks")
    )
    figure = picture(found, range(4, 6), "title")
    assert [text.get_text() for text in figure.axes[0].texts if "for" in text.get_text()] == [
        "for 4",
        "for 5",
    ]
    assert [text.get_text() for text in figure.axes[0].texts if "step" in text.get_text()] == [
        "step 4",
        "step 5",
    ]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert (
        legend
        == "gradient,receive,attack,update,network: gradients,waits for a slower rank".split(",")
    )
    rows = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert rows == ["rank 0, learner", "network", "rank 1, learner", "network", "rank 2, attacks"]


def test_many_ranks_are_represented() -> None:
    # Red when: the attack ranks, or the last learner, are not among those that are drawn.
    found = timeline(record([FIRST] * 30, [FIRST] * 10, steps=3))
    assert [lane.rank for lane in shown(found)] == [0, 4, 7, 11, 14, 18, 22, 25, 29, 30, 34, 39]
    few = timeline(record([FIRST] * 3, steps=3))
    assert shown(few) == list(few.lanes)


# ---- the command


def run(capsys: pytest.CaptureFixture[str], *args: str | Path) -> tuple[int, str, str]:
    code = cli.main(["timeline", *map(str, args)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Red when: the shares are swapped, the files are not written, or --out is ignored.
    path = write(tmp_path / "run", record([FIRST, SECOND]))
    code, out, err = run(capsys, path)
    assert (code, err) == (0, "")
    assert "conadv, executor inline, 2 learners" in out
    assert (
        "Communication: 81.8 % hidden. Gradients were on the network for 27.50 ms of a step, 5.00 ms of it"
        in out
    )
    assert (
        "Attack: 87.5 % hidden. Of 20.00 ms per step, 17.50 ms were beside gradients on the network; 2.50 ms"
        in out
    )
    assert "(by learner: 75.0 % to 100.0 %)" in out
    check_trace(json.loads((path / "timeline" / "trace.json").read_text()))
    Image.open(path / "timeline" / "timeline.png").verify()
    code, out, _ = run(capsys, path, "--out", tmp_path / "there", "--steps", "3:5")
    assert code == 0
    assert {file.name for file in (tmp_path / "there").iterdir()} == {"trace.json", "timeline.png"}


def test_command_on_a_real_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Red when: the phases of the record and the lengths of its spans are not the same seconds.
    train(config(method="conadv"), tmp_path / "run")
    steps = [
        line for line in read_lines(tmp_path / "run" / "record.jsonl") if line["type"] == "step"
    ]
    for line in steps:
        of_spans = Counter[str]()
        for name, start, end in line["spans"]:
            of_spans[name] += end - start
        assert of_spans == pytest.approx(line["phases"], abs=1e-5)
    code, out, _ = run(capsys, tmp_path / "run")
    assert code == 0
    assert "Attack: 0.0 % hidden." in out
    trace_file = tmp_path / "run" / "timeline" / "trace.json"
    assert len(check_trace(json.loads(trace_file.read_text()))) == sum(
        len(line["spans"]) for line in steps
    )


def attack_ranks() -> tuple[list[Spans], list[Spans]]:
    learner: Spans = [
        ("send", 0, 1),
        ("receive", 1, 6),
        ("gradient", 6, 60),
        ("wait", 60, 79),
        ("update", 79, 80),
    ]
    return [learner], [[("receive", 0, 10), ("attack", 10, 40), ("send", 40, 41)]]


def test_command_says_what_it_cannot_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Red when: late steps are kept quiet, missing attack ranks count as no attack, or an empty phase as one.
    learners, attackers = attack_ranks()
    lines = record(learners, attackers, executor="ranks")
    assert (
        "Attack: 80.0 % hidden. An attack rank" in run(capsys, write(tmp_path / "ranks", lines))[1]
    )
    lines[5]["late"] = lines[1]["late"] = True  # steps 4 and 0, of which the second is warm-up
    assert (
        "1 of 18 steps went without adversarial images"
        in run(capsys, write(tmp_path / "late", lines))[1]
    )
    killed = [line for line in lines if line["type"] != "timeline"]
    assert "Attack: unknown." in run(capsys, write(tmp_path / "killed", killed))[1]
    both = [line for line in record([FIRST, SECOND]) if line["type"] != "timeline"]
    assert "Learners are missing in the record" in run(capsys, write(tmp_path / "half", both))[1]
    vanilla = record([[("gradient", 0, 50), ("attack", 50, 50.002), ("update", 51, 60)]])
    text = run(capsys, write(tmp_path / "vanilla", vanilla))[1]
    assert "Communication: none" in text
    assert "Attack: none." in text


def bad_commands(path: Path) -> Iterator[tuple[list[str | Path], str]]:
    good = write(path / "good", record([FIRST]))
    yield [path / "nothing"], "is not a run: it holds no record.jsonl"
    yield [write(path / "old", [{"type": "header"}])], "Train again with --timeline-steps 200"
    yield (
        [write(path / "bad", [*record([FIRST]), {"type": "step", "step": 99, "spans": 7}])],
        "record.jsonl, line 22: ",
    )
    for steps in ("4", "4:4", "5:4", "a:b", "-1:3", "1:٣"):
        yield [good, f"--steps={steps}"], "must be FIRST:END with FIRST < END"
    yield [good, "--steps", "30:34"], "Choose --steps 0:20 or a part of it"
    (path / "file").write_text("")
    yield [good, "--out", path / "file"], "Choose another --out"


def test_command_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Red when: the check that the message belongs to is taken out.
    for args, message in bad_commands(tmp_path):
        code, _, err = run(capsys, *args)
        assert (code, message in err) == (2, True), err
    assert not (tmp_path / "good" / "timeline").exists()


def test_a_hundred_ranks_are_quick(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Red when: something is quadratic in spans or ranks. Measured: 2 s of one core, for 140,000 spans.
    path = write(tmp_path, record([FIRST] * 100, steps=200))
    begin = time.process_time()
    assert run(capsys, path)[0] == 0
    assert time.process_time() - begin < 10


@pytest.mark.parametrize("line", ["[" * 100_000, '{"step": ' + "9" * 5000 + "}", "{"])
def test_a_line_that_is_no_sane_json_is_a_users_error(line: str, tmp_path: Path) -> None:
    # Red when: only JSONDecodeError is caught.
    file = tmp_path / "record.jsonl"
    file.write_text('{"type": "header"}\n' + line + "\n")
    with pytest.raises(ConadvError, match="line 2 is not JSON"):
        read_lines(file)
