"""What LARS and LAMB share: norms, the rule for zero norms, and the choice of how a step is carried
out.

A step has three forms that compute the same numbers (docs/methods/optimizers.md has the
measurements):

* fused: tensor by tensor through torch's fused CPU kernels, the weights still in cache from their
  norm. Default on CPU.
* foreach: one operator over all tensors of a group. Default on CUDA; ``foreach=True``.
* loop: the same operators, tensor by tensor. Any device, any memory layout; ``foreach=False``.

On CUDA norms and ratios stay on the device, so a step never waits for the host.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from conadv.errors import ConadvError

Group = dict[str, Any]
Scalar = TypeVar("Scalar", float, Tensor)
Rate = float | list[Tensor]
"""A factor for every tensor of a list: one number, or one 0-dim tensor each."""

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_HALF = (torch.float16, torch.bfloat16)


def norm_tensor(x: Tensor) -> Tensor:
    """|x|_2 as a 0-dim tensor; half precision is summed in float32.

    Over rows first: in float32 one long sum of 2.4 million squares is off by 4e-5 and depends on
    the thread count, the sum over rows is off by 2e-8 and does not.
    """
    dtype = torch.float32 if x.dtype in _HALF else None
    if x.dim() > 1:
        x = torch.linalg.vector_norm(x, dim=tuple(range(1, x.dim())), dtype=dtype)
    result: Tensor = torch.linalg.vector_norm(x, dtype=dtype)
    return result


def norm(x: Tensor) -> float:
    """|x|_2 as a Python number: a sync point on an accelerator, free on CPU."""
    return float(norm_tensor(x).item())


def norms(tensors: list[Tensor]) -> Tensor:
    """|x|_2 of every tensor as one float64 vector: on the device for CUDA, else on the host."""
    if not tensors[0].is_cuda:
        return torch.tensor([norm(x) for x in tensors], dtype=torch.float64)
    dtype = torch.float32 if tensors[0].dtype in _HALF else None
    return torch.stack(torch._foreach_norm(tensors, 2, dtype)).double()


def trust_ratio(
    w_norm: Scalar, other_norm: Scalar, formula: Callable[[Scalar, Scalar], Scalar]
) -> Scalar:
    """``formula(w_norm, other_norm)``, or 1 where either norm is 0: for numbers and for vectors of
    norms.
    """
    if isinstance(w_norm, Tensor):
        return torch.where((w_norm > 0) & (other_norm > 0), formula(w_norm, other_norm), 1.0)
    return formula(w_norm, other_norm) if w_norm > 0 and other_norm > 0 else 1.0


def at_most(value: Scalar, high: float) -> Scalar:
    """min(value, high) for a number or a vector."""
    return value.clamp(max=high) if isinstance(value, Tensor) else min(value, high)


def per_tensor(rate: float | Tensor) -> Rate:
    """A vector of rates as one 0-dim tensor per parameter; a single number stays what it is."""
    return list(rate.unbind()) if isinstance(rate, Tensor) else rate


def flat_alike(*tensors: Tensor) -> bool:
    """Whether element i in memory is the same element of all tensors, as the fused CPU kernels take
    for granted.

    torch's fused CPU kernels look neither at strides, and give wrong weights where gradient and
    weight differ in them, nor at shapes, and read and write beyond the end of the smaller one.
    """
    first, *others = tensors
    for x in others:
        if x.dtype != first.dtype or x.shape != first.shape:
            return False
    formats = (torch.contiguous_format, _CHANNELS_LAST.get(first.dim()))
    # a list is faster than a generator here, and this runs for every tensor and step
    return any(all([x.is_contiguous(memory_format=f) for x in tensors]) for f in formats if f)  # noqa: C419


def check_number(name: str, value: object, low: float, high: float = math.inf) -> None:
    """ConadvError unless ``low <= value < high``."""
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= float(value) < high:
        upper = "finite" if high == math.inf else f"below {high:g}"
        raise ConadvError(f"{name} = {value!r}: give a number, at least {low:g} and {upper}.")


class TrustRatioOptimizer(Optimizer):
    """The skeleton of LARS and LAMB: an ordinary ``torch.optim.Optimizer`` with the per-group
    option ``adapt``.

    Ranks: reads ``p.grad``, which the caller has averaged; reduces nothing itself.
    In flight: a step writes the parameters and its own state, nothing else (gradients are only
    read).
    """

    def add_param_group(self, param_group: Group) -> None:
        """Add a group as torch does. Raises ConadvError that names a wrong option."""
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
        except ConadvError:
            self.param_groups.pop()
            raise

    def _check(self, group: Group) -> None:
        check_number("lr", group["lr"], 0)
        check_number("weight_decay", group["weight_decay"], 0)
        for name, allowed in (("adapt", (True, False)), ("foreach", (True, False, None))):
            if not any(group[name] is value for value in allowed):
                choices = ", ".join(map(str, allowed))
                raise ConadvError(f"{name} = {group[name]!r}: give one of {choices}.")
        for p in group["params"]:
            if not p.is_floating_point():
                raise ConadvError(
                    f"{type(self).__name__} cannot train a {p.dtype} parameter of shape "
                    f"{tuple(p.shape)}: only real floating-point ones. Leave it out, or keep a "
                    "complex one as torch.view_as_real."
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; returns what ``closure`` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for params in self._buckets(group["params"]):
                self._update(params, group)
        return loss

    def _buckets(self, params: Iterable[Tensor]) -> Iterable[list[Tensor]]:
        """The parameters that have a gradient, by device and dtype."""
        buckets: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for p in params:
            if p.grad is None:
                continue
            if p.grad.layout != torch.strided:
                raise ConadvError(
                    f"{type(self).__name__} got a sparse gradient for a parameter of shape "
                    f"{tuple(p.shape)}. Use nn.Embedding(..., sparse=False), or give that "
                    "parameter to torch.optim.SparseAdam."
                )
            buckets.setdefault((p.device, p.dtype), []).append(p)
        return buckets.values()

    def _update(self, params: list[Tensor], group: Group) -> None:
        device, foreach = params[0].device.type, group["foreach"]
        if foreach or (foreach is None and device == "cuda"):
            self._foreach(params, group)
        elif foreach is None and device == "cpu":
            self._fused(params, group)
        else:
            for p in params:
                self._foreach([p], group)

    @abstractmethod
    def _fused(self, params: list[Tensor], group: Group) -> None: ...

    @abstractmethod
    def _foreach(self, params: list[Tensor], group: Group) -> None: ...


def grads_of(params: list[Tensor]) -> list[Tensor]:
    """The gradients of parameters that have one."""
    grads = [p.grad for p in params]
    assert all(grad is not None for grad in grads)
    return grads  # type: ignore[return-value]
