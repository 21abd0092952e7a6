"""Any loss: attacks ascend it, micro-batches and ranks give the gradient of the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conadv import FGSM, PGD, Batch, ConadvError, Concurrent, MicroBatch, Recycle, Sequential

from .helpers import train_step

EPS = 0.1
WEIGHT = torch.tensor([1.0, 5.0, 0.2, 2.0, 0.0], dtype=torch.float64)
F64 = torch.float64


def own(output: Tensor, y_N: Tensor) -> Tensor:
    """Half of squared distance to one-hot labels, by somebody who knows no reduction."""
    return 0.5 * (output - F.one_hot(y_N, 5)).square().sum(1).mean()


def classes(g: torch.Generator) -> Tensor:
    return torch.randint(0, 5, (8,), generator=g)


def uneven(g: torch.Generator) -> Tensor:
    """The first four images, a micro-batch of two among them, have the class that is ignored."""
    return torch.tensor([3, 3, 3, 3, 0, 1, 4, 3])


def mixed(g: torch.Generator) -> Tensor:
    return torch.rand(8, 5, generator=g).softmax(1)  # float32, as mixing makes them


def numbers(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.rand(8, *shape, generator=g, dtype=F64)


CE = nn.CrossEntropyLoss
CASES: dict[str, tuple[tuple[int, ...], Callable[[torch.Generator], Tensor], Any]] = {
    "cross-entropy": ((5,), classes, F.cross_entropy),
    "smoothed": ((5,), classes, partial(F.cross_entropy, label_smoothing=0.3)),
    "weighted": ((5,), classes, CE(WEIGHT)),
    "weighted, by a partial": ((5,), classes, partial(F.cross_entropy, weight=WEIGHT)),
    "weighted, smoothed": ((5,), classes, CE(WEIGHT, label_smoothing=0.3)),
    "ignored": ((5,), uneven, CE(ignore_index=3)),
    "weighted, ignored": ((5,), uneven, CE(WEIGHT, ignore_index=3)),
    "mixed": ((5,), mixed, F.cross_entropy),
    "weighted, mixed": ((5,), mixed, CE(WEIGHT)),
    "nll": ((5,), classes, nn.NLLLoss(WEIGHT)),
    "margin": ((5,), classes, nn.MultiMarginLoss()),
    "pixels, weighted": (
        (5, 2, 2),
        lambda g: torch.randint(0, 5, (8, 2, 2), generator=g),
        CE(WEIGHT),
    ),
    "one logit": ((1,), numbers(1), F.binary_cross_entropy_with_logits),
    "many labels": ((5,), numbers(5), nn.BCEWithLogitsLoss(pos_weight=WEIGHT)),
    "mse (N,)": ((), numbers(), F.mse_loss),
    "mse (N, 1)": ((1,), numbers(1), nn.MSELoss()),
    "l1 of images": ((3, 4, 4), numbers(3, 4, 4), nn.L1Loss()),
    "huber": ((2,), numbers(2), partial(F.smooth_l1_loss, beta=0.5)),
    "own": ((5,), classes, own),
}


def network(shape: tuple[int, ...], dtype: torch.dtype = F64) -> nn.Module:
    torch.manual_seed(0)
    size = int(torch.tensor(shape).prod()) if shape else 1
    layers = nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(144, size)
    return nn.Sequential(*layers, nn.Unflatten(1, shape) if shape else nn.Flatten(0)).to(dtype)


def data(name: str, dtype: torch.dtype = F64) -> tuple[nn.Module, Tensor, Tensor, Any]:
    shape, labels, loss = CASES[name]
    g = torch.Generator().manual_seed(1)
    x = torch.rand(8, 3, 8, 8, generator=g, dtype=dtype)
    return network(shape, dtype), x, labels(g), loss


def batch_of(x: Tensor, y: Tensor, count: int) -> Batch:
    pairs = zip(x.chunk(count), y.chunk(count), strict=True)
    return Batch(0, tuple(MicroBatch(i, b, {"clean": a}) for i, (a, b) in enumerate(pairs)))


def engine_of(model: nn.Module, loss: Any, method: Any = None, **options: Any) -> Any:
    return train_step(model, torch.optim.SGD(model.parameters(), 0.1), method, loss=loss, **options)


def exact(model: nn.Module, x: Tensor, y: Tensor, loss: Any) -> Tensor:
    """FGSM of the loss by hand."""
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(
        loss(model(leaf), y.to(F64) if y.is_floating_point() else y), leaf
    )
    return (x + EPS * gradient.sign()).clamp(0, 1)


@pytest.mark.parametrize("name", CASES)
def test_the_attack_ascends_the_loss_that_is_trained(name: str) -> None:
    # Red when: PGD takes cross-entropy whatever is trained, without weights or smoothing; or casts
    # to float32.
    model, x, y, loss = data(name)
    want = exact(model, x, y, loss)
    engine = engine_of(model, loss, Sequential(FGSM(EPS)))
    found = engine.attack_batch(engine.method.attack, batch_of(x, y, 1)).images[0]
    assert torch.equal(found, want)
    # outside of an engine a loss is given to the attack itself
    assert torch.equal(FGSM(EPS, loss=loss)(model, x, y, torch.Generator()), want)
    engine = engine_of(model, loss, Recycle(FGSM(EPS)))
    engine(batch_of(x, y, 1))
    assert torch.equal(engine.pending.pop(1).images[0], want)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_micro_batches_give_the_gradient_of_the_whole_batch(name: str, share: float) -> None:
    # Red when: means of micro-batches are averaged (class weights), a micro-batch in which all
    # labels are ignored makes NaN, or the extra view has the weight of its number of images.
    model, x, y, loss = data(name)
    engine = engine_of(model, loss, Sequential(FGSM(EPS), share=share))
    first = torch.cat([torch.arange(len(part)) + 4 * i for i, part in enumerate(x.split(4))])
    first = first.view(2, 4)[:, : round(4 * share)].flatten()
    both = torch.cat([x, exact(model, x, y, loss)[first]]), torch.cat([y, y[first]])
    target = both[1].to(F64) if y.is_floating_point() else both[1]
    want = loss(model(both[0]), target)
    gradients = torch.autograd.grad(want, list(model.parameters()))
    engine.gradient(batch_of(x, y, 2))
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-9, atol=1e-13)
    assert engine.update().loss == pytest.approx(want.item(), rel=1e-9)


def test_an_image_moves_by_its_own_loss_alone() -> None:
    # Red when: the attack takes the mean over a batch whose labels are all ignored (0 / 0).
    model, x, y, loss = data("weighted, ignored")
    engine = engine_of(model, loss, Sequential(PGD(EPS, 2, norm="l2")))
    method = engine.method
    whole = engine.attack_batch(method.attack, batch_of(x, y, 1)).images[0]
    alone = torch.cat(engine.attack_batch(method.attack, batch_of(x, y, 8)).images)
    torch.testing.assert_close(whole, alone, rtol=1e-12, atol=1e-12)
    assert torch.equal(alone[y == 3], x[y == 3])
    for name in ("weighted, ignored", "ignored"):
        model, x, y, loss = data(name)
        record = engine_of(model, loss)((x[:4], y[:4]))  # nothing to learn from
        assert (record.loss, record.grad_norm) == (0, 0)


def test_float64_stays_float64_and_half_is_raised() -> None:
    # Red when: the loss is cast to float32 (signs of small gradients differ), or an attack steps in
    # float16, where eps of 1/255 is rounded.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).double()
    model[1].weight.data *= 30
    x = torch.rand(64, 3, 2, 2, dtype=F64)
    y = model(x).argmax(1)
    want = exact(model, x, y, partial(F.cross_entropy, reduction="sum"))
    attack = FGSM(EPS)
    assert torch.equal(attack(model, x, y, torch.Generator()), want)
    engine = engine_of(model, F.cross_entropy, Sequential(attack))
    assert torch.equal(engine.attack_batch(attack, batch_of(x, y, 1)).images[0], want)
    pixels = (x * 255).to(torch.uint8)
    made = engine.attack_batch(FGSM(0.0), batch_of(pixels, y, 1)).images[0]
    assert torch.equal(made, pixels.double() / 255)

    half, x_half = model.half(), x.half()
    for norm in ("linf", "l2"):
        steps = PGD(1 / 255, 3, norm=norm)
        moved = steps(half, x_half, y, torch.Generator())
        want = steps(lambda z: half(z.half()), x_half.float(), y, torch.Generator())
        assert torch.equal(moved, want.half())


def _scalarless(output: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(output, y, reduction="none")


class _Derived(CE):
    """A focal loss that does not look at its reduction."""

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        each = F.cross_entropy(output, y, reduction="none")
        return ((1 - torch.exp(-each)) ** 2 * each).mean()


def _sum_by_default(output: Tensor, y: Tensor, reduction: str = "sum") -> Tensor:
    return F.cross_entropy(output, y, reduction=reduction)


WRONG: dict[str, tuple[str, Any, Any, str]] = {
    "none": ("cross-entropy", CE(reduction="none"), None, "reduction='none'"),
    "sum": ("cross-entropy", partial(F.cross_entropy, reduction="sum"), None, "reduction='sum'"),
    "own sum": ("own", lambda o, y: 8 * own(o, y) * len(y), None, "is a sum over images"),
    "own none": ("cross-entropy", _scalarless, None, r"returns \(8,\), not a scalar"),
    "no tensor": ("cross-entropy", lambda o, y: 1.0, None, "returns float, not a scalar"),
    "detached": ("own", lambda o, y: own(o.detach(), y), None, "has no gradient"),
    "sum by default": ("cross-entropy", _sum_by_default, None, "is a sum over images"),
    "sum in old words": (
        "cross-entropy",
        partial(F.cross_entropy, size_average=False),
        None,
        "is a sum over images",
    ),
    "derived": ("cross-entropy", _Derived(), None, "_Derived is derived from"),
    "class": ("cross-entropy", CE, None, "CrossEntropyLoss is no function of"),
    "hinge": (
        "mse (N, 1)",
        nn.HingeEmbeddingLoss(),
        lambda y: y[:, 0],
        r"\(8, 1\) float64 and labels \(8,\)",
    ),
    "broadcast": (
        "mse (N, 1)",
        F.mse_loss,
        lambda y: y[:, 0],
        r"\(8, 1\) float64 and labels \(8,\)",
    ),
    "column": ("cross-entropy", F.cross_entropy, lambda y: y[:, None], r"squeeze\(1\)"),
    "int32": ("cross-entropy", F.cross_entropy, lambda y: y.int(), r"y.long\(\)"),
    "range": ("cross-entropy", F.cross_entropy, lambda y: y + 1, "range from 1 to 5"),
    "negative": ("cross-entropy", F.cross_entropy, lambda y: y - 100, "ignore_index"),
    "weights": ("weighted", CE(WEIGHT[:3]), None, "labels"),
    "one class": ("one logit", F.cross_entropy, None, "one class is always 0"),
    "bce of classes": (
        "cross-entropy",
        nn.BCEWithLogitsLoss(),
        None,
        r"\(8, 5\) float64 and labels",
    ),
}


SUMS = "own sum", "sum by default", "sum in old words"


@pytest.mark.parametrize("how", ["step", "gradient", "attack"])
@pytest.mark.parametrize("name", WRONG)
def test_losses_and_labels_that_do_not_fit_are_named(name: str, how: str) -> None:
    # Red when: a check of TrainedLoss is removed (a sum by default trained N times faster with N
    # micro-batches as with one, a derived loss slower by the number of images); it holds for the
    # step and not for its phases.
    case, loss, change, message = WRONG[name]
    model, x, y, _ = data(case)
    if name == "range":
        y = torch.arange(8) % 5
    y = change(y) if change else y
    if how == "attack" and name in SUMS:  # which has the same direction
        return

    def use() -> None:
        engine = engine_of(model, loss, Sequential(FGSM(EPS)))
        if how == "attack":
            engine.attack_batch(engine.method.attack, batch_of(x, y, 1))
        else:
            (engine if how == "step" else engine.gradient)((x, y))

    with pytest.raises(ConadvError, match=message):
        use()


@pytest.mark.parametrize("name", ["many labels", "mse (N, 1)", "own", "pixels, weighted"])
def test_targeted_attacks_need_classes(name: str) -> None:
    # Red when: any floats are taken for probabilities, of which one is the least.
    model, x, y, loss = data(name)
    attack = FGSM(EPS, targeted=True)
    with pytest.raises(ConadvError, match="needs cross-entropy"):
        engine_of(model, loss, Sequential(attack))((x, y))


def test_targeted_attacks_descend_the_trained_loss() -> None:
    # Red when: class weights are left out, or the sign.
    model, x, y, loss = data("weighted, smoothed")
    y = y.clamp_max(3)
    engine = engine_of(model, loss, Concurrent(FGSM(0.01, targeted=True)))
    found = engine.attack_batch(engine.method.attack, batch_of(x, y, 1)).images[0]
    distances = []
    for target in range(5):
        leaf = x.clone().requires_grad_()
        summed = CE(WEIGHT, label_smoothing=0.3, reduction="sum")  # class 4 weighs nothing
        each = summed(model(leaf), torch.full_like(y, target))
        (gradient,) = torch.autograd.grad(each, leaf)
        want = (x - 0.01 * gradient.sign()).clamp(0, 1)
        distances.append((found - want).flatten(1).abs().amax(1))
    hit = torch.stack(distances, 1) == 0
    assert hit.any(1).all()
    assert not hit.gather(1, y[:, None]).any()
