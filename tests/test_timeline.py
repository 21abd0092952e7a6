"""Records -> timelines: shares worked out by hand, traces that viewers accept, pictures, bad
records.

The records are written by ``record``: lines of docs/record.md with made-up times, in milliseconds.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conadv.analysis.picture import headline, picture, shown, window
from conadv.analysis.shares import covered, hidden_attack, hidden_communication, overlap, summary
from conadv.analysis.timeline import timeline
from conadv.analysis.trace import trace
from conadv.cli import program
from conadv.cli.timeline import text
from conadv.errors import ConadvError
from conadv.training.loop import train
from conadv.training.record import BESIDE, read_lines

from .test_training import config

Spans = list[tuple[str, float, float]]
STEP = 100.0  # milliseconds from one step to the next
ROOT = Path(__file__).parent.parent

# Both have launched the first bucket at 40 and the second at 50. So gradients are on rank 0's
# network from 40 to 75 (35 ms), 10 ms of it in "wait", and its whole attack lies beside that; on
# rank 1's from 40 to 60 (20 ms), never in "wait", which comes later, and 5 of the attack's 20 ms
# come after it.
OWN: Spans = [("data", 0, 5), ("gradient", 5, 45), ("attack", 45, 65)]
FIRST: Spans = [*OWN, ("wait", 65, 75), ("update", 75, 85)]
FIRST += [("network", 35, 55), ("network", 50, 75)]
SECOND: Spans = [*OWN, ("wait", 65, 66), ("update", 66, 76)]
SECOND += [("network", 40, 50), ("network", 45, 60)]


def seconds(spans: Spans, begin: float) -> list[list[Any]]:
    return [[name, *(round((begin + x) / 1e3, 6) for x in times)] for name, *times in spans]


def record(
    learners: Sequence[Spans], attackers: Sequence[Spans] = (), steps: int = 20, **header: Any
) -> list[Any]:
    """The same spans in every step; rank 0 in "step" lines, others in "timeline" lines."""
    execution = {"executor": "inline", "learners": len(learners), "attack_ranks": len(attackers)}
    settings = {"method": "conadv", "staleness": 1}
    lines: list[Any] = [{"type": "header", "config": settings, "execution": execution | header}]
    for t in range(steps):
        spans = seconds(learners[0], STEP * t)
        lines.append({"type": "step", "step": t, "staleness": 1 if t else None, "spans": spans})
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


# Intervals

cells = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)).map(sorted), max_size=12)


@given(cells, cells)
def test_intervals_are_sets(a: list[list[int]], b: list[list[int]]) -> None:
    # Red when: an interval inside an earlier one counts again, or one that only touches is left
    # out.
    def array(pairs: list[list[int]]) -> np.ndarray:
        return np.array(pairs, dtype=np.float64).reshape(-1, 2)

    def unit_cells(pairs: list[list[int]]) -> set[int]:
        return {cell for start, end in pairs for cell in range(start, end)}

    assert covered(array(a)) == len(unit_cells(a))
    assert covered(array(a), array(b)) == len(unit_cells(a) | unit_cells(b))
    assert overlap(array(a), array(b)) == len(unit_cells(a) & unit_cells(b))


# Shares

FAST: Spans = [("gradient", 0, 40), ("attack", 40, 60), ("wait", 60, 70), ("update", 70, 80)]
SLOW: Spans = [("gradient", 0, 55), ("attack", 55, 75), ("wait", 75, 76), ("update", 76, 86)]
STREAM: Spans = [("gradient", 5, 45), ("attack", 20, 60), ("network", 40, 50), ("update", 60, 70)]
UNEVEN = [[*FAST, ("network", 30, 70)], [*SLOW, ("network", 50, 70)]]


def learner(receive: float) -> Spans:
    begin = 1 + receive
    blocked: Spans = [("send", 0, 1), ("receive", 1, begin)]
    return [*blocked, ("gradient", begin, 60), ("wait", 60, 79), ("update", 79, 80)]


def attacker(attack: float) -> Spans:
    return [("receive", 0, 10), ("attack", 10, 10 + attack), ("send", 10 + attack, 11 + attack)]


# lines -> (seconds, exposed, delay, shares of ranks) in ms, None where nothing is to be hidden
COMMUNICATION = {
    # Red when: buckets are added instead of united (40 ms), "wait" counts as work, ranks are
    # averaged (6/7), or a bucket is on the network before both have launched it (30/40).
    "two learners": (record([FIRST, SECOND]), (27.5, 5, 0.5, {0: 25 / 35, 1: 1})),
    "a slower learner": (record(UNEVEN), (20, 5, 0.5, {0: 10 / 20, 1: 1})),
    "one process": (record([[("gradient", 0, 50), ("attack", 50, 70)]]), None),
}
ATTACK = {
    # Red when: all of an attack counts as hidden, or only what is beside "wait" does.
    "two learners": (record([FIRST, SECOND]), (20, 2.5, 0, {0: 1, 1: 15 / 20})),
    # Red when: the faster rank's attack counts as hidden before the other has launched, at 50.
    "a slower learner": (record(UNEVEN), (20, 7.5, 5, {0: 10 / 20, 1: 15 / 20})),
    # Red when: what lies beside network and gradient counts twice, or the gradient does not count.
    "stream": (record([STREAM]), (40, 10, 0, {0: 30 / 40})),
    # Red when: the learners' waiting is added up, "wait" counts, or "send" does not.
    "attack ranks": (
        record([learner(3), learner(7)], [attacker(20), attacker(40)]),
        (30, 6, 0, {0: 1 - 4 / 30, 1: 1 - 8 / 30}),
    ),
    "late attack ranks": (record([learner(50)], [attacker(20)]), (20, 51, 0, {0: 0})),
    # Red when: an attack without a network beside it counts as hidden.
    "one process": (record([[("gradient", 0, 50), ("attack", 50, 70)]]), (20, 20, 0, {0: 0})),
    "no attack": (record([[("gradient", 0, 50), ("attack", 50, 50.002)]]), None),
}


@pytest.mark.parametrize(
    ("share", "lines", "want"),
    [(hidden_communication, *case) for case in COMMUNICATION.values()]
    + [(hidden_attack, *case) for case in ATTACK.values()],
    ids=[*(f"communication, {n}" for n in COMMUNICATION), *(f"attack, {n}" for n in ATTACK)],
)
def test_shares_by_hand(share: Any, lines: list[Any], want: Any) -> None:
    hidden = share(timeline(lines))
    if want is None:
        assert hidden is None
        return
    total, exposed, delay, by_rank = want
    got = [1e3 * value for value in (hidden.seconds, hidden.exposed, hidden.delay)]
    assert got == pytest.approx([total, exposed, delay], abs=1e-9)
    assert hidden.by_rank == pytest.approx(by_rank)
    assert hidden.share == pytest.approx(max(1 - exposed / total, 0), abs=1e-9)
    beside = 1e3 * sum(hidden.beside.values())
    assert beside == pytest.approx(max(total - exposed, 0), abs=1e-9)


def test_buckets_are_matched_within_their_step() -> None:
    # Red when: buckets are numbered through the run: after a step that rank 1 lacks, they do not
    # match.
    lines = [x for x in record([FIRST, SECOND]) if (x.get("rank"), x.get("step")) != (1, 5)]
    hidden = hidden_communication(timeline(lines))
    assert hidden is not None
    # in step 5 rank 0's own launches count
    assert hidden.by_rank == pytest.approx({0: (17 * 25 + 30) / (17 * 35 + 40), 1: 1})


def test_steps_are_those_of_learners() -> None:
    # Red when: the steps that attack ranks work for, tau further, count as steps of the run.
    lines = record([FIRST], [[("attack", 0, 40)]], steps=20)
    ahead = [x | {"step": x["step"] + 2} if x["type"] == "timeline" else x for x in lines]
    assert timeline(ahead).steps == range(20)


def test_warm_up_does_not_count() -> None:
    # Red when: `steady` is all steps, or leaves out a step less than tau + 1 and a tenth.
    slow: Spans = [("attack", 0, 60), ("gradient", 60, 90), ("update", 90, 95)]
    lines = record([FIRST, SECOND], steps=40)
    for line in lines[1:]:
        if line["step"] < 4:
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
    # Red when: overlapping buckets are added, a step lasts until the next one, or the network is
    # part of the step's extent.
    sends: Spans = [("receive", 0, 30), ("attack", 30, 100), ("transfer", 90, 130)]
    found = summary(timeline(record([FIRST, SECOND], [sends])))
    learner, attacker = (found.loc[role] for role in ("learner", "attack"))
    names = ["data", "gradient", "wait", "attack", "update", "step", "network"]
    assert sorted(learner.index) == sorted(names)
    assert learner.loc["step", "median"] == pytest.approx((0.085 + 0.076) / 2)
    assert learner.loc["network", "median"] == pytest.approx((0.040 + 0.020) / 2)
    assert learner.loc["gradient", "share"] == pytest.approx((40 / 85 + 40 / 76) / 2)
    assert learner["share"].drop(["step", *BESIDE], errors="ignore").sum() == pytest.approx(1)
    want = {"receive": 0.3, "attack": 0.7, "transfer": 0.4, "step": 1.0}
    assert attacker["share"].to_dict() == pytest.approx(want)


def test_the_committed_record() -> None:
    # Red when: records of version 0.2 cannot be read, or the pictures' numbers are not this
    # record's.
    found = {
        path.stem: timeline(read_lines(path))
        for path in (ROOT / "results/timelines").glob("*.jsonl")
    }
    shares = {name: hidden_attack(one) for name, one in found.items()}
    text_of = (ROOT / "results/timelines/shares.txt").read_text()
    assert set(found) == {"single", "disadv", "inline", "ranks"}
    for name, hidden in shares.items():
        assert hidden is not None
        part = text_of.split(f"== {name}\n")[1].split("\n==")[0]
        said = float(part.split("Attack: ")[1].split(" %")[0])
        assert abs(said - 100 * hidden.share) <= 0.05 + 1e-9


# The record


def test_a_resumed_run_has_one_clock_per_part() -> None:
    # Red when: the parts are laid over each other, the shorter one is taken, or a part keeps the
    # other's ranks.
    first = record([FIRST, SECOND], steps=4)
    second = [x | {"step": x["step"] + 4} for x in record([SECOND], steps=10)[1:]]
    resume = {"type": "resume", "step": 4, "execution": {"executor": "stream"}}
    found = timeline([*first, resume, *second])
    assert (found.resumed, found.steps, found.ranks("learner")) == (4, range(4, 14), [0])
    assert (found.execution["executor"], found.config["method"]) == ("stream", "conadv")
    found = timeline([*first, {"type": "resume", "step": 4, "ranks": 1}, *second[:3]])
    assert (found.resumed, found.steps, found.ranks("learner")) == (None, range(4), [0, 1])


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
anything = scalars | st.lists(scalars, max_size=3) | st.dictionaries(st.just("a"), scalars)
span_likes = st.tuples(st.just("wait"), anything, anything).map(list) | anything
fields = ("step", "rank", "role", "staleness", "late", "config", "execution")
optional = dict.fromkeys(fields, anything) | {"spans": st.lists(span_likes, max_size=3) | anything}
kinds = st.sampled_from(["header", "step", "timeline", "resume", "eval"])


@settings(deadline=None, max_examples=40)
@given(st.fixed_dictionaries({"type": kinds}, optional=optional), st.integers(0, 6))
def test_no_record_ends_in_a_traceback(line: dict[str, Any], place: int) -> None:
    # Red when: the type of any field is not checked.
    lines = record([FIRST, SECOND], steps=3)
    lines[place] = {**lines[place], **line}
    try:
        found = timeline(lines)
    except ConadvError:
        return
    list(text(found))
    check_trace(trace(found))
    window(found)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"type": "header"}, {"type": "step", "step": 0, "spans": []}], "--timeline-steps 200"),
        ([{"type": "header"}, [1, 2]], "^the record, line 2 is not what conadv writes"),
        ([{"type": "step", "step": 10**30}], "^the record, line 1 .*: step is "),
        ([{"type": "step", "step": 0, "spans": [["\x1b$x", 1.0, 2.0]]}], r": spans.0.0 is "),
        ([{"type": "step", "step": 0, "spans": [["wait", 2.0, 1.0]]}], "ends before its start"),
    ],
)
def test_records_without_a_timeline(lines: list[Any], message: str) -> None:
    with pytest.raises(ConadvError, match=message):
        timeline(lines, "the record")


# The trace


def check_trace(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Fields and types of the Trace Event Format, metadata first, then spans by start that nest."""
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    events = found["traceEvents"]
    kinds = "".join(event["ph"] for event in events)
    assert kinds == "M" * kinds.count("M") + "X" * kinds.count("X")
    named = {(e["pid"], e.get("tid")) for e in events if e["name"].endswith("_name")}
    complete = [event for event in events if event["ph"] == "X"]
    for event in complete:
        assert all(isinstance(event[key], int) for key in ("ts", "dur", "pid", "tid"))
        assert min(event["ts"], event["dur"]) >= 0
        assert {(event["pid"], None), (event["pid"], event["tid"])} <= named
    assert [event["ts"] for event in complete] == sorted(event["ts"] for event in complete)
    owner = {(event["tid"], event["pid"]) for event in complete}
    assert len(owner) == len({tid for tid, _ in owner})
    for tid, _ in owner:
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
    # Red when: times are in milliseconds, not shifted to the first span, or two ranks share a
    # thread id.
    complete = check_trace(found := trace(timeline(record([FIRST, SECOND], steps=3))))
    assert len(complete) == 3 * 14
    attacks = [(e["ts"], e["dur"]) for e in complete if e["name"] == "attack" and e["pid"] == 1]
    assert attacks == [(45_000, 20_000), (145_000, 20_000), (245_000, 20_000)]
    staleness = {e["args"]["step"]: e["args"].get("staleness") for e in complete}
    assert staleness == {0: None, 1: 1, 2: 1}
    names = {e["args"]["name"] for e in found["traceEvents"] if e["name"].endswith("_name")}
    assert names == {"rank 0 (learner)", "rank 1 (learner)", "compute", "network", "network 2"}
    stream = trace(timeline(record([STREAM])))["traceEvents"]  # an attack beside the gradient
    threads = [e["args"]["name"] for e in stream if e["name"] == "thread_name"]
    assert threads == ["compute", "attack stream", "network"]


