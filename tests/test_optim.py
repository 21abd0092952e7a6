"""LARS and LAMB: one table of cases, contracts over the table, then what is particular to each."""

from __future__ import annotations

import copy
import itertools
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from conadv.errors import ConadvError
from conadv.optim.lamb import LAMB
from conadv.optim.lars import LARS, VARIANTS
from conadv.optim.trust_ratio import norm, norms
from conadv.reference.lamb import LambState, lamb_step
from conadv.reference.lars import lars_step

F64, F32 = torch.float64, torch.float32
FORMS: dict[str, dict[str, Any]] = {
    "default": {},
    "loop": {"foreach": False},
    "foreach": {"foreach": True},
    "capturable": {"capturable": True, "lr": torch.tensor(0.0, dtype=F64)},
}
ALL_FORMS = pytest.mark.parametrize("form", FORMS)
# lr = 0 first (warm-up starts there), then above and below the trust ratio, so that "larc" clips
# and does not clip
LRS = [0.0, 0.1, 0.3, 1e-3, 0.05] * 4


@dataclass(frozen=True)
class Case:
    """One row: an optimizer, its settings, and what its plain group (norm, bias) overrides."""

    name: str
    kind: type
    settings: dict[str, Any]
    plain: dict[str, Any] = field(default_factory=lambda: {"weight_decay": 0.0, "adapt": False})

    def build(self, params: list[nn.Parameter], form: str = "default") -> Any:
        groups = [{"params": params[:-2]}, {"params": params[-2:], **self.plain}]
        options = {"lr": LRS[0], **copy.deepcopy(FORMS[form]), **self.settings}
        return self.kind(groups, **options)


# a ratio of up to eta / weight_decay = 100: above the limit of 50 that "nus" has
_STRONG = {"trust_coefficient": 0.05, "weight_decay": 5e-4}
CASES = [
    *(Case(f"lars-{v}", LARS, {"variant": v, **_STRONG}) for v in VARIANTS if v != "no-wd-ratio"),
    # weaker: without weight decay in the denominator a tiny gradient's ratio explodes
    Case("lars-no-wd-ratio", LARS, {"variant": "no-wd-ratio", "weight_decay": 5e-4}),
    Case("lars-eps", LARS, {"eps": 0.1, "weight_decay": 0.0}),
    Case("lars-no-momentum", LARS, {"momentum": 0.0, **_STRONG}),
    Case("lars-all-adapt-maximize", LARS, {"momentum": 0.5, "maximize": True}, plain={}),
    Case("lamb-settings", LAMB, {"betas": (0.5, 0.7), "eps": 1e-3, "weight_decay": 0.3}),
    Case("lamb-no-decay-maximize", LAMB, {"weight_decay": 0.0, "maximize": True}, plain={}),
    Case("lamb-plain-decay", LAMB, {}, plain={"weight_decay": 0.2, "adapt": False}),
]
ALL_CASES = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def make_params(dtype: torch.dtype = F64) -> list[nn.Parameter]:
    """Conv, channels-last conv, transposed (dense in no format), zero, tiny and zero gradient;
    two plain ones."""
    gen = torch.Generator().manual_seed(0)
    shapes = [(4, 3, 3, 3), (6, 3, 2, 2), (5, 4), (3, 4), (7, 2), (4, 2), (9,), (5,)]
    tensors = [torch.randn(shape, generator=gen, dtype=F64) for shape in shapes]
    tensors[1] = tensors[1].to(memory_format=torch.channels_last)
    tensors[2] = tensors[2].t().contiguous().t()
    tensors[3].zero_()
    return [nn.Parameter(t.to(dtype)) for t in tensors]


def make_grads(step: int, params: list[nn.Parameter]) -> list[Tensor]:
    """With elements beyond +-10 (clamped by "nus"), one tiny, one zero; some in another order."""
    gen = torch.Generator().manual_seed(100 + step)
    scales = [8.0, 1.0, 0.3, 1.0, 1e-5, 0.0, 1.0, 0.1]
    grads = [
        torch.randn(p.shape, generator=gen, dtype=F64) * s
        for p, s in zip(params, scales, strict=True)
    ]
    if step % 2:
        grads[0] = grads[0].to(memory_format=torch.channels_last)
    return [g.to(p.dtype) for g, p in zip(grads, params, strict=True)]


