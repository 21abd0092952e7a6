"""Cheaper attacks: which images, through which batch norm; and what it costs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from conadv import FGSM, ConadvError, Concurrent, MultiView, Sequential, windows
from conadv.config.resolve import resolve
from conadv.config.schema import replace
from conadv.nn.split_batchnorm import frozen_stats, route, running_stats, split_batchnorm
from conadv.training.build import build

from .helpers import no_norm_net, parameters, same, state, tiny_resnet
from .test_methods import ATTACK, EPS, SPACE, as_batch, make, run
from .test_training import CPU, config


@pytest.mark.parametrize("fuse", [False, True])
def test_a_share_is_a_mean_over_all_images_of_both_views(fuse: bool) -> None:
    # Red when: the adversarial view keeps its full weight; the last images are taken instead of the
    # first.
    model = no_norm_net()
    engine = make(
        Sequential(FGSM(EPS, space=SPACE), share=0.3),
        model,
        fuse_views=fuse,
    )
    batch = as_batch(0, dtype=torch.float64)
    x, y = batch.micro[0].views["clean"], batch.micro[0].y_N
    x_adv = FGSM(EPS, space=SPACE)(model, x, y, torch.Generator())[:2]  # 0.3 of 8, rounded
    want = F.cross_entropy(model(torch.cat([x, x_adv])), torch.cat([y, y[:2]]))
    gradients = torch.autograd.grad(want, list(model.parameters()))
    engine.gradient(batch)
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.allclose(p.grad, gradient, rtol=1e-9, atol=1e-13)
    assert engine.update().loss == pytest.approx(want.item(), rel=1e-12)


@pytest.mark.parametrize("where", ["adv", "clean"])
@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_route_and_statistics_of_the_attack(where: str, statistics: str) -> None:
    # Red when: the attack stays on the adv route, or normalises by the batch; buffers or modes have
    # changed after it.
    model = tiny_resnet("adv")
    with torch.no_grad():
        model.bn1.routes["adv"].weight.neg_()
    attack = FGSM(EPS, space=SPACE)
    engine = make(Sequential(attack, attack_route=where, attack_statistics=statistics), model)
    before, micro = state(model), as_batch(0).micro[0]
    got = engine.method.extra_view(engine, as_batch(0)).images[0]
    assert same(before, state(model))
    assert all(module.training for module in model.modules())
    with route(model, where), (running_stats if statistics == "running" else frozen_stats)(model):
        want = attack(model, micro.views["clean"], micro.y_N, torch.Generator())
    assert torch.equal(got, want)


def test_shared_affine_parameters_are_one_and_statistics_two() -> None:
    # Red when: the route keeps a copy (two sets of parameters), or shares the buffers.
    model = split_batchnorm(tiny_resnet(), "adv", share_affine=True)
    assert not [name for name, _ in model.named_parameters() if ".routes." in name]
    engine = make(Concurrent(ATTACK, 1, lookahead=True), model)
    run(engine, 3)
    clean, adv = model.bn1, model.bn1.routes["adv"]
    assert clean.weight is adv.weight
    assert not torch.equal(clean.running_mean, adv.running_mean)
    assert copy.deepcopy(model).bn1.routes["adv"].weight is not adv.weight


@pytest.mark.parametrize("fuse", [False, True])
def test_the_clean_route_can_serve_both_views(fuse: bool) -> None:
    # Red when: both views are normalised together; the adversarial view's statistics are not
    # tracked.
    model = tiny_resnet(dtype=torch.float64)
    twin = copy.deepcopy(model)
    engine = make(MultiView(), model, adv_route="clean", fuse_views=fuse)
    batch = as_batch(0, dtype=torch.float64)
    engine.gradient(batch)
    loss = (
        sum(F.cross_entropy(twin(x), batch.micro[0].y_N) for x in batch.micro[0].views.values()) / 2
    )
    loss.backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-9, atol=1e-12)
    assert model.bn1.num_batches_tracked == 2
    with pytest.raises(ConadvError, match="adv_route"):
        make(MultiView(), tiny_resnet("adv"), adv_route="aug")


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({}, 3.0),
        ({"attack__share": 0.25}, 1 + 0.25 * 2),
        ({"attack__num_steps": 2, "attack__share": 0.5}, 1 + 0.5 * (1 + 2)),
    ],
)
def test_costs_count_what_ran(changes: dict[str, Any], want: float) -> None:
    # Red when: a share is counted in full.
    for method in ("disadv", "conadv"):
        parts = build(
            resolve(config(method=method, global_batch_size=8, micro_batch_size=8, **changes)), CPU
        )
        pixels, model = [0.0], parts.model
        model.register_forward_pre_hook(
            lambda _, args, seen=pixels: seen.__setitem__(0, seen[0] + args[0].numel())
        )
        counted = 0.0
        batches = parts.data.train_batches(0, 6, ("clean",))
        for batch, future in windows(batches, parts.step.ahead):
            record = parts.step(batch, future)
            counted += parts.step.method.gradient_images(record.losses, 8)
        assert counted / 6 == pytest.approx(want)
        assert pixels[0] / (6 * 8 * 64) == pytest.approx(
            want
        )  # what the network saw, at 8x8 pixels an image


@pytest.mark.parametrize("adv_route", ["own", "statistics", "clean"])
@pytest.mark.parametrize("method", ["multiview", "noise", "disadv", "conadv", "recycle"])
def test_adv_routes_train_with_every_method(method: str, adv_route: str) -> None:
    # Red when: a model is split although the clean route serves both views.
    parts = build(resolve(replace(config(method=method), adv_route=adv_route)), CPU)
    batches = parts.data.train_batches(0, 3, ("clean", *parts.step.method.data_views))
    for batch, future in windows(batches, parts.step.ahead):
        parts.step(batch, future)
    names = list(parts.model.state_dict())
    assert any(".routes.adv.running_mean" in name for name in names) == (adv_route != "clean")
    own = [name for name in parameters(parts.model) if ".routes.adv." in name]
    assert bool(own) == (adv_route == "own")


def test_errors() -> None:
    for wrong in (
        {"share": 0.0},
        {"share": 1.5},
        {"attack_route": "aug"},
        {"attack_statistics": "none"},
    ):
        with pytest.raises(ConadvError):
            Sequential(ATTACK, **wrong)
    with pytest.raises(ConadvError, match="zero images"):
        make(Sequential(ATTACK, share=0.01))(as_batch(0))
