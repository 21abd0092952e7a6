"""SIGTERM and SIGINT: a checkpoint at the next step boundary, an exit code, and a second Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from conadv.config.files import dump_yaml
from conadv.engine.stop import INTERRUPT, TERMINATE
from conadv.errors import ConadvError
from conadv.training.checkpoint import steps
from conadv.training.loop import train
from conadv.training.observer import Observer
from conadv.training.record import read_lines
from conadv.training.signals import (
    Patience,
    Signals,
    Stopped,
    granted_seconds,
)

from .ranks.launch import started, until
from .test_nonfinite import same
from .test_training import config, weights, without_times


class Sends(Observer):
    """Sends a signal to this process after step ``at``, or during the evaluation after it."""

    def __init__(self, number: int, at: int) -> None:
        self.number, self.at = number, at
        self.heard: list[str] = []

    def step(self, record: Any) -> None:
        if record.step == self.at:
            os.kill(os.getpid(), self.number)

    def message(self, text: str) -> None:
        self.heard.append(text)


SHORT = {"epochs": None, "steps": 4, "eval__every_epochs": None, "checkpoint__every_epochs": None}
CONADV = config(method="conadv", staleness=2, **SHORT)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody stops."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(CONADV, out)
    return out


@pytest.mark.parametrize(
    ("number", "name", "code"),
    [
        (signal.SIGTERM, "SIGTERM", 143),
        (signal.SIGINT, "SIGINT", 130),
        (signal.SIGHUP, "SIGTERM", 143),
    ],
)
def test_a_signal_ends_the_run_after_the_next_step_with_a_checkpoint(
    number: int, name: str, code: int, whole: Path, tmp_path: Path
) -> None:
    # Red when: the loop does not look at stop; no checkpoint is saved there; the handlers of before
    # do not come back; the last step is an exception.
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    step = 2 if number == signal.SIGHUP else 1
    seen, saved = Sends(number, step), step + 2
    message = f"by {name} after {saved} steps; --resume goes on from step {saved}"
    with pytest.raises(Stopped, match=message) as caught:
        train(CONADV, tmp_path, observer=seen)
    assert caught.value.code == code
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert steps(tmp_path / "checkpoints") == [saved]
    last = read_lines(tmp_path / "record.jsonl")[-1]
    assert (last["type"], last["step"], last["signal"]) == ("stop", saved, name)
    assert not (tmp_path / "summary.json").exists()
    until(lambda: any("stopping after this step" in text for text in seen.heard), 5, "the message")
    train(CONADV, tmp_path, auto_resume=True)
    lines = [read_lines(run / "record.jsonl") for run in (tmp_path, whole)]
    assert without_times(lines[0]) == without_times(lines[1])
    assert same(weights(tmp_path), weights(whole))


def test_a_signal_during_an_evaluation_counts_at_that_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Red when: what came during the evaluation is seen after one more step.
    import conadv.training.results

    original = conadv.training.results.evaluate

    def evaluate(*args: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **options)

    monkeypatch.setattr(conadv.training.results, "evaluate", evaluate)
    with pytest.raises(Stopped, match="after 3 steps"):
        train(config(checkpoint__every_epochs=None), tmp_path)
    assert steps(tmp_path / "checkpoints") == [3]


def test_the_stronger_request_counts_and_a_second_interrupt_has_the_systems_action() -> None:
    # Red when: SIGINT keeps its handler after the first signal.
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.request == INTERRUPT
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.request == TERMINATE


def test_a_signal_that_was_ignored_stays_ignored() -> None:
    # Red when: Signals takes signals that the process was started to ignore (nohup, a script's
    # `&`), or changes any off the main thread.
    ignored = (signal.SIGHUP, signal.SIGINT)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ignored}
    try:
        with Signals() as signals:
            for number in ignored:
                os.kill(os.getpid(), number)
            assert signals.request == 0
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            thread = threading.Thread(target=Signals().__enter__)
            handler = signal.getsignal(signal.SIGTERM)
            thread.start()
            thread.join()
            assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def test_a_forked_child_is_not_the_run() -> None:
    # Red when: the handler does not look at the process (a child would then outlive SIGTERM).
    here, there = os.pipe()
    with Signals() as signals:
        child = os.fork()
        if not child:
            os.write(
                there, b"!"
            )  # Python forgets signals that come before it is ready in the child
            time.sleep(20)
            os._exit(0)
        os.read(here, 1)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        assert signals.request == 0


KILLED = """
import multiprocessing, os, signal, sys

def load(key):
    return os.getpid()

