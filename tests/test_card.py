"""The model card: what it says is what the run did, its code runs, and nothing in a run's names
becomes markup.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from conadv.config.files import load_yaml, parse
from conadv.config.schema import replace
from conadv.errors import ConadvError
from conadv.training.card import escape, fenced, model_card
from conadv.training.export import export, load_plain_model
from conadv.training.loop import train
from conadv.training.resume import load_state
from conadv.training.run_dir import RunDir

from .test_training import config

CPU = torch.device("cpu")


def front(text: str) -> dict[str, Any]:
    """The metadata header."""
    _, header, _ = text.split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(header)
    return found


def block(text: str, language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("card") / "run"
    weights = {"ema__decay": 0.5, "eval__precise_bn_images": 20, "data__mixup": 0.2}
    train(config(method="conadv", checkpoint__every_epochs=1, checkpoint__keep=9, **weights), path)
    export(path)
    return RunDir(path)


def test_it_says_what_the_run_did(run: RunDir) -> None:
    # Red when: the robust accuracy stands in the test row, the folder of the data is in the card,
    # the average, the recalibration or mixup is left out, or the size is the setting's, which may
    # be none.
    text, summary = run.card.read_text(), json.loads(run.summary.read_text())
    rows = re.findall(r"^\| (\w+) images(.*?) \| ([\d.]+) \| ([\d.]+) \| (\d+) \|$", text, re.M)
    found = {
        kind + ("-PGD" if "PGD" in more else ""): float(accuracy)
        for kind, more, accuracy, _, _ in rows
    }
    want = {"test": "test_accuracy", "training": "train_accuracy", "test-PGD": "robust_accuracy"}
    assert found == {
        kind: pytest.approx(100 * summary[name], abs=0.005) for kind, name in want.items()
    }
    done = "after 6 updates, averaged with decay 0.5, with batch-norm statistics of 20 images, in"
    for words in (done, ", mixup 0.2", "Input: 1 channel(s), 8 x 8 pixels", "staleness 1"):
        assert words in text
    assert f"torch {torch.__version__.partition('+')[0]}" in text.replace("\\", "")
    assert parse(yaml.safe_load(block(text, "yaml")), "card") == replace(
        load_yaml(run.config), data__dir=None
    )


def test_the_header_is_what_hubs_read(run: RunDir) -> None:
    # Red when: the accuracy is written in percent, the header is not the first thing in the file,
    # or a tag comes twice (the method's name is that of the library).
    about, summary = front(run.card.read_text()), json.loads(run.summary.read_text())
    assert about["tags"] == ["image-classification", "conadv", "large-batch"]
    assert about["pipeline_tag"] == "image-classification"
    (result,) = about["model-index"][0]["results"]
    assert result["dataset"] == {"name": "digits", "type": "digits", "split": "test"}
    assert result["metrics"][0]["value"] == summary["test_accuracy"]


def test_its_code_loads_the_weights(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    # Red when: the width is left out of the constructor.
    monkeypatch.chdir(run.path)
    names: dict[str, Any] = {}
    exec(block(run.card.read_text(), "python"), names)
    x = torch.rand(4, 1, 8, 8)
    assert torch.equal(names["model"](x), load_plain_model(run.path)(x))


OTHERS = {"resnet18": (), "torchvision:mobilenet_v3_small": ("dropout=0.25",)}


@pytest.mark.parametrize("name", [*OTHERS, "timm:resnet10t"])
def test_other_peoples_networks_come_from_their_own_constructors(
    run: RunDir, tmp_path: Path, name: str
) -> None:
    # Red when: a torchvision network is looked for in conadv, or model.args do not arrive.
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    args = OTHERS.get(name, ("drop_rate=0.25",))
    other = RunDir(tmp_path / "other")
    changes = {"model__name": name, "model__width": None, "model__args": args}
    other.start(replace(load_yaml(run.config), **changes))
    code = block(model_card(other, {"step": 1, "channels": 3, "class_names": ["a", "b"]}), "python")
    wanted = re.findall(r"^(?:import timm|from torchvision.*|model = .*)$", code, re.M)
    names: dict[str, Any] = {}
    exec("\n".join(wanted), names)
    assert names["model"](torch.rand(2, 3, 32, 32)).shape == (2, 2)
    assert all(arg in code for arg in args)
    assert "conadv" not in code


def test_accuracies_are_of_the_exported_weights(run: RunDir) -> None:
    # Red when: the last evaluation of the record is taken whatever the step.
    state = load_state(run, CPU)
    assert "no evaluation of these weights" in model_card(run, {**state, "step": state["step"] - 1})
    assert "model-index" not in front(model_card(run, {**state, "step": state["step"] - 1}))


def test_an_export_reads_the_record_before_it_writes(run: RunDir, tmp_path: Path) -> None:
    # Red when: the card is made after the weights were written.
    copy = RunDir(Path(shutil.copytree(run.path, tmp_path / "run")))
    copy.weights.unlink(missing_ok=True)
    with copy.record.open("a") as file:
        file.write('{"type": "eval", "step": 3, "split": "test", "accuracy": 1' + "0" * 400 + "}\n")
    with pytest.raises(ConadvError, match="digits"):
        export(copy.path)
    assert not copy.weights.exists()


def test_names_from_somebody_else_stay_text(run: RunDir, tmp_path: Path) -> None:
    # Red when: class names go in unescaped, or the YAML's fence has always three backticks.
    bad = "```\n# x <script>alert(1)</script> [y](javascript:z) | --- $a$ @b"
    other = RunDir(tmp_path / "other")
    other.start(replace(load_yaml(run.config), recipe=bad))
    text = model_card(other, {"step": 1, "channels": 1, "class_names": [bad, "b"]})
    body = re.sub(r"^(`{3,})\w+\n.*?^\1$", "", text.split("---\n", 2)[2], flags=re.M | re.S)
    body = re.sub(r"`(model\.safetensors|--data|conadv eval RUN)`", "", body)
    assert "<script>" not in body
    assert not re.search(r"(?<!\\)\[y|(?<!\\)`|^# x|(?<!\\)\$a", body, re.M)
    assert (
        yaml.safe_load(re.search(r"^(`{4,})yaml\n(.*?)^\1$", text, re.M | re.S)[2])["recipe"] == bad
    )  # type: ignore[index]
    assert front(text)["library_name"] == "pytorch"


def test_escape() -> None:
    # Red when: "*" is left alone; a_b may stay, since nothing begins inside of a word.
    assert escape("a_b *c* <i> \n#") == r"a_b \*c\* &lt;i&gt; \\n\#"
    assert fenced("a ```` b", "x") == "`````x\na ```` b\n`````\n"
