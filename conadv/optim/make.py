"""Building an optimizer by its name."""

from __future__ import annotations

from collections.abc import Sequence
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from conadv.errors import ConadvError, unknown
from conadv.optim import OPTIMIZERS
from conadv.optim.sharded import spread
from conadv.optim.trust_ratio import flat_alike


def build_optimizer(
    name: str, groups: Sequence[dict[str, Any]], lr: float, **settings: Any
) -> Optimizer:
    """The optimizer ``name`` of the table, in its fastest form for the device.

    ``groups``: of :func:`parameter_groups`, which carry the weight decay. ``lr``: the learning rate
    to start from (the caller's schedule decides it). ``settings``: those of the table's row; one
    that is left out, or None, takes its default there. Raises ConadvError for an unknown name.
    """
    if name not in OPTIMIZERS:
        raise unknown("optimizer", name, OPTIMIZERS)
    row = OPTIMIZERS[name]
    kind = resolve_name(row.target)
    chosen, options = [dict(group) for group in groups], row.complete(settings)
    if kind not in (SGD, AdamW):
        optimizer: Optimizer = kind(chosen, lr, **options)
        return optimizer
    # torch's fused CPU kernels are 1.5 to 6 times as fast; None is torch's own choice
    fused = all(_fusable(p) for group in chosen for p in group["params"]) or None
    optimizer = kind(chosen, lr, fused=fused, **options)
    if fused:
        optimizer.register_step_pre_hook(_prepare_fused)
    return optimizer


def _fusable(p: Tensor) -> bool:
    return p.device.type == "cpu" and p.is_floating_point() and not spread(p) and flat_alike(p)


def _prepare_fused(optimizer: Optimizer, *_: object) -> None:
    """Give torch's fused CPU step what it takes for granted but does not check (torch 2.14).

    It reads gradients and state in the memory order of the weights whatever their strides (wrong
    weights), and SGD stops on a parameter whose first gradient comes in a later step, as a
    batch-norm route's may. A zero buffer is the same arithmetic: 0 * momentum + gradient.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is None:
                continue
            if not flat_alike(p, p.grad):
                p.grad = torch.empty_like(p).copy_(p.grad)
            state = optimizer.state[p]
            if group.get("momentum") and state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(p)
            for key, value in state.items():
                if isinstance(value, Tensor) and key != "step" and not flat_alike(p, value):
                    if value.shape != p.shape:
                        raise ConadvError(
                            f"The optimizer's {key} has the shape {tuple(value.shape)}, its "
                            f"parameter {tuple(p.shape)}: load the state of this model."
                        )
                    state[key] = torch.empty_like(p).copy_(value)
