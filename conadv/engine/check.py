"""Mistakes that a training step finds when it is made, with what to do about each."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn

from conadv.attacks.space import PixelSpace
from conadv.distributed.comm import Comm
from conadv.errors import ConadvError, unknown
from conadv.nn import split_batchnorm as norm
from conadv.nn.buffers import every_parameter
from conadv.types import Method

VIEWS = ("clean", "aug", "adv")


def check_kinds(model: object, optimizer: object, method: object) -> None:
    """ConadvError for a class or a name in the place of an object."""
    wanted = {
        "an nn.Module": (model, isinstance(model, nn.Module)),
        "a Method": (method, isinstance(method, Method)),
        # Wrappers of optimizers are no torch.optim.Optimizer; a class has no param_groups.
        "an optimizer": (optimizer, hasattr(optimizer, "param_groups")),
    }
    for kind, (found, fits) in wanted.items():
        if not fits:
            raise ConadvError(f"TrainStep takes {kind}, not {found!r:.60}.")


def check_model(model: nn.Module, method: Method, adv_route: str, ranks: int) -> None:
    """ConadvError unless ``ranks`` ranks can train the model by the method."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ConadvError(
            f"The model is wrapped in {type(model).__name__}. TrainStep sums gradients over ranks "
            "itself: pass the plain model (model.module) and comm=Comm.from_environment(), in "
            "place of init_process_group."
        )
    # Sums over ranks, look-ahead and checkpoints take each rank to have all of every weight.
    for name, p in model.named_parameters():
        if hasattr(p, "placements") or getattr(p, "_fsdp_flattened", False):
            raise ConadvError(
                f"The parameter {name!r} is sharded over processes (fully_shard, FSDP, DTensor), "
                "and TrainStep needs whole weights on every rank. Pass the model before it is "
                "sharded and comm=Comm.from_environment(); or write the loop yourself: LARS, LAMB, "
                "attacks and routes take models of fully_shard."
            )
    # Not a view's name: "aug" would send the extra images through the third view's statistics.
    if adv_route not in ("adv", "clean"):
        raise unknown("adv_route", adv_route, ("adv", "clean"))
    own_route = method.route if adv_route == "adv" else None
    if own_route and method.mix == "replace" and method.share == 1 and norm.has_batchnorm(model):
        raise ConadvError(
            "With mix replace and share 1 no image goes the clean route, which evaluation uses. "
            "Take a smaller share, or adv_route clean."
        )
    # Before the first step: a missing route would show as shared statistics, or as a deadlock.
    norm.check_sync(model, ranks)
    norm.check_routes(model, [own_route] if own_route else [])


def check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, *, scheduled: bool) -> None:
    """ConadvError unless it has all parameters; ``scheduled``: at one learning rate."""
    # One schedule would overwrite what makes the groups differ.
    rates = {float(group["lr"]) for group in optimizer.param_groups}
    if scheduled and len(rates) > 1:
        raise ConadvError(
            f"lr_at sets one learning rate for all groups, which start with {sorted(rates)}."
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ConadvError("Every parameter of the model is frozen: there is nothing to train.")
    # A route that was split after the optimizer was built would never train, without a word.
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    orphans = [
        name for name, p in model.named_parameters() if p.requires_grad and id(p) not in known
    ]
    if orphans:
        raise ConadvError(
            f"The optimizer does not have {len(orphans)} parameter(s), such as {orphans[0]!r}. "
            "Split the batch norm before you build the optimizer, and give it all parameters; "
            "optimizer.add_param_group takes those of a layer that is trained from now on."
        )


def trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[int, bool]]:
    """Which parameters are trained, to notice that others are: requires_grad_, add_param_group."""
    found = [(id(p), p.requires_grad) for p in every_parameter(model)]
    return [*found, (sum(len(group["params"]) for group in optimizer.param_groups), True)]


def checked_weights(weights: Mapping[str, float]) -> dict[str, float]:
    """The weight of each view's loss."""
    for name, weight in weights.items():
        if name not in VIEWS:
            raise unknown("view in view_weights", name, VIEWS)
        if not (weight > 0 and math.isfinite(weight)):
            raise ConadvError(f"view_weights[{name!r}] = {weight} must be above 0.")
    return dict(weights)


def one_space(given: PixelSpace | None, of_method: PixelSpace | None) -> PixelSpace:
    """The normalisation, which the step and the method's attack may both name."""
    if given and of_method and given != of_method:
        raise ConadvError(
            f"The attack has {of_method}, the step {given}. Give the normalisation once."
        )
    return given or of_method or PixelSpace()


def alone(device: torch.device) -> Comm:
    """A Comm of one rank. Among several that is an error: nobody would notice it."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ConadvError(
            f"There is a process group of {dist.get_world_size()}, but TrainStep has no comm: "
            "every rank would train for itself. Pass comm=Comm.from_process_group(device), or "
            "comm=Comm(device=device) to mean just that."
        )
    return Comm(device=device)
