"""torch.compile: one graph per route and one for the attack, none after the first step, and the
same arithmetic.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func

from conadv import (
    FGSM,
    ConadvError,
    Concurrent,
    Recycle,
    TrainStep,
    Vanilla,
    split_batchnorm,
    windows,
)
from conadv.types import Method

from .helpers import images, same, state, train_step

METHODS = {
    "vanilla": (Vanilla(), 1),
    "conadv": (Concurrent(FGSM(8 / 255), 1), 3),
    "conadv-lookahead": (Concurrent(FGSM(8 / 255), 2, lookahead=True), 3),
    "recycle": (Recycle(FGSM(8 / 255)), 2),
}


class Graphs:
    """A backend that keeps the backward graphs and runs them with eager's own kernels."""

    def __init__(self) -> None:
        self.backward: list[Any] = []
        self.backend = aot_autograd(fw_compiler=self._plain, bw_compiler=self._keep)

    def _plain(self, graph: Any, _: Any) -> Any:
        return make_boxed_func(graph.forward)

    def _keep(self, graph: Any, _: Any) -> Any:
        self.backward.append(graph)
        return make_boxed_func(graph.forward)

    def weight_gradients(self) -> list[int]:
        """Per backward graph the convolutions whose weights get a gradient."""
        target = torch.ops.aten.convolution_backward.default
        return [
            sum(n.target is target and n.args[-1][1] for n in g.graph.nodes) for g in self.backward
        ]


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def network(*more: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        *more,
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4),
    )
    return split_batchnorm(nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 5)), "adv")


def train(method: Method, steps: int, model: nn.Module | None = None, **options: Any) -> TrainStep:
    """Steps of which only the first three may compile."""
    model = model or network()
    engine = train_step(
        model, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), method, **options
    )
    try:
        for t, (batch, future) in enumerate(
            windows([images(8, i) for i in range(steps)], engine.ahead)
        ):
            torch._dynamo.config.error_on_recompile = t >= 3
            engine(batch, future)
    finally:
        torch._dynamo.config.error_on_recompile = False
    return engine


@pytest.mark.parametrize("name", METHODS)
def test_a_graph_per_route_and_none_after_that(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Red when: the look-ahead's weights go in as other types than the present ones (a fourth
    # graph); the current route is looked up in a way that dynamo does not guard (the adversarial
    # view then runs through the clean route).
    method, graphs = METHODS[name]
    want = train(method, 7)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=Graphs().backend))
    found = train(method, 7, compile=True)
    assert same(state(found.model), state(want.model))
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


def test_the_attack_computes_no_gradient_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    # Red when: the attack's graph gets the parameters themselves (a compiled backward computes all
    # it has).
    graphs = Graphs()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=graphs.backend))
    train(METHODS["conadv"][0], 2, compile=True)
    assert sorted(graphs.weight_gradients()) == [0, 2, 2]


class Breaks(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x


def test_a_graph_break_is_an_error() -> None:
    # Red when: fullgraph is left out (two graphs instead of one, in silence).
    with pytest.raises(ConadvError, match="as one graph per shape"):
        train(Vanilla(), 1, network(Breaks()), compile=True)


@pytest.mark.skipif(
    shutil.which("g++") is None, reason="inductor needs a C++ compiler: g++ is not installed"
)
def test_compiled_by_inductor_it_computes_the_same_up_to_rounding() -> None:
    # Red when: the compiled network normalises an adversarial view by the clean route.
    want, found = (train(METHODS["conadv"][0], 2, compile=flag) for flag in (False, True))
    for name, value in state(want.model).items():
        assert torch.allclose(
            state(found.model)[name].double(), value.double(), rtol=1e-3, atol=1e-4
        ), name
