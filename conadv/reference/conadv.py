"""Algorithm 1 of ConAdv (Liu et al., arXiv 2106.00221), plain, slow and obvious.

The paper's symbols: theta_t the weights before step t, tau the staleness, B_t the batch of step t,
x_i its images, x^_i(theta) those images attacked at theta, L the loss. One worker (K = 1),
unweighted mean of the two losses.

Where the engine keeps images and attacks ahead of time, this keeps every theta_t that there ever
was and attacks when the batch is due, so staleness is right by definition.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conadv.attacks.fgsm import FGSM
from conadv.nn.split_batchnorm import frozen_stats, route
from conadv.types import Attack


def algorithm_1(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[tuple[Tensor, Tensor]],
    attack: Attack,
    tau: int,
    draws: Callable[[int], torch.Generator],
    lookahead: bool = False,
) -> list[float]:
    """Train ``model`` (with a route "adv") on B_0, B_1, ...; returns every step's loss.

    draws(t): the attack's generator for B_t. lookahead: attack at :func:`coast` of theta_{t - tau}
    instead.
    """
    theta: list[dict[str, Tensor]] = []  # theta[t]: what an attack made at step t sees
    losses = []
    for t, (x, y) in enumerate(batches):
        seen = coast(model, optimizer, tau) if lookahead else model
        theta.append({name: p.detach().clone() for name, p in seen.named_parameters()})
        stale = t >= tau  # the first tau batches find no older weights and are attacked at theta_t
        theta_made: Mapping[str, Tensor] = (
            theta[t - tau] if stale else dict(model.named_parameters())
        )
        x_hat = attacked(model, theta_made, attack, x, y, draws(t))
        loss = F.cross_entropy(model(x), y) / 2  # main batch norm
        with route(model, "adv"):
            loss = loss + F.cross_entropy(model(x_hat), y) / 2  # adversarial batch norm
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def replaced(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[tuple[Tensor, Tensor]],
    attack: Attack,
    tau: int,
    draws: Callable[[int], torch.Generator],
    share: float,
    *,
    one_batch: bool,
) -> list[float]:
    """:func:`algorithm_1` where x^_i stands for x_i in a ``share`` of B_t, its first images.

    one_batch: one main batch norm for all images of a step, not one for each kind.
    """
    theta: list[dict[str, Tensor]] = []
    losses = []
    for t, (x, y) in enumerate(batches):
        theta.append({name: p.detach().clone() for name, p in model.named_parameters()})
        count = round(share * len(x))
        made = theta[t - tau if t >= tau else t]
        x_hat = attacked(model, made, attack, x[:count], y[:count], draws(t), one_batch)
        loss = mean_loss(model, x[count:], y[count:], x_hat, y[:count], one_batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def recycled(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[tuple[Tensor, Tensor]],
    attack: FGSM,
    share: float,
    *,
    one_batch: bool,
) -> list[float]:
    """Fresh images and those of the last step, moved by the gradient that it had by them.

    batches: the fresh images. Of the images that a step trains on, the old ones are a ``share``.
    """
    x_hat, y_hat = torch.empty(0), torch.empty(0, dtype=torch.int64)
    losses = []
    for x, y in batches:
        x = x.clone().requires_grad_()
        loss = mean_loss(model, x, y, x_hat, y_hat, one_batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert x.grad is not None
        count = round(share / (1 - share) * len(x))
        x_hat = attack.from_gradient(x.detach()[:count], x.grad[:count])
        y_hat = y[:count]
        losses.append(loss.item())
    return losses


def mean_loss(
    model: nn.Module, x: Tensor, y: Tensor, x_hat: Tensor, y_hat: Tensor, one_batch: bool
) -> Tensor:
    """The mean over all images of a step, clean and adversarial."""
    if not len(x_hat):
        return F.cross_entropy(model(x), y)
    if one_batch:
        return F.cross_entropy(model(torch.cat([x_hat, x])), torch.cat([y_hat, y]))
    loss = F.cross_entropy(model(x), y, reduction="sum")
    with route(model, "adv"):
        loss = loss + F.cross_entropy(model(x_hat), y_hat, reduction="sum")
    return loss / (len(x) + len(x_hat))


def attacked(
    model: nn.Module,
    theta: Mapping[str, Tensor],
    attack: Attack,
    x: Tensor,
    y: Tensor,
    draws: torch.Generator,
    main: bool = False,
) -> Tensor:
    """x^(theta), on a copy of the model that has the weights theta; ``main``: its batch norm."""
    attacker = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in attacker.named_parameters():
            parameter.copy_(theta[name])
    with route(attacker, "clean" if main else "adv"), frozen_stats(attacker):
        return attack(attacker, x, y, draws)


def coast(model: nn.Module, optimizer: torch.optim.Optimizer, tau: int) -> nn.Module:
    """Look-ahead by definition: the model after tau steps with zero gradients.

    Weight decay is left out, as the prediction is of what momentum alone has decided.
    """
    twin = copy.deepcopy(model)
    places: dict[Tensor, int] = {p: i for i, p in enumerate(model.parameters())}
    twins = list(twin.parameters())
    groups = [
        {**group, "params": [twins[places[p]] for p in group["params"]], "weight_decay": 0.0}
        for group in optimizer.param_groups
    ]
    coasting = type(optimizer)(groups, lr=groups[0]["lr"])  # type: ignore[call-arg]
    for p, state in optimizer.state.items():
        coasting.state[twins[places[p]]] = copy.deepcopy(state)
    for _ in range(tau if optimizer.state else 0):
        for p in twins:
            p.grad = torch.zeros_like(p)
        coasting.step()
    return twin
