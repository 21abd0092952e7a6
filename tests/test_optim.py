"""LARS and LAMB: one table of cases, contracts over the table, then what is particular to each."""

from __future__ import annotations

import copy
import io
import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conadv.errors import ConadvError
from conadv.optim.lamb import LAMB
from conadv.optim.lars import LARS, VARIANTS
from conadv.optim.trust_ratio import norm, norms
from conadv.reference.lamb import LambState, lamb_step
from conadv.reference.lars import lars_step

FORMS = (None, False, True)
# lr = 0 first (warm-up starts there), then above and below the trust ratio, so that "larc" clips and does not clip
LRS = [0.0, 0.1, 0.3, 1e-3, 0.05] * 4


@dataclass(frozen=True)
class Case:
    """One row: an optimizer with its settings, and what its plain group (norm, bias) overrides."""

    name: str
    kind: type
    settings: dict[str, Any]
    plain: dict[str, Any] = field(default_factory=lambda: {"weight_decay": 0.0, "adapt": False})

    def build(self, params: list[nn.Parameter], foreach: bool | None = None) -> Any:
        groups = [{"params": params[:-2]}, {"params": params[-2:], **self.plain}]
        return self.kind(groups, LRS[0], foreach=foreach, **self.settings)


# a ratio of up to eta / weight_decay = 100: above the limit of 50 that "nus" has
_STRONG = {"trust_coefficient": 0.05, "weight_decay": 5e-4}
CASES = [
    *(Case(f"lars-{v}", LARS, {"variant": v, **_STRONG}) for v in VARIANTS if v != "no-wd-ratio"),
    # weaker: without weight decay in the denominator a tiny gradient's ratio explodes
    Case("lars-no-wd-ratio", LARS, {"variant": "no-wd-ratio", "weight_decay": 5e-4}),
    Case("lars-defaults", LARS, {}),
    Case("lars-eps", LARS, {"eps": 0.1, "weight_decay": 0.0}),
    Case("lars-no-momentum", LARS, {"momentum": 0.0, **_STRONG}),
    Case("lars-all-adapt", LARS, {"momentum": 0.5}, plain={}),
    Case("lamb", LAMB, {}),
    Case("lamb-settings", LAMB, {"betas": (0.5, 0.7), "eps": 1e-3, "weight_decay": 0.3}),
    Case("lamb-no-decay", LAMB, {"weight_decay": 0.0}, plain={}),
    Case("lamb-plain-decay", LAMB, {}, plain={"weight_decay": 0.2, "adapt": False}),
]
ALL_CASES = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def make_params(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    """Conv, channels-last conv, transposed (not dense in any format), zero, tiny-gradient, zero-gradient; two plain."""
    gen = torch.Generator().manual_seed(0)
    shapes = [(4, 3, 3, 3), (6, 3, 2, 2), (5, 4), (3, 4), (7, 2), (4, 2), (9,), (5,)]
    tensors = [torch.randn(shape, generator=gen, dtype=torch.float64) for shape in shapes]
    tensors[1] = tensors[1].to(memory_format=torch.channels_last)
    tensors[2] = tensors[2].t().contiguous().t()
    tensors[3].zero_()
    return [nn.Parameter(t.to(dtype)) for t in tensors]


def make_grads(step: int, params: list[nn.Parameter]) -> list[Tensor]:
    """Gradients with elements beyond +-10 (clamped by "nus"), one tiny, one zero; some in another memory order."""
    gen = torch.Generator().manual_seed(100 + step)
    scales = [8.0, 1.0, 0.3, 1.0, 1e-5, 0.0, 1.0, 0.1]
    grads = [
        torch.randn(p.shape, generator=gen, dtype=torch.float64) * s
        for p, s in zip(params, scales, strict=True)
    ]
    if step % 2:
        grads[0] = grads[0].to(memory_format=torch.channels_last)
    return [g.to(p.dtype) for g, p in zip(grads, params, strict=True)]


def take_step(optimizer: Any, params: list[nn.Parameter], step: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = LRS[step]
    for p, g in zip(params, make_grads(step, params), strict=True):
        p.grad = g
    optimizer.step()


def snapshot(optimizer: Any, params: list[nn.Parameter]) -> list[Tensor]:
    """Copies of all weights and of all state tensors."""
    values = [p.detach() for p in params]
    for p in params:
        values += [optimizer.state[p][key] for key in sorted(optimizer.state[p])]
    return [value.clone() for value in values]


def trajectory(
    case: Case, dtype: torch.dtype, foreach: bool | None, num_steps: int = 20
) -> list[list[Tensor]]:
    params = make_params(dtype)
    optimizer = case.build(params, foreach)
    history = []
    for step in range(num_steps):
        take_step(optimizer, params, step)
        history.append(snapshot(optimizer, params))
    return history


def assert_equal(left: Any, right: Any) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=False)


class Oracle:
    """The reference in float64 over the two groups of a case; its snapshots are ordered as ``snapshot`` orders."""

    def __init__(self, case: Case, start: list[Tensor]) -> None:
        self.weights = [p.detach().double() for p in start]
        zeros = [torch.zeros_like(w) for w in self.weights]
        self.is_lars = case.kind is LARS
        self.states: list[Any] = zeros if self.is_lars else [LambState(z, z, 0) for z in zeros]
        groups = case.build([nn.Parameter(w) for w in self.weights]).param_groups
        skip = {"params", "lr", "foreach"}
        self.settings = [{k: v for k, v in g.items() if k not in skip} for g in groups]

    def step(self, grads: list[Tensor], lr: float) -> None:
        update: Any = lars_step if self.is_lars else lamb_step
        for part, settings in zip((slice(0, -2), slice(-2, None)), self.settings, strict=True):
            given = [g.double() for g in grads[part]]
            self.weights[part], self.states[part] = update(
                self.weights[part], given, self.states[part], lr=lr, **settings
            )

    def snapshot(self) -> list[Tensor]:
        if self.is_lars:
            return self.weights + self.states
        states = [[s.m, s.v, torch.tensor(float(s.t))] for s in self.states]
        return self.weights + list(itertools.chain(*states))


# ---------------------------------------------------------------- contracts over the table


@pytest.mark.parametrize("foreach", FORMS)
@ALL_CASES
def test_equals_the_reference_in_float64(case: Case, foreach: bool | None) -> None:
    """20 steps, weights and state after each. Red when: ratio 0 at zero norms; wd left out of the update; beta1 in
    place of beta2; t counted from 0; "nus" clamped at 11 or its ratio at 60; "larc" not clipped; lr applied twice."""
    params = make_params()
    optimizer, oracle = case.build(params, foreach), Oracle(case, params)
    for step, lr in enumerate(LRS):
        take_step(optimizer, params, step)
        oracle.step(make_grads(step, params), lr)
        for ours, theirs in zip(snapshot(optimizer, params), oracle.snapshot(), strict=True):
            torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-11, atol=1e-13)