class NoReading(TorchDispatchMode):
    """An error for whatever would make the host wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "read back"
        return func(*args, **(kwargs or {}))


def take_step(optimizer: Any, params: list[nn.Parameter], step: int) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(LRS[step])
        else:
            group["lr"] = LRS[step]
    for p, g in zip(params, make_grads(step, params), strict=True):
        p.grad = g.to(p.device)
    if optimizer.param_groups[0]["capturable"]:
        with NoReading():
            optimizer.step()
    else:
        optimizer.step()


def snapshot(optimizer: Any, params: list[nn.Parameter]) -> list[Tensor]:
    """Copies of all weights and of all state tensors."""
    values = [p.detach() for p in params]
    for p in params:
        values += [optimizer.state[p][key] for key in sorted(optimizer.state[p])]
    return [value.clone() for value in values]


def assert_equal(left: Any, right: Any) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=False)


class Oracle:
    """The reference in float64 over a case's two groups; its snapshots have ``snapshot``'s
    order.
    """

    def __init__(self, case: Case, start: list[nn.Parameter]) -> None:
        self.weights = [p.detach().double() for p in start]
        zeros = [torch.zeros_like(w) for w in self.weights]
        self.is_lars = case.kind is LARS
        self.states: list[Any] = zeros if self.is_lars else [LambState(z, z, 0) for z in zeros]
        groups = case.build([nn.Parameter(w) for w in self.weights]).param_groups
        self.sign = -1 if groups[0]["maximize"] else 1
        skip = {"params", "lr", "foreach", "fused", "maximize", "capturable"}
        self.settings = [{k: v for k, v in g.items() if k not in skip} for g in groups]

    def step(self, grads: list[Tensor], lr: float) -> None:
        update: Any = lars_step if self.is_lars else lamb_step
        for part, settings in zip((slice(0, -2), slice(-2, None)), self.settings, strict=True):
            given = [self.sign * g.double() for g in grads[part]]
            self.weights[part], self.states[part] = update(
                self.weights[part], given, self.states[part], lr=lr, **settings
            )

    def snapshot(self) -> list[Tensor]:
        if self.is_lars:
            return self.weights + self.states
        states = [[s.m, s.v, torch.tensor(float(s.t))] for s in self.states]
        return self.weights + list(itertools.chain(*states))


# ---------------------------------------------------------------- contracts over the table


@pytest.mark.parametrize("form", [*((F64, form) for form in FORMS), (F32, "default")], ids=str)
@ALL_CASES
def test_equals_the_reference(case: Case, form: tuple[torch.dtype, str]) -> None:
    """20 steps, weights and state after each; gradients are only read. float32 is the fused form.

    Red when: ratio 0 at zero norms; wd left out of the update; beta1 in place of beta2; t counted
    from 0; "nus" clamped at 11 or its ratio at 60; "larc" not clipped; lr applied twice; weight
    decay added to p.grad in place; maximize ignored; in float32, dampening = inside instead of
    1 - inside; lr = +1 for LAMB's scratch; strides are not compared; capturable reads lr or t."""
    dtype, name = form
    params = make_params(dtype)
    optimizer, oracle = case.build(params, name), Oracle(case, params)
    for step, lr in enumerate(LRS):
        take_step(optimizer, params, step)
        assert_equal([p.grad for p in params], make_grads(step, params))
        oracle.step(make_grads(step, params), lr)
        for ours, theirs in zip(snapshot(optimizer, params), oracle.snapshot(), strict=True):
            rtol, atol = 1e-11, 1e-13
            if dtype == F32:
                rtol, atol = 2e-5, 2e-6 * theirs.abs().max().item() + 1e-12
            torch.testing.assert_close(ours.double(), theirs.double(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@ALL_CASES
def test_foreach_is_loop_bit_for_bit(case: Case, dtype: torch.dtype) -> None:
    """Red when: one form takes its norms, or the corrections of LAMB's moments, over the group."""
    runs = []
    for form in ("loop", "foreach"):
        params = make_params(dtype)
        optimizer = case.build(params, form)
        for step in range(6):
            take_step(optimizer, params, step)
        runs.append(snapshot(optimizer, params))
    assert_equal(*runs)


@ALL_FORMS
def test_bfloat16_is_the_float32_step_rounded(form: str) -> None:
    """Sanity: one step in bfloat16 is the float32 step to its 8 bits. Red when: lr is doubled."""
    for case in CASES:
        start = [p.to(torch.bfloat16).float() for p in make_params()]
        moved = []
        for dtype in (torch.bfloat16, F32):
            params = [nn.Parameter(p.to(dtype)) for p in start]
            take_step(case.build(params, form), params, 1)
            moved.append([p.detach().float() for p in params])
        torch.testing.assert_close(*moved, rtol=2e-2, atol=2e-2)


@ALL_FORMS
@ALL_CASES
def test_a_late_parameter_starts_fresh_and_one_without_gradient_stays(
    case: Case, form: str
) -> None:
    """As the adversarial route's batch norm, which has no gradient in step 0. Red when: t is shared
    by the group."""
    params, fresh = make_params(), make_params()
    optimizer, fresh_optimizer = case.build(params, form), case.build(fresh, form)
    for p, g in zip(params[:-1], make_grads(1, params), strict=False):
        p.grad = g
    before = params[-1].detach().clone()
    optimizer.step()
    assert_equal(params[-1].detach(), before)
    assert params[-1] not in optimizer.state
    take_step(optimizer, params, 2)
    take_step(fresh_optimizer, fresh, 2)
    assert_equal(params[-1].detach(), fresh[-1].detach())


@pytest.mark.parametrize("kind", [LARS, LAMB])
@ALL_FORMS
def test_empty_and_scalar_parameters(kind: type, form: str) -> None:
    params = [nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.tensor(2.0))]
    optimizer = kind(params, **{**FORMS[form], "lr": 0.1})
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert params[1].item() < 2.0


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@ALL_FORMS
@ALL_CASES
def test_cuda_forms_agree_with_the_reference_and_never_wait(case: Case, form: str) -> None:
    params = [nn.Parameter(p.detach().cuda()) for p in make_params()]
    optimizer, oracle = case.build(params, form), Oracle(case, [p.cpu() for p in params])  # type: ignore[misc]
    for step, lr in enumerate(LRS):
        with no_waiting():
            take_step(optimizer, params, step)
        oracle.step(make_grads(step, params), lr)
        for ours, theirs in zip(snapshot(optimizer, params), oracle.snapshot(), strict=True):
            torch.testing.assert_close(ours.double().cpu(), theirs.double(), rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------- what each is


def one_tensor(kind: type, lrs: list[float], w: Tensor, grads: list[Tensor], **options: Any) -> Any:
    """Steps of a single tensor; returns it and its state."""
    p = nn.Parameter(w.clone())
    optimizer = kind([{"params": [p], **options}], lrs[0])
    for lr, g in zip(lrs, grads, strict=False):
        optimizer.param_groups[0]["lr"] = lr
        p.grad = g
        optimizer.step()
    return p.detach(), optimizer.state[p]


W = make_params()[0].detach()
GRADS = [make_grads(step, make_params())[0] for step in range(8)]


def test_first_steps_by_hand() -> None:
    """LARS, w = (3, 4), g = (0, 2), eta 0.1, wd 0.2, lr 0.5: r = 0.1 * 5 / (2 + 0.2 * 5) = 1/6;
    v = r/2 (0.6, 2.8). LAMB's first direction is sign(g) at eps 0: u = (1, -1) + 0.5 w; w moves by
    lr |w| along u / |u|."""
    w = torch.tensor([[3.0, 4.0]], dtype=F64)
    g, v = torch.tensor([[0.0, 2.0]], dtype=F64), torch.tensor([[0.05, 2.8 / 12]], dtype=F64)
    end, state = one_tensor(LARS, [0.5], w, [g], trust_coefficient=0.1, weight_decay=0.2)
    torch.testing.assert_close(state["momentum_buffer"], v)
    torch.testing.assert_close(end, w - v)
    g, u = torch.tensor([[0.1, -7.0]], dtype=F64), torch.tensor([[2.5, 1.0]], dtype=F64)
    end, _ = one_tensor(LAMB, [0.2], w, [g], eps=0.0, weight_decay=0.5)
    torch.testing.assert_close(end, w - 0.2 * 5 * u / 7.25**0.5, rtol=1e-9, atol=0)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "nus"] + ["LAMB"])