names = st.sampled_from(
    ["data", "gradient", "attack", "wait", "network", "transfer", "other_phase"]
)
moments = st.integers(-5_000_000, 5_000_000)
any_spans = st.tuples(names, st.tuples(moments, moments).map(sorted))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(any_spans, min_size=1, max_size=30), min_size=1, max_size=3))
def test_any_record_gives_a_valid_trace(ranks: list[list[tuple[str, list[int]]]]) -> None:
    # Red when: `rows` takes the first row always, or microseconds are cut instead of rounded.
    lines: list[Any] = []
    for rank, spans in enumerate(ranks):
        plain = [[name, start / 1e6, end / 1e6] for name, (start, end) in spans]
        line = {"type": "timeline", "rank": rank, "role": "learner", "step": rank, "spans": plain}
        lines.append(line)
    complete = check_trace(trace(timeline(lines)))
    first = min(start for spans in ranks for _, (start, _) in spans)
    expected = Counter(
        (rank + 1, name, start - first, end - start)
        for rank, spans in enumerate(ranks)
        for name, (start, end) in spans
    )
    assert Counter((e["pid"], e["name"], e["ts"], e["dur"]) for e in complete) == expected


# The picture


def test_the_window_is_typical() -> None:
    # Red when: the window is the first stretch, or may begin in the warm-up.
    lines = record([FIRST], steps=40)
    for line in lines[1:]:
        if line["step"] % 10 == 4:  # an evaluation after every tenth step
            line["spans"][-3][2] += 0.05
    chosen = window(timeline(lines))
    assert len(chosen) == 3
    assert chosen.start >= 4
    assert chosen[-1] % 10 != 4
    assert window(timeline(record([FIRST], steps=3))) == range(2, 3)


