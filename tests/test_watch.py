"""The live view: records that grow, are cut off, begin anew or are hostile, and what is shown."""

from __future__ import annotations

import io
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from conadv.cli import watch as watch_module
from conadv.cli.program import main
from conadv.cli.watch import RunState, View, duration
from conadv.errors import ConadvError

HEADER = {
    "type": "header",
    "steps": 10,
    "ranks": 1,
    "config": {"recipe": "digits", "method": "conadv", "seed": 3, "global_batch_size": 64},
}


def step(index: int, **changes: Any) -> dict[str, Any]:
    values = {"type": "step", "step": index, "epoch": index // 5, "lr": 0.5, "grad_norm": 1.5}
    values |= {"loss": 2.0 / (index + 1), "losses": {"clean": 1.0}, "seconds": 0.4}
    values |= {"phases": {"data": 0.01, "gradient": 0.3, "attack": 0.09}}
    return values | changes


def lines(*values: dict[str, Any]) -> str:
    return "".join(json.dumps(line) + "\n" for line in values)


def write(run: Path, *values: dict[str, Any], mode: str = "a", rest: str = "") -> Path:
    run.mkdir(parents=True, exist_ok=True)
    with (run / "record.jsonl").open(mode) as file:
        file.write(lines(*values) + rest)
    return run


def screen(shown: RenderableType, width: int = 80) -> str:
    out = io.StringIO()
    Console(file=out, width=width, highlight=False).print(shown)
    return out.getvalue()


def seen(run: Path) -> RunState:
    state = RunState(run)
    state.update()
    return state


def frame(path: Path, width: int = 80, height: int = 24) -> str:
    view = View(path)
    view.look()
    return screen(view.frame(width, height), width)


# ---- what is read


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
    assert (state.done, len(state.losses)) == (3, 3)
    new = write(tmp_path / "new", HEADER, *map(step, range(3, 12)))
    (new / "record.jsonl").replace(tmp_path / "record.jsonl")
    state.update()
    assert (state.done, state.losses[0]) == (12, 0.5)


def test_a_line_without_end_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "LINE_BYTES", 1000)
    with pytest.raises(ConadvError, match="longer than 1,000 bytes"):
        seen(write(tmp_path, rest="x" * 5000))


def test_numbers_by_hand(tmp_path: Path) -> None:
    # Red when: shares are of the wall clock, or the median takes the first step.
    steps = [step(0, seconds=9.0), *map(step, range(1, 4))]
    state = seen(write(tmp_path, HEADER, *steps))
    assert state.phase_shares() == pytest.approx({"gradient": 0.75, "attack": 0.225, "data": 0.025})
    assert state.step_seconds() == 0.4 == seen(write(tmp_path / "b", *steps[:2])).step_seconds()
    assert dict(state.rows(40))["step"] == "4/10  40 %  epoch 0  left 0:00:02"
    assert [duration(s) for s in (5, 3700, 90_000)] == ["0:00:05", "1:01:40", "1 d 1 h"]


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


# ---- what is shown


@pytest.mark.parametrize("width", [60, 80, 120])
def test_numbers_are_never_cut(width: int, tmp_path: Path) -> None:
    # Red when: a warning has no rule; a value is cut where it is narrow.
    phases = {"data": 0.3, "gradient": 0.3}
    run = tmp_path / ("a-long-name-" * 6)
    write(run, HEADER, *(step(i, phases=phases, staleness=1) for i in range(5)))
    write(run, {"type": "eval", "step": 5, "split": "test", "loss": 1.0, "accuracy": 0.75})
    write(run, *({"type": "bad_image", "path": f"{i}.png", "reason": "?"} for i in range(30)))
    write(run, step(5, skipped="loss is not finite", loss=None, late=True))
    text = frame(run, width)
    assert max(map(len, text.splitlines())) <= width
    assert len(text.splitlines()) <= 30
    together = " ".join(text.split())
    for words in ("6/10 60 %", "seed 3", "75.00 % at step 5", "data 44.4 %", "160 images/s"):
        assert words in together, words
    for words in ("data takes 44 %", "1 update(s) skipped", "30 unreadable", "1 step(s) without"):
        assert words in together, words


