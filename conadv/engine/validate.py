"""Whether what a checkpoint holds is what the run itself would have made.

torch loads an optimizer's state of any shape and hands it to kernels that do not check: a stranger's file could make
them read and write outside of a tensor. So every tensor is compared with its like before anything is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from conadv.errors import ConadvError, printable
from conadv.nn.ema import EMA

MOST = 10**9
"""Of anything that is counted: the product of two counts still fits into 64 bits."""
_HOW = {"fused", "foreach"}
"""Settings that say how a step is carried out, which depends on the device: those of the run stay."""


def is_count(value: object, most: int = MOST) -> TypeGuard[int]:
    """Whether it is a whole number from 0 to ``most``."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def check_count(value: object, what: str, most: int = MOST) -> int:
    """``value``, or ConadvError unless it is a whole number from 0 to ``most``."""
    if not is_count(value, most):
        raise ConadvError(f"{what} is {shown(value)}, not a whole number from 0 to {most:,}")
    return value


def check_mapping(value: object, what: str) -> dict[Any, Any]:
    """``value``, or ConadvError unless it is a dictionary."""
    if not isinstance(value, dict):
        raise ConadvError(f"{what} is {shown(value)}, not a dictionary")
    return value


def check_keys(value: object, keys: Collection[object], what: str) -> dict[Any, Any]:
    """``value``, or ConadvError unless it is a dictionary with just these keys."""
    found = check_mapping(value, what)
    if set(found) != set(keys):
        odd = next(iter(set(found) ^ set(keys)))
        raise ConadvError(f"{what} {'has' if odd in found else 'lacks'} {shown(odd)}")
    return found


def check_tensor(
    value: object, shape: torch.Size, dtype: torch.dtype, what: str, *, dense: bool = True
) -> Tensor:
    """``value``, or ConadvError unless it is a tensor of this shape and dtype, with memory of its own per element.

    ``dense`` False: its like may be an expanded tensor, so that it may be one too.
    """
    if not isinstance(value, Tensor):
        raise ConadvError(f"{what} is {shown(value)}, not a tensor")
    if value.shape != shape or value.dtype != dtype or value.layout != torch.strided:
        raise ConadvError(
            f"{what} is a {_kind(value.dtype, value.layout)} tensor of shape {_numbers(value.shape)}, not a "
            f"{_kind(dtype, torch.strided)} one of shape {_numbers(shape)}"
        )
    if dense and not _is_dense(value):
        raise ConadvError(f"{what} is an expanded view")
    return value


def check_like(value: object, like: Tensor, what: str) -> Tensor:
    """``value``, or ConadvError unless it is a tensor that can take the place of ``like``."""
    return check_tensor(value, like.shape, like.dtype, what, dense=_is_dense(like))


def load_weights(module: nn.Module, state: dict[str, Any]) -> None:
    """``module.load_state_dict(state)``, which itself casts other dtypes and drops the imaginary part of numbers.

    ConadvError for a tensor of another shape or dtype, RuntimeError (torch's) for names that differ.
    """
    check_weights(module, state, "its model")
    module.load_state_dict(state)


def check_weights(module: nn.Module, state: object, what: str) -> None:
    """ConadvError unless the tensors of ``state`` are like those that ``module`` has under their names."""
    found = check_mapping(state, what)
    for name, own in module.state_dict().items():
        if isinstance(own, Tensor) and name in found:
            check_like(found[name], own, f"{name} of {what}")


def load_average(average: EMA, state: dict[str, Any]) -> None:
    """Load an average's state dict; ConadvError for what is no average of such a model."""
    check_weights(average, state, "its average")
    average.load_state_dict(state)
    check_count(int(average.n_averaged), "its average's number of updates")  # type: ignore[call-overload, arg-type]


