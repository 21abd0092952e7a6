"""The average of the weights and precise batch-norm statistics, against brute force."""

from __future__ import annotations

import copy
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from conadv import (
    EMA,
    FGSM,
    ConadvError,
    evaluate,
    frozen_stats,
    recalibrate,
    route,
    split_batchnorm,
)
from conadv.nn.ema import evaluated_state
from conadv.nn.split_batchnorm import layers_on
from conadv.training.checkpoint import load_newest, steps
from conadv.training.export import load_plain_model
from conadv.training.loop import train
from conadv.training.results import measure
from conadv.training.resume import load_run

from .helpers import images, no_norm_net, same, state, tiny_resnet
from .test_methods import CASES, EPS, SPACE, as_batch, make
from .test_training import CPU, config

# ---- averages


@pytest.mark.parametrize("decay", [0.3, 0.99])
def test_weights_and_statistics_of_every_route_are_averaged(decay: float) -> None:
    # Red when: buffers are left out, a route's statistics come from another route, or the decay has
    # no warm-up.
    model = tiny_resnet("adv", dtype=torch.float64)
    engine, average = make(CASES["conadv"](), model), EMA(model, decay)
    want: dict[str, Any] = {}
    for t in range(5):
        engine(as_batch(t, dtype=torch.float64), as_batch(t + 1, dtype=torch.float64))
        average.update_parameters(model)
        d = min(decay, (1 + t) / (10 + t)) if t else 0.0
        for name, value in state(model).items():
            old = want.get(name, value)
            want[name] = d * old + (1 - d) * value if value.is_floating_point() else value
    found = state(average.module)
    assert found.keys() == want.keys()
    for name, value in found.items():
        assert torch.allclose(value, want[name], rtol=1e-12), name
    assert not same(found, state(model))
    clean, adv = found["bn1.running_mean"], found["bn1.routes.adv.running_mean"]
    assert not torch.equal(clean, adv)
    with pytest.raises(ValueError, match="decay"):
        EMA(model, 1.0)


AVERAGED = {"method": "conadv", "ema__decay": 0.9, "eval__precise_bn_images": 200}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("average") / "whole"
    train(config(**AVERAGED), out)
    return out


