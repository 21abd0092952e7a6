"""Networks whose tensors share memory: trained, averaged, resumed, stripped and exported as any
other.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from conadv.config.resolve import resolve
from conadv.models.own import trust
from conadv.training.build import build
from conadv.training.export import export, load_plain_model
from conadv.training.loop import train
from conadv.training.resume import load_run

from .helpers import same
from .test_training import config, weights

CPU = torch.device("cpu")


def tied_weight(num_classes: int) -> nn.Module:
    """One weight under two names."""
    a, b = nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 3, padding=1)
    b.weight = a.weight
    return nn.Sequential(
        a, nn.BatchNorm2d(1), nn.ReLU(), b, nn.Flatten(), nn.Linear(64, num_classes)
    )


def tied_module(num_classes: int) -> nn.Module:
    """One batch norm at two places: its weights, its statistics and its routes."""
    norm = nn.BatchNorm2d(2)
    layers = [nn.Conv2d(1, 2, 3, padding=1), norm, nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1), norm]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, num_classes))


class TiedBuffer(nn.Module):
    """One buffer under two names."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
        self.register_buffer("scale", torch.full((num_classes,), 2.0))
        self.register_buffer("again", self.scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) * self.scale + self.again


def one_storage(num_classes: int) -> nn.Module:
    """Weights that are parts of one tensor, and a weight that is not contiguous."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, num_classes))
    flat = torch.randn(2, 64) * 0.1
    net[1].bias = nn.Parameter(flat[0])
    net[1].weight = nn.Parameter(torch.randn(64, 64).t() * 0.1)
    net[3].weight = nn.Parameter(flat[1].expand(num_classes, 64).clone())
    return net


NETS: dict[str, Callable[[int], nn.Module]] = {
    "tied_weight": tied_weight,
    "tied_module": tied_module,
    "TiedBuffer": TiedBuffer,
    "one_storage": one_storage,
}


def settings(name: str) -> Any:
    own = f"{__name__}:{name}"
    trust(own)
    changes = {"model__name": own, "model__width": None, "method": "conadv", "ema__decay": 0.5}
    return config(**changes, eval__every_epochs=None, eval__robust_images=0)


def ties(model: nn.Module) -> list[tuple[str, str]]:
    """Names of one tensor."""
    named = list(model.state_dict(keep_vars=True).items())
    return [(a, b) for i, (a, x) in enumerate(named) for b, y in named[i + 1 :] if x is y]


@pytest.mark.parametrize("name", NETS)
def test_a_network_with_shared_tensors_goes_all_the_way(name: str, tmp_path: Path) -> None:
    # Red when: export hands tensors that share memory to safetensors; EMA or strip copies them
    # apart; a resume loads them as if they were not one.
    out, plain = tmp_path / "whole", NETS[name](10)
    train(settings(name), out)
    cut = Path(shutil.copytree(out, tmp_path / "cut"))
    for step in (5, 6):
        (cut / "checkpoints" / f"step_{step:08d}.pt").unlink()
    train(settings(name), cut, resume=True)
    assert same(weights(out), weights(cut))

    loaded = load_plain_model(out)
    assert ties(loaded) == ties(plain)
    plain.load_state_dict(load_file(export(out)), strict=True)
    x = load_run(out, CPU).space.normalize(torch.rand(5, 1, 8, 8))
    assert torch.equal(plain.eval()(x), loaded(x))
    program = torch.export.load(export(out, kind="torch-export")).module()
    assert torch.allclose(program(x), loaded(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["tied_weight", "tied_module"])
def test_the_average_of_a_tied_weight_is_taken_once(name: str) -> None:
    # Red when: an update goes over both names of a tensor (the average would move twice).
    run = build(resolve(settings(name)), CPU)
    assert run.ema is not None
    assert ties(run.ema.module) == ties(run.model)
    first = run.model[0].weight.detach().clone()
    want = first.clone()
    for count in range(3):
        with torch.no_grad():
            run.model[0].weight.add_(1.0)
        run.ema.update_parameters(run.model)
        decay = min(0.5, (1 + count) / (10 + count)) if count else 0.0  # the first one copies
        want = decay * want + (1 - decay) * (first + 1.0 * (count + 1))
    assert torch.allclose(run.ema.module[0].weight, want)


def test_onnx_of_a_tied_weight(tmp_path: Path) -> None:
    # Red when: the format's own names for one tensor clash.
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    train(settings("tied_weight"), tmp_path)
    session = onnxruntime.InferenceSession(export(tmp_path, kind="onnx"))
    x = torch.rand(5, 1, 8, 8)
    (found,) = session.run(["logits_NK"], {"x_NCHW": x.numpy()})
    assert torch.allclose(torch.from_numpy(found), load_plain_model(tmp_path)(x), atol=1e-4)
