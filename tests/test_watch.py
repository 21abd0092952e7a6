"""The live view: records that grow, are cut off, begin anew or are hostile, and what is shown."""

from __future__ import annotations

import io
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from conadv.cli import watch as watch_module
from conadv.cli.program import main
from conadv.cli.watch import RunState, View
from conadv.errors import ConadvError

HEADER = {"type": "header", "steps": 10, "ranks": 1, "config": {"recipe": "digits"}}


def step(index: int, **changes: Any) -> dict[str, Any]:
    values = {"type": "step", "step": index, "epoch": index // 5, "lr": 0.5, "seconds": 0.4}
    values |= {"loss": 2.0 / (index + 1), "losses": {"clean": 1.0}, "skipped": None, "late": False}
    values |= {"phases": {"data": 0.01, "gradient": 0.3, "attack": 0.09}}
    return values | changes


def lines(*values: dict[str, Any]) -> str:
    return "".join(json.dumps(line) + "\n" for line in values)


def write(run: Path, *values: dict[str, Any], mode: str = "a", rest: str = "") -> Path:
    run.mkdir(parents=True, exist_ok=True)
    with (run / "record.jsonl").open(mode) as file:
        file.write(lines(*values) + rest)
    return run


def seen(run: Path) -> RunState:
    state = RunState(run)
    state.update()
    return state


def frame(path: Path, width: int = 80, height: int = 24) -> str:
    view, console = View(path), Console(file=io.StringIO(), width=width, highlight=False)
    view.look()
    console.print(view.frame(console, height))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_torn_line_is_read_when_its_end_comes(tmp_path: Path) -> None:
    # Red when: the rest of a line is dropped, or taken for a line of its own.
    torn = lines(step(1))
    state = seen(tmp_path)
    assert state.state() == "waiting"  # there is no record yet
    write(tmp_path, HEADER, step(0), rest=torn[:25])
    state.update()
    assert (state.done, state.total, state.counts["step"]) == (1, 10, 1)
    write(tmp_path, rest=torn[25:] + "no json\n[1]\n")
    state.update()
    assert (state.done, state.counts["step"], state.counts["broken"]) == (2, 2, 2)


def test_a_record_that_is_cut_or_replaced_begins_anew(tmp_path: Path) -> None:
    # Red when: only the size, or only the file's identity, is looked at.
    state = seen(write(tmp_path, HEADER, *map(step, range(6))))
    write(tmp_path, HEADER, *map(step, range(3)), mode="w")
    state.update()
    assert (state.done, state.counts["step"]) == (3, 3)
    new = write(tmp_path / "new", HEADER, *map(step, range(3, 12)))
    (new / "record.jsonl").replace(tmp_path / "record.jsonl")
    state.update()
    assert (state.done, state.counts["step"]) == (12, 9)


def test_a_line_without_end_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "LINE_BYTES", 1000)
    with pytest.raises(ConadvError, match="longer than 1,000 bytes"):
        seen(write(tmp_path, rest="x" * 5000))


def test_numbers_by_hand(tmp_path: Path) -> None:
    # Red when: shares are of the wall clock, or the median takes the first step.
    state = seen(write(tmp_path, HEADER, step(0, seconds=9.0), *map(step, range(1, 4))))
    assert state.phase_shares() == pytest.approx({"gradient": 0.75, "attack": 0.225, "data": 0.025})
    assert state.step_seconds() == 0.4
    assert (state.cells()["step"], state.cells()["left"]) == ("4/10", "2.4 s")


@pytest.mark.parametrize(
    ("last", "files", "age", "status"),
    [
        ({"type": "stop", "signal": "SIGTERM"}, (), 0, "stopped"),
        ({"type": "error", "message": "no space"}, (), 0, "failed"),
        ({"type": "resume", "step": 5}, (), 0, "running"),
        ({"type": "resume", "step": 5}, (), 100, "silent"),
        ({"type": "eval", "split": "test"}, ("summary.json",), 100, "finished"),
        ({"type": "eval", "split": "test"}, ("failed.json",), 100, "failed"),
    ],
)
def test_how_a_run_stands(
    last: dict[str, Any], files: tuple[str, ...], age: float, status: str, tmp_path: Path
) -> None:
    # Red when: a stop before a resume still counts, or a run without news counts as running.
    write(tmp_path, HEADER, step(0), {"type": "stop"}, last)
    for name in files:
        (tmp_path / name).write_text("{}")
    for path in (*tmp_path.iterdir(), tmp_path):
        os.utime(path, (time.time() - age,) * 2)
    assert seen(tmp_path).state() == status
    assert View(tmp_path).look() == (status in ("stopped", "failed", "finished"))


