"""LARS, layer-wise adaptive rate scaling: five formulas in use (conadv/reference/lars.py).

You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks", arXiv 1708.03888,
Algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import sgd

from conadv.errors import unknown
from conadv.optim import OPTIMIZERS
from conadv.optim.sharded import Spread, local
from conadv.optim.trust_ratio import (
    Group,
    Scalar,
    TrustRatioOptimizer,
    at_most,
    check_number,
    flat_alike,
    grads_of,
    norm,
    norms,
    per_tensor,
    trust_ratio,
)


@dataclass(frozen=True)
class Variant:
    """One LARS formula: where lr and the trust ratio stand, and what is limited.

    ``*_inside``: the factor multiplies the gradient on its way into the
    momentum buffer; otherwise it multiplies the buffer on its way to the weights.
    """

    lr_inside: bool
    ratio_inside: bool
    decay_in_ratio: bool = True
    clip_to_lr: bool = False
    max_ratio: float | None = None
    max_gradient: float | None = None

    def ratio(self, w_norm: Scalar, g_norm: Scalar, group: Group) -> Scalar:
        """The trust ratio of norms of weights and gradients (numbers, or vectors over tensors)."""
        decay = group["weight_decay"] if self.decay_in_ratio else 0.0
        lr, eta, eps = group["lr"], group["trust_coefficient"], group["eps"]

        def formula(w: Scalar, g: Scalar) -> Any:
            ratio: Any = eta * w / (g + decay * w + eps)
            if self.clip_to_lr:  # at lr = 0 the limit of min(ratio / lr, 1) is 1
                if isinstance(lr, Tensor):
                    ratio = torch.where(lr > 0, ratio / lr, 1.0)
                else:
                    ratio = ratio / lr if lr > 0 else ratio * 0 + 1.0
                ratio = at_most(ratio, 1.0)
            return ratio if self.max_ratio is None else at_most(ratio, self.max_ratio)

        return trust_ratio(w_norm, g_norm, formula)

    def rates(self, lr: float, ratio: Any) -> tuple[Any, Any]:
        """The factors (into the buffer, out of the buffer); their product is lr * ratio."""
        inside = (lr if self.lr_inside else 1.0) * (ratio if self.ratio_inside else 1.0)
        outside = (1.0 if self.lr_inside else lr) * (1.0 if self.ratio_inside else ratio)
        return inside, outside


VARIANTS = {
    "tf": Variant(lr_inside=True, ratio_inside=True),
    "timm": Variant(lr_inside=False, ratio_inside=True),
    "nus": Variant(lr_inside=False, ratio_inside=False, max_ratio=50.0, max_gradient=10.0),
    "larc": Variant(lr_inside=False, ratio_inside=True, clip_to_lr=True),
    "no-wd-ratio": Variant(lr_inside=True, ratio_inside=True, decay_in_ratio=False),
}

# The fused kernel takes 1 - rate in double, off by up to 1.1e-16: for rates from here on that is
# 1e-8 of the rate, less than float32 rounds. Smaller rates, and float64 parameters, take the loop
# form.
_SMALLEST_FUSED_RATE = 1e-8

_FUSED: Any = {"fused": True, "foreach": False, "nesterov": False}


class LARS(TrustRatioOptimizer):
    """SGD with momentum whose learning rate is scaled per tensor by |w| / |gradient|.

    ``variant="tf"`` (TensorFlow, MLPerf), with w weights, g gradient, v the momentum buffer::

        ratio = trust_coefficient * |w| / (|g| + weight_decay * |w| + eps)     1 if |w| or |g| is 0
        v <- momentum * v + lr * ratio * (g + weight_decay * w)
        w <- w - v

    Other variants: "timm" (ratio inside v, lr outside), "larc" ("timm" with ratio limited to
    min(ratio / lr, 1)), "nus" (lr and ratio outside, ratio at most 50, decayed gradient clamped to
    +-10), "no-wd-ratio" ("tf" without weight decay in the ratio). "timm" has no clip of its own
    here: that is "larc".

    Args:
        params: tensors, or groups as torch takes them (:func:`conadv.parameter_groups` makes them).
        lr: learning rate, >= 0. Schedulers write ``group["lr"]``.
        momentum: mu, in [0, 1).
        weight_decay: >= 0, added to the gradient.
        trust_coefficient: eta, >= 0.
        eps: >= 0; None takes the variant's own (1e-8 for "timm" and "larc", else 0).
        foreach, fused: None takes the fastest form for the device. ``foreach=True`` forces one
            operator over all tensors, ``fused=True`` the fused kernels (CPU); False rules one out.
        maximize: ascend.
        capturable: read nothing back, for CUDA graphs; then ``lr`` is a tensor on the device, which
            a scheduler fills.
    Any of them, and ``adapt`` (default True), can be set per group. ``adapt=False`` leaves the
    ratio at 1 (the raw lr); with ``weight_decay=0`` it is meant for norm and bias parameters.

    State: ``state[p]["momentum_buffer"]``, v, like the parameter, sharded as it is.
    Raises: ConadvError for bad options, sparse gradients and parameters that are not real
    floating-point.
    Reduces to: torch's SGD with ``adapt=False`` under a constant lr.
    Source: arXiv 1708.03888, Algorithm 1; the variants' sources are in docs/methods/optimizers.md.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        *,
        momentum: float = 0.9,
        weight_decay: float = 5e-5,
        trust_coefficient: float = 0.001,
        eps: float | None = None,
        variant: str = "tf",
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        formula = {"eps": eps, "variant": variant, "trust_coefficient": trust_coefficient}
        rates = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        forms = {"foreach": foreach, "fused": fused, "capturable": capturable}
        super().__init__(params, maximize=maximize, **rates, **formula, **forms)

    def _check(self, group: Group) -> None:
        if group["variant"] not in VARIANTS:
            raise unknown("LARS variant", str(group["variant"]), VARIANTS)
        if group["eps"] is None:
            group["eps"] = OPTIMIZERS["lars"].complete({"variant": group["variant"]})["eps"]
        check_number("momentum", group["momentum"], 0, 1)
        check_number("trust_coefficient", group["trust_coefficient"], 0)
        check_number("eps", group["eps"], 0)
        super()._check(group)

    def _buffers(self, params: list[Tensor]) -> list[Tensor]:
        for p in params:
            if self.state[p].get("momentum_buffer") is None:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return [self.state[p]["momentum_buffer"] for p in params]

    def _fused(self, params: list[Tensor], group: Group) -> None:
        """Norms of one tensor, then its update in a single pass while it is in cache."""
        variant = VARIANTS[group["variant"]]
        together: list[tuple[Tensor, ...]] = []
        fits = group["momentum"] > 0 and variant.max_gradient is None
        fits = fits and params[0].dtype != torch.float64
        for p, v in zip(params, self._buffers(params), strict=True):
            assert p.grad is not None
            triple = p, p.grad, v
            # The kernel has no clamp, dampens nothing at momentum 0, and its 1 - (1 - rate) costs
            # float64 digits.
            if not (fits and flat_alike(*triple)):
                self._foreach([p], group)
            elif group["adapt"]:
                ratio = variant.ratio(norm(p), norm(p.grad), group)
                self._sgd_kernel([triple], group, *variant.rates(group["lr"], ratio))
            else:
                together.append(triple)
        if together:  # without a ratio one call serves all tensors
            self._sgd_kernel(together, group, *variant.rates(group["lr"], 1.0))

    def _sgd_kernel(
        self, triples: list[tuple[Tensor, ...]], group: Group, inside: float, outside: float
    ) -> None:
        """In one pass: v <- momentum * v + inside * (g + weight_decay * w), w <- w - outside * v.

        ``triples``: (w, g, v) of each tensor.
        """
        params, grads, buffers = map(list, zip(*triples, strict=True))
        if inside < _SMALLEST_FUSED_RATE:
            self._foreach(params, group)
            return
        # SGD's v <- mu v + (1 - dampening) g is LARS's with the rate as 1 - dampening.
        rates = {name: group[name] for name in ("weight_decay", "momentum", "maximize")}
        sgd(params, grads, buffers, lr=outside, dampening=1.0 - inside, **rates, **_FUSED)  # type: ignore[arg-type]

    def _foreach(self, params: list[Tensor], group: Group, where: Spread = ()) -> None:
        variant, buffers = VARIANTS[group["variant"]], [local(v) for v in self._buffers(params)]
        weights, grads = [local(p) for p in params], grads_of(params, group)
        ratios: float | Tensor = 1.0
        if group["adapt"]:
            ratios = variant.ratio(norms(weights, where), norms(grads, where), group)
        inside, outside = map(per_tensor, variant.rates(group["lr"], ratios))
        # The only copy: what follows is in place, in the order that the loop form has.
        updates: Any = torch._foreach_add(grads, weights, alpha=group["weight_decay"])
        if variant.max_gradient is not None:
            torch._foreach_clamp_min_(updates, -variant.max_gradient)
            torch._foreach_clamp_max_(updates, variant.max_gradient)
        torch._foreach_mul_(updates, inside)
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, updates)
        # "tf" has everything inside: that saves a copy of the weights
        if not (isinstance(outside, float) and outside == 1.0):
            buffers = torch._foreach_mul(buffers, outside)  # type: ignore[assignment, arg-type]
        torch._foreach_sub_(weights, buffers)