@ALL_CASES
def test_default_form_is_close_to_the_reference_in_float32(case: Case) -> None:
    """The fused CPU form. Red when: dampening = inside instead of 1 - inside; lr = +1 for LAMB's scratch; strides are
    not compared (a channels-last weight with a contiguous gradient)."""
    params = make_params(torch.float32)
    optimizer, oracle = case.build(params), Oracle(case, params)
    for step, lr in enumerate(LRS):
        take_step(optimizer, params, step)
        oracle.step(make_grads(step, params), lr)
        for ours, theirs in zip(snapshot(optimizer, params), oracle.snapshot(), strict=True):
            scale = theirs.abs().max().item() if theirs.numel() else 0.0
            torch.testing.assert_close(
                ours.double(), theirs.double(), rtol=2e-5, atol=2e-6 * scale + 1e-12
            )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@ALL_CASES
def test_foreach_is_loop_bit_for_bit(case: Case, dtype: torch.dtype) -> None:
    """On CPU both run the same operators in the same order. Red when: one form adds -rate * v where the other subtracts
    rate * v, or takes its norms by another sum. Not in bfloat16, where torch's foreach rounds scalars differently."""
    assert_equal(trajectory(case, dtype, True), trajectory(case, dtype, False))


@pytest.mark.parametrize("foreach", FORMS)
@ALL_CASES
def test_bfloat16_is_the_float32_step_rounded(case: Case, foreach: bool | None) -> None:
    """Sanity: one step in bfloat16 is the float32 step to bfloat16's 8 bits. Red when: lr is doubled."""
    start = [p.to(torch.bfloat16).float() for p in make_params()]
    moved = []
    for dtype in (torch.bfloat16, torch.float32):
        params = [nn.Parameter(p.to(dtype)) for p in start]
        take_step(case.build(params, foreach), params, 1)
        moved.append([p.detach().float() for p in params])
    for low, high in zip(*moved, strict=True):
        torch.testing.assert_close(low, high, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("foreach", FORMS)
@ALL_CASES
def test_a_saved_state_continues_bit_for_bit(case: Case, foreach: bool | None) -> None:
    """Through torch.save and weights_only=True, in the middle of a run. Red when: LAMB's u holds what the scratch held
    before (two runs differ)."""
    params = make_params(torch.float32)
    optimizer = case.build(params, foreach)
    for step in range(5):
        take_step(optimizer, params, step)
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), [p.detach() for p in params]], file)
    file.seek(0)
    saved, weights = torch.load(file, weights_only=True)
    resumed_params = [nn.Parameter(w) for w in weights]
    resumed = case.build(resumed_params, foreach)
    resumed.load_state_dict(saved)
    for step in range(5, 10):
        take_step(optimizer, params, step)
        take_step(resumed, resumed_params, step)
        assert_equal(snapshot(optimizer, params), snapshot(resumed, resumed_params))


