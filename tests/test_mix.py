"""Mixup and cutmix: torchvision's, keyed by step and micro-batch; soft labels in every loss and attack."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from conadv import FGSM, Batch, ConadvError, MicroBatch, rng, windows
from conadv.attacks.targets import random_other_class
from conadv.config.resolve import resolve
from conadv.config.schema import Config, replace
from conadv.data.mix import Mix
from conadv.nn.split_batchnorm import frozen_stats, route
from conadv.training.data import load_data

from .helpers import images, tiny_resnet
from .test_methods import CASES, EPS, SPACE, as_batch, make
from .test_training import config


def pixels(seed: int, n: int = 6) -> torch.Tensor:
    return (images(n, seed)[0] * 255).round().to(torch.uint8)


def partner_share(y_NK: torch.Tensor, y_N: torch.Tensor) -> torch.Tensor:
    """The share of the partner (the image before) by the labels."""
    return 1 - y_NK[torch.arange(len(y_N)), y_N]


def test_mixup_is_its_formula_in_every_view() -> None:
    # Red when: each view draws a share of its own; images are truncated, not rounded.
    views, y_N = {"clean": pixels(1), "aug": pixels(2)}, torch.arange(6) % 5
    mixed, y_NK = Mix(0.4, 0.0, 6, seed=3)(views, y_N, step=4, index=1)
    assert y_NK.sum(1).tolist() == pytest.approx([1] * 6)
    for name, x in views.items():
        lam = 1 - partner_share(y_NK, y_N)[1:2].view(1, 1, 1)
        want = (lam * x.float() + (1 - lam) * x.float().roll(1, 0)).round()
        assert (mixed[name].float() - want).abs().max() <= 1  # a tie may fall to either side
        assert ((mixed[name].float() - want).abs() > 0).float().mean() < 0.05
        assert mixed[name].dtype == torch.uint8
        assert not torch.equal(mixed[name], x)


def test_cutmix_pastes_one_box_of_the_share_that_the_labels_say() -> None:
    # Red when: views get boxes of their own, or the label's share is not the box's.
    shares = set()
    for step in range(8):
        y_N = torch.arange(6) % 5
        mixed, y_NK = Mix(0.0, 1.0, 6, seed=3)(
            {"clean": pixels(1), "second": pixels(2)}, y_N, step, 0
        )
        pasted = []
        for name, x in (("clean", pixels(1)), ("second", pixels(2))):
            own, other = mixed[name] == x, mixed[name] == x.roll(1, 0)
            assert (own | other).all()
            pasted.append(~own.all(1).all(0))
        assert torch.equal(pasted[0], pasted[1])
        share = pasted[0].float().mean()
        assert partner_share(y_NK, y_N)[1:5] == pytest.approx(share.expand(4), abs=0.02)
        shares.add(round(share.item(), 3))
    assert len(shares) > 3


def labels(data: Any, steps: range, views: tuple[str, ...] = ("clean",)) -> list[tuple[Any, Any]]:
    batches = data.train_batches(steps.start, steps.stop, views)
    return [(m.y_N.tolist(), m.views["clean"].tolist()) for batch in batches for m in batch.micro]


def test_a_step_is_the_same_wherever_one_starts() -> None:
    # Red when: draws come from a stream, or depend on the views that are asked for or on the rank.
    settings = resolve(config(data__mixup=0.2, data__cutmix=1.0, data__augment="basic"))
    data = load_data(settings)
    all_of_it = labels(data, range(3))
    count = len(all_of_it) // 3
    assert labels(data, range(2, 3), ("clean", "second")) == all_of_it[2 * count :]
    assert all_of_it == labels(load_data(settings), range(3))
    second_rank = labels(load_data(settings, rank=1, ranks=2), range(1))
    assert second_rank == all_of_it[count // 2 : count]
    other = labels(load_data(replace(settings, seed=1)), range(3))
    assert other != all_of_it
    assert not any(isinstance(y, list) for _, y in data.eval_batches("test", 4, 4))
    assert next(iter(data.eval_batches("train", 4, 4)))[1].dtype == torch.int64


def soft(batch: Batch) -> Batch:
    """The batch with labels between two classes, as mixed images have them."""
    micro = batch.micro[0]
    hard = F.one_hot(micro.y_N, 5).float()
    return Batch(batch.step, (MicroBatch(0, 0.7 * hard + 0.3 * hard.roll(1, 0), micro.views),))


@pytest.mark.parametrize("name", CASES)
def test_every_method_trains_on_soft_labels(name: str) -> None:
    # Red when: the loss or the pending labels take the largest class alone.
    engine = make(CASES[name]())
    for batch, future in windows([soft(as_batch(t)) for t in range(4)], engine.ahead):
        twin_x, twin_y = engine.images(batch.micro[0], "clean"), batch.micro[0].y_N
        with torch.no_grad(), frozen_stats(engine.model):
            log_p = engine.model(twin_x).log_softmax(1)
        record = engine(batch, future)
        assert record.losses["clean"] == pytest.approx(
            -(twin_y * log_p).sum(1).mean().item(), rel=1e-4
        )


def test_the_attack_climbs_the_loss_of_the_soft_labels() -> None:
    # Red when: ascent_loss takes the largest class of a soft label.
    model = tiny_resnet("adv")
    engine = make(CASES["disadv"].__call__().__class__(FGSM(EPS, space=SPACE)), model)
    batch = soft(as_batch(0))
    found = engine.craft(FGSM(EPS, space=SPACE), batch).images[0]
    x = engine.images(batch.micro[0], "clean").clone().requires_grad_()
    with route(model, "adv"), frozen_stats(model):
        loss = -(batch.micro[0].y_N * model(x).log_softmax(1)).sum()
    (gradient,) = torch.autograd.grad(loss, x)
    want = FGSM(EPS, space=SPACE).from_gradient(x, gradient)
    assert ((found - want).abs() > 1e-5).float().mean() < 1e-3


def test_a_targeted_attack_leaves_both_classes_of_a_mixed_image_out() -> None:
    # Red when: only the larger class is left out.
    y = torch.tensor([[0.6, 0.0, 0.4, 0.0]] * 400)
    target = random_other_class(y, 4, rng.generator("cpu", 0, "x"))
    assert set(target.tolist()) == {1, 3}


def test_a_run_with_both_learns_and_repeats(tmp_path: Any) -> None:
    from conadv.training.loop import train
    from conadv.training.record import read_lines

    losses = []
    for name in ("a", "b"):
        changes = {
            "method": "conadv",
            "data__mixup": 0.2,
            "data__cutmix": 1.0,
            "attack__targeted": True,
        }
        train(config(**changes, epochs=1, eval__robust_images=0), tmp_path / name)
        losses.append(
            [
                line["loss"]
                for line in read_lines(tmp_path / name / "record.jsonl")
                if line["type"] == "step"
            ]
        )
    assert losses[0] == losses[1]


def test_an_image_alone_cannot_be_mixed() -> None:
    with pytest.raises(ConadvError, match="micro_batch_size 1"):
        resolve(Config(steps=1, micro_batch_size=1, data={"mixup": 0.2}))
