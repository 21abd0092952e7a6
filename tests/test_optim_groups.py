"""Parameter groups cover every parameter, and build_optimizer makes what a config names."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from conadv.config.resolve import optimizer_settings, resolve
from conadv.config.schema import Config, OptimConfig
from conadv.errors import ConadvError
from conadv.nn.split_batchnorm import split_batchnorm
from conadv.optim import OPTIMIZERS
from conadv.optim.groups import DEFAULT_RULES, Rule, describe, parameter_groups
from conadv.optim.lamb import LAMB
from conadv.optim.lars import LARS, VARIANTS
from conadv.optim.make import build_optimizer


def names_by_group(model: nn.Module, **options: Any) -> dict[str, set[str]]:
    names = {p: name for name, p in model.named_parameters()}
    return {g["name"]: {names[p] for p in g["params"]} for g in parameter_groups(model, **options)}


def test_resnet_groups_cover_every_parameter_once() -> None:
    """Red when: the norm rule is left out (1-D norm weights raise), or the bias rule comes after the weights rule."""
    model = resnet18()
    found = names_by_group(model, weight_decay=0.1)
    assert sorted(n for names in found.values() for n in names) == sorted(
        n for n, _ in model.named_parameters()
    )
    assert found["bias"] == {"fc.bias"}
    assert "layer1.0.conv1.weight" in found["weights"]
    assert "fc.weight" in found["weights"]
    assert found["norm"] == {
        n for n, _ in model.named_parameters() if "bn" in n or "downsample.1" in n
    }


def test_every_batchnorm_route_is_a_norm_parameter() -> None:
    """Red when: a layer is recognised by its exact class (split layers change theirs)."""
    model = split_batchnorm(resnet18(), "adv", "aug")
    plain, found = (
        names_by_group(resnet18(), weight_decay=0.1),
        names_by_group(model, weight_decay=0.1),
    )
    assert found["weights"] == plain["weights"]
    assert len(found["norm"]) == 3 * len(plain["norm"])
    assert any(".routes.adv." in name for name in found["norm"])


def test_groups_carry_decay_and_adaptation_and_keep_order() -> None:
    layers = [
        nn.LayerNorm(3),
        nn.GroupNorm(1, 3),
        nn.InstanceNorm1d(3, affine=True),
        nn.RMSNorm(3),
        nn.Linear(3, 2),
    ]
    groups = parameter_groups(nn.Sequential(*layers, nn.MultiheadAttention(4, 2)), weight_decay=0.3)
    assert describe(groups) == [
        {"name": "norm", "tensors": 7, "parameters": 21, "weight_decay": 0.0, "adapt": False},
        {
            "name": "bias",
            "tensors": 3,
            "parameters": 2 + 12 + 4,
            "weight_decay": 0.0,
            "adapt": False,
        },
        {
            "name": "weights",
            "tensors": 3,
            "parameters": 6 + 48 + 16,
            "weight_decay": 0.3,
            "adapt": True,
        },
    ]


def test_shared_parameters_count_once_and_frozen_ones_not_at_all() -> None:
    """Red when: named_modules is walked without remembering what was seen."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[2].requires_grad_(False)
    assert {g["name"]: len(g["params"]) for g in parameter_groups(model, weight_decay=0.1)} == {
        "bias": 2,
        "weights": 1,
    }
    with pytest.raises(ConadvError, match="no trainable parameter"):
        parameter_groups(model.requires_grad_(False), weight_decay=0.1)


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(4))


def test_an_uncovered_parameter_is_named_with_the_way_out() -> None:
    model = nn.Sequential(nn.Linear(4, 4), LayerScale())
    with pytest.raises(
        ConadvError, match=r"'1\.gamma' of shape \(4,\) in a LayerScale.*Rule\('gamma'"
    ):
        parameter_groups(model, weight_decay=0.1)
    rule = Rule("scale", lambda module, name, p: name == "gamma", decay=False, adapt=True)
    assert names_by_group(model, weight_decay=0.1, rules=(*DEFAULT_RULES, rule))["scale"] == {
        "1.gamma"
    }