@ALL_CASES
def test_a_deep_copy_continues_bit_for_bit(case: Case) -> None:
    """Red when: LAMB's scratch is not restored (AttributeError)."""
    params = make_params(torch.float32)
    optimizer = case.build(params)
    take_step(optimizer, params, 1)
    twin_params, twin = copy.deepcopy((params, optimizer))
    take_step(optimizer, params, 2)
    take_step(twin, twin_params, 2)
    assert_equal(snapshot(optimizer, params), snapshot(twin, twin_params))


@pytest.mark.parametrize("foreach", FORMS)
@ALL_CASES
def test_a_late_parameter_starts_fresh_and_one_without_gradient_stays(
    case: Case, foreach: bool | None
) -> None:
    """As the adversarial route's batch norm, which has no gradient in step 0. Red when: t is shared by the group."""
    params = make_params()
    optimizer = case.build(params, foreach)
    some_grads = make_grads(1, params)
    for p, g in zip(params[:-1], some_grads, strict=False):
        p.grad = g
    before = params[-1].detach().clone()
    optimizer.param_groups[1]["lr"] = 0.1
    optimizer.step()
    assert_equal(params[-1].detach(), before)
    assert params[-1] not in optimizer.state
    take_step(optimizer, params, 2)
    fresh = make_params()
    fresh_optimizer = case.build(fresh, foreach)
    take_step(fresh_optimizer, fresh, 2)
    assert_equal(params[-1].detach(), fresh[-1].detach())


@pytest.mark.parametrize("foreach", FORMS)
@ALL_CASES
def test_gradients_are_only_read(case: Case, foreach: bool | None) -> None:
    """Red when: weight decay is added to p.grad in place."""
    params = make_params(torch.float32)
    optimizer = case.build(params, foreach)
    take_step(optimizer, params, 1)
    assert_equal([p.grad for p in params], make_grads(1, params))


@ALL_CASES
def test_behaves_as_a_torch_optimizer(case: Case) -> None:
    """Closure, zero_grad, a scheduler, add_param_group with its own options. Red when: the closure runs without
    gradients."""
    p, late = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(2))
    optimizer = case.kind([p], 0.5, **case.settings)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 6.0
    assert not torch.equal(p.detach(), torch.ones(3, 2))
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    optimizer.zero_grad()
    assert p.grad is None
    optimizer.add_param_group({"params": [late], "lr": 1.0, "adapt": False})
    late.grad, before = torch.ones(2), p.detach().clone()
    optimizer.step()
    assert_equal(p.detach(), before)
    assert not torch.equal(late.detach(), torch.ones(2))


def test_empty_and_scalar_parameters() -> None:
    for kind, foreach in itertools.product((LARS, LAMB), FORMS):
        params = [nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.tensor(2.0))]
        optimizer = kind(params, 0.1, foreach=foreach)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert params[1].item() < 2.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@ALL_CASES
def test_cuda_forms_agree_with_the_reference_and_never_wait(case: Case) -> None:
    for foreach in FORMS:
        params = [nn.Parameter(p.detach().cuda()) for p in make_params()]
        optimizer, oracle = case.build(params, foreach), Oracle(case, [p.cpu() for p in params])
        for step, lr in enumerate(LRS):
            grads = make_grads(step, params)
            for p, g in zip(params, grads, strict=True):
                p.grad = g.cuda()
            for group in optimizer.param_groups:
                group["lr"] = lr
            torch.cuda.set_sync_debug_mode("error")
            try:
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            oracle.step(grads, lr)
            for ours, theirs in zip(snapshot(optimizer, params), oracle.snapshot(), strict=True):
                torch.testing.assert_close(
                    ours.double().cpu(), theirs.double(), rtol=1e-10, atol=1e-12
                )


