"""torch's own contracts of an optimizer, over inputs described as torch describes its optimizers'.

torch tests SGD, AdamW and the others by torch.testing._internal.common_optimizers; here LARS and
LAMB are held against what it promises of them.
"""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau, StepLR

from conadv import LAMB, LARS

pytest.importorskip("expecttest", reason="torch's own tests need expecttest")


@functools.cache
def torchs() -> Any:
    """Imported late: it takes seconds. What it forbids to all of torch stays allowed."""
    with mock.patch("torch.backends.disable_global_flags"):
        from torch.testing._internal import common_optimizers
    return common_optimizers


SETTINGS: dict[type, list[dict[str, Any]]] = {
    LARS: [{"momentum": 0.0}, *({"variant": name} for name in ("timm", "larc", "nus"))],
    LAMB: [{"betas": (0.8, 0.99)}, {"eps": 1e-3}],
}
FRIENDLY: list[dict[str, Any]] = [  # what torch calls friendly: goes with any other option
    {},
    {"lr": torch.tensor(0.01)},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "maximize": True},
    {"capturable": True},
    {"lr": torch.tensor(0.01), "maximize": True, "capturable": True},
]
FLAGS = ("foreach", "fused", "maximize", "capturable")


def info(kind: type) -> Any:
    rows = [{"lr": 0.01, **row} for row in FRIENDLY + SETTINGS[kind]]
    made = [torchs().OptimizerInput(params=None, kwargs=row, desc=str(row)) for row in rows]
    return torchs().OptimizerInfo(
        kind,
        optim_inputs_func=lambda device, dtype=None: made,
        supported_impls=("foreach", "fused"),
        supports_fused_on=("cpu",),
        not_og_supported_flags=FLAGS,
        has_capturable_arg=True,
        supports_complex=False,
    )


def all_inputs(kind: type) -> list[dict[str, Any]]:
    """Every setting in the forms loop, foreach and fused, fresh."""
    found = torchs()._get_optim_inputs_including_global_cliquey_kwargs("cpu", None, info(kind))
    # capturable rules the fused form out, by name: tests/test_optim.py
    rows = [each.kwargs for each in found]
    return [copy.deepcopy(row) for row in rows if not (row.get("fused") and row.get("capturable"))]


KINDS = pytest.mark.parametrize("kind", [LARS, LAMB])


class Problem:
    """|W x + b|^2, which any number of steps should lower, or raise."""

    def __init__(self, strided: bool = False, dtype: torch.dtype = torch.float32) -> None:
        gen = torch.Generator().manual_seed(0)
        w, b, x = (torch.randn(n, generator=gen, dtype=dtype) for n in ((10, 5, 2), (10, 2), (5,)))
        w, b = (w[..., 0], b[..., 0]) if strided else (w[..., 0].clone(), b[..., 0].clone())
        self.params, self.x = [nn.Parameter(w), nn.Parameter(b)], x

    def loss(self) -> Tensor:
        for p in self.params:
            p.grad = None
        loss = (self.params[0].mv(self.x) + self.params[1]).square().sum()
        loss.backward()
        return loss

    def train(self, optimizer: Any, steps: int) -> list[Tensor]:
        for _ in range(steps):
            self.loss()
            optimizer.step()
        return [p.detach().clone() for p in self.params]


