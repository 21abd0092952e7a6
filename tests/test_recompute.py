"""Activation checkpointing computes again what the forward pass computed, on its routes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from conadv import FGSM, ConadvError, TrainStep, frozen_stats, route, split_batchnorm

from .helpers import batches, same, state
from .test_methods import CASES, SPACE

F64 = torch.float64
X = torch.rand(6, 4, generator=torch.Generator().manual_seed(1), dtype=F64)


def network() -> nn.Sequential:
    """Two split layers whose routes differ in all that they have."""
    torch.manual_seed(0)
    norms = nn.BatchNorm1d(8), nn.BatchNorm1d(5)
    layers = (nn.Linear(4, 8), norms[0], nn.Tanh(), nn.Linear(8, 5), norms[1], nn.Linear(5, 2))
    model = nn.Sequential(*layers).to(F64)
    split_batchnorm(model, "adv", "aug")
    with torch.no_grad():
        for number, (name, value) in enumerate(model.state_dict().items()):
            if "routes" in name and value.is_floating_point():
                value.add_(0.3 + 0.1 * number)
    return model


def nested(model: nn.Module, x: Tensor) -> Tensor:
    """A checkpoint within a checkpoint, and a route within each."""
    first, second = model[:3], model[3:]

    def inner(h: Tensor) -> Tensor:
        with route(model, "aug"):
            h = second[:2](h)
        return second[2:](h)

    def outer(x: Tensor) -> Tensor:
        return checkpoint(inner, first(x), use_reentrant=False)

    return checkpoint(outer, x, use_reentrant=False)


def without(model: nn.Module, x: Tensor) -> Tensor:
    h = model[:3](x)
    with route(model, "aug"):
        h = model[3:5](h)
    return model[5:](h)


def wrapped(model: nn.Module, x: Tensor) -> Tensor:
    return checkpoint_wrapper(model)(x)


HOW: dict[str, tuple[Callable[[Any, Tensor], Tensor], Callable[[Any, Tensor], Tensor]]] = {
    "plain": (lambda m, x: checkpoint(m, x, use_reentrant=False), lambda m, x: m(x)),
    "reentrant": (lambda m, x: checkpoint(m, x, use_reentrant=True), lambda m, x: m(x)),
    "sequential": (
        lambda m, x: checkpoint_sequential(m, 3, x, use_reentrant=False),
        lambda m, x: m(x),
    ),
    "wrapper": (wrapped, lambda m, x: m(x)),
    "nested": (nested, without),
}


@pytest.mark.parametrize("elsewhere", [None, "clean", "aug"])
@pytest.mark.parametrize("spec", ["clean", "adv", {"clean": 2, "adv": 4}], ids=str)
@pytest.mark.parametrize("how", HOW)
def test_the_second_pass_takes_the_routes_of_the_first(
    how: str, spec: Any, elsewhere: str | None
) -> None:
    # Red when: recomputation takes the present route (gradients); it moves running statistics a
    # second time; the route of a block within the function is lost. ``elsewhere``: the block that
    # backward runs in.
    found = []
    for run in HOW[how]:
        model = network().train()
        x = X.clone().requires_grad_()
        with route(model, spec):
            loss = run(model, x).square().sum()
        with route(model, elsewhere) if elsewhere else nullcontext():
            loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((loss.detach(), x.grad, grads, state(model)))
        model(X)  # outside of any block the route is clean again
        assert torch.equal(model[1].num_batches_tracked, found[-1][3]["1.num_batches_tracked"] + 1)
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


class Checkpointed(nn.Module):
    def __init__(self, on: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        self.last, self.on = nn.Linear(144, 5), on

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(self.head, x, use_reentrant=False) if self.on else self.head(x)
        return self.last(h)


@pytest.mark.parametrize("case", ["vanilla", "disadv", "conadv", "recycle"])
def test_steps_of_a_checkpointed_model_are_those_of_the_plain_one(case: str) -> None:
    # Red when: a copy of the model is not followed; TrainStep's backward recomputes on one route.
    ends = []
    for on in (False, True):
        model = copy.deepcopy(split_batchnorm(Checkpointed(on).double(), "adv"))
        step = TrainStep(
            model, torch.optim.SGD(model.parameters(), 0.1), CASES[case](), space=SPACE
        )
        stream = batches(3, dtype=F64)
        for batch, future in zip(stream, [*stream[1:], None], strict=True):
            step(batch, future if step.ahead else None)
        ends.append(state(model))
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-14)


def test_an_attack_through_a_checkpoint() -> None:
    # Red when: the attack's own backward recomputes on another route.
    made = []
    for on in (False, True):
        model = split_batchnorm(Checkpointed(on).double(), "adv").train()
        (x, y), draws = batches(1, dtype=F64)[0], torch.Generator()
        with route(model, "adv"), frozen_stats(model):
            made.append(FGSM(0.1)(model, x, y, draws))
    assert torch.equal(*made)


def test_update_bn_is_an_error_that_leaves_everything_as_it_is() -> None:
    # Red when: reset_running_stats is torch's own: the routes' statistics are then 0 and 1.
    model = network()
    before = state(model)
    with pytest.raises(ConadvError, match=r"conadv\.recalibrate"):
        update_bn([X], model)
    assert same(state(model), before)
    model[1].reset_running_stats()  # what somebody asks of a layer, it does
    assert not model[1].running_mean.any()
