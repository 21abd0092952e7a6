"""SAM against its reference, and what its two gradients leave alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from conadv import LARS, SAM, Batch, ConadvError, MicroBatch, Vanilla
from conadv.reference.sam import sam

from .helpers import no_norm_net, parameters, same, state, tiny_resnet
from .test_methods import as_batch, make, run, sgd

OPTIMIZERS = {"sgd": sgd, "lars": lambda model: LARS(model.parameters(), 5.0)}


def pairs(count: int) -> list[Any]:
    micro = [as_batch(t, dtype=torch.float64).micro[0] for t in range(count)]
    return [(m.views["clean"], m.y_N) for m in micro]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_engine_equals_the_reference(optimizer: str) -> None:
    """Weights, statistics and losses after seven float64 steps with batch norm."""
    # Red when: the weights are not restored before the update; the second pass moves running
    # statistics; the gradient uphill is added to the first; g is not divided by its norm.
    model = tiny_resnet("aug", dtype=torch.float64)
    twin = copy.deepcopy(model)
    engine = make(SAM(0.3), model, OPTIMIZERS[optimizer])
    got = [record.loss for record in run(engine, 7, dtype=torch.float64)]
    trained = [p for name, p in twin.named_parameters() if ".routes." not in name]
    plain = _WithoutRoutes(twin, trained)
    want = sam(plain, OPTIMIZERS[optimizer](plain), pairs(7), 0.3)
    assert got == pytest.approx(want, rel=1e-10)
    for name, value in state(twin).items():
        assert torch.allclose(state(model)[name], value, rtol=1e-9, atol=1e-12), name
    assert got != pytest.approx(
        [r.loss for r in run(make(Vanilla(), copy.deepcopy(twin)), 7, dtype=torch.float64)]
    )


class _WithoutRoutes(torch.nn.Module):
    """The model with the parameters of its clean route alone, as the reference trains all that
    there are.
    """

    def __init__(self, model: torch.nn.Module, trained: list[torch.nn.Parameter]) -> None:
        super().__init__()
        self.model, self.trained = model, trained

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)

    def parameters(self, recurse: bool = True) -> Any:
        names = [name for name, _ in self.model.named_parameters() if ".routes." not in name]
        return iter([self.model.get_parameter(name) for name in names])


def test_the_gradient_leaves_the_weights_bitwise_alone() -> None:
    # Red when: the excursion is subtracted again instead of copied back (off by a rounding).
    engine = make(SAM(0.3), tiny_resnet("aug"))
    before = parameters(engine.model)
    engine.gradient(as_batch(0))
    assert same(parameters(engine.model), before)
    assert all(p.requires_grad for p in engine.model.parameters())


@pytest.mark.parametrize("fuse", [False, True])
def test_with_an_aug_view(fuse: bool) -> None:
    # Red when: the second gradient leaves the aug view out.
    def batch(size: int = 8) -> Batch:
        (micro,) = as_batch(0, dtype=torch.float64).micro
        return Batch(
            0,
            (
                MicroBatch(
                    0, micro.y_N, {"clean": micro.views["clean"], "aug": micro.views["second"]}
                ),
            ),
        )

    model = tiny_resnet("aug", dtype=torch.float64)
    twin = copy.deepcopy(model)
    engine = make(SAM(0.3), model, fuse_views=fuse)
    engine.gradient(batch())
    first = make(Vanilla(), copy.deepcopy(twin))
    first.gradient(batch())
    gradients = {name: p.grad for name, p in first.model.named_parameters()}
    length = torch.cat([g.flatten() for g in gradients.values()]).norm()
    with torch.no_grad():
        for name, p in twin.named_parameters():
            p += 0.3 * gradients[name] / length
    uphill = make(Vanilla(), twin)
    uphill.gradient(batch())
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-8, atol=1e-11), name
    assert model.bn1.routes["aug"].num_batches_tracked == 1


def test_a_zero_gradient_stays_where_it_is() -> None:
    # Red when: the division by the norm has no lower bound.
    engine = make(SAM(0.3), no_norm_net(), loss=lambda logits, y: 0 * logits.sum())
    assert engine(as_batch(0, dtype=torch.float64)).grad_norm == 0


def test_errors() -> None:
    # Red when: gradients that are there already are taken for the first gradient.
    for wrong in ({"rho": 0.0}, {"rho": float("inf")}):
        with pytest.raises(ConadvError):
            SAM(**wrong)
    engine = make(SAM(), tiny_resnet("aug"))
    engine.gradient(as_batch(0))
    with pytest.raises(ConadvError, match="cleared gradients"):
        engine.gradient(as_batch(0))
