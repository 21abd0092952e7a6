"""LAMB: Adam's direction, scaled per tensor by |w| / |direction| (plain form: conadv/reference/lamb.py).

You, Li, Reddi et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", arXiv 1904.00962,
Algorithm 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from conadv.errors import ConadvError
from conadv.optim.trust_ratio import (
    Group,
    Rate,
    Scalar,
    TrustRatioOptimizer,
    check_number,
    flat_alike,
    grads_of,
    norm,
    norms,
    per_tensor,
    spread,
    trust_ratio,
)


def lamb_ratio(w_norm: Scalar, u_norm: Scalar) -> Scalar:
    """|w| / |u|, or 1 where either is 0."""
    return trust_ratio(w_norm, u_norm, lambda w, u: w / u)


class LAMB(TrustRatioOptimizer):
    """Adam with decoupled weight decay whose step is as long as the weights, per tensor.

    With w weights, g gradient, t the number of this update, counted from 1 for each parameter::

        m <- beta1 * m + (1 - beta1) * g            s <- beta2 * s + (1 - beta2) * g^2
        u = (m / (1 - beta1^t)) / (sqrt(s / (1 - beta2^t)) + eps) + weight_decay * w
        w <- w - lr * |w| / |u| * u                                            factor 1 if |w| or |u| is 0

    phi of the paper is the identity; no global gradient clip is hidden inside (clip before the step if wanted).

    Args:
        params: tensors, or groups as torch takes them (:func:`conadv.parameter_groups` makes them).
        lr: learning rate, >= 0. Schedulers write ``group["lr"]``.
        betas: each in [0, 1).
        eps: >= 0, added to the root.
        weight_decay: >= 0.
        foreach: None takes the fastest form for the device, True and False force foreach and loop.
    Any of them, and ``adapt`` (default True), can be set per group; ``adapt=False`` leaves the factor at 1.

    State: ``exp_avg`` (m) and ``exp_avg_sq`` (s) like the parameter; ``step`` (t), a float32 0-dim tensor on the CPU.
    Memory: on CPU one scratch tensor as large as the largest parameter; with foreach a copy of the group and a half.
    Raises: ConadvError for bad options, sparse gradients and parameters that are not real floating-point.
    Reduces to: AdamW with ``adapt=False``.
    Source: arXiv 1904.00962, Algorithm 2.
    """

    _scratch: dict[torch.dtype, Tensor]

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "adapt": True,
        }
        self._scratch = {}
        super().__init__(params, {**defaults, "foreach": foreach})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._scratch = {}
        for values in (
            self.state.values()
        ):  # a checkpoint loaded onto a GPU would make every step wait for it
            values["step"] = values["step"].cpu()

    def _check(self, group: Group) -> None:
        if not isinstance(group["betas"], (tuple, list)) or len(group["betas"]) != 2:
            raise ConadvError(f"betas = {group['betas']!r}: give two numbers in [0, 1).")
        for i, beta in enumerate(group["betas"]):
            check_number(f"betas[{i}]", beta, 0, 1)
        check_number("eps", group["eps"], 0)
        super()._check(group)

    def _moments(self, params: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """exp_avg, exp_avg_sq and step of each parameter."""
        for p in params:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32)
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        states = [self.state[p] for p in params]
        return (
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [s["step"] for s in states],
        )

    def _fused(self, params: list[Tensor], group: Group) -> None:
        """Adam's kernel run on a scratch tensor that holds weight_decay * w leaves u there, in one pass."""
        moments = zip(*self._moments(params), strict=True)
        fusable: list[Tensor] = []
        for p, g, (m, s, _) in zip(params, grads_of(params), moments, strict=True):
            if not flat_alike(p, g, m, s):
                self._loop([p], group)
            elif group["adapt"]:
                self._fused_tensor(p, group)
            else:
                fusable.append(p)
        if fusable:
            self._adam_kernel(
                fusable, fusable, group, lr=group["lr"], decoupled_decay=group["weight_decay"]
            )

    def _fused_tensor(self, p: Tensor, group: Group) -> None:
        u = torch.mul(p, group["weight_decay"], out=self._scratch_like(p))
        self._adam_kernel(
            [u], [p], group, lr=-1.0, decoupled_decay=0.0
        )  # "subtracts" -1 times the direction
        p.add_(u, alpha=-group["lr"] * lamb_ratio(norm(p), norm(u)))

    def _scratch_like(self, p: Tensor) -> Tensor:
        """Memory that all tensors share, so that it stays in cache, in the layout of p."""
        scratch = self._scratch.get(p.dtype)
        if scratch is None or scratch.numel() < p.numel():
            scratch = self._scratch[p.dtype] = torch.empty(
                p.numel(), dtype=p.dtype, device=p.device
            )
        return scratch.as_strided(p.size(), p.stride())

    def _adam_kernel(
        self,
        targets: list[Tensor],
        params: list[Tensor],
        group: Group,
        *,
        lr: float,
        decoupled_decay: float,
    ) -> None:
        """Advance the moments of ``params`` and subtract lr times Adam's direction from ``targets``."""
        exp_avgs, exp_avg_sqs, steps = self._moments(params)
        adamw(
            targets,
            grads_of(params),
            exp_avgs,
            exp_avg_sqs,
            [],
            steps,
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=lr,
            weight_decay=decoupled_decay,
            eps=group["eps"],
            maximize=False,
        )

    def _corrections(self, steps: list[Tensor], group: Group) -> tuple[list[float], list[float]]:
        """Count the update, and return 1 - beta^t per parameter (the counters live on the host)."""
        torch._foreach_add_(steps, 1)
        first, second = ([1 - beta ** t.item() for t in steps] for beta in group["betas"])
        return first, second

    def _loop(self, params: list[Tensor], group: Group) -> None:
        beta1, beta2 = group["betas"]
        moments = self._moments(params)
        corrections = zip(*self._corrections(moments[2], group), strict=True)
        for p, g, m, s, (c1, c2) in zip(
            params, grads_of(params), *moments[:2], corrections, strict=True
        ):
            m.lerp_(g, 1 - beta1)
            s.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            u = m.div((s / c2).sqrt_().add_(group["eps"])).div_(c1)
            u.add_(p, alpha=group["weight_decay"])
            (rate,) = spread(self._rates([p], [u], group), 1)
            p.sub_(u.mul_(rate))

    def _foreach(self, params: list[Tensor], group: Group) -> None:
        (beta1, beta2), grads = group["betas"], grads_of(params)
        exp_avgs, exp_avg_sqs, steps = self._moments(params)
        corrections1, corrections2 = self._corrections(steps, group)
        torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
        torch._foreach_mul_(exp_avg_sqs, beta2)
        torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
        roots: Any = torch._foreach_div(exp_avg_sqs, corrections2)
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, group["eps"])
        updates: Any = torch._foreach_div(exp_avgs, roots)
        torch._foreach_div_(updates, corrections1)
        torch._foreach_add_(updates, params, alpha=group["weight_decay"])
        torch._foreach_mul_(updates, self._rates(params, list(updates), group))
        torch._foreach_sub_(params, updates)

    def _rates(self, params: list[Tensor], updates: list[Tensor], group: Group) -> Rate:
        if not group["adapt"]:
            return float(group["lr"])
        return per_tensor(group["lr"] * lamb_ratio(norms(params), norms(updates)))
