"""The live view: records that grow, are cut off, begin anew or are hostile, and what a frame says of them."""

from __future__ import annotations

import io
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from conadv import ConadvError
from conadv.cli.program import main
from conadv.watch import many, view
from conadv.watch.command import folder, is_run, one_run
from conadv.watch.follow import TAIL_BYTES, Follower, ends
from conadv.watch.state import LOSSES, State

HEADER = {
    "type": "header",
    "time": "2026-01-01T00:00:00+00:00",
    "steps": 10,
    "ranks": 1,
    "config": {"recipe": "digits", "method": "conadv", "seed": 3, "global_batch_size": 64},
}


def step(index: int, **changes: Any) -> dict[str, Any]:
    phases = {"data": 0.01, "gradient": 0.3, "attack": 0.09}
    values = {
        "type": "step",
        "step": index,
        "epoch": index // 5,
        "lr": 0.5,
        "loss": 2.0 / (index + 1),
        "grad_norm": 1.5,
    }
    return (
        values
        | {"losses": {"clean": 1.0}, "phases": phases, "seconds": 0.4, "time": 0.4 * (index + 1)}
        | changes
    )


def write(path: Path, *lines: dict[str, Any], mode: str = "a") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open(mode) as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def screen(shown: RenderableType, width: int = 80) -> str:
    out = io.StringIO()
    Console(file=out, width=width, highlight=False).print(shown)
    return out.getvalue()


# ---- following


def test_a_torn_line_is_read_when_its_end_comes(tmp_path: Path) -> None:
    # Red when: the rest of a line is dropped, or taken for a line of its own.
    record = tmp_path / "record.jsonl"
    follower = Follower(record)
    assert list(follower.lines()) == []  # there is no record yet
    write(record, HEADER, step(0))
    torn = json.dumps(step(1)) + "\n"
    with record.open("a") as file:
        file.write(torn[:25])
    assert [line["type"] for line in follower.lines()] == ["header", "step"]
    assert list(follower.lines()) == []
    with record.open("a") as file:
        file.write(torn[25:] + "no json\n[1]\n")
    assert [line["step"] for line in follower.lines()] == [1]
    assert (follower.broken, follower.restarts) == (2, 0)


def test_a_record_that_is_cut_or_replaced_begins_anew(tmp_path: Path) -> None:
    # Red when: only the size, or only the file's identity, is looked at.
    record = tmp_path / "record.jsonl"
    write(record, HEADER, *map(step, range(6)))
    look = one_run(tmp_path, Console(file=io.StringIO()))
    assert "step 6/10" in screen(look(80, 24)[0])
    write(record, HEADER, *map(step, range(3)), mode="w")
    assert "step 3/10" in screen(look(80, 24)[0])
    write(tmp_path / "new", HEADER, *map(step, range(9)))
    (tmp_path / "new").replace(record)
    assert "step 9/10" in screen(look(80, 24)[0])


def test_a_line_without_end_is_an_error_and_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("conadv.watch.follow.LINE_BYTES", 1000)
    (tmp_path / "record.jsonl").write_text("x" * 5000)
    with pytest.raises(ConadvError, match="longer than 1,000 bytes"):
        list(Follower(tmp_path / "record.jsonl").lines())


def test_the_ends_of_a_long_record(tmp_path: Path) -> None:
    # Red when: the first line of the tail is taken for a whole one, or a torn last line is kept.
    record = tmp_path / "record.jsonl"
    write(record, HEADER, *(step(i, pad="x" * 200) for i in range(400)))
    with record.open("a") as file:
        file.write('{"type": "step", "step": 4')
    assert record.stat().st_size > TAIL_BYTES
    found = ends(record)
    assert found[0] == HEADER
    assert found[-1]["step"] == 399
    assert [line["step"] for line in found[1:]] == list(range(400 - len(found) + 1, 400))


# ---- what is shown


