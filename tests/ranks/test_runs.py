"""Whole runs on two ranks: the trainer in worker processes, and the program under torchrun."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from conadv.config.files import dump_yaml
from conadv.training.checkpoint import steps
from conadv.training.loop import train
from conadv.training.record import read_lines
from conadv.training.results import measure
from conadv.training.resume import load_run

from ..data_cases import image_folder
from ..test_training import METHODS, config, weights, without_times
from . import jobs
from .launch import ONE_HOST, torchrun
from .pool import Ranks

STORY = ["header", *["step"] * 3, "eval", *["step"] * 3, *["timeline"] * 6, *["eval"] * 3]


def same_weights(a: Path, b: Path) -> bool:
    x, y = weights(a), weights(b)
    return x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x)


def forget_after(out: Path, step: int) -> None:
    """As if the run had been killed after writing more steps than its last checkpoint."""
    for late in steps(out / "checkpoints"):
        if late > step:
            (out / "checkpoints" / f"step_{late:08d}.pt").unlink()
    (out / "summary.json").unlink()


@pytest.mark.parametrize("name", ["sam-aug", "conadv-tau2", "conadv-share", "recycle"])
def test_methods_train_and_resume_bitwise(two: Ranks, name: str, tmp_path: Path) -> None:
    # Red when: only rank 0's waiting images are saved; a rank takes another's share of them; rank 1
    # goes on with its own running statistics; the checkpoint's statistics are not those that were
    # evaluated.
    changes = METHODS[name]
    mine, theirs = two.run(jobs.train_run, tmp_path / "whole", changes)
    assert mine == theirs == json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert (mine["ranks"], mine["accumulation"], mine["batchnorm_batch_size"]) == (2, 2, 64)
    lines = read_lines(tmp_path / "whole" / "record.jsonl")
    assert [line["type"] for line in lines] == STORY
    assert lines[0]["ranks"] == 2
    assert all("wait" in line["phases"] for line in lines if line["type"] == "step")
    results = measure(load_run(tmp_path / "whole", torch.device("cpu")))
    for split in ("test", "robust"):
        assert results[split].accuracy == mine[f"{split}_accuracy"]
    assert results["train"].loss == pytest.approx(mine["train_loss"], rel=1e-6)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    forget_after(tmp_path / "cut", 4)
    two.run(jobs.train_run, tmp_path / "cut", changes, True)
    assert without_times(read_lines(tmp_path / "cut" / "record.jsonl")) == without_times(lines)
    assert same_weights(tmp_path / "whole", tmp_path / "cut")


def test_the_probe_on_two_ranks(two: Ranks, tmp_path: Path) -> None:
    # Red when: rank 0 probes only its share of the images; a rank takes part in measuring alone.
    plain = {"method": "conadv", "staleness": 2, "lookahead": True}
    probe = {"probe__every_epochs": 1, "probe__staleness": (1, 2), "probe__images": 128}
    for name, changes in (("probed", {**plain, **probe}), ("plain", plain)):
        two.run(jobs.train_run, tmp_path / name, changes)
    assert same_weights(tmp_path / "probed", tmp_path / "plain")
    train(config(**plain, **probe), tmp_path / "alone")
    records = [read_lines(tmp_path / name / "record.jsonl") for name in ("probed", "alone")]
    ours, alone = ([line for line in lines if line["type"] == "probe"] for lines in records)
    assert len(ours) == len(alone) == 2 + 2 * 3
    for a, b in zip(ours, alone, strict=True):
        floats = {key for key, value in b.items() if isinstance(value, float)}
        want = {key: pytest.approx(b[key], rel=1e-3, abs=1e-4) for key in floats}
        assert a == {**b, **want}


@pytest.mark.parametrize("name", ["conadv-tau2", "recycle"])
def test_one_rank_gives_the_losses_of_two_and_goes_on_where_they_stopped(
    two: Ranks, name: str, tmp_path: Path
) -> None:
    # Red when: rank 1 reads rank 0's images; losses in the record are those of one rank; the
    # waiting images of rank 0 are taken for those of all ranks. Up to rounding, which six LARS
    # steps in float32 amplify: four gradients are summed one by one instead of two and two. Without
    # evaluations: one rank tracks the statistics of all images, not only of rank 0's.
    out = tmp_path / "two"
    two.run(jobs.train_run, out, METHODS[name])
    train(config(**METHODS[name]), tmp_path / "one")
    records = [read_lines(path / "record.jsonl") for path in (out, tmp_path / "one")]
    forget_after(out, 4)
    train(config(**METHODS[name]), out, resume=True)
    records.append(read_lines(out / "record.jsonl"))
    losses = [[line["losses"] for line in lines if "losses" in line] for lines in records]
    assert len(losses[0]) == 6
    for other in losses[1:]:
        for one, two_ranks in zip(other, losses[0], strict=True):
            assert one == pytest.approx(two_ranks, rel=1e-3)
    resumed = [line for line in records[-1] if line["type"] == "resume"]
    assert [(line["step"], line["ranks"]) for line in resumed] == [(4, 1)]


def test_ranks_that_the_batch_does_not_divide_into(two: Ranks, tmp_path: Path) -> None:
    # Red when: one rank alone notices (the other waits for it).
    for changes, message in (
        ({"global_batch_size": 255, "micro_batch_size": 51}, "does not divide into 2 rank(s)"),
        ({"micro_batch_size": 256}, "is not micro_batch_size 256 x accumulation x 2"),
    ):
        for error in two.errors(jobs.train_run, tmp_path, changes):
            assert message in error
    assert not list(tmp_path.iterdir())


def run_on_two(*args: object) -> subprocess.CompletedProcess[str]:
    """``conadv train`` on two processes; a run that hangs fails the test."""
    command = list(map(str, torchrun(ONE_HOST, *args, "--comm-timeout", 60)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)


def test_torchrun(tmp_path: Path) -> None:
    # Red when: every rank writes the record, shows progress or reports what all have raised; a
    # check of rank 0 ends rank 0 alone; the ranks compare their clocks on the line of the first
    # weights.
    settings: dict[str, Any] = {"method": "conadv", "staleness": 2, "lookahead": True}
    settings |= {"epochs": None, "steps": 4, "eval__robust_images": 32}
    file, out = tmp_path / "config.yaml", tmp_path / "run"
    file.write_text(dump_yaml(config(**settings)))
    done = run_on_two("--config", file, "--out", out, "--attack-ranks", 1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ranks 1 (and 1 attack rank(s))") == 1
    assert done.stdout.count("run directory:") == 1
    steps_made = [line for line in read_lines(out / "record.jsonl") if line["type"] == "step"]
    assert [line["staleness"] for line in steps_made] == [0, 0, 2, 2]
    train(config(**settings), tmp_path / "alone")
    assert same_weights(out, tmp_path / "alone")

    again = run_on_two("--config", file, "--out", out)
    assert again.returncode != 0
    assert again.stderr.count("conadv: ") == 1
    assert "already holds a run" in again.stderr
    assert "exitcode  : 2" in again.stderr
    assert "exitcode  : 1 " not in again.stderr


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda root: (root / "train/owl/0.png").unlink(), "23 training images, rank 0 has 24"),
        (lambda root: rename_class(root), "number 2 was owl, it is yak now"),
    ],
)
def test_ranks_with_other_data_are_an_error(
    two: Ranks, tmp_path: Path, change: Any, said: str
) -> None:
    # Red when: check_same_on_ranks is not called (one rank would wait for the other's last step, or
    # the ranks would train on other labels).
    for rank in range(2):
        image_folder(tmp_path / f"data{rank}")
    change(tmp_path / "data1")
    for error in two.errors(jobs.train_on_data_of_its_own, tmp_path):
        assert said in error
    assert not (tmp_path / "run").exists()


def rename_class(root: Path) -> None:
    for split in ("train", "test"):
        (root / split / "owl").rename(root / split / "yak")