# ---------------------------------------------------------------- build_optimizer


def resolved(**optim: Any) -> OptimConfig:
    return resolve(Config(steps=1, optim=OptimConfig(**optim))).optim


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_build_optimizer_sets_what_the_config_says(name: str) -> None:
    optim = resolved(name=name, weight_decay=0.03)
    model = resnet18()
    optimizer = build_optimizer(
        name, parameter_groups(model, weight_decay=0.03), lr=0.7, **optimizer_settings(optim)
    )
    assert [g["lr"] for g in optimizer.param_groups] == [0.7] * 3
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.0, 0.0, 0.03]
    for key in OPTIMIZERS[name].defaults:
        if key != "weight_decay":
            assert {g[key] for g in optimizer.param_groups} == {getattr(optim, key)}
    kinds = {"lars": LARS, "lamb": LAMB, "sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
    assert type(optimizer) is kinds[name]


def test_lars_and_the_config_agree_on_every_default() -> None:
    """The config resolves eps without importing torch; the optimizer has the same values."""
    p = nn.Parameter(torch.ones(2))
    for variant in VARIANTS:
        own = LARS([p], 0.1, variant=variant).param_groups[0]["eps"]
        assert resolved(name="lars", variant=variant).eps == own
        assert own == (1e-8 if variant in ("timm", "larc") else 0.0)
    for name, optimizer in (("lars", LARS([p], 0.1)), ("lamb", LAMB([p], 0.1))):
        assert {k: optimizer.param_groups[0][k] for k in OPTIMIZERS[name].defaults} == OPTIMIZERS[
            name
        ].defaults


def small_model(memory_format: torch.memory_format = torch.contiguous_format) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    return model.to(memory_format=memory_format)


def set_grads(model: nn.Module, seed: int, *, leave_out: str = "none") -> None:
    gen = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        grad = torch.randn(p.shape, generator=gen)
        p.grad = None if name.startswith(leave_out) else grad


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_channels_last_and_late_gradients_change_nothing(name: str) -> None:
    """Contiguous gradients and state for channels-last weights; one batch-norm tensor has no gradient in step 0. Red
    when: _prepare_fused does not touch gradients, or state, or leaves SGD's buffer to torch."""
    ends = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = small_model()
        groups = parameter_groups(model, weight_decay=0.1)
        optimizer = build_optimizer(name, groups, lr=0.1)
        for step in range(4):
            if step == 2:
                model.to(memory_format=memory_format)
            set_grads(model, step, leave_out="1.weight" if step == 0 else "none")
            optimizer.step()
        ends.append(weights(model))
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_built_optimizer_resumes_bit_for_bit(name: str) -> None:
    """Red when: SGD's state is not what a plain torch.optim.SGD saves and loads."""
    model, twin = small_model(), small_model()
    optimizer, resumed = (
        build_optimizer(name, parameter_groups(m, weight_decay=0.1), lr=0.1) for m in (model, twin)
    )
    for step in range(3):
        set_grads(model, step)
        optimizer.step()
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    state, optimizer_state = torch.load(file, weights_only=True)
    twin.load_state_dict(state)
    resumed.load_state_dict(optimizer_state)
    for step in range(3, 6):
        for m, o in ((model, optimizer), (twin, resumed)):
            set_grads(m, step)
            o.step()
    torch.testing.assert_close(weights(model), weights(twin), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "plain"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)]
)
def test_sgd_and_adamw_are_torchs_own(name: str, plain: type) -> None:
    """Against torch's loop form with the same groups."""
    models = [small_model(), small_model()]
    optim = resolved(name=name)
    settings = {k: getattr(optim, k) for k in OPTIMIZERS[name].defaults}
    optimizers = [
        build_optimizer(name, parameter_groups(models[0], weight_decay=0.1), lr=0.01),
        plain(parameter_groups(models[1], weight_decay=0.1), 0.01, foreach=False, **settings),
    ]
    for step in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            set_grads(model, step)
            optimizer.step()
    torch.testing.assert_close(weights(models[0]), weights(models[1]), rtol=1e-5, atol=1e-7)