# ---------------------------------------------------------------- LARS


def test_lars_variants_differ_from_each_other() -> None:
    """Under a changing lr. Red when: two names share a formula ("tf" in place of any other)."""
    ends = {
        v: trajectory(Case(v, LARS, {"variant": v, **_STRONG}), torch.float64, None)[-1]
        for v in VARIANTS
    }
    for a, b in itertools.combinations(VARIANTS, 2):
        assert not torch.allclose(ends[a][0], ends[b][0], rtol=1e-6), f"{a} and {b} are the same"


def _run_lars(variant: str, lrs: list[float]) -> Tensor:
    p = nn.Parameter(make_params()[0].detach())
    optimizer = LARS([p], lrs[0], variant=variant, eps=0.0, **_STRONG)
    for step, lr in enumerate(lrs):
        optimizer.param_groups[0]["lr"] = lr
        p.grad = make_grads(step, make_params())[0]
        optimizer.step()
    return p.detach()


def test_lars_tf_is_timm_under_a_constant_lr_and_differs_under_a_changing_one() -> None:
    """lr inside the buffer or outside. Red when: "tf" keeps lr outside (second assertion)."""
    torch.testing.assert_close(
        _run_lars("tf", [0.1] * 8), _run_lars("timm", [0.1] * 8), rtol=1e-11, atol=0
    )
    decaying = [0.8 / 2**k for k in range(8)]
    assert not torch.allclose(_run_lars("tf", decaying), _run_lars("timm", decaying), rtol=1e-3)


def test_lars_first_step_by_hand() -> None:
    """w = (3, 4), g = (0, 2), eta 0.1, wd 0.2, lr 0.5: r = 0.1 * 5 / (2 + 0.2 * 5) = 1/6; v = r/2 (0.6, 2.8)."""
    p = nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    p.grad = torch.tensor([[0.0, 2.0]], dtype=torch.float64)
    optimizer = LARS([p], 0.5, trust_coefficient=0.1, weight_decay=0.2)
    optimizer.step()
    v = torch.tensor([[0.05, 2.8 / 12]], dtype=torch.float64)
    torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], v)
    torch.testing.assert_close(p.detach(), torch.tensor([[3.0, 4.0]], dtype=torch.float64) - v)


@pytest.mark.parametrize("variant", VARIANTS)
def test_lars_ratio_is_one_at_zero_norms(variant: str) -> None:
    """w = 0 moves by lr * g, as in plain SGD. Red when: the ratio falls to 0 there (the tensor never moves)."""
    p = nn.Parameter(torch.zeros(2, 2))
    p.grad = torch.ones(2, 2)
    LARS([p], 0.5, variant=variant).step()
    assert_equal(p.detach(), torch.full((2, 2), -0.5))


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "nus"])
def test_lars_without_adaptation_is_torch_sgd(variant: str) -> None:
    """Constant lr. Red when: adapt is ignored."""
    ours, theirs = (nn.Parameter(make_params()[0].detach()) for _ in range(2))
    optimizers = [
        LARS(
            [{"params": [ours], "adapt": False}],
            0.01,
            momentum=0.8,
            weight_decay=0.1,
            variant=variant,
        ),
        torch.optim.SGD([theirs], 0.01, momentum=0.8, weight_decay=0.1),
    ]
    for step in range(6):
        ours.grad = theirs.grad = make_grads(step, make_params())[0]
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("dtype", "rate", "rtol"),
    [(torch.float32, 1.3e-13, 1e-6), (torch.float64, 1.3e-7, 1e-13)],
    ids=str,
)
def test_small_rates_stay_exact_in_the_default_form(
    dtype: torch.dtype, rate: float, rtol: float
) -> None:
    """The fused kernel's 1 - (1 - rate) is off by up to 1.1e-16: 0.1 % and 1e-9 of these rates. Red when: the smallest
    fused rate is 0 (float32), or float64 takes the fused kernel."""
    p = nn.Parameter(torch.ones(2, 2, dtype=dtype))
    optimizer = LARS([{"params": [p], "adapt": False}], rate, weight_decay=0.0)
    p.grad = torch.ones_like(p)
    optimizer.step()
    expected = torch.full_like(p, rate).detach()
    torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], expected, rtol=rtol, atol=0)


