"""What LARS and LAMB share: norms, the rule for zero norms, and the choice of a step's form.

A step has three forms that compute the same numbers (docs/methods/optimizers.md has measurements):

* fused: tensor by tensor through torch's fused CPU kernels, the weights still in cache from their
  norm. Default on CPU.
* foreach: one operator over all tensors of a group. Default on CUDA and for sharded parameters.
* loop: the same operators, tensor by tensor. Any device, any memory layout.

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
from conadv.optim.sharded import Spread, local_grad, refuse_flat, spread, whole_norms

Group = dict[str, Any]
Scalar = TypeVar("Scalar", float, Tensor)
Rate = float | Tensor | list[Tensor]
"""A factor for every tensor of a list: one number, or one 0-dim tensor each."""

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_HALF = (torch.float16, torch.bfloat16)
_CHOICES = {
    "adapt": (True, False),
    "foreach": (True, False, None),
    "fused": (True, False, None),
    "maximize": (True, False),
    "capturable": (True, False),
}


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


def norms(tensors: list[Tensor], where: Spread = ()) -> Tensor:
    """|x|_2 of every tensor as one float64 vector on its device; no sync point.

    ``where``: what the tensors are parts of, see :func:`conadv.optim.sharded.spread`.
    """
    # On CUDA few kernels count, on the CPU the accuracy of sums over rows.
    if tensors[0].is_cuda:
        dtype = torch.float32 if tensors[0].dtype in _HALF else None
        each: Any = torch._foreach_norm(tensors, 2, dtype)
    else:
        each = [norm_tensor(x) for x in tensors]
    return whole_norms(torch.stack(each).double(), where)


def trust_ratio(
    w_norm: Scalar, other_norm: Scalar, formula: Callable[[Scalar, Scalar], Scalar]
) -> Scalar:
    """``formula(w_norm, other_norm)``, or 1 where either norm is 0; numbers or vectors of norms."""
    # A tensor that starts at zero would never move with a ratio of 0.
    if isinstance(w_norm, Tensor):
        return torch.where((w_norm > 0) & (other_norm > 0), formula(w_norm, other_norm), 1.0)
    return formula(w_norm, other_norm) if w_norm > 0 and other_norm > 0 else 1.0


def at_most(value: Scalar, high: float) -> Scalar:
    """min(value, high) for a number or a vector."""
    return value.clamp(max=high) if isinstance(value, Tensor) else min(value, high)


def per_tensor(rate: float | Tensor) -> Rate:
    """A vector of rates as one 0-dim tensor per parameter; a single rate stays what it is."""
    return list(rate.unbind()) if isinstance(rate, Tensor) and rate.dim() else rate


def flat_alike(*tensors: Tensor) -> bool:
    """Whether element i in memory is the same element of all tensors.

    torch's fused CPU kernels take that for granted: they look neither at strides, and give wrong
    weights where gradient and weight differ in them, nor at shapes, and read and write beyond the
    end of the smaller one.
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
    """The skeleton of LARS and LAMB: an ordinary ``torch.optim.Optimizer``, option ``adapt`` added.

    Ranks: reads ``p.grad``, which the caller has averaged; reduces nothing itself but the norms of
    sharded parameters.
    In flight: a step writes the parameters and its own state; gradients are only read.
    """

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, {**options, "adapt": True})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Version 0.1 and other programs saved fewer options: those are this optimizer's own."""
        super().__setstate__(state)
        # Only these: torch itself adds to the defaults here, and a saved state must not grow by it.
        for group in self.param_groups:
            for name in _CHOICES:
                group.setdefault(name, self.defaults[name])
            self._check(group)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group as torch does. Raises ConadvError that names a wrong option."""
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
        except ConadvError:
            self.param_groups.pop()  # torch has added it already
            raise

    def _check(self, group: Group) -> None:
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ConadvError(f"lr has {lr.numel()} elements: Tensor lr must be 1-element.")
        check_number("lr", lr.item() if isinstance(lr, Tensor) else lr, 0)
        check_number("weight_decay", group["weight_decay"], 0)
        for name, allowed in _CHOICES.items():
            if not any(group[name] is value for value in allowed):
                choices = ", ".join(map(str, allowed))
                raise ConadvError(f"{name} = {group[name]!r}: give one of {choices}.")
        kind = type(self).__name__
        for p in group["params"]:
            refuse_flat(p, kind)
            if not p.is_floating_point():
                raise ConadvError(
                    f"{kind} cannot train a {p.dtype} parameter of shape {tuple(p.shape)}: only "
                    "real floating-point ones. Leave it out, or keep a complex one as "
                    "torch.view_as_real."
                )
            if group["fused"] and (
                group["foreach"] or group["capturable"] or p.device.type != "cpu" or spread(p)
            ):
                raise ConadvError(
                    "fused=True is the form for whole parameters on the CPU, without foreach or "
                    "capturable. Leave it out: the default is the fastest form."
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; returns what ``closure`` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            options = group
            # Read once per group, not per tensor. The group keeps it, for schedulers to fill.
            if isinstance(group["lr"], Tensor) and not group["capturable"]:
                options = {**group, "lr": group["lr"].item()}
            for (device, _, where), params in self._buckets(group["params"]).items():
                self._update(params, options, device.type, where)
        return loss

    def _buckets(self, params: Iterable[Tensor]) -> dict[Any, list[Tensor]]:
        """The parameters that have a gradient, by (device, dtype, where their parts lie)."""
        buckets: dict[Any, list[Tensor]] = {}
        for p in params:
            if p.grad is None:
                continue
            if p.grad.layout != torch.strided:
                raise ConadvError(
                    f"{type(self).__name__} got a sparse gradient for a parameter of shape "
                    f"{tuple(p.shape)}. Use nn.Embedding(..., sparse=False), or give that "
                    "parameter to torch.optim.SparseAdam."
                )
            # Foreach operators take one device and dtype, and one message sums one set of shards.
            buckets.setdefault((p.device, p.dtype, spread(p)), []).append(p)
        return buckets

    def _update(self, params: list[Tensor], group: Group, device: str, where: Spread) -> None:
        # The fused form reads norms on the host, one by one, so it is neither for CUDA graphs nor
        # for sharded parameters, where each norm would be a message.
        together = device == "cuda" or group["capturable"] or bool(where)
        fused, foreach = group["fused"], group["foreach"]
        if foreach or (foreach is None and together):
            self._foreach(params, group, where)
        elif foreach is None and fused is not False and device == "cpu":
            self._fused(params, group)
        else:
            for p in params:
                self._foreach([p], group, where)

    @abstractmethod
    def _fused(self, params: list[Tensor], group: Group) -> None: ...

    @abstractmethod
    def _foreach(self, params: list[Tensor], group: Group, where: Spread = ()) -> None: ...


def grads_of(params: list[Tensor], group: Group) -> list[Tensor]:
    """The gradients to descend, this process's parts of them."""
    # Negated copies where the loss is to rise: gradients belong to the caller, who may log them.
    grads = [local_grad(p) for p in params]
    return list(torch._foreach_neg(grads)) if group["maximize"] else grads
