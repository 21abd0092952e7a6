"""Run directories that version 0.1 wrote: stopped by SIGTERM with images pending, and finished with
an EMA and SGD.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conadv.cli.program import main
from conadv.training.checkpoint import load_newest
from conadv.training.export import load_plain_model
from conadv.training.loop import train
from conadv.training.record import read_lines
from conadv.training.run_dir import RunDir

DATA = Path(__file__).parent / "data" / "v01"
CPU = torch.device("cpu")


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """Six of ten steps of conadv, staleness 1."""
    return Path(shutil.copytree(DATA / "stopped", tmp_path / "stopped"))


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """Four steps of vanilla."""
    return Path(shutil.copytree(DATA / "finished", tmp_path / "finished"))


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_lines(run / "record.jsonl") if line["type"] == "step"]


def tensors(state: Any, name: str = "") -> dict[str, torch.Tensor]:
    """Every tensor of nested dicts and lists, by the path to it."""
    if isinstance(state, torch.Tensor):
        return {name: state}
    inner = state.items() if isinstance(state, dict) else enumerate(state)
    found: dict[str, torch.Tensor] = {}
    for key, value in inner:
        if isinstance(value, (dict, list, tuple, torch.Tensor)):
            found |= tensors(value, f"{name}/{key}")
    return found


def test_a_stopped_run_resumes_to_the_bits_of_an_uninterrupted_one(
    stopped: Path, tmp_path: Path
) -> None:
    # Red when: the pending images, the momentum or the order of the data is not taken from the 0.1
    # checkpoint.
    assert load_newest(stopped / "checkpoints", CPU)["engine"]["pending"]
    before, config = losses(stopped), RunDir(stopped).open()
    train(config, stopped, resume=True)
    train(config, tmp_path / "whole")
    found, want = (
        tensors(load_newest(run / "checkpoints", CPU)) for run in (stopped, tmp_path / "whole")
    )
    assert losses(stopped)[:6] == before
    assert len(losses(stopped)) == 10
    if losses(tmp_path / "whole")[:6] == before:  # the machine has the kernels that wrote the run
        assert losses(stopped) == losses(tmp_path / "whole")
        assert all(torch.equal(found[name], value) for name, value in want.items())
    else:
        assert losses(stopped) == pytest.approx(losses(tmp_path / "whole"), rel=1e-2)


def test_a_finished_run_is_evaluated_exported_and_reported(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Red when: a command cannot read what 0.1 wrote, or evaluates the weights instead of their
    # average.
    page = finished.parent / "page" / "report.html"
    assert main(["eval", str(finished)]) == 0
    assert main(["export", str(finished)]) == 0
    assert main(["report", str(finished), "--out", str(page)]) == 0
    assert main(["timeline", str(finished)]) == 0
    summary = json.loads((finished / "summary.json").read_text())
    test = [line for line in read_lines(finished / "record.jsonl") if line.get("split") == "test"]
    assert test[-1]["accuracy"] == summary["test_accuracy"]
    averaged = load_newest(finished / "checkpoints", CPU)["ema"]
    exported = load_file(finished / "model.safetensors")
    assert torch.equal(exported["conv1.weight"], averaged["module.conv1.weight"])
    assert load_plain_model(finished)(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


def test_a_finished_run_has_nothing_left_to_train(finished: Path) -> None:
    # Red when: the EMA or SGD's momentum of 0.1 is refused.
    want = json.loads((finished / "summary.json").read_text())
    found = train(RunDir(finished).open(), finished, resume=True)
    assert found["steps"] == want["steps"] == 4
    assert found["test_accuracy"] == pytest.approx(want["test_accuracy"], abs=0.01)
