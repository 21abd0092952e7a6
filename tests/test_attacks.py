"""Attacks: pixel units, the box, purity, random draws, targets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from conadv import (
    FGSM,
    PGD,
    ConadvError,
    Concurrent,
    PixelSpace,
    RandomSigns,
    Sequential,
    TrainStep,
    frozen_stats,
    route,
)
from conadv.attacks.contract import run_attack
from conadv.attacks.targets import random_other_class

from .helpers import images, no_norm_net, same, state, tiny_resnet

SPACE = PixelSpace(
    (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
)  # rounds differently by other arithmetic
EPS = 8 / 255


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model_input(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    pixels, y = images(8, dtype=dtype)
    pixels = (pixels * 255).round().clamp(0, 255) / 255
    pixels[0], pixels[1] = 0, 1  # black and white: the box binds
    return SPACE.normalize(pixels), y


ATTACKS = {
    "fgsm": FGSM(EPS, space=SPACE),
    "fgsm-targeted": FGSM(EPS, targeted=True, space=SPACE),
    "fgsm-l2": FGSM(0.5, norm="l2", space=SPACE),
    "pgd-1": PGD(EPS, 1, space=SPACE),
    "pgd": PGD(EPS, 4, random_start=0.5, space=SPACE),
    "pgd-targeted": PGD(EPS, 3, targeted=True, random_start=1.0, space=SPACE),
    "pgd-l2": PGD(0.5, 4, norm="l2", random_start=1.0, space=SPACE),
    "signs": RandomSigns(EPS, space=SPACE),
}


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stays_in_the_ball_and_the_box_in_pixels(name: str, dtype: torch.dtype) -> None:
    # Red when: project skips clip, or eps is not divided by std.
    x, y = model_input(dtype)
    attack = ATTACKS[name]
    out = attack(no_norm_net(dtype=dtype), x, y, gen())
    assert (out.shape, out.dtype, out.requires_grad) == (x.shape, dtype, False)
    delta = SPACE.to_pixels(out) - SPACE.to_pixels(x)
    slack = 1e-6 if dtype == torch.float32 else 1e-12
    size = delta.flatten(1).norm(dim=1) if "l2" in name else delta.abs().flatten(1).amax(1)
    assert size.max() <= attack.eps + slack
    assert size.max() >= 0.5 * attack.eps
    assert SPACE.to_pixels(out).min() >= -slack
    assert SPACE.to_pixels(out).max() <= 1 + slack
    assert not torch.equal(out, x)


@pytest.mark.parametrize("name", ATTACKS)
def test_touches_nothing(name: str) -> None:
    # Red when: loss.backward() replaces autograd.grad, or the attack calls model.eval().
    model = tiny_resnet("adv")
    x, y = model_input()
    kept = x.clone()
    before, modes = state(model), [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    stream = torch.random.get_rng_state()
    with route(model, "adv"), frozen_stats(model), torch.no_grad():
        ATTACKS[name](model, x, y, gen())
    assert same(state(model), before)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), stream)
    assert torch.equal(x, kept)
    assert not x.requires_grad


@pytest.mark.parametrize(
    "attack",
    [
        FGSM(0.0, space=SPACE),
        PGD(0.0, 3, random_start=1.0, space=SPACE),
        PGD(0.0, 3, norm="l2", random_start=1.0, space=SPACE),
        RandomSigns(0.0, SPACE),
    ],
)
def test_eps_zero_gives_the_clean_images_bitwise(attack: object) -> None:
    # Red when: the box is made with other arithmetic than normalize (black and white move by an
    # ulp).
    x, y = model_input()
    assert torch.equal(attack(no_norm_net(dtype=torch.float32), x, y, gen()), x)  # type: ignore[operator]


def test_fgsm_is_eps_times_the_sign_of_the_gradient() -> None:
    # Red when: the sign is flipped, or the gradient is of the targeted loss.
    model = no_norm_net()
    x, y = model_input(torch.float64)
    leaf = x.clone().requires_grad_()
    torch.nn.functional.cross_entropy(model(leaf), y).backward()
    pixels = SPACE.to_pixels(x)
    want = (pixels + EPS * leaf.grad.sign()).clamp(0, 1)
    got = SPACE.to_pixels(FGSM(EPS, space=SPACE)(model, x, y, gen()))
    assert torch.allclose(got, want, atol=1e-12)


def test_reductions() -> None:
    # Red when: PGD starts from a random point although random_start is 0.
    model = no_norm_net(dtype=torch.float32)
    x, y = model_input()
    one = PGD(EPS, 1, space=SPACE)(model, x, y, gen(1))
    assert torch.equal(one, FGSM(EPS, space=SPACE)(model, x, y, gen(2)))
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(
        torch.nn.functional.cross_entropy(model(leaf), y, reduction="sum"), leaf
    )
    assert torch.equal(FGSM(EPS, space=SPACE).from_gradient(x, gradient), one)


def test_attacks_raise_the_loss_and_more_steps_raise_it_more() -> None:
    # Red when: ascend subtracts.
    model = no_norm_net(dtype=torch.float64)
    x, y = model_input(torch.float64)

    def loss(z: Tensor) -> float:
        return torch.nn.functional.cross_entropy(model(z), y).item()

    def other_class(attack: FGSM) -> float:
        target = random_other_class(y, 5, gen())
        z = attack(model, x, y, gen())
        f = torch.nn.functional.cross_entropy
        return (f(model(z), target) - f(model(x), target)).item()

    fgsm, pgd = (a(model, x, y, gen()) for a in (FGSM(EPS, space=SPACE), PGD(EPS, 10, space=SPACE)))
    noise = RandomSigns(EPS, SPACE)(model, x, y, gen())
    assert loss(x) < loss(fgsm) <= loss(pgd)
    assert abs(loss(noise) - loss(x)) < (loss(fgsm) - loss(x)) / 2
    assert other_class(FGSM(EPS, targeted=True, space=SPACE)) < min(
        other_class(FGSM(EPS, space=SPACE)), 0
    )


def test_an_images_attack_does_not_depend_on_the_others() -> None:
    # Red when: the l2 length is of the whole batch.
    model = no_norm_net()
    x, y = model_input(torch.float64)
    for attack in (
        FGSM(EPS, space=SPACE),
        FGSM(0.5, "l2", space=SPACE),
        PGD(0.5, 3, norm="l2", space=SPACE),
    ):
        assert torch.allclose(
            attack(model, x, y, gen())[:3], attack(model, x[:3], y[:3], gen()), atol=1e-13
        )


def test_attacks_take_any_number_of_dimensions() -> None:
    x, y = torch.rand(6, 4, 5), torch.arange(6) % 5
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(20, 5))
    for attack in (FGSM(0.1), PGD(0.1, 3, norm="l2", random_start=0.5)):
        assert attack(model, x, y, gen()).shape == x.shape


def test_random_start_is_drawn_per_image_with_its_probability() -> None:
    # Red when: one coin is thrown for the whole batch.
    x = torch.full((4000, 1, 1, 1), 0.5)
    start = PGD(0.1, random_start=0.3)._start(x, gen())
    moved = (start != x).flatten(1).any(1).float().mean()
    assert 0.26 < moved < 0.34
    assert (start - x).abs().max() <= 0.1 + 1e-7


@pytest.mark.parametrize(("norm", "size"), [("linf", 0.05), ("l2", 0.1 * 0.5 ** (1 / 4))])
def test_random_start_is_uniform_in_the_ball_and_valid(norm: Any, size: float) -> None:
    # Red when: linf draws from [0, eps], the l2 radius is uniform or always eps, or the start
    # leaves the box.
    space, x = PixelSpace((0.5,), (0.25,)), torch.zeros(4000, 1, 2, 2)
    delta = space.to_pixels(space.random_start(x, 0.1, norm, gen())) - 0.5
    length = delta.abs() if norm == "linf" else delta.flatten(1).norm(dim=1)
    assert length.median() == pytest.approx(size, rel=0.03)  # half of the volume lies within
    assert abs(delta.mean()) < 0.002
    assert space.to_pixels(space.random_start(x + 2, 0.1, norm, gen())).max() <= 1


def test_l2_steps_along_the_gradient_in_pixel_units() -> None:
    # Red when: the gradient is taken in model space (channels of another std get another share).
    x, _ = model_input(torch.float64)
    x, g = x[2:], torch.randn(6, 3, 8, 8, generator=gen(), dtype=torch.float64)
    x = SPACE.normalize(torch.full_like(x, 0.5))
    g_pixels = g / torch.tensor(SPACE.std, dtype=torch.float64).view(1, 3, 1, 1)
    want = 0.5 + 0.1 * g_pixels / g_pixels.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    assert torch.allclose(
        SPACE.to_pixels(FGSM(0.1, "l2", space=SPACE).from_gradient(x, g)), want, atol=1e-12
    )


def test_pgd_takes_its_own_step_size_and_draws_its_targets_once() -> None:
    # Red when: eps replaces step_size, the default is not 2.5 eps / num_steps, or every step draws
    # a new target.
    assert (PGD(0.1, 1).step_size, PGD(0.1, 5).step_size) == (0.1, pytest.approx(0.05))
    model = no_norm_net(dtype=torch.float32)
    x, y = model_input()
    out = PGD(EPS, 2, step_size=EPS / 8, space=SPACE)(model, x, y, gen())
    assert (SPACE.to_pixels(out) - SPACE.to_pixels(x)).abs().max() <= EPS / 4 + 1e-6
    used, once = gen(), gen()
    PGD(EPS, 3, targeted=True, space=SPACE)(model, x, y, used)
    random_other_class(y, 5, once)
    assert torch.equal(used.get_state(), once.get_state())


def test_zero_gradient_moves_nothing_and_l2_stays_finite() -> None:
    x = torch.full((2, 1, 2, 2), 0.5)
    for norm in ("linf", "l2"):
        assert torch.equal(FGSM(0.1, norm).from_gradient(x, torch.zeros_like(x)), x)  # type: ignore[arg-type]


def test_targets_are_uniform_over_the_other_classes() -> None:
    # Red when: the shift is drawn from 0 .. K - 1.
    y = torch.zeros(6000, dtype=torch.long)
    counts = torch.bincount(random_other_class(y, 4, gen()), minlength=4)
    assert counts[0] == 0
    assert (counts[1:] - 2000).abs().max() < 200


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FGSM(8), "8/255"),
        (lambda: FGSM("8"), "Did you mean 8/255"),
        (lambda: FGSM("4/0"), "not a number or a fraction such as 4/255"),
        (lambda: FGSM(None), "eps = None is not a number"),
        (lambda: PGD(0.1, step_size="x"), "step_size: 'x' is not a number or a fraction"),
        (lambda: PGD(-0.1), "0 or more"),
        (lambda: PGD(float("nan")), "0 or more"),
        (lambda: PGD(0.1, 0), "num_steps = 0 must be 1 or more"),
        (lambda: PGD(0.1, 2.5), "num_steps = 2.5 must be a whole number"),
        (lambda: PGD(0.1, random_start=1.5), "probability"),
        (lambda: PGD(0.1, random_start="often"), "random_start = 'often' is not a number"),
        (lambda: PGD(0.1, norm="l1"), "linf"),
        (lambda: PixelSpace((123.7,), (58.4,)), "Divide values"),
        (lambda: PixelSpace((0.5, 0.5), (0.5,)), "one value per channel"),
        (lambda: PixelSpace((0.5,), (0.0,)), "std > 0"),
        (lambda: random_other_class(torch.zeros(2, dtype=torch.long), 1, gen()), "two classes"),
        (lambda: SPACE.normalize(torch.zeros(1, 4, 2, 2)), "3 channels"),
        (lambda: RandomSigns(0.1).space.check(torch.zeros(5)), r"not of shape \(5,\)"),
        (lambda: FGSM(0.1)(None, torch.zeros(2, 1, 2, 2).byte(), None, gen()), r"space\.normalize"),
    ],
)
def test_errors(make: Any, message: str) -> None:
    with pytest.raises(ConadvError, match=message):
        make()


def test_sizes_may_be_written_as_fractions() -> None:
    # Red when: text is left as it is, or is taken as another number than the command line takes.
    assert FGSM("4/255") == FGSM(4 / 255)
    assert RandomSigns(" 8 / 255") == RandomSigns(8 / 255)
    assert PGD("0.1", 2, step_size="1/40", norm="l2") == PGD(0.1, 2, step_size=0.025, norm="l2")


# Attacks of one's own


def with_backward(forward: Any, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    leaf = x.clone().requires_grad_()
    torch.nn.functional.cross_entropy(forward(leaf), y).backward()
    return x + 0.1 * leaf.grad.sign()


OWN: dict[str, tuple[Any, str]] = {
    "three arguments": (lambda model, x, y: x, r"called with \(forward, x_NCHW, y_N, generator\)"),
    "no function": ("fgsm", "The attack str is no attack"),
    "a class": (FGSM, r"FGSM is a class: pass an attack, FGSM\("),
    "nothing": (lambda f, x, y, g: None, "returned NoneType, not images like its own"),
    "a pair": (lambda f, x, y, g: (x, y), "returned tuple"),
    "another shape": (lambda f, x, y, g: x[:1], r"of shape \(1, 3, 8, 8\)"),
    "another type": (lambda f, x, y, g: x.double(), "torch.float64 of shape"),
    "in place": (lambda f, x, y, g: x.mul_(0.9), "changed the clean images in place"),
    "backward": (with_backward, r"with_backward left gradients.*torch\.autograd\.grad"),
}


@pytest.mark.parametrize("method", [Sequential, Concurrent])
@pytest.mark.parametrize("name", OWN)
def test_an_attack_of_ones_own_that_would_do_harm_is_named(name: str, method: Any) -> None:
    # Red when: check_attack or run_attack lets it pass: torch's own error far away, or images and
    # gradients that are changed without a word.
    attack, message = OWN[name]
    model = no_norm_net(dtype=torch.float32)

    def train() -> None:
        step = TrainStep(model, torch.optim.SGD(model.parameters(), 0.1), method(attack))
        step(images(), images() if step.ahead else None)

    with pytest.raises(ConadvError, match=message):
        train()


def test_classes_and_names_are_no_parts_of_a_step() -> None:
    # Red when: check_kinds is removed (AttributeError), or an attack alone takes any output.
    model, (x, y) = no_norm_net(dtype=torch.float32), images()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    wrong = [(model, torch.optim.SGD, None), (type(model), optimizer, None)]
    wrong += [(model, optimizer, method) for method in ("conadv", Sequential)]
    for parts in wrong:
        with pytest.raises(ConadvError, match=r"TrainStep takes an? "):
            TrainStep(*parts)  # type: ignore[arg-type]
    with pytest.raises(ConadvError, match="The model returns a dict"):
        FGSM(0.1)(lambda x: {"logits": model(x)}, x, y, gen())  # type: ignore[arg-type,return-value]


def test_an_attack_of_ones_own_may_return_its_images_or_a_part_of_a_graph() -> None:
    # Red when: images are compared by identity; what it returns is not detached.
    model, (x, y) = no_norm_net(dtype=torch.float32), images()
    assert torch.equal(run_attack(lambda f, x, y, g: x, model, x, y, gen()), x)
    made = run_attack(lambda f, x, y, g: x * f(x).mean(), model, x, y, gen())
    assert not made.requires_grad


def test_uint8_round_trip() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    x = SPACE.normalize(pixels)
    assert torch.equal(SPACE.to_pixels(x).mul(255).round().to(torch.uint8), pixels)
    assert torch.equal(SPACE.clip(x.clone()), x)