def test_picture() -> None:
    # Red when: ranks beyond MOST are drawn, the last attack rank is not, phases that nobody can see
    # are in the legend, or gradients are drawn before all learners have launched them.
    fast: Spans = [("data", 0, 0.001), ("gradient", 5, 60), ("update", 79, 80), ("network", 30, 70)]
    slow: Spans = [("gradient", 5, 60), ("update", 79, 80), ("network", 50, 70)]
    attacks: Spans = [("receive", 0, 10), ("attack", 10, 40)]
    found = timeline(record([fast, slow], [attacks], executor="ranks"))
    figure = picture(found, range(4, 6), "a $title")
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.texts] == ["step 4", "step 5"]
    legend = [label.get_text() for label in figure.legends[0].get_texts()]
    assert legend == ["gradient", "receive", "attack", "update", "all-reduce of gradients"]
    rows = [label.get_text() for label in axes.get_yticklabels()]
    assert rows == ["rank 0", "all-reduce", "rank 1", "all-reduce", "rank 2, attacks"]
    bars = [bar for drawn in axes.collections for bar in drawn.get_paths()]
    starts = sorted(round(bar.vertices[:, 0].min(), 3) for bar in bars)
    assert (starts.count(50), starts.count(30)) == (2, 0)
    many = timeline(record([FIRST] * 30, [FIRST] * 10, steps=3))
    assert (len(shown(many)), shown(many)[0], shown(many)[-1]) == (12, 0, 39)
    assert headline(timeline(record([FIRST, SECOND]))) == (
        "88 % of the attack hidden behind the all-reduce"
    )


