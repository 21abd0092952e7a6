"""Checkpoints: sealed, read back, kept, written beside the training; what damage and a full disk
do.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conadv import ConadvError
from conadv.cli.program import main
from conadv.config.files import dump_yaml
from conadv.config.resolve import resolve
from conadv.config.schema import replace
from conadv.distributed.comm import Comm
from conadv.training import checkpoint
from conadv.training.checkpoint import (
    DamagedCheckpoint,
    find_newest,
    load,
    load_newest,
    load_step,
    save,
    steps,
)
from conadv.training.loop import train
from conadv.training.observer import Observer
from conadv.training.record import read_lines, truncate
from conadv.training.resume import load_run
from conadv.training.resume import scatter as _deal
from conadv.training.run_dir import RunDir
from conadv.training.writer import Writer
from conadv.types import StepRecord

from .test_training import config, weights, without_times

CPU = torch.device("cpu")
SHORT: dict[str, Any] = {"steps": 4, "epochs": None}
SEAL = checkpoint.SEAL_BYTES


def state(step: int) -> dict[str, Any]:
    nested = {"name": "a", "none": None, "list": [1, torch.ones(2)]}
    values = {"x": torch.arange(1000.0) + step, "nested": nested}
    return {**values, "engine": {"version": step}, "best": None}


def three(folder: Path) -> list[Path]:
    return [save(folder, step, state(step), keep=10) for step in (1, 2, 3)]


def same(a: Any, b: Any) -> bool:
    """Same structure, same bits."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


