"""Two programs in one folder: the second one ends at once, and a killed one is in nobody's way."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from conadv import ConadvError
from conadv.config.schema import Config
from conadv.training import loop as trainer
from conadv.training.lock import Lock
from conadv.training.loop import train
from conadv.training.observer import Observer
from conadv.training.run_dir import RunDir

from .test_training import config

fcntl = pytest.importorskip("fcntl")

HOLD = """
import os, sys, time
from pathlib import Path
from conadv.training.lock import Lock
lock = Lock(Path(sys.argv[1]), "")
assert lock.take()
if os.fork() == 0:  # as a loader's worker, which may outlive the process that it works for
    print("held", flush=True)
time.sleep(60)
"""


def take(path: Path) -> Lock:
    lock = Lock(path, "somebody else is at work")
    assert lock.take()
    return lock


def test_a_lock_keeps_others_out_until_it_is_released(tmp_path: Path) -> None:
    # Red when: take does not lock, release leaves the file or the lock, the file is truncated, or
    # opened through a link.
    path, other = tmp_path / ".lock", tmp_path / "other"
    path.write_text("x")
    with take(path) as first:
        assert not first.take()  # it is held already
        with pytest.raises(ConadvError, match="somebody else"):
            take(path)
        assert path.read_text() == "x"
    assert not path.exists()
    take(path).release()
    other.write_text("y")
    path.symlink_to(other)
    assert not Lock(path, "").take()
    assert other.read_text() == "y"


def test_a_killed_holder_is_in_nobodys_way(tmp_path: Path) -> None:
    # Red when: a forked child keeps the lock, or a file that is there already counts as a lock.
    path = tmp_path / ".lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE, start_new_session=True
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(ConadvError, match="somebody else"):
            take(path)
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait(20)
        assert path.exists()
        take(path).release()
        os.killpg(holder.pid, signal.SIGKILL)


def test_a_file_system_without_locks_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Red when: take raises for every OSError, or filelock falls back to a marker that a killed run
    # leaves behind.
    for number in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
        refused = Mock(side_effect=OSError(number, os.strerror(number)))
        monkeypatch.setattr(fcntl, "flock", refused)
        for _ in range(2):
            assert not Lock(tmp_path / ".lock", "").take()


def test_a_second_program_in_a_run_folder_ends_at_once(tmp_path: Path) -> None:
    # Red when: train does not lock, locks behind admit (a run of other settings would be named), or
    # keeps the lock.
    out = tmp_path / "run"
    refused: list[str] = []

    class Second(Observer):
        def start(self, title: str, first_step: int, num_steps: int) -> None:
            for options in ({}, {"overwrite": True}, {"resume": True}, {"auto_resume": True}):
                with pytest.raises(ConadvError, match="Another program is training") as caught:
                    train(settings(seed=1), out, **options)
                refused.append(str(caught.value))

    train(settings(), out, observer=Second())
    assert len(refused) == 4
    assert not RunDir(out).lock.exists()
    RunDir(out).lock.touch()  # a killed run's
    train(settings(), out, resume=True)


def test_a_run_that_was_begun_meanwhile_is_not_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Red when: claim does not lock a folder that was not there before, or does not look again.
    original = trainer.build

    def build(*args: Any) -> Any:
        monkeypatch.setattr(trainer, "build", original)
        train(settings(), tmp_path / "run")  # begins and ends while the other one loads its data
        return original(*args)

    monkeypatch.setattr(trainer, "build", build)
    with pytest.raises(ConadvError, match="already holds a run"):
        train(settings(), tmp_path / "run")
    assert RunDir(tmp_path / "run").summary.exists()


def test_what_a_killed_run_leaves_does_not_fill_a_folder(tmp_path: Path) -> None:
    # Red when: the lock or a half-written file counts as somebody's file; the launcher's note is
    # decoded.
    RunDir(tmp_path).lock.touch()
    (tmp_path / ".config.yaml.tmp").touch()
    train(settings(), tmp_path)
    RunDir(tmp_path).launcher.write_bytes(b"\xff\xfe")
    assert not RunDir(tmp_path).is_of_this_launcher()


def settings(**changes: Any) -> Config:
    return config(
        epochs=None, steps=1, schedule__warmup_epochs=0, eval__every_epochs=None, **changes
    )