def test_default_form_on_cpu_is_the_fused_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red when: every tensor falls back to the loop (right numbers, a third of the speed)."""
    counts = {"lars": 0, "lamb": 0}
    for name, kernel in (("lars", "sgd"), ("lamb", "adamw")):
        module = __import__(f"conadv.optim.{name}", fromlist=[kernel])
        real = getattr(module, kernel)

        def counting(
            params: Any, *args: Any, name: str = name, real: Any = real, **options: Any
        ) -> None:
            counts[name] += len(params)
            real(params, *args, **options)

        monkeypatch.setattr(module, kernel, counting)
    for case in (CASES[0], next(c for c in CASES if c.kind is LAMB)):
        params = make_params(torch.float32)
        take_step(case.build(params), params, 2)
    # not: the channels-last weight with a contiguous gradient, the transposed weight
    assert counts == {"lars": 6, "lamb": 6}


# ---------------------------------------------------------------- LAMB


def test_lamb_first_step_by_hand() -> None:
    """The first direction is sign(g) at eps 0: u = (1, -1) + 0.5 w; w moves by lr |w| along u / |u|."""
    p = nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    p.grad = torch.tensor([[0.1, -7.0]], dtype=torch.float64)
    LAMB([p], 0.2, eps=0.0, weight_decay=0.5).step()
    u = torch.tensor([[2.5, 1.0]], dtype=torch.float64)
    expected = torch.tensor([[3.0, 4.0]], dtype=torch.float64) - 0.2 * 5 * u / 7.25**0.5
    torch.testing.assert_close(p.detach(), expected, rtol=1e-9, atol=0)


def test_lamb_without_adaptation_is_adamw() -> None:
    """Red when: adapt is ignored, or the decay is not scaled by lr."""
    ours, theirs = (nn.Parameter(make_params()[0].detach()) for _ in range(2))
    optimizers = [
        LAMB([{"params": [ours], "adapt": False}], 0.01, betas=(0.8, 0.9), weight_decay=0.1),
        torch.optim.AdamW([theirs], 0.01, betas=(0.8, 0.9), weight_decay=0.1, eps=1e-6),
    ]
    for step in range(6):
        ours.grad = theirs.grad = make_grads(step, make_params())[0]
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_lamb_scratch_does_not_leak_between_tensors() -> None:
    """A smaller tensor after a larger one. Red when: the scratch keeps the larger tensor's values (mul left out)."""
    alone, beside = (make_params(torch.float32)[4] for _ in range(2))
    large = nn.Parameter(torch.ones(50, 50))
    for params in ([alone], [large, beside]):
        for p in params:
            p.grad = torch.full_like(p, 0.5)
        LAMB(params, 0.1).step()
    assert_equal(alone.detach(), beside.detach())


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
        (LARS, {"lr": torch.tensor(0.1)}, "lr = tensor"),
        (LARS, {"lr": float("nan")}, "lr = nan"),
        (LARS, {"lr": float("inf")}, "finite"),
        (LARS, {"momentum": 1.0}, "momentum = 1.0: give a number, at least 0 and below 1"),
        (LARS, {"weight_decay": -1e-4}, "weight_decay"),
        (LARS, {"trust_coefficient": -1}, "trust_coefficient"),
        (LARS, {"eps": -1e-8}, "eps"),
        (LARS, {"variant": "tff"}, "Did you mean 'tf'"),
        (LARS, {"foreach": "yes"}, "foreach = 'yes'"),
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
def test_a_refused_group_leaves_the_optimizer_as_it_was(kind: type) -> None:
    """Red when: the group stays after its check failed."""
    optimizer = kind([nn.Parameter(torch.ones(2))], 0.1)
    with pytest.raises(ConadvError, match="adapt = 1"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "adapt": 1})
    with pytest.raises(ConadvError, match="complex"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=torch.complex64))]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("kind", [LARS, LAMB])
def test_sparse_gradients_are_refused(kind: type) -> None:
    """Red when: the layout is not looked at."""
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ConadvError, match="sparse=False"):
        kind(table.parameters(), 0.1).step()


def test_unknown_variant_names_are_all_in_the_reference_too() -> None:
    """Every variant of the table moves the reference's weights: none falls through its branches."""
    for variant in VARIANTS:
        w, g, v = (torch.full((2, 2), x, dtype=torch.float64) for x in (1.0, 0.5, 0.0))
        settings = {"momentum": 0.9, "weight_decay": 0.0, "trust_coefficient": 0.1, "eps": 0.0}
        new_w, new_v = lars_step([w], [g], [v], lr=0.3, variant=variant, **settings)
        assert new_w[0].lt(w).all()
        assert new_v[0].gt(0).all()