def equal(left: Any, right: Any, **tolerance: float) -> None:
    torch.testing.assert_close(left, right, **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("strided", [False, True])
@KINDS
def test_goes_in_the_right_direction(kind: type, strided: bool) -> None:
    # Red when: maximize is ignored in one form; the fused kernel gets strided weights; the closure
    # runs without gradients.
    schedulers: list[Callable[[Any], Any]] = [
        lambda optimizer: StepLR(optimizer, 2, 0.9),
        lambda optimizer: ExponentialLR(optimizer, 0.99),
        lambda optimizer: ReduceLROnPlateau(optimizer),
    ]
    for number, settings in enumerate(all_inputs(kind)):
        problem = Problem(strided)
        optimizer = kind(problem.params, **settings)
        assert optimizer.__class__.__name__ in repr(optimizer)
        scheduler, first = schedulers[number % 3](optimizer), problem.loss().item()
        for _ in range(20):
            loss = optimizer.step(problem.loss).detach()
            scheduler.step(*[loss] * isinstance(scheduler, ReduceLROnPlateau))
        rises = problem.loss().item() > first
        assert rises == settings.get("maximize", False), settings


@KINDS
def test_all_forms_are_the_loop_also_for_mixed_types(kind: type) -> None:
    # Red when: parameters of two dtypes share a bucket.
    for given in info(kind).optim_inputs_func("cpu"):
        ends = []
        for form in ({"foreach": False}, {"foreach": True}, {"fused": True}, {}):
            if given.kwargs.get("capturable") and "fused" in form:
                continue
            problems = [Problem(dtype=d) for d in (torch.float32, torch.float64)]
            params = [p for problem in problems for p in problem.params]
            optimizer = kind(params, **copy.deepcopy(given.kwargs), **form)
            for _ in range(5):
                for problem in problems:
                    problem.loss()
                optimizer.step()
            ends.append([p.detach() for p in params])
        for end in ends[1:]:
            equal(end, ends[0], rtol=1e-5, atol=1e-6)


@KINDS
def test_a_tensor_as_the_learning_rate_is_its_number(kind: type) -> None:
    # Red when: the tensor is read once, at construction; another learning rate takes its place.
    for settings in all_inputs(kind):
        lr = torch.tensor(0.01)
        ends = []
        for given in (lr, lr.item()):
            problem = Problem()
            optimizer = kind(problem.params, **{**settings, "lr": given})
            problem.train(optimizer, 2)
            if isinstance(given, Tensor):
                given.fill_(0.1)
            else:
                optimizer.param_groups[0]["lr"] = lr.item()
            ends.append(problem.train(optimizer, 2))
        assert optimizer.param_groups[0]["lr"] == lr.item()
        equal(*ends, rtol=1e-6, atol=1e-7)


@KINDS
def test_groups_have_their_own_options(kind: type) -> None:
    # Red when: an option is read from the defaults.
    for settings in all_inputs(kind):
        problem = Problem()
        before = problem.params[0].detach().clone()
        groups = [{"params": problem.params[:1], "lr": 0.0}, {"params": problem.params[1:]}]
        end = problem.train(kind(groups, **settings), 3)
        equal(end[0], before)
        assert (end[1] != 0).all()


@KINDS
def test_no_gradient_or_a_zero_one_moves_nothing(kind: type) -> None:
    for settings in all_inputs(kind):
        problem = Problem()
        settings["weight_decay"] = 0.0
        optimizer = kind(problem.params, **settings)
        before = [p.detach().clone() for p in problem.params]
        optimizer.step()
        assert not optimizer.state
        for p in problem.params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        equal([p.detach() for p in problem.params], before)


def older(state: dict[str, Any]) -> None:
    """As a version before the flags wrote it."""
    for group in state["param_groups"]:
        for flag in FLAGS:
            del group[flag]


def plain_steps(state: dict[str, Any]) -> None:
    """As programs that count in Python write it."""
    for values in state["state"].values():
        if "step" in values:
            values["step"] = values["step"].item()


def same_state(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left["param_groups"] == right["param_groups"]
    equal(left["state"], right["state"])


@pytest.mark.parametrize("change", [lambda state: None, older, plain_steps])
@KINDS
def test_a_state_loads(kind: type, change: Callable[[dict[str, Any]], None]) -> None:
    # Red when: __setstate__ does not fill options in, or keeps a step that is a number.
    for settings in all_inputs(kind):
        settings = {**settings, "maximize": False}
        one, two = Problem(), Problem()
        optimizer, other = (
            kind(problem.params, **copy.deepcopy(settings)) for problem in (one, two)
        )
        one.train(optimizer, 3)
        two.train(other, 1)
        state = copy.deepcopy(optimizer.state_dict())
        assert state["state"] or settings.get("momentum") == 0.0  # there is something to load
        change(state)
        kept = copy.deepcopy(state)
        other.load_state_dict(state)
        same_state(state, kept)
        for mine, theirs in zip(two.params, one.params, strict=True):
            mine.data.copy_(theirs)
        equal(two.train(other, 3), one.train(optimizer, 3))
        if change is not older:
            same_state(other.state_dict(), optimizer.state_dict())


@KINDS
def test_copies_continue_as_the_original(kind: type) -> None:
    # Red when: a copy lacks the scratch memory, or shares the state.
    for settings in all_inputs(kind):
        problem = Problem()
        optimizer = kind(problem.params, **settings)
        problem.train(optimizer, 2)
        copies = [copy.deepcopy((problem, optimizer))]
        copies.append(pickle.loads(pickle.dumps((problem, optimizer))))
        want = problem.train(optimizer, 2)
        for twin, its in copies:
            equal(twin.train(its, 2), want)


@pytest.mark.filterwarnings("error")
@KINDS
def test_wrong_arguments_are_torchs_errors(kind: type) -> None:
    # Red when: a check of ours hides torch's own.
    for case in torchs().get_error_inputs_for_all_optims("cpu", torch.float32):
        given = case.optimizer_error_input
        params = [nn.Parameter(torch.randn(1, 1))] if given.params is None else given.params
        with pytest.raises(case.error_type, match=case.error_regex):
            kind(params, **{"lr": 0.1, **given.kwargs})


@KINDS
def test_hooks_run_around_a_step_and_names_stay_in_the_state(kind: type) -> None:
    problem, seen = Problem(), []
    optimizer = kind([("w", problem.params[0]), ("b", problem.params[1])], 0.1)
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    problem.train(optimizer, 1)
    assert seen == ["pre", "post"]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["w", "b"]
    twin = kind(Problem().params, 0.1)
    twin.load_state_dict(optimizer.state_dict())