def test_without_adaptation_it_is_torchs_own(variant: str) -> None:
    """SGD and AdamW, constant lr. Red when: adapt is ignored, or LAMB's decay is not scaled by
    lr.
    """
    kind, torchs, own = LARS, torch.optim.SGD, {"variant": variant}
    settings: dict[str, Any] = {"momentum": 0.8, "weight_decay": 0.1}
    if variant == "LAMB":
        kind, torchs, own = LAMB, torch.optim.AdamW, {}
        settings = {"betas": (0.8, 0.9), "weight_decay": 0.1, "eps": 1e-6}
    ours, _ = one_tensor(kind, [0.01] * 6, W, GRADS, adapt=False, **settings, **own)
    theirs, _ = one_tensor(torchs, [0.01] * 6, W, GRADS, **settings)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("dtype", "rate", "rtol"),
    [(F32, 1.3e-13, 1e-6), (F64, 1.3e-7, 1e-13)],
    ids=str,
)
def test_small_rates_stay_exact_in_the_default_form(
    dtype: torch.dtype, rate: float, rtol: float
) -> None:
    """The fused kernel's 1 - (1 - rate) is off by up to 1.1e-16: 0.1 % and 1e-9 of these rates.
    Red when: the smallest fused rate is 0 (float32), or float64 takes the fused kernel."""
    p = nn.Parameter(torch.ones(2, 2, dtype=dtype))
    optimizer = LARS([{"params": [p], "adapt": False}], rate, weight_decay=0.0)
    p.grad = torch.ones_like(p)
    optimizer.step()
    expected = torch.full_like(p, rate).detach()
    torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], expected, rtol=rtol, atol=0)