DAMAGES = {
    "cut off": lambda data: data[: len(data) // 2],
    "without its seal": lambda data: data[:-SEAL],
    "bytes before its seal": lambda data: data[:-SEAL] + b"more" + data[-SEAL:],
    "empty": lambda data: b"",
    "a bit flipped": lambda data: bytes([*data[:900], data[900] ^ 1, *data[901:]]),
    "a bit of the seal flipped": lambda data: bytes([*data[:-60], data[-60] ^ 1, *data[-59:]]),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_and_the_checkpoint_before_it_is_used(name: str, tmp_path: Path) -> None:
    # Red when: verify compares no digest (a bit flipped), or no length (bytes before its seal).
    *_, newest = three(tmp_path)
    newest.write_bytes(DAMAGES[name](newest.read_bytes()))
    with pytest.raises(DamagedCheckpoint, match="damaged"):
        load(newest, CPU)
    with pytest.warns(
        UserWarning, match=r"00000003.pt is damaged.*Going back to .* step 2"
    ) as seen:
        assert torch.equal(load_newest(tmp_path, CPU)["x"], state(2)["x"])
    assert len(seen) == 1


def test_files_that_are_not_what_their_name_says(tmp_path: Path) -> None:
    # Red when: the step inside is not compared with the name; what a stranger has sealed is passed
    # over in silence; torch cannot read a checkpoint.
    first, second, third = three(tmp_path)
    assert torch.load(second, weights_only=True)["nested"]["name"] == "a"
    spare = third.read_bytes()
    third.write_bytes(first.read_bytes())
    first.write_bytes(spare)
    assert find_newest(tmp_path, CPU)[0]["step"] == 2
    second.unlink()
    with pytest.raises(ConadvError, match=r"None of the checkpoints.*--overwrite"):
        find_newest(tmp_path, CPU)
    save(tmp_path, 1, state(1), keep=10)
    save(tmp_path, 4, {"x": Path("a")}, keep=10)
    with pytest.raises(ConadvError, match="Cannot read"):
        find_newest(tmp_path, CPU)


MISSING = object()
ODD: tuple[Any, ...] = (None, -1, True, "x", [], {}, float("inf"), float("nan"), torch.ones(2))
ENVELOPES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "format": ("not a checkpoint of this version", (*ODD, torch.tensor(2))),
    "step": ("its step is", ODD),
    "engine": ("its engine", (*ODD, MISSING)),
    "engine.version": ("its engine", (*ODD, 2, MISSING)),
    "best": ("its best", (*ODD[1:], MISSING)),
    "best.step": ("its best", (*ODD, 4, MISSING)),
    "best.accuracy": ("its best.accuracy", (*ODD, 1.5, MISSING)),
}


@pytest.mark.parametrize("name", ENVELOPES)
def test_an_envelope_that_cannot_be_is_refused(name: str, tmp_path: Path) -> None:
    # Red when: _Envelope lacks that field, is not strict, or does not compare the steps.
    message, values = ENVELOPES[name]
    for value in values:
        changed = {**state(3), "best": {"step": 2, "accuracy": 0.5}}
        owner, _, key = name.rpartition(".")
        inside = changed[owner] if owner else changed
        inside[key] = value
        if value is MISSING:
            del inside[key]
        file = save(tmp_path, 3, changed, keep=1)
        with pytest.raises(ConadvError, match=message) as caught:
            load(file, CPU)
        assert file.name in str(caught.value)


def test_the_error_names_the_version_that_wrote_a_checkpoint(tmp_path: Path) -> None:
    # Red when: save does not write its version, or a checkpoint without one is not known to be of
    # 0.1.
    file = save(tmp_path, 3, {**state(3), "format": 3, "conadv": "9.1"}, keep=1)
    with pytest.raises(ConadvError, match=r"not a checkpoint of this version.*of version 9\.1"):
        load(file, CPU)
    with (
        pytest.raises(ConadvError, match=r"or was written by version 0\.1"),
        checkpoint.restoring({"step": 3}),
    ):
        raise KeyError("model")


def test_older_ones_go_only_when_the_newer_one_has_been_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Red when: save does not verify before it renames and prunes.
    save(tmp_path, 1, state(1), keep=1)
    good = os.fsync

    def lies(descriptor: int) -> None:
        """A disk that loses the last bytes of what it was given."""
        if not os.path.isdir(f"/proc/self/fd/{descriptor}"):  # noqa: PTH112
            os.ftruncate(descriptor, os.fstat(descriptor).st_size - 3)
        good(descriptor)

    monkeypatch.setattr(os, "fsync", lies)
    with pytest.raises(ConadvError, match="Cannot write the checkpoint"):
        save(tmp_path, 2, state(2), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001.pt"]
    assert load_newest(tmp_path, CPU)["step"] == 1


def test_the_order_of_a_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Red when: any of the calls is missing or moves.
    seen: list[str] = []

    def note(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def noted(*args: Any, **options: Any) -> Any:
            seen.append(name)
            return original(*args, **options)

        monkeypatch.setattr(owner, name, noted)

    for owner, name in ((os, "fsync"), (Path, "replace")):
        note(owner, name)
    for name in ("verify", "sync_folder", "prune"):
        note(checkpoint, name)
    save(tmp_path, 1, state(1), keep=1)
    assert seen == ["fsync", "verify", "replace", "sync_folder", "fsync", "prune"]


def test_what_stays_in_the_folder(tmp_path: Path) -> None:
    # Red when: prune forgets the best, or the files of killed writers; steps takes every number for
    # a step's.
    for name in (
        "step_00000009.tmp",
        "step_99.pt",
        "step_000000099.pt",
        "step_\u0661\u0661\u0661\u0661\u0661\u0661\u0661\u0661.pt",
    ):
        (tmp_path / name).write_text("half")
    for step in range(1, 7):
        save(tmp_path, step, state(step), keep=2, best=2 if step > 1 else 1)
    assert steps(tmp_path) == [2, 5, 6]
    assert not list(tmp_path.glob("*.tmp"))
    assert (tmp_path / "step_99.pt").exists()
    assert load_newest(tmp_path, CPU)["step"] == 6


# In the background


def test_the_writer_works_beside_the_training_and_from_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Red when: save writes on the caller's thread; the state is not copied; two are under way at
    # once.
    go, running = threading.Event(), []
    original = checkpoint.save

    def slow(*args: Any) -> Path:
        running.append(threading.current_thread())
        assert go.wait(20)
        assert len(running) == len(steps(tmp_path)) + 1  # the one before has ended
        return original(*args)

    monkeypatch.setattr(checkpoint, "save", slow)
    writer = Writer(tmp_path, 5, background=True)
    live = state(1)
    writer.save(1, live)
    assert not steps(tmp_path)  # save has returned and nothing is there yet
    live["x"].fill_(-1)
    second = threading.Thread(target=writer.save, args=(2, state(2)))
    second.start()
    go.set()
    second.join()
    writer.wait()
    assert steps(tmp_path) == [1, 2]
    assert threading.main_thread() not in running
    assert torch.equal(load_step(tmp_path, 1, CPU)["x"], state(1)["x"])


def test_what_goes_wrong_in_the_background_is_raised_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Red when: the thread's error is dropped.
    monkeypatch.setattr(checkpoint, "save", lambda *_: 1 / 0)
    writer = Writer(tmp_path, 1, background=True)
    writer.save(1, state(1))
    with pytest.raises(ConadvError, match="ZeroDivisionError"):
        writer.save(2, state(2))
    writer.wait()


def test_a_run_with_background_writing_is_the_same_run(tmp_path: Path) -> None:
    # Red when: the copy is taken after the next step has begun, or the end does not wait for the
    # last checkpoint.
    for run, background in (("a", False), ("b", True)):
        changes = {**SHORT, "checkpoint__background": background}
        train(config(method="conadv", staleness=2, **changes), tmp_path / run)
    for step in range(1, 5):
        a, b = (load_step(tmp_path / run / "checkpoints", step, CPU) for run in "ab")
        assert same(a, b), step


def test_a_failed_background_write_ends_the_run_before_its_next_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Red when: `failed` does not reach stop_request (the run then goes on to its next checkpoint,
    # step 6).
    original = checkpoint.save

    def full(folder: Path, step: int, *rest: Any) -> Path:
        if step == 5:
            raise ConadvError("Cannot write the checkpoint: No space left on device.")
        return original(folder, step, *rest)

    class Waits(Observer):
        """Until the thread has failed: how long it takes depends on the machine."""

        def step(self, record: StepRecord) -> None:
            for thread in threading.enumerate():
                if thread.name == "checkpoint 5":
                    thread.join(60)

    monkeypatch.setattr(checkpoint, "save", full)
    changes = {"checkpoint__background": True, "checkpoint__every_epochs": 2 / 3}
    with pytest.raises(ConadvError, match="No space left"):
        train(config(global_batch_size=128, epochs=2, **changes), tmp_path, observer=Waits())
    last = read_lines(tmp_path / "record.jsonl")[-1]
    assert last["type"] == "error"
    assert last["step"] < 10  # when the next checkpoint is due


# The best


def test_the_best_checkpoint_is_chosen_by_held_out_images(tmp_path: Path) -> None:
    # Red when: the test set's accuracy is taken, the best is pruned, or eval takes the newest.
    settings = config(
        data__validation_images=98,
        global_batch_size=200,
        micro_batch_size=100,
        epochs=None,
        steps=8,
        eval__every_epochs=0.25,
        checkpoint__every_epochs=0.25,
        checkpoint__keep=1,
        checkpoint__keep_best=True,
        optim__lr=6.0,
        schedule__warmup_epochs=0,
        schedule__decay="constant",
    )
    train(settings, tmp_path)
    lines = read_lines(tmp_path / "record.jsonl")
    held_out = [line for line in lines if line.get("split") == "validation"]
    assert [line["step"] for line in held_out] == [*range(1, 8), 8]
    top = max(line["accuracy"] for line in held_out)
    # the first of equals
    best = next(line["step"] for line in held_out if line["accuracy"] == top)
    assert load_newest(tmp_path / "checkpoints", CPU)["best"] == {"step": best, "accuracy": top}
    assert steps(tmp_path / "checkpoints") == sorted({best, 8})
    assert load_run(tmp_path, CPU, best=True).step.version == best
    assert main(["export", str(tmp_path), "--best"]) == 0


def test_waiting_images_stay_on_the_cpu_and_nobody_holds_those_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Red when: the images of all go to every rank before each takes its own, or a rank's to the
    # device with the rest.
    images, labels = [torch.rand(2, 3), torch.rand(2, 3)], [torch.zeros(2)] * 2
    waiting = {"images": images, "labels": labels, "weight_version": 0}
    whole = {
        "step": 1,
        "model": {"w": torch.ones(3)},
        "engine": {"version": 1, "pending": {"1": waiting}},
    }
    comm, shared = Comm(device=torch.device("meta")), []
    monkeypatch.setattr(comm, "broadcast_object", lambda value: shared.append(value) or value)
    dealt = _deal(whole, comm)
    assert [value["engine"]["pending"] for value in shared] == [{}]
    assert dealt["model"]["w"].device.type == "meta"
    mine = dealt["engine"]["pending"]["1"]["images"]
    assert [image.device.type for image in mine] == ["cpu", "cpu"]


# Runs

SETTINGS = config(method="conadv", **SHORT, eval__every_epochs=None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    train(SETTINGS, path)
    return path


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_a_run_with_damaged_checkpoints_goes_on_from_the_one_before(
    finished: Path, out: Path
) -> None:
    # Red when: the damaged file stays under its name; the record does not say so; a resume does not
    # remove what a killed run had no time for.
    folder = out / "checkpoints"
    for step in (3, 4):
        path = folder / f"step_{step:08d}.pt"
        path.write_bytes(path.read_bytes()[:-500])
    train(SETTINGS, out, auto_resume=True)
    lines = read_lines(out / "record.jsonl")
    (resumed,) = (line for line in lines if line["type"] == "resume")
    assert resumed["step"] == 2
    for step, text in zip((4, 3), resumed["damaged"], strict=True):
        assert f"step_0000000{step}.pt is damaged" in text
    assert len(list(folder.glob("*.damaged"))) == 2
    assert without_times(lines) == without_times(read_lines(finished / "record.jsonl"))
    assert same(weights(finished), weights(out))


def test_a_resume_removes_what_a_killed_run_had_no_time_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Red when: load_or_claim does not prune: the run keeps one checkpoint too many for ever.
    settings = config(**SHORT, checkpoint__every_epochs=0.5, checkpoint__keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "prune", lambda *_: None)
        train(settings, tmp_path)
    assert len(steps(tmp_path / "checkpoints")) > 1
    train(settings, tmp_path, resume=True)
    assert steps(tmp_path / "checkpoints") == [4]


def test_a_finished_run_is_neither_deleted_nor_resumed_with_other_settings(out: Path) -> None:
    # Red when: a resume compares the settings with config.yaml alone, which the same hand has
    # changed; a finished run whose checkpoints are gone is begun again over its results; a run
    # without a best has one; auto-resume takes another config's run for its own.
    with pytest.raises(ConadvError, match="keep-best"):
        load_run(out, CPU, best=True)
    edited = replace(SETTINGS, seed=SETTINGS.seed + 1)
    with pytest.raises(ConadvError, match="already holds a run"):
        train(edited, out, auto_resume=True)
    written = (out / "config.yaml").read_text()
    (out / "config.yaml").write_text(dump_yaml(resolve(edited)))
    with pytest.raises(ConadvError, match=f"it began with:\n  seed: {SETTINGS.seed}"):
        train(edited, out, resume=True)
    (out / "config.yaml").write_text(written)
    shutil.rmtree(out / "checkpoints")
    before = (out / "summary.json").read_bytes()
    with pytest.raises(ConadvError, match="finished, but without a checkpoint"):
        train(SETTINGS, out, auto_resume=True)
    assert (out / "summary.json").read_bytes() == before


def test_a_stop_line_stays_where_the_run_goes_on_from_it(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    path.write_text("".join(f'{{"type": "stop", "step": {step}}}\n' for step in (3, 5)))
    truncate(path, read_lines(path), 3)
    assert [line["step"] for line in read_lines(path)] == [3]


def appended(line: str) -> Any:
    return lambda lines: [*lines, line + "\n"]


BROKEN: dict[str, tuple[Any, str]] = {
    "a step is missing": (
        lambda lines: [line for line in lines if '"step": 1,' not in line],
        r"lacks step\(s\) 1\.",
    ),
    "a step stands twice": (lambda lines: [*lines, lines[1]], "more than one line of"),
    "it is empty": (lambda lines: [], r"no header; it lacks step\(s\) 0, 1, 2"),
    "a step without its phases": (
        lambda lines: [*lines[:1], '{"type": "step", "step": 0}\n', *lines[2:]],
        "lacks",
    ),
    "a probe without a step": (appended('{"type": "probe"}'), "in probe step is missing"),
    "an image without a path": (appended('{"type": "bad_image", "step": 0}'), "path is missing"),
    "text for seconds": (
        appended('{"type": "step", "step": 0, "seconds": "x"}'),
        "in step seconds is 'x'",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_record_is_not_resumed(name: str, out: Path) -> None:
    # Red when: check_steps is not called, or does not look for that; RecordLine lacks that field.
    change, message = BROKEN[name]
    record = out / "record.jsonl"
    record.write_text("".join(change(record.read_text().splitlines(keepends=True))))
    before = record.read_bytes()
    with pytest.raises(ConadvError, match=message):
        train(RunDir(out).open(), out, resume=True)
    assert record.read_bytes().startswith(before)  # no line is lost; the error may be added


# A full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"cannot mount a tmpfs: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_ends_with_an_error_and_the_last_good_checkpoint(
    small_disk: Path, background: bool
) -> None:
    # Red when: save keeps its temporary file; the error is not a ConadvError; the record ends in
    # half a line.
    out = small_disk / "run"
    settings = config(checkpoint__keep=10, checkpoint__background=background, model__width=8)
    with pytest.raises(ConadvError, match=r"Cannot write the (checkpoint|record).*No space left"):
        train(settings, out)
    saved = steps(RunDir(out).checkpoints)
    assert saved
    assert find_newest(RunDir(out).checkpoints, CPU)[1] == []
    assert not list(RunDir(out).checkpoints.glob("*.tmp"))
    found = [line["step"] for line in read_lines(out / "record.jsonl") if line["type"] == "step"]
    assert found[: saved[-1]] == list(range(saved[-1]))
    assert (out / "record.jsonl").read_bytes().endswith(b"\n")