def test_numbers_by_hand() -> None:
    # Red when: shares are of the wall clock, the time left of all steps, or the median takes the first step.
    state = State()
    for line in (HEADER, step(0, seconds=9.0), step(1), step(2, staleness=1), step(3)):
        state.add(line)
    assert (state.done, state.total) == (4, 10)
    assert state.phase_shares() == pytest.approx({"gradient": 0.75, "attack": 0.225, "data": 0.025})
    assert state.step_seconds() == 0.4
    assert state.seconds_left() == pytest.approx(6 * 0.4)
    for i in range(4, 3 * LOSSES):
        state.add(step(i))
    assert LOSSES / 2 <= len(state.losses) <= LOSSES
    assert state.losses[0] == 2.0
    assert all(
        earlier > later for earlier, later in zip(state.losses, state.losses[1:], strict=False)
    )


def test_a_frame_fits_and_names_what_matters(tmp_path: Path) -> None:
    # Red when: a warning has no rule, or events push the frame over the screen.
    record = tmp_path / "record.jsonl"
    write(record, HEADER, *(step(i, phases={"data": 0.3, "gradient": 0.3}) for i in range(5)))
    write(record, {"type": "eval", "step": 5, "split": "test", "loss": 1.0, "accuracy": 0.75})
    write(
        record,
        *(
            {"type": "bad_image", "step": 5, "path": f"a/{i}.png", "reason": "empty"}
            for i in range(30)
        ),
    )
    write(record, step(5, skipped="loss is not finite", loss=None, late=True))
    look = one_run(tmp_path, Console(file=io.StringIO()))
    for width, height in ((80, 24), (100, 30)):
        shown, over = look(width, height)
        text = screen(shown, width)
        assert not over
        assert len(text.splitlines()) <= height
        assert max(map(len, text.splitlines())) <= width
        for words in (
            "digits conadv",
            "seed 3",
            "60 %",
            "not finite",
            "75.00 %",
            "data takes 44 %",
            "1 update(s) left",
        ):
            assert words in text, words
        for words in ("30 image file(s)", "1 step(s) without", "160 images/s"):
            assert words in text, words


@pytest.mark.parametrize(
    ("last", "files", "age", "status"),
    [
        ({"type": "stop", "step": 5, "signal": "SIGTERM"}, (), 0, "stopped"),
        ({"type": "error", "step": 5, "message": "no space"}, (), 0, "failed"),
        ({"type": "resume", "step": 5, "damaged": []}, (), 0, "running"),
        ({"type": "resume", "step": 5, "damaged": ["x"]}, (), 100, "silent"),
        ({"type": "eval", "step": 5, "split": "test"}, ("summary.json",), 100, "finished"),
    ],
)
def test_how_a_run_stands(
    last: dict[str, Any], files: tuple[str, ...], age: float, status: str, tmp_path: Path
) -> None:
    # Red when: a stop that a resume followed still counts, or a run without news counts as running.
    record = tmp_path / "record.jsonl"
    write(record, HEADER, step(0), {"type": "stop", "step": 1}, last)
    for name in files:
        (tmp_path / name).write_text("{}")
    os.utime(record, (time.time() - age,) * 2)
    shown, over = one_run(tmp_path, Console(file=io.StringIO()))(80, 24)
    assert status in screen(shown)
    assert over == (status in ("stopped", "failed", "finished"))


HOSTILE = "[bold red]\x1b[2J\x07\u202e\n[/nope]" + "A" * 10_000


def test_hostile_records_are_shown_as_text(tmp_path: Path) -> None:
    # Red when: an event is printed as markup or unescaped, or a value of another type raises.
    odd: list[Any] = [None, True, "x", [], {}, 1e308, -1, {"a": {"b": 1}}, HOSTILE, 10**400]
    lines = [{"type": kind, **dict.fromkeys(FIELDS, value)} for kind in KINDS for value in odd]
    lines += [
        {**HEADER, "config": {"recipe": HOSTILE, "method": HOSTILE, "global_batch_size": HOSTILE}}
    ]
    lines += [
        step(1, losses={HOSTILE: 1.0}, phases={HOSTILE: 1.0}),
        {"type": "error", "step": 1, "message": HOSTILE},
    ]
    lines += [{"type": "_add_step"}, {"type": "__init__"}, {"type": ""}, {"type": HOSTILE}]
    write(tmp_path / "record.jsonl", *lines)
    for kind in (one_run(tmp_path, Console(file=io.StringIO())), folder(tmp_path)):
        text = screen(kind(80, 24)[0])
        assert "\x1b" not in text
        assert "\x07" not in text
        assert "\u202e" not in text
    assert "[bold red]\\x1b" in screen(
        one_run(tmp_path, Console(file=io.StringIO()))(400, 40)[0], 400
    )


