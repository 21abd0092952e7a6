"""LAMB: Adam's direction, scaled per tensor by |w| / |direction|.

You, Li, Reddi et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes",
arXiv 1904.00962, Algorithm 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from conadv.errors import ConadvError
from conadv.optim.sharded import Spread, local
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
    trust_ratio,
)

_FUSED: Any = {"fused": True, "amsgrad": False}


def lamb_ratio(w_norm: Scalar, u_norm: Scalar) -> Scalar:
    """|w| / |u|, or 1 where either is 0."""
    return trust_ratio(w_norm, u_norm, lambda w, u: w / u)


class LAMB(TrustRatioOptimizer):
    """Adam with decoupled weight decay whose step is as long as the weights, per tensor.

    With w weights, g gradient, t the number of this update, counted from 1 for each parameter::

        m <- beta1 * m + (1 - beta1) * g            s <- beta2 * s + (1 - beta2) * g^2
        u = (m / (1 - beta1^t)) / (sqrt(s / (1 - beta2^t)) + eps) + weight_decay * w
        w <- w - lr * |w| / |u| * u                               factor 1 if |w| or |u| is 0

    phi of the paper is the identity; no global gradient clip is hidden inside (clip before the step
    if wanted).

    Args:
        params: tensors, or groups as torch takes them (:func:`conadv.parameter_groups` makes them).
        lr: learning rate, >= 0. Schedulers write ``group["lr"]``.
        betas: each in [0, 1).
        eps: >= 0, added to the root.
        weight_decay: >= 0.
        foreach, fused: None takes the fastest form for the device. ``foreach=True`` forces one
            operator over all tensors, ``fused=True`` the fused kernels (CPU); False rules one out.
        maximize: ascend.
        capturable: read nothing back, for CUDA graphs; then ``lr`` is a tensor on the device, which
            a scheduler fills.
    Any of them, and ``adapt`` (default True), can be set per group; ``adapt=False`` leaves the
    factor at 1.

    State: ``exp_avg`` (m) and ``exp_avg_sq`` (s) like the parameter; ``step`` (t), a float32 0-dim
    tensor, on the CPU unless ``capturable``.
    Memory: on CPU one scratch tensor as large as the largest parameter; with foreach a copy of the
    group and a half.
    Raises: ConadvError for bad options, sparse gradients and parameters that are not real
    floating-point.
    Reduces to: AdamW with ``adapt=False``.
    Source: arXiv 1904.00962, Algorithm 2.
    """

    _scratch: dict[torch.dtype, Tensor]

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        rates = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        forms = {"foreach": foreach, "fused": fused, "capturable": capturable}
        self._scratch = {}
        super().__init__(params, maximize=maximize, **rates, **forms)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._scratch = {}
        for group in self.param_groups:
            for p in group["params"]:
                if "step" in self.state.get(p, ()):  # other programs save a number, or on the GPU
                    self.state[p]["step"] = self._counter(p, group).copy_(
                        torch.as_tensor(self.state[p]["step"])
                    )

    def _check(self, group: Group) -> None:
        if not isinstance(group["betas"], (tuple, list)) or len(group["betas"]) != 2:
            raise ConadvError(f"betas = {group['betas']!r}: give two numbers in [0, 1).")
        for i, beta in enumerate(group["betas"]):
            check_number(f"betas[{i}]", beta, 0, 1)
        check_number("eps", group["eps"], 0)
        super()._check(group)

    def _counter(self, p: Tensor, group: Group) -> Tensor:
        # On the host, so that 1 - beta^t is known without waiting for the device; a CUDA graph can
        # count only on the device.
        where = p.device if group["capturable"] else torch.device("cpu")
        return torch.zeros((), dtype=torch.float32, device=where)

    def _moments(self, params: list[Tensor], group: Group) -> list[list[Tensor]]:
        """[exp_avg, exp_avg_sq, step] of all parameters, this process's parts of them."""
        for p in params:
            # Counted for each parameter: a batch-norm route gets its first gradient later.
            if not self.state[p]:
                self.state[p]["step"] = self._counter(p, group)
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        names = ("exp_avg", "exp_avg_sq", "step")
        return [[local(self.state[p][name]) for p in params] for name in names]

    def _fused(self, params: list[Tensor], group: Group) -> None:
        """Per tensor one pass of Adam's kernel.

        The kernel subtracts lr times Adam's direction from its target.
        """
        together = []
        m, s, _ = self._moments(params, group)
        for p, *moments in zip(params, m, s, strict=True):
            assert p.grad is not None
            if not flat_alike(p, p.grad, *moments):
                self._foreach([p], group)
            elif group["adapt"]:
                # with lr = -1 and weight_decay * w as its target, the kernel leaves u there
                u = torch.mul(p, group["weight_decay"], out=self._scratch_like(p))
                self._adam_kernel([u], [p], group, lr=-1.0, decay=0.0)
                p.add_(u, alpha=-group["lr"] * lamb_ratio(norm(p), norm(u)))
            else:
                together.append(p)
        if together:  # without a ratio one call serves all tensors
            lr, decay = group["lr"], group["weight_decay"]
            self._adam_kernel(together, together, group, lr=lr, decay=decay)

    def _scratch_like(self, p: Tensor) -> Tensor:
        """Memory that all tensors share, so that it stays in cache, in the layout of p."""
        scratch = self._scratch.get(p.dtype)
        if scratch is None or scratch.numel() < p.numel():
            scratch = self._scratch[p.dtype] = p.new_empty(p.numel())
        return scratch.as_strided(p.size(), p.stride())

    def _adam_kernel(
        self, targets: list[Tensor], params: list[Tensor], group: Group, lr: float, decay: float
    ) -> None:
        """Advance the moments of ``params`` and subtract lr times their direction from targets."""
        m, s, steps = self._moments(params, group)
        (beta1, beta2), eps = group["betas"], group["eps"]
        rates = {"lr": lr, "weight_decay": decay, "eps": eps, "beta1": beta1, "beta2": beta2}
        grads: Any = [p.grad for p in params]
        adamw(targets, grads, m, s, [], steps, maximize=group["maximize"], **rates, **_FUSED)

    def _foreach(self, params: list[Tensor], group: Group, where: Spread = ()) -> None:
        (beta1, beta2), grads = group["betas"], grads_of(params, group)
        weights, (m, s, steps) = [local(p) for p in params], self._moments(params, group)
        torch._foreach_add_(steps, 1)
        capturable = group["capturable"]
        counts: Any = torch.stack(steps).double().unbind() if capturable else map(float, steps)
        counts = list(counts)
        first, second = ([1 - beta**t for t in counts] for beta in group["betas"])
        # The operators and their order are those of torch's AdamW, so that adapt=False is AdamW.
        torch._foreach_lerp_(m, grads, 1 - beta1)
        torch._foreach_mul_(s, beta2)
        torch._foreach_addcmul_(s, grads, grads, 1 - beta2)
        roots: Any = torch._foreach_div(s, second)
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, group["eps"])
        updates: Any = torch._foreach_div(m, roots)
        torch._foreach_div_(updates, first)
        torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
        rate: Rate = group["lr"]
        if group["adapt"]:
            ratios = lamb_ratio(norms(weights, where), norms(list(updates), where))
            rate = per_tensor(group["lr"] * ratios)
        torch._foreach_mul_(updates, rate)
        torch._foreach_sub_(weights, updates)
