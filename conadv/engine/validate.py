"""Validate a checkpoint before loading it.

torch loads an optimizer's state of any shape and hands it to kernels that do not check: a
stranger's file could make them read and write outside of a tensor. So every part is compared with
its like, part by part, before anything is loaded. All functions raise ConadvError that says which
part does not fit.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from conadv.errors import ConadvError, printable
from conadv.nn.ema import EMA

MOST = 10**9
"""Of anything that is counted: the product of two counts still fits into 64 bits."""


def check_count(value: object, what: str, most: int = MOST) -> int:
    """``value``, which must be a whole number from 0 to ``most``."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise ConadvError(f"{what} is {shown(value)}, not a whole number from 0 to {most:,}")
    return value


def check_keys(value: object, keys: Collection[object] | None, what: str) -> dict[Any, Any]:
    """``value``, which must be a dictionary with just these keys; None allows any."""
    if not isinstance(value, dict):
        raise ConadvError(f"{what} is {shown(value)}, not a dictionary")
    if keys is not None and (odd := set(value) ^ set(keys)):
        key = next(iter(odd))
        raise ConadvError(f"{what} {'has' if key in value else 'lacks'} {shown(key)}")
    return value


def check_like(value: Any, like: Tensor | dict[str, Tensor] | list[Tensor], what: str) -> Any:
    """``value``, which must have the keys, shapes and dtypes of ``like``."""
    if isinstance(like, dict):
        for key in check_keys(value, like, what):
            check_like(value[key], like[key], f"{what}: {key}")
    elif isinstance(like, list):
        if not isinstance(value, list) or len(value) != len(like):
            raise ConadvError(f"{what} is {shown(value)}, not a list of {len(like)} tensors")
        for one, other in zip(value, like, strict=True):
            check_like(one, other, what)
    elif not isinstance(value, Tensor) or value.layout != torch.strided:
        raise ConadvError(f"{what} is {shown(value)}, not a dense tensor")
    elif (value.shape, value.dtype) != (like.shape, like.dtype):
        raise ConadvError(f"{what} is {shown(value)}, not {shown(like)}")
    elif _is_dense(like) and not _is_dense(value):
        raise ConadvError(f"{what} is an expanded view")  # writing to it would write elsewhere too
    return value


def load_weights(module: nn.Module, state: object, what: str = "its model") -> None:
    """``module.load_state_dict(state)``, which by itself would cast other dtypes.

    RuntimeError (torch's) for names that differ.
    """
    found = check_keys(state, None, what)
    # Names that differ are left to torch, which lists all of them at once.
    for name, own in module.state_dict().items():
        if isinstance(own, Tensor) and name in found:
            check_like(found[name], own, f"{what}: {name}")
    module.load_state_dict(found)


def load_average(average: EMA, state: object) -> None:
    load_weights(average, state, "its average")
    updates = int(average.get_buffer("n_averaged"))
    check_count(updates, "its average's number of updates")


def load_optimizer(optimizer: Optimizer, state: object) -> None:
    """Load its state and learning rates; the other settings stay those of the run.

    Every parameter must have the tensors that this optimizer makes, or none of them, as one without
    a gradient so far.
    """
    saved = check_keys(state, ("state", "param_groups"), "its optimizer")
    own, groups = optimizer.state_dict()["param_groups"], saved["param_groups"]
    if not isinstance(groups, list) or len(groups) != len(own):
        raise ConadvError("its optimizer has other groups of parameters")
    # A checkpoint of another device may say `fused` or `foreach` where this one must not, so only
    # the learning rate, which the schedule has set, is taken from it.
    rates = [check_keys(group, None, "its optimizer's group").get("lr") for group in groups]
    for rate in rates:
        if not isinstance(rate, (int, float)) or not math.isfinite(rate):
            raise ConadvError(f"its optimizer's learning rate is {shown(rate)}")
    states = check_keys(saved["state"], None, "its optimizer's state")
    _check_states(optimizer, states)
    merged = [{**like, "lr": rate} for like, rate in zip(own, rates, strict=True)]
    optimizer.load_state_dict({"state": states, "param_groups": merged})


def _check_states(optimizer: Optimizer, states: dict[Any, Any]) -> None:
    params = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    if odd := set(states) - set(range(len(params))):
        raise ConadvError(f"its optimizer's state {shown(odd.pop())} is of no parameter")
    for number, state in states.items():
        what = f"its optimizer's state {number}"
        # Empty without a gradient so far, as of a route that comes later.
        if check_keys(state, None, what):
            check_like(state, _made_by(optimizer, *params[number]), what)


def _made_by(optimizer: Optimizer, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    """What this optimizer keeps for ``p``, without memory: found out by a step on two numbers."""
    # Asked of the optimizer itself, so that any optimizer is known. On p's device and dtype: some
    # keep their step there, some on the CPU.
    twin = nn.Parameter(torch.zeros(2, dtype=p.dtype, device=p.device))
    twin.grad = torch.zeros_like(twin)
    kind: Any = type(optimizer)
    other: Optimizer = kind([{**group, "params": [twin]}], group["lr"])
    other.step()
    return {
        key: torch.empty(p.shape if value.dim() else (), dtype=value.dtype, device="meta")
        for key, value in other.state[twin].items()
    }


def _is_dense(x: Tensor) -> bool:
    """Whether its elements fill a block of memory, each at its own place, in whichever order."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def shown(value: object) -> str:
    """What a file holds, short and on one line; of a tensor no elements, which could be many."""
    if isinstance(value, Tensor):
        shape = " x ".join(map(str, value.shape)) or "()"
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {shape}"
    return printable(repr(value))[:80]
