"""Optimizers for large batches, and the parameter groups that they need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from conadv.config.schema import OptimConfig
from conadv.errors import ConadvError
from conadv.optim.groups import DEFAULT_RULES, MODEL_RULES, Rule, describe, parameter_groups
from conadv.optim.lamb import LAMB
from conadv.optim.lars import LARS
from conadv.optim.trust_ratio import flat_alike

__all__ = [
    "DEFAULT_RULES",
    "LAMB",
    "LARS",
    "MODEL_RULES",
    "Rule",
    "build_optimizer",
    "describe",
    "parameter_groups",
]


def build_optimizer(optim: OptimConfig, groups: Sequence[dict[str, Any]], lr: float) -> Optimizer:
    """The optimizer of a resolved config over :func:`parameter_groups`, in its fastest form for the device.

    ``lr`` is the learning rate to start from (the caller's schedule and scaling rule decide it); the groups carry
    the weight decay. SGD and AdamW are torch's own and have no trust ratio, so that ``adapt`` says nothing to them.
    """
    chosen = [dict(group) for group in groups]
    not_its_own = {"name", "lr", "lr_scaling", "lr_reference_batch", "clip_norm"}  # the engine's
    settings = optim.model_dump(exclude=not_its_own, exclude_none=True)
    if optim.name == "lars":
        return LARS(chosen, lr, **settings)
    if optim.name == "lamb":
        return LAMB(chosen, lr, **settings)
    fused = _fused_on_cpu(chosen)
    optimizer = (SGD if optim.name == "sgd" else AdamW)(chosen, lr, fused=fused, **settings)
    if fused:
        optimizer.register_step_pre_hook(_prepare_fused)
    return optimizer


def _fused_on_cpu(groups: Sequence[dict[str, Any]]) -> bool | None:
    """True where torch's fused CPU kernels are safe (1.5 to 6 times as fast), None for torch's own choice."""
    params = [p for group in groups for p in group["params"]]
    return (
        True
        if all(p.device.type == "cpu" and p.is_floating_point() and flat_alike(p) for p in params)
        else None
    )


def _prepare_fused(optimizer: Optimizer, *_: object) -> None:
    """Give torch's fused CPU step what it takes for granted but does not check (seen in torch 2.14).

    It reads gradients and state in the memory order of the weights whatever their strides (wrong weights), and SGD
    stops on a parameter whose first gradient comes in a later step, as a batch-norm route's may. A zero buffer is the
    same arithmetic: 0 * momentum + gradient.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is None:
                continue
            if not flat_alike(p, p.grad):
                p.grad = _like(p, p.grad)
            state = optimizer.state[p]
            if group.get("momentum") and state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(p)
            for key, value in state.items():
                if isinstance(value, Tensor) and key != "step" and not flat_alike(p, value):
                    if value.shape != p.shape:
                        raise ConadvError(
                            f"The optimizer's {key} has the shape {tuple(value.shape)}, its parameter "
                            f"{tuple(p.shape)}: load the state of this model."
                        )
                    state[key] = _like(p, value)


def _like(p: Tensor, value: Tensor) -> Tensor:
    return torch.empty_like(p).copy_(value)
