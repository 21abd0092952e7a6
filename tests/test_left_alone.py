"""State left alone means all state: buffers of any layer, not of batch norm alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from conadv import PGD, SAM, Concurrent, Inline, Sequential, StepRecord, TrainStep, Vanilla
from conadv.attacks.loss import TrainedLoss
from conadv.models.trial import check_model
from conadv.nn.buffers import state_left_alone
from conadv.nn.split_batchnorm import frozen_stats, route

from .helpers import Quantiser, buffered_net, images, same, state
from .test_methods import EPS, SPACE, AttackFirst, as_batch, draws, make, run

ATTACK = PGD(
    EPS, 2, random_start=0.5, space=SPACE
)  # two passes, of which the second sees the first


def identities(model: nn.Module) -> list[int]:
    return [buffer.data_ptr() for buffer in model.buffers()]


def probe_pass(engine: TrainStep) -> None:
    with engine.attacks.open(("probe", 0)) as (forward, generator):
        x, y = images()
        PGD(EPS, 1)(forward, x, y, generator)


PASSES: dict[str, Callable[[TrainStep], Any]] = {
    "attack": lambda engine: engine.attack_batch(ATTACK, as_batch(0, count=2)),
    "attack elsewhere": lambda engine: engine.attack_batch(ATTACK, as_batch(0), engine.trainable()),
    "attack ahead": lambda engine: engine.prepare(as_batch(1), early=True),
    "probe": probe_pass,
    "first look": lambda engine: check_model(engine.model, 3, 8, 5),
}


@pytest.mark.parametrize("statistics", ["batch", "running"])
@pytest.mark.parametrize("name", PASSES)
def test_a_pass_changes_no_buffer(name: str, statistics: str) -> None:
    # Red when: the attack runs on the module's own buffers; a buffer that a layer replaced stays
    # replaced; only buffers of batch norm are looked after.
    engine = make(Concurrent(ATTACK, 1, attack_statistics=statistics), buffered_net())
    before, where = state(engine.model), identities(engine.model)
    PASSES[name](engine)
    assert same(state(engine.model), before)
    assert identities(engine.model) == where


def test_the_second_pass_of_sam_moves_no_buffer() -> None:
    # Red when: frozen_stats takes the place of state_left_alone.
    states = []
    for method in (SAM(0.1), Vanilla()):
        engine = make(method, buffered_net())
        engine.gradient(as_batch(0))
        states.append(state(engine.model))
    assert same(*states)


@pytest.mark.parametrize("statistics", ["batch", "running"])
@pytest.mark.parametrize("lookahead", [False, True])
def test_attacks_see_the_buffers_of_the_beginning_of_their_step(
    statistics: str, lookahead: bool
) -> None:
    # Red when: inline attacks see the buffers that the gradient has left; a micro-batch sees those
    # that the one before it has left.
    method = Concurrent(ATTACK, 1, lookahead, attack_statistics=statistics)
    found = []
    for executor in (Inline(), AttackFirst()):
        engine = make(method, buffered_net(), executor=executor)
        records: list[StepRecord] = run(engine, 5, count=2)
        found.append(([record.losses for record in records], state(engine.model)))
    assert found[0][0] == found[1][0]
    assert same(found[0][1], found[1][1])


def test_the_attack_is_that_of_a_copy_of_the_model() -> None:
    # Red when: the copies of the buffers are those of another step, or of before the last update.
    engine = make(Concurrent(ATTACK, 1), buffered_net())
    for t in range(3):
        twin, future = copy.deepcopy(engine.model), as_batch(t + 1)
        engine.gradient(as_batch(t))
        engine.prepare(future)
        with route(twin, "adv"), frozen_stats(twin):
            x, y = future.micro[0].views["clean"], future.micro[0].y_N
            want = ATTACK(twin, x, y, draws(t + 1))
        engine.update()
        waiting = engine.pending.pop(t + 1)
        assert torch.equal(waiting.images[0], want)
        engine.pending.put(t + 1, waiting)


def test_a_step_that_is_left_out_gives_replaced_buffers_back() -> None:
    # Red when: the tensors are restored that the guard saw when it was made.
    engine = make(Sequential(ATTACK), buffered_net(), on_nonfinite="skip")
    engine(as_batch(0))
    before = state(engine.model)
    bad = as_batch(1)
    bad.micro[0].views["clean"][:, :, 4, 4] = float("nan")
    engine.inputs._checked = True
    assert engine(bad).skipped
    assert same(state(engine.model), before)


def test_a_buffer_that_two_layers_share_is_one() -> None:
    # Red when: functional_call gets two values for tied buffers.
    model = buffered_net()
    model.append(nn.Sequential(nn.Linear(5, 5), type(model[3])()))
    model[-1][1].largest = model[3].largest
    engine = make(Sequential(ATTACK), model)
    before = state(model)
    engine.attack_batch(ATTACK, as_batch(0))
    assert same(state(model), before)
    with state_left_alone(model):
        TrainedLoss()(model(images()[0]), images()[1])
    assert same(state(model), before)


class Recomputed(nn.Module):
    """Activation checkpointing of all layers but the last."""

    def __init__(self, net: nn.Module, reentrant: bool | None) -> None:
        super().__init__()
        self.net, self.reentrant = net, reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.reentrant is None:
            return self.net(x)
        x = checkpoint(self.net[:-1], x, use_reentrant=self.reentrant)
        return self.net[-1](x)


def test_layers_that_are_computed_again_see_the_weights_and_buffers_of_the_attack() -> None:
    # Red when: functional_call gives the weights of an attack to its forward passes only.
    made, layers = [], (nn.Conv2d(3, 6, 3), nn.GELU(), Quantiser(), nn.Flatten(), nn.Linear(216, 5))
    for reentrant in (None, False):
        torch.manual_seed(0)
        model = Recomputed(nn.Sequential(*copy.deepcopy(layers)), reentrant)
        engine = make(Sequential(ATTACK), model)
        before = state(model)
        other = {name: -2 * p.detach() for name, p in model.named_parameters()}
        made.append(engine.attack_batch(ATTACK, as_batch(0), other).images[0])
        assert same(state(model), before)
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], engine.attack_batch(ATTACK, as_batch(0)).images[0])