def load_optimizer(optimizer: Optimizer, state: object, updates: int, *, some: bool) -> None:
    """Load its state after ``updates`` steps. But for the learning rate its settings are the config's.

    Raises ConadvError unless every parameter has the tensors that this optimizer makes, or none of them, as one
    without a gradient so far; with ``some`` at least one parameter must have them.
    """
    saved = check_keys(state, ("state", "param_groups"), "its optimizer")
    own = optimizer.state_dict()["param_groups"]
    if not isinstance(saved["param_groups"], list) or len(saved["param_groups"]) != len(own):
        raise ConadvError("its optimizer has other groups of parameters")
    rates = [
        _check_group(group, like) for group, like in zip(saved["param_groups"], own, strict=True)
    ]
    _check_states(optimizer, check_mapping(saved["state"], "its optimizer's state"), updates, some)
    groups = [{**like, "lr": rate} for like, rate in zip(own, rates, strict=True)]
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})


def _check_group(group: object, like: dict[str, Any]) -> float:
    """Its learning rate, which the schedule has set; all other settings must be those of the run."""
    found = check_keys(group, like, "its optimizer's group")
    rate = found["lr"]
    if not isinstance(rate, (int, float)) or not math.isfinite(rate):
        raise ConadvError(f"its optimizer's learning rate is {shown(rate)}")
    for name, value in like.items():
        other = found[name]
        if name in _HOW and any(other is allowed for allowed in (True, False, None)):
            continue
        if name != "lr" and (isinstance(other, Tensor) or other != value):
            raise ConadvError(f"its optimizer has other settings: {name} is {shown(other)}")
    return rate


def _check_states(optimizer: Optimizer, states: dict[Any, Any], updates: int, some: bool) -> None:
    params = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    if odd := set(states) - set(range(len(params))):
        raise ConadvError(
            f"its optimizer has a state for {shown(next(iter(odd)))}, which is no parameter"
        )
    makes: dict[tuple[int, torch.dtype], dict[str, Tensor]] = {}
    full = 0
    for number, (p, group) in enumerate(params):
        if not states.get(
            number
        ):  # no gradient so far: a route that comes later, a layer that is not used
            check_mapping(states.get(number, {}), f"its optimizer's state {number}")
            continue
        kind = (id(group), p.dtype)
        if kind not in makes:
            makes[kind] = _fresh_state(optimizer, group, p)
        _check_state(states[number], p, makes[kind], updates, f"its optimizer's state {number}")
        full += 1
    if some and not full and any(_fresh_state(optimizer, group, p) for p, group in params[:1]):
        raise ConadvError("its optimizer has no state, after steps that make one")


def _check_state(
    state: object, p: Tensor, makes: dict[str, Tensor], updates: int, what: str
) -> None:
    for key, value in check_keys(state, makes, what).items():
        name, like = f"{what}, {key},", makes[key]
        if like.dim():
            check_tensor(value, p.shape, p.dtype, name)
            continue
        count = check_tensor(value, like.shape, like.dtype, name).item()
        if not (1 <= count <= updates and count == int(count)):
            raise ConadvError(f"{name} is {count}, not a number of updates up to {updates}")


def _fresh_state(optimizer: Optimizer, group: dict[str, Any], p: Tensor) -> dict[str, Tensor]:
    """What this optimizer keeps for a parameter like ``p``, seen at one of two numbers; counters have no dimension."""
    twin = nn.Parameter(torch.zeros(2, dtype=p.dtype, device=p.device))
    twin.grad = torch.zeros_like(twin)
    kind: Any = type(optimizer)
    other: Optimizer = kind([{**group, "params": [twin]}], group["lr"])
    other.step()
    found: dict[str, Tensor] = other.state[twin]
    return found


def _is_dense(x: Tensor) -> bool:
    """Whether its elements fill a block of memory, each at its own place, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _kind(dtype: torch.dtype, layout: torch.layout) -> str:
    text = str(dtype).removeprefix("torch.")
    return text if layout == torch.strided else f"sparse {text}"


def _numbers(shape: torch.Size) -> str:
    return " x ".join(map(str, shape)) or "()"


def shown(value: object) -> str:
    """What a file holds, short and on one line; of a tensor no elements, which could be many."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {_numbers(value.shape)}"
    return printable(repr(value))[:80]
