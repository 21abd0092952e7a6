"""Parameter groups cover every parameter, and build_optimizer makes what a config names."""

from __future__ import annotations

import copy
import io
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18

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


def test_groups_cover_every_parameter_of_every_route_once() -> None:
    """Red when: the norm rule is left out (1-D norm weights raise); the bias rule comes after the
    weights rule; a layer is recognised by its exact class (split layers change theirs)."""
    plain = names_by_group(resnet18(), weight_decay=0.1)
    names = [name for name, _ in resnet18().named_parameters()]
    assert sorted(itertools.chain(*plain.values())) == sorted(names)
    assert plain["bias"] == {"fc.bias"}
    assert plain["norm"] == {name for name in names if "bn" in name or "downsample.1" in name}
    found = names_by_group(split_batchnorm(resnet18(), "adv", "aug"), weight_decay=0.1)
    assert found["weights"] == plain["weights"] >= {"layer1.0.conv1.weight", "fc.weight"}
    routes = [f"routes.{route}." for route in ("adv", "aug")]
    extra = {
        f"{name.rpartition('.')[0]}.{route}{name.rpartition('.')[2]}"
        for name in plain["norm"]
        for route in routes
    }
    assert found["norm"] == plain["norm"] | extra


def test_groups_carry_decay_and_adaptation_and_keep_order() -> None:
    norms = [nn.LayerNorm(3), nn.GroupNorm(1, 3), nn.InstanceNorm1d(3, affine=True), nn.RMSNorm(3)]
    model = nn.Sequential(*norms, nn.Linear(3, 2), nn.MultiheadAttention(4, 2))
    columns = ("name", "tensors", "parameters", "weight_decay", "adapt")
    assert describe(parameter_groups(model, weight_decay=0.3)) == [
        dict(zip(columns, row, strict=True))
        for row in (
            ("norm", 7, 21, 0.0, False),
            ("bias", 3, 2 + 12 + 4, 0.0, False),
            ("weights", 3, 6 + 48 + 16, 0.3, True),
        )
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

ALL = pytest.mark.parametrize("name", OPTIMIZERS)
KINDS = {"lars": LARS, "lamb": LAMB, "sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))


def built(name: str, model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    return build_optimizer(name, parameter_groups(model, weight_decay=0.03), 0.1, **settings)


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, number: int, without: str = ""
) -> None:
    gen = torch.Generator().manual_seed(number)
    for name, p in model.named_parameters():
        grad = torch.randn(p.shape, generator=gen)
        p.grad = None if name == without else grad
    optimizer.step()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@ALL
def test_a_row_says_what_the_optimizer_gets(name: str) -> None:
    # Red when: a setting that is given does not replace the row's; the groups' weight decay is
    # overwritten.
    optimizer = built(name, small_model(), eps=None, momentum=0.5, betas=(0.1, 0.2))
    assert type(optimizer) is KINDS[name]
    want = {**OPTIMIZERS[name].defaults, "lr": 0.1}
    want |= {"momentum": 0.5} if "momentum" in want else {"betas": (0.1, 0.2)}
    del want["weight_decay"]
    for group, decay in zip(optimizer.param_groups, (0.0, 0.0, 0.03), strict=True):
        assert {key: group[key] for key in want} == want
        assert group["weight_decay"] == decay


def test_the_classes_and_the_table_have_the_same_defaults() -> None:
    # Red when: a default of the class is not that of its row, or a variant loses its eps.
    params = [nn.Parameter(torch.ones(2))]
    eps = {"tf": 0.0, "timm": 1e-8, "nus": 0.0, "larc": 1e-8, "no-wd-ratio": 0.0}
    assert eps.keys() == VARIANTS.keys()
    made: list[Any] = [(LAMB(params, 0.1), OPTIMIZERS["lamb"].complete({}))]
    for name, value in eps.items():
        want = OPTIMIZERS["lars"].complete({"variant": name})
        assert want["eps"] == value
        made.append((LARS(params, 0.1, variant=name), want))
    for optimizer, want in made:
        assert {key: optimizer.param_groups[0][key] for key in want} == want
    with pytest.raises(ConadvError, match="Did you mean 'adamw'"):
        built("adam", small_model())


@ALL
def test_channels_last_and_late_gradients_change_nothing(name: str) -> None:
    """Contiguous gradients and state for channels-last weights; one batch-norm tensor has no
    gradient in step 0. Red when: _prepare_fused does not touch gradients, or state, or leaves SGD's
    buffer to torch.
    """
    ends = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = small_model()
        optimizer = built(name, model)
        for number in range(4):
            if number == 2:
                model.to(memory_format=memory_format)
            step(model, optimizer, number, "1.weight" if number == 0 else "")
        ends.append(weights(model))
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-6)


@ALL
def test_a_built_optimizer_resumes_bit_for_bit(name: str) -> None:
    """From a state that torch's own class can load too. Red when: SGD's state is not what
    torch.optim.SGD saves.
    """
    model, twin, plain = (small_model() for _ in range(3))
    optimizer = built(name, model)
    for number in range(3):
        step(model, optimizer, number)
    torch.save((model.state_dict(), optimizer.state_dict()), file := io.BytesIO())
    file.seek(0)
    state, optimizer_state = torch.load(file, weights_only=True)
    own = KINDS[name](parameter_groups(plain, weight_decay=0.03), 0.1)
    for other, resumed in ((twin, built(name, twin)), (plain, own)):
        other.load_state_dict(state)
        resumed.load_state_dict(copy.deepcopy(optimizer_state))
        for number in range(3, 6):
            step(other, resumed, number)
    for number in range(3, 6):
        step(model, optimizer, number)
    torch.testing.assert_close(weights(model), weights(twin), rtol=0, atol=0)
    torch.testing.assert_close(weights(model), weights(plain), rtol=1e-5, atol=1e-6)