class Buffers(nn.Module):
    """Buffers of all kinds: complex weights, a mask, a counter, ones that are made or grow
    later.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, dtype=torch.complex64))
        for name, value in {
            "mask": torch.ones(3, dtype=torch.bool),
            "scale": torch.ones(3),
        }.items():
            self.register_buffer(name, value)
        self.register_buffer("grows", torch.zeros(0), persistent=False)
        self.register_buffer("later", None)
        self.register_buffer("running_max", torch.zeros(3))

    def change(self, t: int) -> None:
        with torch.no_grad():
            self.weight.copy_(torch.tensor([1, 1j, 2 + 2j]) * t)
        self.mask[t % 3] = False
        self.scale = torch.full((3,), float(t))  # another tensor, not a change in place
        self.grows, self.later = torch.arange(t + 1.0), torch.full((t + 1,), 2.0)
        self.running_max.fill_(t)


def test_other_buffers_are_copied_and_complex_weights_averaged() -> None:
    # Red when: only floats are averaged (the average is then the newest weights); a buffer that is
    # no statistic is averaged; one that has another size, or came later, is an error.
    model = Buffers()
    average, want = EMA(model, 0.5), torch.zeros(())
    for t in range(6):
        model.change(t)
        average.update_parameters(model)
        d = min(0.5, (1 + t) / (10 + t)) if t else 0.0
        want = d * want + (1 - d) * t
    found: Any = average.module
    weights = torch.tensor([1, 1j, 2 + 2j]) * want
    assert torch.allclose(found.weight, weights)
    assert torch.allclose(found.running_max, want.expand(3))
    for name in ("mask", "scale", "grows", "later"):
        assert torch.equal(getattr(found, name), getattr(model, name)), name
        assert getattr(found, name) is not getattr(model, name)


def test_the_average_of_spectral_norm_keeps_its_unit_vectors() -> None:
    # Red when: every buffer is averaged: the vectors shrink, and the weights grow by their product.
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))
    model, turn = nn.Sequential(layer), torch.linalg.qr(torch.randn(8, 8)).Q
    average = EMA(model, 0.9)
    for _ in range(40):  # the weights turn in one plane after another
        with torch.no_grad():
            original = layer.parametrizations.weight.original
            original.copy_(original @ turn)
        model(torch.rand(2, 8))
        average.update_parameters(model)
    vectors = dict(average.module.named_buffers())
    assert [round(v.norm().item(), 4) for v in vectors.values()] == [1.0, 1.0]
    hooked = nn.utils.spectral_norm(nn.Linear(4, 4))
    hooked(torch.rand(1, 4))
    with pytest.raises(
        ConadvError, match=r"parametrizations of torch.nn.utils in place of its hook"
    ):
        EMA(hooked, 0.9)
    locked = nn.Linear(4, 4)
    locked.lock = threading.Lock()  # red when: a TypeError; FSDP has an AssertionError instead
    with pytest.raises(ConadvError, match="cannot be copied for an average"):
        EMA(locked, 0.9)


def test_the_average_does_not_touch_training(whole: Path, tmp_path: Path) -> None:
    # Red when: the average, or the evaluation of it, writes into the weights that train.
    train(config(method="conadv"), tmp_path / "plain")
    ours, plain = (load_newest(out / "checkpoints", CPU) for out in (whole, tmp_path / "plain"))
    assert same(ours["model"], plain["model"])
    assert not same(evaluated_state(ours), ours["model"])


def test_resumed_with_an_average_equals_uninterrupted(whole: Path, tmp_path: Path) -> None:
    # Red when: the average or its count of updates is not in the checkpoint.
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    for late in steps(cut / "checkpoints")[3:]:
        (cut / "checkpoints" / f"step_{late:08d}.pt").unlink()
    train(config(**AVERAGED), cut, resume=True)
    a, b = (load_newest(out / "checkpoints", CPU) for out in (whole, cut))
    assert a["step"] == b["step"] == 6
    assert same(a["model"], b["model"])
    assert same(a["ema"], b["ema"])


def test_the_average_is_what_is_evaluated_and_exported(whole: Path, tmp_path: Path) -> None:
    # Red when: _evaluate takes parts.model; load_run or load_plain_model takes the weights that
    # train.
    import json

    summary = json.loads((whole / "summary.json").read_text())
    parts = load_run(whole, CPU)
    found = measure(parts)["test"]
    assert found is not None
    assert found.loss == summary["test_loss"]
    averaged = evaluated_state(load_newest(whole / "checkpoints", CPU))
    plain = load_plain_model(whole)
    assert same(state(plain), {name: averaged[name] for name in state(plain)})
    data = parts.data.eval_batches("test", None, 500)
    assert evaluate(plain, data, parts.space).loss == pytest.approx(found.loss, rel=1e-5)


# ---- precise statistics


def brute_force(
    model: nn.Module, x: list[torch.Tensor], name: str
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Mean and unbiased variance of all that reached each layer, kept and put together."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        module.training = isinstance(module, _BatchNorm)
    seen: dict[nn.Module, list[torch.Tensor]] = {}
    layers = list(layers_on(twin, name))
    for layer in layers:
        layer.register_forward_pre_hook(
            lambda layer, args: seen.setdefault(layer, []).append(args[0])
        )
    with torch.no_grad(), route(twin, name):
        for part in x:
            twin(part)
    flat = [torch.cat([t.transpose(0, 1).flatten(1) for t in seen[layer]], 1) for layer in layers]
    return [(values.mean(1), values.var(1)) for values in flat]


def noisy_net() -> nn.Module:
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Dropout(0.5),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 6),
    )
    return split_batchnorm(
        nn.Sequential(*layers, nn.BatchNorm1d(6), nn.Linear(6, 5)).double(), "adv"
    )


@pytest.mark.parametrize("make_model", [lambda: tiny_resnet("adv", dtype=torch.float64), noisy_net])
@pytest.mark.parametrize("name", ["clean", "adv"])
def test_statistics_are_those_of_all_images_together(make_model: Any, name: str) -> None:
    # Red when: batches count alike whatever their size; the variance leaves out that of the means;
    # dropout is on; the attack's own passes are counted.
    model = make_model()
    before, modes = state(model), [module.training for module in model.modules()]
    x, y = images(20, 5, torch.float64)
    batches = list(zip(x.split(6), y.split(6), strict=True))
    attack = FGSM(EPS, space=SPACE) if name == "adv" else None
    shown = [part for part, _ in batches]
    if attack is not None:
        twin = copy.deepcopy(model)
        for module in twin.modules():
            module.training = isinstance(module, _BatchNorm)
        with route(twin, name), frozen_stats(twin):
            shown = [attack(twin, x, y, torch.Generator()) for x, y in batches]
    want = brute_force(model, shown, name)
    recalibrate(model, batches, SPACE, route=name, attack=attack)
    for layer, (mean, var) in zip(layers_on(model, name), want, strict=True):
        assert torch.allclose(layer.running_mean, mean, rtol=1e-9, atol=1e-12)
        assert torch.allclose(layer.running_var, var, rtol=1e-9)
    own = "running" if name == "clean" else "routes.adv.running"
    changed = {key for key, value in state(model).items() if not torch.equal(value, before[key])}
    assert changed == {k for k in before if own in k and ("routes" in k) == (name == "adv")}
    assert [module.training for module in model.modules()] == modes


def test_one_batch_is_a_pass_with_momentum_1() -> None:
    model = tiny_resnet("adv", dtype=torch.float64)
    twin, (x, y) = copy.deepcopy(model), images(8, 1, torch.float64)
    for module in twin.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        twin(x)
    recalibrate(model, [(x, y)], SPACE)
    for ours, theirs in zip(layers_on(model, "clean"), layers_on(twin, "clean"), strict=True):
        assert torch.allclose(ours.running_mean, theirs.running_mean, rtol=1e-9, atol=1e-12)
        assert torch.allclose(ours.running_var, theirs.running_var, rtol=1e-9)


def test_a_run_ends_with_precise_statistics_of_what_it_evaluates(whole: Path) -> None:
    # Red when: the run recalibrates the weights that train and not their average, or after the last
    # checkpoint.
    parts = load_run(whole, CPU)
    data = parts.data.eval_batches(
        "train", 192, 64
    )  # 200 images are three whole micro-batches of 64
    want = brute_force(parts.model, [parts.space.normalize(x) for x, _ in data], "clean")
    for layer, (mean, var) in zip(layers_on(parts.model, "clean"), want, strict=True):
        assert torch.allclose(layer.running_mean, mean, rtol=1e-4, atol=1e-5)
        assert torch.allclose(layer.running_var, var, rtol=1e-4)


def test_errors(tmp_path: Path) -> None:
    x, y = images()
    with pytest.raises(ConadvError, match="no batch norm"):
        recalibrate(no_norm_net(), [(x.double(), y)], SPACE)
    with pytest.raises(ConadvError, match="no batch"):
        recalibrate(tiny_resnet(), [], SPACE)
    vit = {
        "model__name": "timm:test_vit",
        "model__args": ("img_size=16",),
        "model__width": None,
        "data__image_size": 16,
    }
    with pytest.raises(ConadvError, match="no effect"):
        train(config(**vit, eval__precise_bn_images=50), tmp_path / "x")
