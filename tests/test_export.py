"""Exports: what other programs read is the clean route, to the last weight or up to rounding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conadv import ConadvError
from conadv.cli.program import main
from conadv.config import recipes
from conadv.config.files import dump_yaml
from conadv.config.resolve import resolve
from conadv.config.schema import replace
from conadv.models.small import SmallResNet
from conadv.training import checkpoint
from conadv.training import export as exporting
from conadv.training.build import make_model
from conadv.training.export import export, load_plain_model
from conadv.training.run_dir import RunDir

from .helpers import images

MODELS = ("torchvision:shufflenet_v2_x0_5", "timm:test_resnet")


def plain(name: str) -> Any:
    """The network by its library's own constructor."""
    kind, _, short = name.partition(":")
    if not short:
        return SmallResNet(8, 16, 3, 4)
    if kind == "timm":
        return pytest.importorskip("timm", reason="timm is not installed").create_model(
            short, num_classes=4
        )
    import torchvision

    return torchvision.models.get_model(short, num_classes=4)


def made(folder: Path, name: str = "resnet8") -> Path:
    """A run directory as one that trained on four classes of 32x32 photographs leaves it."""
    settings = replace(
        recipes.get("digits"),
        method="conadv",
        model__name=name,
        model__width=None,
        data__mean=(0.4,),
    )
    run, config = RunDir(folder), resolve(settings)
    folder.mkdir()
    run.config.write_text(dump_yaml(config))
    model = make_model(config, 3, 4).train()
    for seed in range(2):
        model(images(4, seed, size=32)[0])  # statistics that are not those of the start
    state = {
        "model": model.state_dict(),
        "channels": 3,
        "image_size": 32,
        "class_names": list("abcd"),
    }
    state |= {"engine": {"version": 1}, "best": None}
    checkpoint.save(run.checkpoints, 1, state, keep=1)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_weights_load_into_the_librarys_own_constructor(name: str, tmp_path: Path) -> None:
    # Red when: the routes' entries are left in.
    net = plain(name)
    assert main(["export", str(made(tmp_path / "run", name))]) == 0
    net.load_state_dict(load_file(tmp_path / "run" / "model.safetensors"), strict=True)
    x = images(5, 9, size=32)[0]
    assert torch.equal(net.eval()(x), load_plain_model(tmp_path / "run")(x))


@pytest.mark.parametrize("name", ["resnet8", "timm:test_resnet"])
def test_torch_export_computes_the_clean_route(name: str, tmp_path: Path) -> None:
    # Red when: the network is traced in train mode, or for two images only.
    plain(name)
    run = made(tmp_path / "run", name)
    assert main(["export", str(run), "--format", "torch-export"]) == 0
    about = {"conadv.json": ""}
    program = torch.export.load(run / "model.pt2", extra_files=about).module()
    for n in (1, 5):
        x = images(n, n, size=32)[0]
        assert torch.allclose(program(x), load_plain_model(run)(x), rtol=1e-4, atol=1e-5)
    assert json.loads(json.loads(about["conadv.json"])["class_names"]) == list("abcd")


def test_onnx_computes_the_clean_route(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # Red when: the network is traced for two images only, or weights go into a second file.
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    run = made(tmp_path / "run")
    before = set(tmp_path.rglob("*"))
    assert main(["export", str(run), "--format", "onnx"]) == 0
    assert set(tmp_path.rglob("*")) - before == {run / "model.onnx"}
    assert capfd.readouterr().out == f"{run / 'model.onnx'}\n"
    session = onnxruntime.InferenceSession(run / "model.onnx", providers=["CPUExecutionProvider"])
    for n in (1, 5):
        x = images(n, n, size=32)[0]
        (found,) = session.run(["logits_NK"], {"x_NCHW": x.numpy()})
        assert torch.allclose(
            torch.from_numpy(found), load_plain_model(run)(x), rtol=1e-3, atol=1e-4
        )
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["mean"]) == [0.4]


def test_a_trace_that_computes_something_else_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Red when: _compare is left out.
    run = made(tmp_path / "run")
    other = plain("resnet8").eval()
    traced = exporting._traced
    monkeypatch.setattr(exporting, "_traced", lambda model, shape: traced(other, shape))
    with pytest.raises(ConadvError, match="differs from the trained one"):
        export(run, kind="torch-export")
    assert not (run / "model.pt2").exists()


@pytest.mark.parametrize("name", ["nobody:net", "timm:test_resnet"])
def test_a_network_that_cannot_be_made_here_is_not_the_checkpoints_fault(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Red when: _load builds the network where every error says that the checkpoint was changed.
    run = made(tmp_path / "run")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("name: resnet8", f"name: {name}"))
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ConadvError, match=r"--model nobody:net|pip install") as caught:
        export(run)
    assert "It was changed" not in str(caught.value)


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made(tmp_path / "run")
    with pytest.raises(ConadvError, match="format"):
        export(run, kind="onxx")
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(ConadvError, match=r"pip install '\.\[onnx\]'"):
        export(run, kind="onnx")
    (run / "model.pt2").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConadvError, match="link"):
        export(run, kind="torch-export")
