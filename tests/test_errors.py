"""Every way to end the program: its exit code, one message, and a traceback only where it was asked
for.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from conadv.cli import program as cli
from conadv.cli import recipes
from conadv.cli.program import main
from conadv.data.loader import _stream
from conadv.errors import ConadvError
from conadv.training import signals


def failing(error: BaseException) -> Any:
    def command(_: object) -> None:
        raise error

    return command


FAULTS: dict[str, tuple[BaseException, int, str]] = {
    "user": (ConadvError("the reason"), 2, "conadv: the reason\n"),
    "escape codes": (ConadvError("a\x1b[2Jb\nc\udcff"), 2, "conadv: a\\x1b[2Jb\nc\\xff\n"),
    "bug": (KeyError("x"), 70, "Unexpected KeyError in program.py, line"),
    "assertion": (AssertionError("x"), 70, "please report it with what --debug shows"),
    "disk": (
        OSError(28, "No space left on device", "run"),
        2,
        "No space left on device (run). Check",
    ),
    "memory": (MemoryError(), 2, "Out of memory"),
    "device memory": (
        RuntimeError("CUDA out of memory. Tried"),
        2,
        "Choose a smaller micro_batch_size",
    ),
    "interrupt": (KeyboardInterrupt(), 130, "conadv: interrupted\n"),
}


@pytest.mark.parametrize("debug", ["", "option", "environment"])
@pytest.mark.parametrize("name", FAULTS)
def test_errors_have_a_code_and_one_message(
    name: str, debug: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Red when: an error gets through main; a traceback is shown unasked, or not when asked for.
    error, code, message = FAULTS[name]
    monkeypatch.setattr(recipes, "command", failing(error))
    monkeypatch.setenv("CONADV_DEBUG", "1" if debug == "environment" else "0")
    args = ["recipes", "--debug"] if debug == "option" else ["recipes"]
    assert main(args) == code
    shown = capsys.readouterr()
    assert message in shown.err
    assert ("Traceback" in shown.err) == bool(debug)
    assert shown.out == ""


def test_the_codes_are_documented() -> None:
    # Red when: a code is added without a line in --help and in docs/reliability.md.
    page = (Path(__file__).parent.parent / "docs" / "reliability.md").read_text()
    names = vars(cli) | vars(signals)
    codes = {name: code for name, code in names.items() if name.startswith("EXIT_")}
    assert codes.keys() > {"EXIT_BUG", "EXIT_TERMINATED"}
    for name, code in codes.items():
        assert f"{code} " in cli.help_text().partition("exit codes")[2], name
        assert f"| {code} |" in page, name


def program(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "conadv", *args]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run(command, text=True, timeout=250, check=False, **pipes)


OPTIONS = (
    "--steps 3 --schedule.warmup-epochs 0 --global-batch-size 32 --data.train-images 64 "
    "--model.width 2 --eval.robust-images 0"
).split()


def trained_on(run: Path, shown: str) -> None:
    assert "progress is no longer shown" in shown
    assert "Traceback" not in shown
    assert json.loads((run / "summary.json").read_text())["steps"] == 3
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000003.pt"]


def test_a_run_whose_reader_goes_away_trains_on(tmp_path: Path) -> None:
    # Red when: train() does not guard its observer.
    reading, writing = os.pipe()
    os.close(reading)
    try:
        args = ["train", "digits", *OPTIONS, "--out", str(tmp_path / "run")]
        done = program(*args, stdout=writing)
    finally:
        os.close(writing)
    assert done.returncode == 141
    trained_on(tmp_path / "run", done.stderr)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_run_on_a_full_disk_of_output_trains_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Red when: train() does not guard its observer.
    with Path("/dev/full").open("w", buffering=1) as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["train", "digits", *OPTIONS, "--out", str(tmp_path / "run")]) == 2
        monkeypatch.undo()
        with suppress(OSError):  # what it still holds
            full.close()
    trained_on(tmp_path / "run", capsys.readouterr().err)


def test_a_reader_that_goes_away_ends_the_program_quietly() -> None:
    # Red when: BrokenPipeError is not caught, or stdout is flushed only when Python ends.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    reading, writing = os.pipe()
    os.close(reading)
    try:
        for args in (["recipes"], ["--help"]):
            done = program(*args, stdout=writing, env=environment)
            assert (done.returncode, done.stderr) == (141, "")
    finally:
        os.close(writing)


def test_a_name_that_no_locale_knows_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Red when: an error cannot be written and another one takes its place.
    monkeypatch.chdir(tmp_path)
    for command in ("eval", "check"):
        shown = io.BytesIO()
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(shown, "ascii", "strict"))
        assert main([command, os.fsdecode(b"no\xff\nsuch\x1b[1m")]) == 2
        sys.stderr.flush()
        assert b"\x1b" not in shown.getvalue()
        assert rb"no\xff\nsuch\x1b[1m" in shown.getvalue()


@pytest.mark.parametrize("content", ["[1", "{}", "method: [x]\n", "method: &a [*a]\n"])
def test_a_broken_config_of_a_run_is_an_error_for_every_command(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(content)
    (tmp_path / "record.jsonl").write_text(json.dumps({"type": "header", "steps": 1}) + "\n")
    for command in ("eval", "export", "report"):
        extra = ["--out", str(tmp_path / "out" / "report.html")] if command == "report" else []
        assert main([command, str(tmp_path), *extra]) == 2, command
        assert "Traceback" not in capsys.readouterr().err


def test_output_that_was_closed_from_the_start_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    # Red when: _prepare_output does nothing (conadv recipes >&-).
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert (main(["recipes"]), main(["nothing"])) == (0, 2)


def test_a_killed_loader_process_is_named() -> None:
    # Red when: naming_lost_workers lets torch's RuntimeError through.
    with pytest.raises(ConadvError, match=r"DataLoader worker.*fewer \(--data.num-workers\)"):
        list(_stream(_die, [1, 2], 1))


def _die(_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
