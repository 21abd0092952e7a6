"""Data that change under a run: a resume and an evaluation say what changed, and go on only if told
to.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open

from conadv import ConadvError
from conadv.cli.program import main
from conadv.config.schema import Config, replace
from conadv.training import checkpoint
from conadv.training.export import export
from conadv.training.loop import train
from conadv.training.record import read_lines
from conadv.training.results import measure
from conadv.training.resume import load_run

from .data_cases import image_folder, picture
from .test_training import config

CPU = torch.device("cpu")
STEP = 3  # of six, where the run was stopped


def settings(data: Path, **changes: Any) -> Config:
    """Two epochs of three steps over 24 images."""
    small: Config = replace(
        config(method="conadv", eval__every_epochs=None, eval__robust_images=0),
        global_batch_size=8,
        micro_batch_size=4,
        optim__lr=0.1,
        model__width=None,
        data={"source": "folder", "dir": data, "image_size": 8},
    )
    return replace(small, **changes)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """folder/run, which has come to STEP, and folder/data."""
    folder = tmp_path_factory.mktemp("stopped")
    train(settings(image_folder(folder / "data")), folder / "run")
    for step in range(STEP + 1, 7):
        (folder / "run" / "checkpoints" / f"step_{step:08d}.pt").unlink()
    return folder


@pytest.fixture
def here(stopped: Path, tmp_path: Path) -> Path:
    """A copy: the same data elsewhere are the same data."""
    return Path(shutil.copytree(stopped, tmp_path / "here"))


def four_more(data: Path) -> None:
    for n in range(4):
        picture(50 + n).save(data / "train" / "cat" / f"x{n}.png")


def renamed(data: Path) -> None:
    for split in ("train", "test"):
        (data / split / "owl").rename(data / split / "ant")


def one_class_less(data: Path) -> None:
    for split in ("train", "test"):
        shutil.rmtree(data / split / "owl")


CHANGES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "more images": (four_more, "more or fewer images in cat .8 before, 12 now", "accepted"),
    "another class": (renamed, "Classes that are missing: owl", "accepted"),
    "a class less": (one_class_less, "Classes that are missing: owl", "impossible"),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.filterwarnings("ignore:A batch was not attacked ahead of time")
def test_a_resume_names_what_changed_and_goes_on_only_if_told_to(name: str, here: Path) -> None:
    # Red when: load_or_claim does not compare; images that wait for batches of the old data are
    # kept (Concurrent finds other labels); the next checkpoint has the old fingerprint; what is
    # accepted once is accepted for ever; the network's number of classes is not looked at.
    change, said, then = CHANGES[name]
    out, wanted = here / "run", settings(here / "data")
    change(here / "data")
    before = (out / "record.jsonl").read_bytes()
    for how in ({"resume": True}, {"auto_resume": True}, {"restarted": True}):
        with pytest.raises(ConadvError, match=f"since the checkpoint of step {STEP}(.|\n)*{said}"):
            train(wanted, out, **how)
    assert (out / "record.jsonl").read_bytes() == before
    accepting = replace(wanted, data__changed="accept")
    if then == "impossible":
        with pytest.raises(ConadvError, match="The network's outputs stand for the classes"):
            train(accepting, out, resume=True)
        return
    train(accepting, out, resume=True)
    lines = read_lines(out / "record.jsonl")
    (resumed,) = (line for line in lines if line["type"] == "resume")
    steps = 2 * (28 // 8 if name == "more images" else 24 // 8)
    assert (resumed["step"], resumed["steps"]) == (STEP, steps)
    assert any(said.split(" in ")[0] in text for text in resumed["data_changed"])
    made = [line for line in lines if line["type"] == "step"]
    assert [line["step"] for line in made] == list(range(steps))
    assert [line["staleness"] for line in made[STEP : STEP + 2]] == [0, 1]
    train(wanted, out, resume=True)  # nothing has changed since
    again = [line for line in read_lines(out / "record.jsonl") if line["type"] == "eval"]
    assert [line["split"] for line in again] == ["train", "test"]


def test_accepting_is_for_one_start(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Red when: a config.yaml that says accept is believed.
    seen: list[Config] = []
    monkeypatch.setattr("conadv.training.loop.train", lambda config, *_, **__: seen.append(config))
    file = here / "run" / "config.yaml"
    file.write_text(file.read_text().replace("changed: error", "changed: accept"))
    command = ["train", "--config", str(file), "--quiet", "--device", "cpu", "--out", str(here)]
    for options, changed in (([], "error"), (["--data.changed", "accept"], "accept")):
        main([*command, *options])
        assert seen[-1].data.changed == changed


def reseal(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    state = checkpoint.load_newest(run / "checkpoints", CPU)
    change(state)
    state.pop("format")
    checkpoint.save(run / "checkpoints", STEP, state, keep=1)


def test_a_checkpoint_of_version_0_1_has_class_names_alone(here: Path) -> None:
    # Red when: a checkpoint without a fingerprint is not compared at all, or refused; what a
    # stranger has written in its place is used.
    out, wanted = here / "run", settings(here / "data")
    for odd in (5, {"splits": 1}, {"source": "folder", "classes": [], "splits": {}}):
        reseal(out, lambda state, odd=odd: state.update(data=odd))
        with pytest.raises(ConadvError):
            train(wanted, out, resume=True)
    reseal(out, lambda state: state.pop("data"))
    renamed(here / "data")
    with pytest.raises(ConadvError, match="number 0 was cat, it is ant now"):
        train(wanted, out, resume=True)
    shutil.rmtree(here / "data")
    image_folder(here / "data")
    assert train(wanted, out, resume=True)["steps"] == 6


def test_an_evaluation_says_where_to_look_for_data_that_moved(here: Path) -> None:
    # Red when: load_run does not look, takes other classes for its own, or needs no word for other
    # images.
    out, elsewhere = here / "run", here / "elsewhere"
    before = measure(load_run(out, CPU, data=here / "data"))["test"]
    shutil.copytree(here / "data", elsewhere)
    file = out / "config.yaml"
    now = yaml.safe_load(file.read_text())
    now["data"]["dir"] = str(here / "gone")
    file.write_text(yaml.safe_dump(now))
    with pytest.raises(ConadvError, match=r"no longer in .*gone.*--data DIR"):
        load_run(out, CPU)
    assert main(["eval", str(out), "--data", str(elsewhere)]) == 0
    assert measure(load_run(str(out), CPU, data=elsewhere))["test"] == before
    four_more(here / "elsewhere")
    elsewhere.rename(here / "gone")
    with pytest.raises(ConadvError, match=r"(?s)more or fewer images in cat.*--data DIR"):
        load_run(out, CPU)
    assert load_run(out, CPU, data=here / "gone").data.train_size == 28
    renamed(here / "gone")
    with pytest.raises(ConadvError, match="The network's outputs stand for"):
        load_run(out, CPU, data=here / "gone")


def test_an_export_needs_no_data_and_has_the_classes_in_order(here: Path) -> None:
    # Red when: the metadata lacks the names, or the card does not say what their order means.
    shutil.rmtree(here / "data")
    with safe_open(export(str(here / "run")), "pt") as file:
        assert json.loads(file.metadata()["class_names"]) == ["cat", "dog", "owl"]
    card = (here / "run" / "model_card.md").read_text()
    assert "Classes (3), in the order of the outputs: cat, dog, owl" in card