def sweep(out: Path) -> Path:
    """Three of five planned runs: one going, one finished, one failed."""
    for name in ("the-one-that-is-going-on-now-seed100", "done", "failed"):
        run = write(out / "runs" / name, HEADER, *map(step, range(4)))
        (run / "config.yaml").write_text("{}")
    summary = {"test_accuracy": 0.875, "seconds": 70.0, "steps": 10, "train_loss": 0.25}
    (out / "runs" / "done" / "summary.json").write_text(json.dumps(summary))
    (out / "runs" / "failed" / "failed.json").write_text('{"error": "x", "diverged": true}')
    trial = {"runs": ["runs/the-one-that-is-going-on-now-seed100", "runs/done", "runs/failed"]}
    done = {"arm": "a", "trials": [trial], "runs": ["runs/done"], "seeds": [0]}
    cells = [done, {"arm": "b", "trials": [], "runs": [], "seeds": [0, 1]}]
    (out / "sweep.json").write_text(json.dumps({"cells": cells}))
    return out


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_sweep_is_counted_and_its_runs_listed(width: int, tmp_path: Path) -> None:
    # Red when: runs without a choice do not count as planned; a failed run counts as going; a
    # number is cut; a name loses what tells runs apart.
    rows = frame(sweep(tmp_path), width).splitlines()
    assert rows[0].startswith("2 of 5 runs ended  running 1  failed 1  finished 1")
    going, failed, done = (row.split() for row in rows[2:])
    assert going[0].startswith("the-one") and going[0].endswith("100")  # noqa: PT018
    assert going[1:] == ["running", "4/10", "0.5", "-", "0:00:02"]
    assert failed[:3] == ["failed", "failed", "4/10"]
    assert done == ["done", "finished", "10/10", "0.25", "87.50", "%"]
    assert "and 2 more" in frame(tmp_path, width, height=5)


def test_a_view_is_over_when_all_planned_runs_have_ended(tmp_path: Path) -> None:
    # Red when: look forgets what sweep.json plans.
    (sweep(tmp_path) / "runs" / "the-one-that-is-going-on-now-seed100" / "failed.json").touch()
    assert not View(tmp_path).look()
    (tmp_path / "sweep.json").unlink()
    assert View(tmp_path).look()
    (tmp_path / "sweep.json").write_text('{"cells": 5}')
    with pytest.raises(ConadvError, match=r"sweep\.json"):
        View(tmp_path).look()


HOSTILE = "[bold red]\x1b[2J\x07\u202e\n[/nope]" + "A" * 10_000
ODD: list[Any] = [None, True, "x", [], {}, 1e308, -1, {"a": {"b": 1}}, HOSTILE]
FIELDS = "step epoch lr loss losses grad_norm phases seconds time staleness skipped late split "
FIELDS += "accuracy steps config ranks message signal path reason damaged"


def test_hostile_records_are_shown_as_text(tmp_path: Path) -> None:
    # Red when: an event is printed as markup or unescaped, or an odd value raises.
    kinds = ("header", "step", "eval", "stop", "error", "resume", "bad_image", "add", HOSTILE, 5)
    odd = [
        {"type": kind, **dict.fromkeys(FIELDS.split(), value)} for kind in kinds for value in ODD
    ]
    config = dict.fromkeys(("recipe", "method", "seed", "global_batch_size"), HOSTILE)
    write(
        tmp_path / "run",
        *odd,
        {**HEADER, "config": config},
        rest="[" * 50 + "\n" + "9" * 400 + "\n",
    )
    write(tmp_path / "run", step(1, losses={HOSTILE: 1.0}, phases={HOSTILE: 1.0}))
    write(tmp_path / "run", {"type": "error", "message": HOSTILE})
    (tmp_path / "run" / "config.yaml").touch()
    (tmp_path / "run" / "summary.json").write_text("[5]")
    for path in (tmp_path, tmp_path / "run"):
        text = frame(path)
        assert not {"\x1b", "\x07", "\u202e"} & set(text)
    assert "[bold red]\\x1b" in text


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
