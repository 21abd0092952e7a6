"""The methods: one table, and contracts that hold for every row; the identities of DESIGN, against
Algorithm 1.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
from torch import nn

from conadv import (
    FGSM,
    LAMB,
    LARS,
    PGD,
    SAM,
    Batch,
    ConadvError,
    Concurrent,
    Inline,
    MicroBatch,
    MultiView,
    Noise,
    PixelSpace,
    RandomSigns,
    Recycle,
    Sequential,
    StepRecord,
    Stream,
    TrainStep,
    Vanilla,
    rng,
    windows,
)
from conadv.engine.executors import Executor
from conadv.methods import METHODS
from conadv.reference.conadv import algorithm_1, coast, recycled, replaced
from conadv.types import ExtraBatch, Method

from .helpers import images, no_norm_net, parameters, same, state, tiny_resnet, train_step

SPACE = PixelSpace((0.5,), (0.25,))
EPS = 8 / 255
ATTACK = PGD(EPS, 1, random_start=0.5, space=SPACE)  # draws, so that a wrong generator shows
SEED = 3

CASES: dict[str, Callable[[], Method]] = {
    "vanilla": Vanilla,
    "sam": lambda: SAM(0.1),
    "multiview": MultiView,
    "noise": lambda: Noise(RandomSigns(EPS, SPACE)),
    "disadv": lambda: Sequential(ATTACK),
    "conadv": lambda: Concurrent(ATTACK, 1),
    "conadv-tau3": lambda: Concurrent(ATTACK, 3),
    "conadv-lookahead": lambda: Concurrent(ATTACK, 2, lookahead=True),
    "recycle": lambda: Recycle(FGSM(EPS, space=SPACE)),
    "conadv-replace": lambda: Concurrent(ATTACK, 1, mix="replace", share=0.5),
    "noise-replace": lambda: Noise(RandomSigns(EPS, SPACE), mix="replace", share=0.25),
    "recycle-signs": lambda: Recycle(RandomSigns(EPS, SPACE), mix="replace", share=0.5),
    "recycle-replace": lambda: Recycle(FGSM(EPS, space=SPACE), mix="replace", share=0.5),
}
CLEAN_ONLY = ("vanilla", "sam")


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)


def make(
    method: Method, model: nn.Module | None = None, optimizer: Any = sgd, **options: Any
) -> TrainStep:
    model = tiny_resnet("adv") if model is None else model
    options.setdefault("space", SPACE)
    return train_step(model, optimizer(model), method, seed=SEED, **options)


def as_batch(t: int, count: int = 1, size: int = 8, dtype: torch.dtype = torch.float32) -> Batch:
    """Batch t in model space with a second view, cut into ``count`` micro-batches."""
    x, y = images(size, 100 + t, dtype)
    second, _ = images(size, 900 + t, dtype)
    n = size // count
    cut = range(0, size, n)
    micro = [
        MicroBatch(
            i,
            y[s : s + n],
            {"clean": SPACE.normalize(x[s : s + n]), "second": SPACE.normalize(second[s : s + n])},
        )
        for i, s in enumerate(cut)
    ]
    return Batch(t, tuple(micro))


def run(engine: TrainStep, steps: int = 6, first: int = 0, **kind: Any) -> list[Any]:
    stream = [as_batch(t, **kind) for t in range(first, steps)]
    return [engine(batch, future) for batch, future in windows(stream, engine.ahead)]


def draws(t: int) -> torch.Generator:
    return rng.generator("cpu", SEED, "attack", t, 0)


# ---- contracts over the table


def test_the_table_has_every_method() -> None:
    assert {type(make_method()) for make_method in CASES.values()} == {
        resolve_name(row.target) for row in METHODS.values()
    }


@pytest.mark.parametrize("name", CASES)
def test_repeatable_and_leaves_the_callers_random_stream_alone(name: str) -> None:
    # Red when: rng.scope does not restore.
    torch.manual_seed(1)
    a = make(CASES[name]())
    torch.manual_seed(5)
    stream = torch.random.get_rng_state()
    first = run(a)
    assert torch.equal(torch.random.get_rng_state(), stream)
    torch.manual_seed(7)
    b = make(CASES[name]())
    second = run(b)
    assert [r.losses for r in first] == [r.losses for r in second]
    assert same(state(a.model), state(b.model))


@pytest.mark.parametrize("name", [*CASES, "conadv-lookahead without momentum"])
def test_resumed_in_the_middle_equals_uninterrupted(name: str) -> None:
    # Red when: state_dict leaves out pending (conadv, recycle), its weight versions, the version,
    # or the weights that look-ahead remembers.
    name, _, plain = name.partition(" ")
    optimizer = FALLBACKS["sgd-no-momentum"] if plain else sgd
    whole, half, rest = (make(CASES[name](), optimizer=optimizer) for _ in range(3))
    pairs = list(windows([as_batch(t) for t in range(6)], whole.ahead))
    want = [whole(*pair) for pair in pairs][3:]
    for pair in pairs[:3]:
        half(*pair)
    saved = copy.deepcopy((half.model.state_dict(), half.optimizer.state_dict(), half.state_dict()))
    for part, values in zip((rest.model, rest.optimizer, rest), saved, strict=True):
        part.load_state_dict(values)
    got = [rest(*pair) for pair in pairs[3:]]
    for a, b in zip(got, want, strict=True):
        assert (a.step, a.loss, a.weight_version) == (b.step, b.loss, b.weight_version)
    assert same(state(rest.model), state(whole.model))


@pytest.mark.parametrize("name", CASES)
def test_accumulation_sees_the_global_batch(name: str) -> None:
    # Red when: the loss is not divided by the number of micro-batches. (No batch statistics,
    # float64; the random draws are keyed by micro-batch, so the attacks here draw nothing.)
    plain = {
        "noise": MultiView(),  # random signs are drawn per micro-batch
        "disadv": Sequential(FGSM(EPS, space=SPACE)),
        "conadv": Concurrent(FGSM(EPS, space=SPACE), 1),
        "conadv-tau3": Concurrent(FGSM(EPS, space=SPACE), 3),
        "conadv-lookahead": Concurrent(FGSM(EPS, space=SPACE), 2, lookahead=True),
    }
    if name in ("conadv-replace", "noise-replace", "recycle-signs"):
        pytest.skip("draws, or the images that are replaced, are those of the micro-batch")
    method = plain.get(name) or CASES[name]()
    one, four = (make(method, no_norm_net()) for _ in range(2))
    a = run(one, 4, dtype=torch.float64)
    b = run(four, 4, count=4, dtype=torch.float64)
    assert [r.loss for r in a] == pytest.approx([r.loss for r in b], rel=1e-9)
    for x, y in zip(one.model.parameters(), four.model.parameters(), strict=True):
        assert torch.allclose(x, y, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_only_the_clean_route_and_the_methods_own_are_used(name: str) -> None:
    # Red when: an attack moves running statistics, or the extra view goes through the clean route.
    engine = make(CASES[name]())
    before = state(engine.model)
    run(engine, 3)
    after = state(engine.model)
    assert after["bn1.num_batches_tracked"] == 3
    used = (
        0 if name in CLEAN_ONLY else 2 if name.startswith("recycle") else 3
    )  # recycle has nothing to perturb before step 0
    assert after["bn1.routes.adv.num_batches_tracked"] == used
    assert torch.equal(after["bn1.routes.adv.weight"], before["bn1.routes.adv.weight"]) == (
        name in CLEAN_ONLY
    )


@pytest.mark.parametrize("name", CASES)
def test_record_has_a_loss_per_view_and_the_measured_staleness(name: str) -> None:
    # Red when: the attack stamps the step of the batch instead of the version of the weights.
    records = run(make(CASES[name]()), 6)
    tags = [r.staleness for r in records]
    want = {
        "disadv": [0] * 6,
        "conadv": [0] + [1] * 5,
        "conadv-tau3": [0, 0, 0] + [3] * 3,
        "conadv-lookahead": [0, 0] + [2] * 4,
        "recycle": [None] + [1] * 5,
    }
    assert tags == want.get(name.removesuffix("-replace"), [None] * 6)
    for r in records[1:]:
        assert set(r.losses) == ({"clean"} if name in CLEAN_ONLY else {"clean", "adv"})
        adv = r.losses.get("adv", r.losses["clean"])
        weight = 0.25 if name == "noise-replace" else 0.5
        assert r.loss == pytest.approx(weight * adv + (1 - weight) * r.losses["clean"])
        assert r.grad_norm > 0
        assert set(r.phases) == {"attack", "gradient", "update"}


# ---- identities against Algorithm 1


@pytest.mark.parametrize("tau", [0, 1, 3])
@pytest.mark.parametrize(("lookahead", "fuse"), [(False, False), (False, True), (True, False)])
def test_engine_equals_algorithm_1(tau: int, lookahead: bool, fuse: bool) -> None:
    """Bitwise, but where sums are taken in another order (all views in one pass, powers of mu):
    then to rounding.
    """
    # Red when: prepare attacks `batch` instead of `future`; the attack runs after the update;
    # staleness is tau - 1.
    if lookahead and not tau:
        pytest.skip("look-ahead needs staleness")
    model = tiny_resnet("adv", dtype=torch.float64)
    twin = copy.deepcopy(model)
    attack = FGSM(EPS, space=SPACE) if lookahead else ATTACK
    engine = make(Concurrent(attack, tau, lookahead), model, fuse_views=fuse)
    records = run(engine, 7, dtype=torch.float64)
    stream = [
        (b.micro[0].views["clean"], b.micro[0].y_N)
        for b in (as_batch(t, dtype=torch.float64) for t in range(7))
    ]
    losses = algorithm_1(twin, sgd(twin), stream, attack, tau, draws, lookahead)
    if lookahead or fuse:
        assert [r.loss for r in records] == pytest.approx(losses, rel=1e-9)
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.allclose(a, b, rtol=1e-7, atol=1e-10)
    else:
        assert [r.loss for r in records] == losses
        assert same(parameters(model), parameters(twin))


def test_tau_0_is_the_sequential_attack_and_tau_1_is_not() -> None:
    # Red when: prepare keeps a batch although staleness is 0, or the pending batch is ignored.
    engines = [
        make(m)
        for m in (
            Sequential(ATTACK),
            Concurrent(ATTACK, 0),
            Concurrent(ATTACK, 1),
            Concurrent(ATTACK, 2),
        )
    ]
    for engine in engines:
        run(engine, 5)
    weights = [parameters(engine.model) for engine in engines]
    assert same(weights[0], weights[1])
    assert not same(weights[0], weights[2])
    assert not same(weights[2], weights[3])
    engines[1].method.prepare(engines[1], as_batch(5))
    assert len(engines[1].pending) == 0


def test_eps_0_makes_the_adversarial_batch_the_clean_one() -> None:
    # Red when: clean and future batches are mixed up.
    methods = (Concurrent(FGSM(0.0, space=SPACE), 2), Noise(RandomSigns(0.0, SPACE)), _CleanTwice())
    engines = [make(method) for method in methods]
    for engine in engines:
        run(engine, 5)
        assert same(state(engine.model), state(engines[0].model))


class _CleanTwice(MultiView):
    def extra_view(self, engine: TrainStep, batch: Batch) -> ExtraBatch:
        micro = batch.micro[0]
        return ExtraBatch((engine.images(micro, "clean"),), (micro.y_N,))


def test_recycle_perturbs_the_last_batch_by_its_own_clean_gradient() -> None:
    # Red when: absorb stores other labels, or the gradient of the adversarial half (from the second
    # step on).
    model = tiny_resnet("adv", dtype=torch.float64)
    engine = make(Recycle(FGSM(EPS, space=SPACE)), model)
    for t in range(2):
        twin, batch = copy.deepcopy(model), as_batch(t, dtype=torch.float64)
        assert engine(batch).staleness == (1 if t else None)
        waiting = engine.pending.pop(t + 1)
        assert waiting is not None
        x = batch.micro[0].views["clean"].clone().requires_grad_()
        torch.nn.functional.cross_entropy(twin(x), batch.micro[0].y_N).backward()
        want = FGSM(EPS, space=SPACE).from_gradient(x, x.grad)
        assert torch.allclose(waiting.images[0], want, atol=1e-12)
        assert torch.equal(waiting.labels[0], batch.micro[0].y_N)
        engine.pending.put(t + 1, waiting)


@pytest.mark.parametrize("adv_route", ["adv", "clean"])
@pytest.mark.parametrize("share", [0.25, 0.5])
@pytest.mark.parametrize("tau", [0, 1])
def test_conadv_in_the_place_of_clean_images(tau: int, share: float, adv_route: str) -> None:
    """Bitwise, but for one forward pass of both."""
    # Red when: views of unequal size weigh the same; the images that were attacked train as well.
    model = tiny_resnet("adv", dtype=torch.float64)
    twin = copy.deepcopy(model)
    method = Concurrent(ATTACK, tau, mix="replace", share=share)
    records = run(make(method, model, adv_route=adv_route), 5, dtype=torch.float64)
    stream = [as_batch(t, dtype=torch.float64).micro[0] for t in range(5)]
    pairs = [(micro.views["clean"], micro.y_N) for micro in stream]
    one = adv_route == "clean"
    losses = replaced(twin, sgd(twin), pairs, ATTACK, tau, draws, share, one_batch=one)
    assert [r.loss for r in records] == pytest.approx(losses, rel=1e-12)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
    assert [r.staleness for r in records] == [0] * tau + [tau] * (5 - tau)


@pytest.mark.parametrize("adv_route", ["adv", "clean"])
@pytest.mark.parametrize("share", [0.2, 0.5])
def test_recycle_in_the_place_of_clean_images(share: float, adv_route: str) -> None:
    # Red when: all images of the last step come back, not share / (1 - share) of the fresh ones;
    # the gradient that moves them is that of the perturbed half.
    model = tiny_resnet("adv", dtype=torch.float64)
    twin = copy.deepcopy(model)
    fgsm = FGSM(EPS, space=SPACE)
    engine = make(Recycle(fgsm, mix="replace", share=share), model, adv_route=adv_route)
    records = run(engine, 5, dtype=torch.float64)
    stream = [as_batch(t, dtype=torch.float64).micro[0] for t in range(5)]
    pairs = [(micro.views["clean"], micro.y_N) for micro in stream]
    one = adv_route == "clean"
    losses = recycled(twin, sgd(twin), pairs, fgsm, share, one_batch=one)
    assert [r.loss for r in records] == pytest.approx(losses, rel=1e-12)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_replaced_by_themselves_images_train_as_plain_ones(share: float) -> None:
    # Red when: the replaced images change place in the batch, or their loss weighs otherwise.
    a = make(Concurrent(FGSM(0.0, space=SPACE), 1, mix="replace", share=share), adv_route="clean")
    b = make(Noise(RandomSigns(0.0, SPACE), mix="replace", share=share), adv_route="clean")
    c = make(Vanilla())
    losses = [[r.loss for r in run(engine, 4)] for engine in (a, b, c)]
    assert losses[0] == pytest.approx(losses[2], rel=1e-6)
    assert same(state(a.model), state(c.model))
    assert same(state(b.model), state(c.model))


# ---- waiting images


@pytest.mark.parametrize(
    ("dtype", "error"), [("float32", 0.0), ("float16", 1e-3), ("bfloat16", 8e-3), ("uint8", 1e-6)]
)
def test_pending_dtypes(dtype: str, error: float) -> None:
    # Red when: uint8 truncates instead of rounding (8/255 is then off by one level).
    engine = make(Concurrent(FGSM(EPS, space=SPACE), 1), pending_dtype=dtype)
    x = (images(8, 5)[0] * 255).round() / 255
    future = Batch(
        1, (MicroBatch(0, torch.zeros(8, dtype=torch.long), {"clean": SPACE.normalize(x)}),)
    )
    made = engine.attack_batch(engine.method.attack, future).images[0]
    engine.gradient(as_batch(0))
    engine.prepare(future)
    assert (
        engine.pending.nbytes
        == made.numel() * torch.empty((), dtype=engine.pending.dtype).element_size()
    )
    got = engine.pending.pop(1).images[0]
    assert got.dtype == torch.float32
    assert (got - made).abs().max() <= error  # model space: values up to 2


@pytest.mark.parametrize("tau", [1, 3])
def test_at_most_tau_batches_wait(tau: int) -> None:
    # Red when: pop leaves the batch in the store.
    engine = make(Concurrent(FGSM(EPS, space=SPACE), tau))
    for batch, future in windows([as_batch(t) for t in range(6)], engine.ahead):
        engine(batch, future)
        assert engine.pending.nbytes <= tau * 8 * 3 * 8 * 8 * 4
    assert len(engine.pending) == 0


# ---- look-ahead


OPTIMIZERS = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), 0.05, momentum=0.9),
    "sgd-nesterov": lambda m: torch.optim.SGD(m.parameters(), 0.05, momentum=0.9, nesterov=True),
    "sgd-decay": lambda m: torch.optim.SGD(m.parameters(), 0.05, momentum=0.8, weight_decay=1e-2),
    "lars": lambda m: LARS(m.parameters(), 5.0),
    "lars-timm": lambda m: LARS(m.parameters(), 5.0, variant="timm"),
    "lars-larc": lambda m: LARS(m.parameters(), 5.0, variant="larc"),
    "lars-no-wd-ratio": lambda m: LARS(m.parameters(), 5.0, variant="no-wd-ratio"),
    "lamb": lambda m: LAMB(m.parameters(), 0.01),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), 0.01),
    "adam": lambda m: torch.optim.Adam(m.parameters(), 0.01),
    "sgd-groups": lambda m: torch.optim.SGD(
        [{"params": m[0].parameters()}, {"params": m[2:].parameters(), "momentum": 0.5}],
        0.05,
        momentum=0.9,
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("tau", [1, 3])
def test_lookahead_is_what_the_optimizer_does_with_zero_gradients(name: str, tau: int) -> None:
    # Red when: the sum starts at mu^0; Nesterov's extra factor is missing; Adam's bias correction
    # uses step k - 1.
    model = no_norm_net()
    engine = make(Concurrent(FGSM(EPS, space=SPACE), tau, lookahead=True), model, OPTIMIZERS[name])
    run(engine, 5, dtype=torch.float64)
    want = dict(coast(model, engine.optimizer, tau).named_parameters())
    moved = 0.0
    for key, got in engine.predicted_weights(tau).items():
        assert torch.allclose(got, want[key], rtol=1e-9, atol=1e-12), key
        moved += (got - dict(model.named_parameters())[key]).norm().item()
    assert moved > 0


def test_lookahead_follows_the_schedule() -> None:
    # Red when: the present lr is used for all coming steps.
    model = no_norm_net()
    engine = make(
        Concurrent(FGSM(EPS, space=SPACE), 2, lookahead=True),
        model,
        lr_at=lambda t: 0.1 * (t + 1),
        optimizer=OPTIMIZERS["sgd"],
    )
    run(engine, 4, dtype=torch.float64)
    p = model[0].weight
    buffer = engine.optimizer.state[p]["momentum_buffer"]
    want = p - (0.5 * 0.9 + 0.6 * 0.81) * buffer
    assert torch.allclose(engine.predicted_weights(2)["0.weight"], want, rtol=1e-12)


@pytest.mark.parametrize("tau", [1, 3])
def test_what_is_trained_follows_the_model(tau: int) -> None:
    # Red when: look-ahead keeps the names that it found at the start, or predicts by the momentum
    # of a layer that is frozen.
    model = no_norm_net()
    model[0].requires_grad_(False)
    engine = make(
        Concurrent(FGSM(EPS, space=SPACE), tau, lookahead=True),
        model,
        lambda m: torch.optim.SGD(m[2:].parameters(), 0.05, momentum=0.9),
    )
    stream = [as_batch(t, dtype=torch.float64) for t in range(9)]
    for t, (batch, future) in enumerate(windows(stream, tau)):
        if t == 3:
            model[0].requires_grad_(True)
            engine.optimizer.add_param_group({"params": list(model[0].parameters())})
        if t == 6:
            model[5].requires_grad_(False)
        before = parameters(model)
        engine(batch, future)
        moved = {
            name.split(".")[0] for name, p in parameters(model).items() if not p.equal(before[name])
        }
        assert moved == {"2"} | ({"0"} if t >= 3 else set()) | ({"5"} if t < 6 else set())
        found, want = engine.predicted_weights(tau), coast(model, engine.optimizer, tau)
        assert {name.split(".")[0] for name in found} == moved
        for name, weight in found.items():
            assert torch.allclose(weight, want.get_parameter(name), rtol=1e-9, atol=1e-12), name


def test_a_layer_that_is_unfrozen_must_reach_the_optimizer() -> None:
    # Red when: the optimizer's parameters are looked at when the step is made only.
    model = no_norm_net()
    model[0].requires_grad_(False)
    engine = make(Vanilla(), model, lambda m: torch.optim.SGD(m[2:].parameters(), 0.1))
    engine(as_batch(0, dtype=torch.float64))
    model[0].requires_grad_(True)
    with pytest.raises(ConadvError, match="add_param_group"):
        engine(as_batch(1, dtype=torch.float64))
    model[0] = nn.Conv2d(3, 6, 3, 2, 1).double()  # as is one that replaces another
    with pytest.raises(ConadvError, match="add_param_group"):
        engine(as_batch(1, dtype=torch.float64))


FALLBACKS = {
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), 0.01),
    "sgd-no-momentum": lambda m: torch.optim.SGD(m.parameters(), 0.05),
    "lars-nus": lambda m: LARS(m.parameters(), 0.5, variant="nus"),
    "adam-amsgrad": lambda m: torch.optim.Adam(m.parameters(), 0.01, amsgrad=True),
    "sgd-maximize": lambda m: torch.optim.SGD(m.parameters(), 0.05, momentum=0.9, maximize=True),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_other_optimizers_repeat_their_last_update(name: str) -> None:
    # Red when: snapshot() is not called before the update (the prediction is then theta_t itself).
    model = no_norm_net()
    engine = make(Concurrent(FGSM(EPS, space=SPACE), 3, lookahead=True), model, FALLBACKS[name])
    pairs = windows([as_batch(t, dtype=torch.float64) for t in range(8)], 3)
    for _ in range(4):
        engine(*next(pairs))
    before = parameters(model)
    engine(*next(pairs))
    now = parameters(model)
    for key, got in engine.predicted_weights(3).items():
        assert torch.allclose(got, now[key] + 3 * (now[key] - before[key]), atol=1e-12), key


# ---- own loops, numbers, errors


def test_phases_called_one_by_one_equal_the_step() -> None:
    # Red when: prepare advances the version, advance() is not counted, or a call numbers plain
    # pairs in another way.
    a, b, c = (make(Concurrent(ATTACK, 1)) for _ in range(3))
    run(a, 4)
    stream = [
        (micro.views["clean"], micro.y_N) for micro in (as_batch(t).micro[0] for t in range(4))
    ]
    for batch, future in windows(stream, b.ahead):
        b.gradient(batch)
        b.prepare(future)
        b.optimizer.step()
        b.optimizer.zero_grad()
        b.advance()
        # Red when: advance() leaves the phases: CUDA events pile up
        assert b.clock.collect().spans == []
    for batch, future in windows(stream, c.ahead):
        c(batch, future)
    assert same(state(a.model), state(b.model))
    assert same(state(a.model), state(c.model))


@pytest.mark.parametrize("fuse", [False, True])
def test_view_weights_are_a_weighted_mean(fuse: bool) -> None:
    # Red when: the weights are in the record only, or the gradient is not divided by their sum.
    model = no_norm_net()
    engine = make(MultiView(), model, view_weights={"adv": 3.0}, fuse_views=fuse)
    batch = as_batch(0, dtype=torch.float64)
    losses = [
        torch.nn.functional.cross_entropy(model(x), batch.micro[0].y_N)
        for x in batch.micro[0].views.values()
    ]
    want = (losses[0] + 3 * losses[1]) / 4
    gradients = torch.autograd.grad(want, list(model.parameters()))
    engine.gradient(batch)
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.allclose(p.grad, gradient, rtol=1e-9, atol=1e-14)
    assert engine.update().loss == pytest.approx(want.item())


@pytest.mark.parametrize("fuse", [False, True])
def test_the_aug_view_has_its_own_route(fuse: bool) -> None:
    # Red when: the aug view is left out, or goes through the clean route.
    model = tiny_resnet("aug", "adv")
    engine = make(Concurrent(ATTACK, 1), model, fuse_views=fuse)
    (micro,) = as_batch(0).micro
    views = {"clean": micro.views["clean"], "aug": micro.views["second"]}
    record = engine(Batch(0, (MicroBatch(0, micro.y_N, views),)))
    assert list(record.losses) == ["clean", "aug", "adv"]
    for layer in (model.bn1, model.bn1.routes["aug"], model.bn1.routes["adv"]):
        assert layer.num_batches_tracked == 1


def test_the_schedule_sets_the_rate_of_its_own_update() -> None:
    # Red when: the learning rate is set after optimizer.step().
    model = no_norm_net()
    engine = make(
        Vanilla(),
        model,
        lambda m: torch.optim.SGD(m.parameters(), 9.0),
        lr_at=lambda t: 0.1 * (t != 1),
    )
    start = parameters(model)
    engine(as_batch(0, dtype=torch.float64))
    first = parameters(model)
    engine(as_batch(1, dtype=torch.float64))
    assert not same(start, first)
    assert same(first, parameters(model))  # step 1 has rate 0


def test_draws_are_keyed_by_the_place_in_the_global_batch() -> None:
    # Red when: the micro-batch's index is left out of the path (N ranks would then draw what one
    # rank does not).
    engine = make(Noise(RandomSigns(EPS, SPACE)))
    (micro,) = as_batch(0).micro
    other = MicroBatch(1, micro.y_N, micro.views)
    a, b = engine.method.extra_view(engine, Batch(0, (micro, other))).images
    assert not torch.equal(a, b)
    assert torch.equal(engine.method.extra_view(engine, Batch(0, (other,))).images[0], b)


def test_dropout_is_keyed_by_step_and_micro_batch_only() -> None:
    # Red when: a pass runs outside of rng.scope, or the path of the scope lacks the step or the
    # micro-batch.
    def masks(seed: int) -> list[bytes]:
        model = nn.Sequential(nn.Dropout(0.5), *no_norm_net())
        seen: list[bytes] = []
        model[0].register_forward_hook(
            lambda _, args, out: seen.append((out == 0).numpy().tobytes())
        )
        engine = make(Sequential(FGSM(EPS, space=SPACE)), model)
        torch.manual_seed(seed)
        run(engine, 2, count=2, dtype=torch.float64)
        return seen

    a, b = masks(1), masks(2)
    assert a == b
    assert len(set(a)) == len(a) == 12  # two steps of two micro-batches: attack, clean, adversarial


def test_memory_is_one_copy_of_the_weights_with_lookahead_and_none_without() -> None:
    # Red when: the predictor also keeps the momentum, or a copy is made for plain staleness.
    plain, ahead = (make(Concurrent(FGSM(EPS, space=SPACE), 2, lookahead=x)) for x in (False, True))
    assert plain._lookahead is None
    weights = ahead.predicted_weights(2).values()
    assert sum(w.nbytes for w in weights) == sum(p.nbytes for p in ahead.model.parameters())
    held = {id(w) for w in weights}
    run(ahead, 3)
    assert {id(w) for w in ahead.predicted_weights(2).values()} == held


class AttackFirst(Executor):
    """The order in which Stream queues its work, without its streams."""

    def __call__(self, engine: TrainStep, batch: Batch, future: Batch | None) -> StepRecord:
        engine.prepare(future, early=True)
        engine.gradient(batch)
        engine.wait()
        return engine.update()


@pytest.mark.parametrize("name", CASES)
def test_attacking_before_the_gradient_changes_no_bit(name: str) -> None:
    # Red when: the gradient leaves something behind that the attack sees, or the other way round.
    engines = [make(CASES[name](), executor=executor) for executor in (Inline(), AttackFirst())]
    records = [
        [(r.losses, r.grad_norm, r.weight_version) for r in run(engine)] for engine in engines
    ]
    assert records[0] == records[1]
    assert same(state(engines[0].model), state(engines[1].model))


def test_loops_that_mix_up_their_batches_are_told() -> None:
    # Red when: the label check or the order check is removed: training goes on with images of
    # another batch.
    engine = make(Concurrent(ATTACK, 1))
    engine(as_batch(0), as_batch(1))
    other = Batch(
        1, (MicroBatch(0, (as_batch(1).micro[0].y_N + 1) % 5, as_batch(1).micro[0].views),)
    )
    with pytest.raises(ConadvError, match="another batch"):
        engine.gradient(other)
    engine.pending.clear()
    with pytest.warns(UserWarning, match="not attacked ahead"):
        engine.gradient(other)
    engine.update()
    with pytest.raises(ConadvError, match="between gradient"):
        engine.prepare(as_batch(3))


def test_a_second_prepare_in_one_step_is_named() -> None:
    # Red when: it is let through; the next step then blames the batch that it is given.
    engine = make(Concurrent(ATTACK, 1))
    engine.gradient(as_batch(0))
    engine.prepare(as_batch(1))
    with pytest.raises(ConadvError, match="called twice"):
        engine.prepare(as_batch(2))
    engine.update()
    engine.gradient(as_batch(1))
    engine.prepare(as_batch(2))


class _Returns(nn.Module):
    def __init__(self, change: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self.net, self.change = tiny_resnet("adv"), change

    def forward(self, x: torch.Tensor) -> object:
        return self.change(self.net(x))


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: make(Vanilla(), view_weights={"adversarial": 2.0}), "Unknown view"),
        (lambda: make(Vanilla(), view_weights={"clean": 0.0}), "above 0"),
        (lambda: make(Vanilla())({"image": 1}), "pair"),
        (lambda: make(Vanilla())((1, 2)), "pair"),
        (lambda: make(Vanilla())((*images(), torch.arange(8))), r"step\(\(x, y\)\)"),
        (lambda: make(Vanilla())((images()[0], images()[1][:4])), "differ in number"),
        (lambda: make(Vanilla())((images()[0][:0], images()[1][:0])), "has no images"),
        (lambda: make(Vanilla())((images()[0].long(), images()[1])), "uint8 pixels or floats"),
        (lambda: make(Vanilla())(images(dtype=torch.float64)), "convert one of them"),
        (lambda: make(Vanilla(), _Returns(lambda y: {"logits": y}))(images()), "returns a dict"),
        (lambda: make(Sequential(ATTACK), _Returns(lambda y: (y, y)))(images()), "returns a tuple"),
        (lambda: make(Vanilla(), _Returns(lambda y: y.mean()))(images()), "row for each image"),
        (
            lambda: make(Vanilla())(Batch(0, (*as_batch(0).micro, *as_batch(1, size=4).micro))),
            "one size",
        ),
        (lambda: make(Sequential(ATTACK), nn.DataParallel(tiny_resnet("adv"))), "DataParallel"),
        (
            lambda: make(Sequential(ATTACK), nn.Sequential(tiny_resnet("adv"), nn.BatchNorm1d(5))),
            "without the route",
        ),
        (
            lambda: make(
                Sequential(ATTACK), nn.ModuleList([tiny_resnet("adv"), tiny_resnet("adv")])
            ),
            "separately",
        ),
        (lambda: make(Sequential(ATTACK), tiny_resnet()), "split_batchnorm"),
        (
            lambda: train_step(tiny_resnet("adv"), sgd(tiny_resnet("adv")), Vanilla()),
            "does not have",
        ),
        (lambda: make(Sequential(ATTACK), space=PixelSpace()), "normalisation once"),
        (lambda: make(Sequential(FGSM(EPS)), space=None)(as_batch(0)), "outside of PixelSpace"),
        (lambda: make(Concurrent(ATTACK, 1), executor=Stream()), "needs a CUDA device"),
        (lambda: type("Mine", (Vanilla,), {"extra": None}), "called extra_view since"),
        (lambda: make(Vanilla(), precision="fp8"), "fp8"),
        (lambda: make(Vanilla(), pending_dtype="int4"), "int4"),
        (lambda: Concurrent(ATTACK, -1), "0 or more"),
        (lambda: Concurrent(ATTACK, 1.5), "whole number"),  # type: ignore[arg-type]
        (lambda: Concurrent(ATTACK, 0, lookahead=True), "no effect"),
        (lambda: Recycle(FGSM(EPS, targeted=True)), "untargeted"),
        (lambda: make(Vanilla()).update(), "without gradient"),
        (lambda: make(MultiView())((images()[0], images()[1])), "view 'second'"),
    ],
)
def test_errors(make_it: Callable[[], object], message: str) -> None:
    with pytest.raises(ConadvError, match=message):
        make_it()
