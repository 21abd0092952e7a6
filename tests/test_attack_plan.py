"""Cheaper and scheduled attacks: which images, when, at which eps, through which batch norm; and what it counts."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from conadv import (
    FGSM,
    PGD,
    AttackPlan,
    ConadvError,
    Concurrent,
    MultiView,
    Noise,
    RandomSigns,
    Sequential,
    TrainStep,
    windows,
)
from conadv.attacks.plan import scaled
from conadv.config.schema import replace, resolve
from conadv.methods.base import Method
from conadv.nn.split_batchnorm import frozen_stats, route, running_stats, split_batchnorm
from conadv.training.trainer import build

from .helpers import no_norm_net, parameters, same, state, tiny_resnet
from .test_methods import ATTACK, EPS, SPACE, as_batch, make, run
from .test_trainer import CPU, config

ATTACKING = {
    "noise": lambda plan: Noise(RandomSigns(EPS, SPACE), attack_plan=plan),
    "disadv": lambda plan: Sequential(ATTACK, attack_plan=plan),
    "conadv": lambda plan: Concurrent(ATTACK, 2, attack_plan=plan),
    "conadv-lookahead": lambda plan: Concurrent(ATTACK, 1, lookahead=True, attack_plan=plan),
}
REST = {"noise": [], "disadv": [0], "conadv": [0, 2], "conadv-lookahead": [0, 1]}


@pytest.mark.parametrize("name", ATTACKING)
def test_a_plan_that_says_everything_changes_no_bit(name: str) -> None:
    # Red when: a factor of 1 goes through arithmetic, or draws are keyed by the plan.
    full = AttackPlan(1.0, 1, 1000, lambda step: 1.0, "adv", "batch")
    a, b = make(ATTACKING[name](full)), make(ATTACKING[name](AttackPlan()))
    assert [r.losses for r in run(a)] == [r.losses for r in run(b)]
    assert same(state(a.model), state(b.model))


@pytest.mark.parametrize("name", ATTACKING)
def test_adversarial_views_come_in_the_steps_of_the_plan(name: str) -> None:
    # Red when: prepare attacks for steps that are off (images then wait for ever), or asks for the present step.
    engine = make(ATTACKING[name](AttackPlan(every=2, stop=5)))
    records = run(engine, 8)
    assert [set(r.losses) == {"clean", "adv"} for r in records] == [
        t in (0, 2, 4) for t in range(8)
    ]
    assert [r.staleness for r in records if "adv" not in r.losses] == [None] * 5
    tags = [r.staleness for r in records if "adv" in r.losses]
    assert tags == ([None] * 3 if name == "noise" else [0] + [REST[name][-1]] * 2)
    assert len(engine.pending) == 0
    assert records[1].loss == records[1].losses["clean"]


@pytest.mark.parametrize("name", ATTACKING)
def test_resumed_between_attacked_steps(name: str) -> None:
    # Red when: the plan counts from the first step after a resume.
    def method() -> Method:
        return ATTACKING[name](AttackPlan(0.5, 3, 8, lambda step: step / 8))

    whole, half, rest = (make(method()) for _ in range(3))
    pairs = list(windows([as_batch(t) for t in range(9)], whole.ahead))
    for batch, future in pairs:
        whole(batch, future)
    for batch, future in pairs[:5]:
        half(batch, future)
    saved = copy.deepcopy((half.model.state_dict(), half.optimizer.state_dict(), half.state_dict()))
    for part, values in zip((rest.model, rest.optimizer, rest), saved, strict=True):
        part.load_state_dict(values)
    for batch, future in pairs[5:]:
        rest(batch, future)
    assert same(state(rest.model), state(whole.model))


@pytest.mark.parametrize("fuse", [False, True])
def test_a_share_is_a_mean_over_all_images_of_both_views(fuse: bool) -> None:
    # Red when: the adversarial view keeps its full weight; the last images are taken instead of the first.
    model = no_norm_net()
    engine = make(
        Sequential(FGSM(EPS, space=SPACE), attack_plan=AttackPlan(share=0.3)),
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


def test_eps_belongs_to_the_step_that_uses_the_images() -> None:
    # Red when: eps is that of the step that makes them, or step_size keeps its size.
    engine = make(
        Concurrent(
            PGD(EPS, 2, EPS / 2, space=SPACE), 2, attack_plan=AttackPlan(eps_factor=lambda t: t / 8)
        )
    )
    for t in range(3):
        engine.gradient(as_batch(t))
        engine.prepare(as_batch(t + 2))
        waiting = engine.pending._waiting[t + 2][0].images[0]
        delta = SPACE.to_pixels(waiting) - SPACE.to_pixels(as_batch(t + 2).micro[0].views["clean"])
        assert delta.abs().max() == pytest.approx(EPS * (t + 2) / 8, rel=1e-4)
        engine.update()
    half = scaled(PGD(EPS, 4, EPS / 2, space=SPACE), 0.5)
    assert half == PGD(EPS / 2, 4, EPS / 4, space=SPACE)
    assert scaled(RandomSigns(EPS), 0.0) == RandomSigns(0.0)
    with pytest.raises(ConadvError, match="no field eps"):
        scaled(lambda *args: args[1], 0.5)


@pytest.mark.parametrize(
    "attack", [FGSM(0.1, resolution=0.5), PGD(0.1, 3, norm="l2", random_start=1, resolution=0.5)]
)
def test_resolution(attack: Any) -> None:
    # Red when: the gradient is taken at full resolution; it is spread by interpolation instead of repetition.
    sizes: list[int] = []
    weight = torch.randn(
        5, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )

    def forward(x: torch.Tensor) -> torch.Tensor:
        sizes.append(x.shape[2])
        return torch.einsum("nchw,kchw->nk", x**2, weight)

    x, y = torch.rand(6, 3, 8, 8, dtype=torch.float64) * 0.4 + 0.3, torch.arange(6) % 5
    delta = attack(forward, x, y, torch.Generator().manual_seed(0)) - x
    assert sizes == [4] * getattr(attack, "num_steps", 1)
    if isinstance(attack, FGSM):
        low = F.avg_pool2d(x, 2).requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(forward(low), y, reduction="sum"), low)
        assert torch.allclose(
            delta, 0.1 * gradient.sign().repeat_interleave(2, 2).repeat_interleave(2, 3)
        )
    else:
        assert delta.flatten(1).norm(dim=1).max() <= 0.1 + 1e-9


def test_noise_at_a_lower_resolution_is_constant_over_blocks() -> None:
    # Red when: signs are drawn per pixel.
    x = torch.full((4, 3, 8, 8), 0.5)
    delta = RandomSigns(0.1, resolution=0.5)(None, x, torch.zeros(4), torch.Generator()) - x  # type: ignore[arg-type]
    blocks = delta.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
    assert torch.equal(blocks, blocks[..., :1].expand_as(blocks))
    assert 0.4 < (delta > 0).float().mean() < 0.6


@pytest.mark.parametrize("where", ["adv", "clean"])
@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_route_and_statistics_of_the_attack(where: str, statistics: str) -> None:
    # Red when: the attack stays on the adv route, or normalises by the batch; buffers or modes have changed after it.
    model = tiny_resnet("adv")
    with torch.no_grad():
        model.bn1.routes["adv"].weight.neg_()
    attack = FGSM(EPS, space=SPACE)
    engine = make(
        Sequential(attack, attack_plan=AttackPlan(route=where, statistics=statistics)), model
    )
    before, micro = state(model), as_batch(0).micro[0]
    got = engine.method.extra(engine, as_batch(0)).images[0]
    assert same(before, state(model))
    assert all(module.training for module in model.modules())
    with route(model, where), (running_stats if statistics == "running" else frozen_stats)(model):
        want = attack(model, micro.views["clean"], micro.y_N, torch.Generator())
    assert torch.equal(got, want)


def test_running_stats_normalises_by_the_buffers() -> None:
    # Red when: running_stats does nothing.
    model = tiny_resnet()
    x = as_batch(0).micro[0].views["clean"]
    with running_stats(model):
        inside = model(x)
    assert torch.equal(inside, model.eval()(x))


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
    # Red when: both views are normalised together; the adversarial view's statistics are not tracked.
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
        ({"attack__every": 4}, 1 + 2 * 2 / 6),  # steps 0 and 4 of 6
        ({"attack__until": 0.5}, 1 + 2 / 2),
        ({"attack__resolution": 0.5}, 2.25),
        (
            {"attack__num_steps": 2, "attack__share": 0.5, "attack__every": 2},
            1 + 0.5 * (0.5 + 0.5 * 2),
        ),
    ],
)
def test_costs_count_what_ran(changes: dict[str, Any], want: float) -> None:
    # Red when: a share or a step without an attack is counted in full.
    for method in ("disadv", "conadv"):
        parts = build(
            resolve(config(method=method, global_batch_size=8, micro_batch_size=8, **changes)), CPU
        )
        pixels, model = [0.0], parts.model
        model.register_forward_pre_hook(
            lambda _, args, seen=pixels: seen.__setitem__(0, seen[0] + args[0].numel())
        )
        counted, steps = 0.0, range(0, parts.num_steps, parts.num_steps // 6)[:6]
        plan = dataclasses.replace(parts.method.plan, stop=3 if parts.method.plan.stop else None)
        parts.engine.method = parts.method.for_run(plan)
        batches = parts.data.train_batches(0, len(steps), ("clean",))
        for batch, future in windows(batches, parts.engine.ahead):
            record = parts.engine(batch, future)
            counted += parts.engine.method.gradient_images(record.step, record.losses, 8)
        assert counted / 6 == pytest.approx(want)
        assert pixels[0] / (6 * 8 * 64) == pytest.approx(
            want
        )  # what the network saw, at 8x8 pixels an image


def test_schedules_from_a_config() -> None:
    # Red when: lr is not divided by its peak; a ramp does not end at eps.
    def plan(**changes: Any) -> AttackPlan:
        return build(resolve(config(method="disadv", **changes)), CPU).method.plan

    lr = plan(attack__eps_schedule="lr")
    assert lr.eps_factor is not None
    assert [lr.eps_factor(t) for t in range(4)] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    ramp = plan(attack__eps_schedule="ramp", attack__until=0.5)
    assert [ramp.eps_factor(t) for t in range(6)] == pytest.approx([t / 5 for t in range(6)])
    assert [ramp.active(t) for t in range(6)] == [True] * 3 + [False] * 3
    assert plan() == AttackPlan()


@pytest.mark.parametrize("adv_route", ["own", "statistics", "clean"])
@pytest.mark.parametrize("method", ["multiview", "noise", "disadv", "conadv", "recycle"])
def test_adv_routes_train_with_every_method(method: str, adv_route: str) -> None:
    # Red when: a model is split although the clean route serves both views.
    parts = build(resolve(replace(config(method=method), adv_route=adv_route)), CPU)
    batches = parts.data.train_batches(0, 3, ("clean", *parts.method.data_views))
    for batch, future in windows(batches, parts.engine.ahead):
        parts.engine(batch, future)
    names = list(parts.model.state_dict())
    assert any(".routes.adv.running_mean" in name for name in names) == (adv_route != "clean")
    own = [name for name in parameters(parts.model) if ".routes.adv." in name]
    assert bool(own) == (adv_route == "own")


def test_errors() -> None:
    for wrong in (
        {"share": 0.0},
        {"share": 1.5},
        {"every": 0},
        {"stop": 0},
        {"route": "aug"},
        {"statistics": "none"},
    ):
        with pytest.raises(ConadvError):
            AttackPlan(**wrong)
    for resolution in (0.0, 2.0):
        with pytest.raises(ConadvError, match="resolution"):
            FGSM(0.1, resolution=resolution)
    with pytest.raises(ConadvError, match="N, C, H, W"):
        FGSM(0.1, resolution=0.5)(None, torch.rand(4, 7), torch.zeros(4), torch.Generator())  # type: ignore[arg-type]
    engine: TrainStep = make(Sequential(ATTACK, attack_plan=AttackPlan(share=0.01)))
    with pytest.raises(ConadvError, match="no image"):
        engine(as_batch(0))