KINDS = ("header", "step", "eval", "stop", "error", "resume", "bad_image")
FIELDS = "step epoch lr loss losses grad_norm phases seconds time staleness skipped late split accuracy steps config".split()
FIELDS += "ranks message signal path reason damaged".split()


# ---- folders


def sweep(out: Path) -> Path:
    """Four runs: one going, one finished, one failed, one planned; and what sweep.json says of them."""
    for name in ("going", "done", "failed"):
        write(out / "runs" / name / "record.jsonl", HEADER, *map(step, range(4)))
        (out / "runs" / name / "config.yaml").write_text("{}")
    (out / "runs" / "done" / "summary.json").write_text('{"test_accuracy": 0.875, "seconds": 70.0}')
    (out / "runs" / "failed" / "failed.json").write_text('{"error": "x", "diverged": true}')
    trial = {"runs": ["runs/going", "runs/done", "runs/failed"]}
    done = {"arm": "a", "trials": [trial], "runs": ["runs/done"], "seeds": [0]}
    cells = [done, {"arm": "b", "trials": [], "runs": [], "seeds": [0, 1]}]
    (out / "sweep.json").write_text(json.dumps({"cells": cells}))
    return out


def test_a_sweep_is_counted_and_its_runs_listed(tmp_path: Path) -> None:
    # Red when: runs without a choice are not counted as planned, or a failed run counts as going.
    out = sweep(tmp_path / "sweep")
    runs = many.Runs(out)
    seen = runs.look()
    assert [(run.name, run.status) for run in seen] == [
        ("runs/going", "running"),
        ("runs/failed", "failed"),
        ("runs/done", "finished"),
    ]
    assert runs.planned() == 5
    shown, over = folder(out)(80, 24)
    text = screen(shown)
    for words in ("2 of 5 runs ended", "87.50 %", "0:01:10", "4/10"):
        assert words in text
    assert not over
    assert many.is_over(seen[1:], 2)
    assert not many.is_over(seen[1:], 5)
    (out / "sweep.json").write_text('{"cells": 5}')
    with pytest.raises(ConadvError, match="of a sweep"):
        runs.planned()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(sweep(tmp_path / "sweep")), "--once"]) == 0
    assert "2 of 5 runs ended" in capsys.readouterr().out
    assert (
        main(["watch", str(tmp_path / "sweep" / "runs" / "going")]) == 0
    )  # no terminal: one frame
    assert "step 4/10" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    for args, words in (
        (["watch", str(tmp_path / "none")], "no folder"),
        (["watch", str(tmp_path / "empty")], "No run in"),
        (["watch", str(tmp_path / "sweep"), "--interval", "0"], "more than 0"),
    ):
        assert main(args) == 2
        assert words in capsys.readouterr().err
    assert is_run(tmp_path / "sweep" / "runs" / "done")


def test_links_in_a_run_are_refused(tmp_path: Path) -> None:
    # Red when: a record may be a link to a file elsewhere.
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "record.jsonl").symlink_to(__file__)
    with pytest.raises(ConadvError, match="is a link"):
        one_run(tmp_path / "run", Console(file=io.StringIO()))


def test_long_names_lose_their_middle() -> None:
    assert many._shortened("runs/" + "a" * 30 + "-seed100", 20) == "aaaaaaaaa...-seed100"
    assert view.duration(3700) == "1:01:40"
    assert view.duration(90_000) == "1 d 1 h"