def test_default_form_on_cpu_is_the_fused_one() -> None:
    """Red when: every tensor falls back to the loop (right numbers, a third of the speed)."""
    for kind, kernel in ((LARS, "lars.sgd"), (LAMB, "lamb.adamw")):
        case = next(case for case in CASES if case.kind is kind)
        params = make_params(F32)
        real = pkgutil.resolve_name(f"conadv.optim.{kernel}")
        with mock.patch(f"conadv.optim.{kernel}", side_effect=real) as calls:
            take_step(case.build(params), params, 2)
        # not: the channels-last weight with a contiguous gradient, the transposed weight
        assert sum(len(call.args[0]) for call in calls.call_args_list) == 6


# ---------------------------------------------------------------- norms and errors


def test_norms_are_accurate_for_large_float32_tensors() -> None:
    """ResNet-50's largest layer. Red when: one long float32 sum (off by 4e-5)."""
    x = torch.randn(512, 512, 3, 3, generator=torch.Generator().manual_seed(0))
    exact = x.double().norm().item()
    assert norm(x) == pytest.approx(exact, rel=1e-6)
    assert norm(x.to(memory_format=torch.channels_last)) == pytest.approx(exact, rel=1e-6)
    assert norms([x])[0].item() == norm(x)
    assert norm(x.bfloat16()) == pytest.approx(x.bfloat16().double().norm().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (LARS, {"lr": -1.0}, "lr = -1.0"),
        (LARS, {"lr": torch.tensor(-0.5)}, "lr = -0.5"),
        (LARS, {"lr": float("nan")}, "lr = nan"),
        (LARS, {"lr": float("inf")}, "finite"),
        (LARS, {"momentum": 1.0}, "momentum = 1.0: give a number, at least 0 and below 1"),
        (LARS, {"weight_decay": -1e-4}, "weight_decay"),
        (LARS, {"trust_coefficient": -1}, "trust_coefficient"),
        (LARS, {"eps": -1e-8}, "eps"),
        (LARS, {"variant": "tff"}, "Did you mean 'tf'"),
        (LARS, {"foreach": "yes"}, "foreach = 'yes'"),
        (LAMB, {"fused": True, "foreach": True}, "fused=True is the form for whole parameters"),
        (LAMB, {"fused": True, "capturable": True}, "without foreach or capturable"),
        (LAMB, {"maximize": None}, "maximize = None: give one of True, False"),
        (LAMB, {"lr": "0.1"}, "lr = '0.1'"),
        (LAMB, {"betas": (0.9, 1.0)}, r"betas\[1\] = 1.0"),
        (LAMB, {"betas": 0.9}, "betas = 0.9: give two numbers"),
        (LAMB, {"eps": -1.0}, "eps"),
        (LAMB, {"weight_decay": True}, "weight_decay = True"),
    ],
)
def test_bad_options_are_refused(kind: type, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConadvError, match=message):
        kind([nn.Parameter(torch.ones(2))], **{"lr": 0.1, **options})


@pytest.mark.parametrize("kind", [LARS, LAMB])
def test_what_cannot_be_trained_is_refused(kind: type) -> None:
    """Red when: the group stays after its check failed; the layout of a gradient is not looked
    at.
    """
    optimizer = kind([nn.Parameter(torch.ones(2))], 0.1)
    for options, message in (
        ({"params": [nn.Parameter(torch.ones(2))], "adapt": 1}, "adapt = 1"),
        ({"params": [nn.Parameter(torch.ones(2, dtype=torch.complex64))]}, "complex"),
    ):
        with pytest.raises(ConadvError, match=message):
            optimizer.add_param_group(options)
    assert len(optimizer.param_groups) == 1
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ConadvError, match="sparse=False"):
        kind(table.parameters(), 0.1).step()