if __name__ == "__main__":
    from conadv.data.loader import _stream
    multiprocessing.set_start_method("forkserver")
    multiprocessing.set_forkserver_preload(["torch"])
    stream = _stream(load, range(100), 2)
    print(next(stream), next(stream), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_loader_workers_end_with_a_killed_run(tmp_path: Path) -> None:
    # Red when: outlive_stop does not end with the parent (torch's own watchdog sees the fork
    # server, which lives on).
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    command = [sys.executable, script]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=100)
    assert done.returncode == -signal.SIGKILL
    workers = [int(word) for word in done.stdout.split()]
    assert len(set(workers)) == 2
    end = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < end, "a worker is left"
        time.sleep(0.1)


NAMES = ("TORCHELASTIC_RUN_ID", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "CONADV_GRACE_SECONDS")
WAITS: list[tuple[tuple[str | None, ...], float | None]] = [
    ((None, None, None), None),
    ((None, "5", None), None),  # not under torchrun
    (("x", None, None), 30.0),
    (("x", "300", None), 300.0),
    (("x", None, "600"), 600.0),
    ((None, None, "60"), 60.0),
]


def test_how_long_a_launcher_waits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Red when: torchrun's own 30 seconds are not known, the job script's word does not come first,
    # or a time may be infinite or below 0, or is looked at by the first step only.
    for values, seconds in WAITS:
        for name, value in zip(NAMES, values, strict=True):
            monkeypatch.setenv(name, value or "")
            if value is None:
                monkeypatch.delenv(name)
        assert granted_seconds() == seconds, values
    for text in ("ten", "nan", "-1", "inf"):
        monkeypatch.setenv("CONADV_GRACE_SECONDS", text)
        with pytest.raises(ConadvError, match=f"CONADV_GRACE_SECONDS is '{text}'"):
            train(config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("granted", "said"), [(14.9, 1), (15.1, 0), (None, 0)])
def test_stopping_takes_the_longest_turn_and_what_saving_takes(
    granted: float | None, said: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Red when: the first step counts (it compiles), saving counts as a step, the write in the
    # background is left out, or it is said at every step.
    now, heard = [0.0], list[str]()
    monkeypatch.setattr("conadv.training.signals.time.monotonic", lambda: now[0])
    patience = Patience(granted, heard.append)
    for step, saving in ((100, 0), (2, 3), (5, 3), (4, 0)):
        now[0] += step
        patience.turn()
        now[0] += saving
        if saving:
            patience.saved()
        patience.judge(None if saving else 7)  # while it is being written nobody knows
    assert len(heard) == said  # 5 + 3 + 7
    patience.judge(7)
    assert len(heard) == said


def test_a_run_says_that_it_would_be_killed_before_it_has_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Red when: the loop does not judge, or the writer never says what a background write took.
    settings = config(**{**SHORT, "checkpoint__every_epochs": 0.3}, checkpoint__background=True)
    for granted, said in (("1e-9", 1), ("600", 0)):
        seen = Sends(0, -1)
        monkeypatch.setenv("CONADV_GRACE_SECONDS", granted)
        train(settings, tmp_path / granted, observer=seen)
        assert sum("s after SIGTERM" in text for text in seen.heard) == said


def program(out: Path, *options: str, **changes: Any) -> list[object]:
    (out.parent / "config.yaml").write_text(dump_yaml(config(**changes)))
    command = [sys.executable, "-m", "conadv", "train", "--config", out.parent / "config.yaml"]
    return [*command, "--out", out, "--device", "cpu", *options]


LONG = {"epochs": 3000, "eval__every_epochs": None, "checkpoint__every_epochs": 1000}


def recorded(out: Path) -> int:
    path = out / "record.jsonl"
    return path.read_bytes().count(b'{"type": "step"') if path.exists() else 0


@pytest.mark.skipif(sys.platform != "linux", reason="signals a process group")
def test_the_program_and_its_loader_workers_under_a_signal_to_their_group(tmp_path: Path) -> None:
    # Red when: workers die of SIGTERM and take the run with them; the exit code is another.
    out, log = tmp_path / "run", tmp_path / "log"
    with started(program(out, data__num_workers=2, **LONG), log) as process:
        until(lambda: recorded(out) > 3, 120, "the first steps")
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(60) == 143, log.read_text()
    (saved,) = steps(out / "checkpoints")
    assert (
        f"stopped by SIGTERM after {saved} steps; --resume goes on from step {saved}"
        in log.read_text()
    )
    assert "Traceback" not in log.read_text()
    assert recorded(out) == saved