# The command


def run(capsys: pytest.CaptureFixture[str], *args: str | Path) -> tuple[int, str, str]:
    code = program.main(["timeline", *map(str, args)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_command_on_a_real_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Red when: the phases of the record and the lengths of its spans are not the same seconds;
    # --out is ignored.
    train(config(method="conadv"), tmp_path / "run")
    lines = read_lines(tmp_path / "run" / "record.jsonl")
    steps = [line for line in lines if line["type"] == "step"]
    for line in steps:
        of_spans = pd.DataFrame(line["spans"]).set_index(0).diff(axis=1)[2].groupby(level=0).sum()
        assert of_spans.to_dict() == pytest.approx(line["phases"], abs=1e-5)
    code, out, _ = run(capsys, tmp_path / "run")
    assert (code, "Attack: 0.0 % hidden." in out) == (0, True)
    written = json.loads((tmp_path / "run" / "timeline" / "trace.json").read_text())
    assert len(check_trace(written)) == sum(len(line["spans"]) for line in steps)
    assert run(capsys, tmp_path / "run", "--out", tmp_path / "there", "--steps", "3:5")[0] == 0
    assert {file.name for file in (tmp_path / "there").iterdir()} == {"trace.json", "timeline.png"}


def test_command_says_what_it_cannot_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Red when: late steps are kept quiet, or missing ranks count as no attack.
    lines = record([learner(5)], [attacker(30)], executor="ranks")
    lines[5]["late"] = lines[1]["late"] = True  # steps 4 and 0, of which the second is warm-up
    assert "1 of 18 steps went without" in run(capsys, write(tmp_path / "late", lines))[1]
    killed = [line for line in lines if line["type"] != "timeline"]
    assert "Attack: unknown." in run(capsys, write(tmp_path / "killed", killed))[1]
    both = [line for line in record([FIRST, SECOND]) if line["type"] != "timeline"]
    assert "Learners are missing" in run(capsys, write(tmp_path / "half", both))[1]


def test_command_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Red when: the check that the message belongs to is taken out.
    good = write(tmp_path / "good", record([FIRST]))
    wrong = write(tmp_path / "bad", [*record([FIRST]), {"type": "step", "step": 99, "spans": 7}])
    (tmp_path / "file").write_text("")
    span = "must be FIRST:END with FIRST < END"
    for args, message in (
        ([tmp_path / "nothing"], "is not a run: it holds no record.jsonl"),
        ([wrong], "record.jsonl, line 22 is not what conadv writes"),
        *(([good, f"--steps={steps}"], span) for steps in ("4", "4:4", "a:b", "-1:3", "1:٣")),
        ([good, "--steps", "30:34"], "Choose --steps 0:20 or a part of it"),
        ([good, "--out", tmp_path / "file"], "Check the path"),
    ):
        code, _, err = run(capsys, *args)
        assert (code, message in " ".join(err.split())) == (2, True), err
    assert not (good / "timeline").exists()
