"""Evaluation: right numbers, clean route, nothing touched."""

from __future__ import annotations

import pytest
import torch

from conadv import PGD, ConadvError, PixelSpace, evaluate, route

from .helpers import images, same, state, tiny_resnet

SPACE = PixelSpace((0.5,), (0.25,))


def test_loss_and_accuracy_over_uneven_batches() -> None:
    # Red when: batch means are averaged instead of sums (the last batch is smaller).
    model = tiny_resnet("adv")
    x, y = images(10)
    result = evaluate(model, [(x[:7], y[:7]), (x[7:], y[7:])], SPACE)
    logits = model.eval()(x)
    assert result.images == 10
    assert result.loss == pytest.approx(
        torch.nn.functional.cross_entropy(logits, y).item(), rel=1e-5
    )
    assert result.accuracy == (logits.argmax(1) == y).sum().item() / 10


def test_clean_route_and_modes_survive() -> None:
    # Red when: evaluate runs on the caller's route, or calls model.train() at the end.
    model = tiny_resnet("adv")
    model.bn1.eval()
    modes, before = [m.training for m in model.modules()], state(model)
    with torch.no_grad():
        model.bn1.routes["adv"].bias.fill_(100.0)
    x, y = images(10)
    plain = evaluate(model, [(x, y)], SPACE)
    with route(model, "adv"):
        assert evaluate(model, [(x, y)], SPACE) == plain
    assert [m.training for m in model.modules()] == modes
    before["bn1.routes.adv.bias"] = model.bn1.routes["adv"].bias.detach().clone()
    assert same(state(model), before)


def test_attack_is_white_box_and_repeatable() -> None:
    # Red when: the attack is not applied, draws from the global generator, or ignores the seed.
    model = tiny_resnet("adv")
    x, _ = images(32)
    y = model.eval()(x).argmax(1)  # labels that the model gets right
    attack = PGD(0.3, 5, random_start=1.0, space=SPACE)
    assert evaluate(model, [(x, y)], SPACE).accuracy == 1.0
    attacked = [evaluate(model, [(x, y)], SPACE, attack=attack, seed=s) for s in (1, 1)]
    assert attacked[0] == attacked[1]
    assert attacked[0].accuracy < 0.9
    assert evaluate(model, [(x, y)], SPACE, attack=attack, seed=2) != attacked[0]


def test_nothing_to_evaluate_is_an_error() -> None:
    with pytest.raises(ConadvError, match="no batch"):
        evaluate(tiny_resnet(), [], SPACE)


def test_uint8_bf16_and_channels_last() -> None:
    # Red when: any of the three has no effect.
    model = tiny_resnet()
    x, y = images(8)
    seen = []
    model.conv1.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    pixels = (x * 255).to(torch.uint8)
    a = evaluate(model, [(pixels, y)], SPACE)
    b = evaluate(model, [(SPACE.normalize(pixels), y)], SPACE, channels_last=True)
    assert a.loss == pytest.approx(b.loss, rel=1e-5)
    c = evaluate(model, [(pixels, y)], SPACE, precision="bf16")
    assert c.loss == pytest.approx(a.loss, rel=0.05)
    assert c.loss != a.loss
    assert seen == [False, True, False]
