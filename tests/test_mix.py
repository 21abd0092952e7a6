"""The soft labels of mixed images in every loss and attack."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from conadv import FGSM, Batch, MicroBatch, rng, windows
from conadv.attacks.targets import random_other_class
from conadv.nn.split_batchnorm import frozen_stats, route
from conadv.training.loop import train
from conadv.training.record import read_lines

from .helpers import tiny_resnet
from .test_methods import CASES, EPS, SPACE, as_batch, make
from .test_training import config


def soft(batch: Batch) -> Batch:
    """The batch with labels between two classes, as mixed images have them."""
    micro = batch.micro[0]
    hard = F.one_hot(micro.y_N, 5).float()
    return Batch(batch.step, (MicroBatch(0, 0.7 * hard + 0.3 * hard.roll(1, 0), micro.views),))


@pytest.mark.parametrize("name", [name for name in CASES if "replace" not in name])
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
    # Red when: the attack takes the largest class of a soft label.
    model = tiny_resnet("adv")
    engine = make(CASES["disadv"].__call__().__class__(FGSM(EPS, space=SPACE)), model)
    batch = soft(as_batch(0))
    found = engine.attack_batch(FGSM(EPS, space=SPACE), batch).images[0]
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


def test_a_run_with_both_repeats(tmp_path: Any) -> None:
    # Red when: a draw of the mix comes from a stream.
    losses = []
    changes = {
        "method": "conadv",
        "data__mixup": 0.2,
        "data__cutmix": 1.0,
        "attack__targeted": True,
    }
    for name in ("a", "b"):
        train(config(**changes, epochs=1, eval__robust_images=0), tmp_path / name)
        lines = read_lines(tmp_path / name / "record.jsonl")
        losses.append([line["loss"] for line in lines if line["type"] == "step"])
    assert losses[0] == losses[1]