def sweep(out: Path) -> Path:
    """Three of five planned runs: one going, one finished, one failed."""
    for name in ("the-one-that-is-going-on-now-with-seed100", "done", "failed"):
        run = write(out / "runs" / name, HEADER, *map(step, range(4)))
        (run / "config.yaml").write_text("{}")
    write(out / "runs" / "done", {"type": "eval", "step": 4, "split": "test", "accuracy": 0.875})
    (out / "runs" / "done" / "summary.json").write_text("{}")
    (out / "runs" / "failed" / "failed.json").write_text('{"error": "x", "diverged": true}')
    names = ["runs/the-one-that-is-going-on-now-with-seed100", "runs/done", "runs/failed"]
    done = {"arm": "a", "trials": [{"runs": names}], "runs": ["runs/done"], "seeds": [0]}
    cells = [done, {"arm": "b", "trials": [], "runs": [], "seeds": [0, 1]}]
    (out / "sweep.json").write_text(json.dumps({"cells": cells}))
    return out


@pytest.mark.parametrize("width", [60, 80, 120])
def test_numbers_are_never_cut(width: int, tmp_path: Path) -> None:
    # Red when: a warning has no rule; a value is cut where it is narrow; runs without a choice do
    # not count as planned; a failed run counts as going.
    phases = {"data": 0.3, "gradient": 0.3}
    run = tmp_path / ("a-long-name-" * 6)
    write(run, HEADER, *(step(i, phases=phases) for i in range(5)))
    write(run, {"type": "eval", "step": 5, "split": "test", "loss": 1.0, "accuracy": 0.75})
    bad = {"type": "bad_image", "path": "a.png", "reason": "?"}
    write(run, *(bad for _ in range(30)), step(5, skipped="not finite", loss=None, late=True))
    text, together = frame(run, width), " ".join(frame(run, width).split())
    assert max(map(len, text.splitlines())) <= width
    for words in ("6/10", "75.00 % at step 5", "data 44.41 %", "data takes 44 %", "1.6 s"):
        assert words in together, words
    for words in ("1 update(s) skipped", "30 unreadable", "1 step(s) without"):
        assert words in together, words

    rows = frame(sweep(tmp_path / "sweep"), width).splitlines()
    assert rows[0].split() == "2 of 5 runs ended running 1 failed 1 finished 1".split()
    together = " ".join("".join(rows[4:]).split())
    for words in ("running 4/10 0.5 -", "2.4 s", "failed failed 4/10", "finished 4/10 0.5 87.50 %"):
        assert words in together, words
    assert "not shown: 2" in " ".join(frame(tmp_path / "sweep", width, height=7).split())


def test_a_view_is_over_when_all_planned_runs_have_ended(tmp_path: Path) -> None:
    # Red when: look forgets what sweep.json plans.
    (next((sweep(tmp_path) / "runs").glob("the-one*")) / "failed.json").touch()
    assert not View(tmp_path).look()
    (tmp_path / "sweep.json").unlink()
    assert View(tmp_path).look()


HOSTILE = "[bold red]\x1b[2J\x07\u202e\n[/nope]" + "A" * 10_000
ODD: list[Any] = [None, True, "x", [], {}, 1e308, -1, {"a": {"b": 1}}, HOSTILE]
FIELDS = "step lr loss phases seconds skipped late split accuracy steps".split()


def test_hostile_records_are_shown_as_text(tmp_path: Path) -> None:
    # Red when: an event is printed as markup or unescaped, or an odd value raises.
    kinds = ("header", "step", "eval", "stop", "error", "resume", "bad_image", HOSTILE, 5)
    odd = [{"type": kind, **dict.fromkeys(FIELDS, value)} for kind in kinds for value in ODD]
    run = write(tmp_path / "run", *odd, HEADER, rest="[" * 50 + "\n" + "9" * 400 + "\n\xff\n")
    write(run, step(1, phases={HOSTILE: 1.0}), {"type": "eval", "split": HOSTILE})
    write(run, {"type": "error", "message": HOSTILE})
    (run / "config.yaml").touch()
    for path in (tmp_path, run):
        text = frame(path)
        assert not {"\x1b", "\x07", "\u202e"} & set(text)
    assert "[bold red]\\u001b" in text.replace("\n", "")


def test_links_are_refused(tmp_path: Path) -> None:
    # Red when: a record or a summary may be a link to a file elsewhere.
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "config.yaml").touch()
    for name in ("record.jsonl", "summary.json"):
        (tmp_path / "runs" / "a" / name).symlink_to(__file__)
    view = View(tmp_path)
    view.look()
    (state,) = view.runs.values()
    assert (state.state(), state.counts.total()) == ("waiting", 0)
    with pytest.raises(ConadvError, match="is a link"):
        View(tmp_path / "runs" / "a")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(sweep(tmp_path / "sweep")), "--once"]) == 0
    assert "2 of 5 runs ended" in capsys.readouterr().out
    assert main(["watch", str(tmp_path / "sweep" / "runs" / "done")]) == 0  # no terminal: one frame
    assert "finished" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    for args, words in (
        ([str(tmp_path / "none")], "not a folder"),
        ([str(tmp_path / "empty")], "No run in"),
        ([str(tmp_path / "sweep"), "--interval", "0"], "more than 0"),
    ):
        assert main(["watch", *args]) == 2
        assert words in capsys.readouterr().err
