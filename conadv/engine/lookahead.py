"""Look-ahead: the weights that the next updates will reach, predicted from what is known before step t's gradient is.

An attack at a prediction waits for nothing. The coming gradients are taken to be zero, so what is left is the part of
the next tau updates that momentum has already decided. With the learning rate inside the momentum buffer (LARS "tf"):

    v_{t+1} = mu v_t + u_t,   theta_{t+1} = theta_t - v_{t+1}
    theta_{t+tau} ~ theta_t - (mu + ... + mu^tau) v_t

The same definition, "what the optimizer does with zero gradients and no weight decay", gives the closed forms below
for SGD, LARS with the learning rate outside, Adam(W) and LAMB. Any other optimizer, SGD or LARS without momentum, and
LARS "nus" (its ratio is outside the buffer) get the last update once more for every step,
theta_t + tau (theta_t - theta_{t-1}); the staleness probe measures that for all of them ("last-update").

Learning rates of the coming steps are the schedule's.

Our own addition to ConAdv; predicting stale weights by momentum goes back to SpecTrain (Chen et al., arXiv 1809.02839).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from conadv.engine.validate import check_keys, check_like
from conadv.errors import unknown
from conadv.optim.lamb import LAMB
from conadv.optim.lars import LARS, VARIANTS

Group = dict[str, Any]
Lrs = Sequence[float]
PREDICTORS = ("momentum", "last-update")
_WHAT = "its look-ahead"
Advance = Callable[[Tensor, Tensor, dict[str, Any], Group, Lrs], None]
"""(out, parameter, optimizer state of the parameter, its group, lr of each coming step): write the prediction."""


def _along_buffer(out: Tensor, p: Tensor, state: dict[str, Any], factor: float) -> None:
    buffer = state.get("momentum_buffer")
    if buffer is None:
        out.copy_(p)
    else:
        torch.add(p, buffer, alpha=-factor, out=out)


def _sgd(out: Tensor, p: Tensor, state: dict[str, Any], group: Group, lrs: Lrs) -> None:
    """theta - sum_k lr_k mu^k b; Nesterov steps along mu b_{k+1} once more: one more factor mu."""
    mu = group["momentum"]
    extra = 1 if group["nesterov"] else 0
    _along_buffer(out, p, state, sum(lr * mu ** (k + extra) for k, lr in enumerate(lrs, 1)))


def _lars(out: Tensor, p: Tensor, state: dict[str, Any], group: Group, lrs: Lrs) -> None:
    """Learning rate inside the buffer: theta - sum_k mu^k v; outside: as SGD."""
    mu, inside = group["momentum"], VARIANTS[group["variant"]].lr_inside
    _along_buffer(
        out, p, state, sum((1.0 if inside else lr) * mu**k for k, lr in enumerate(lrs, 1))
    )


def _adam_directions(state: dict[str, Any], group: Group, num_steps: int) -> Iterator[Tensor]:
    """The bias-corrected Adam direction of each coming step when both moments only decay."""
    m, v = state["exp_avg"], state["exp_avg_sq"]
    done = state["step"].double()  # stays where it is: reading it back would wait for a CUDA device
    beta1, beta2 = group["betas"]
    for k in range(1, num_steps + 1):
        m_hat = m * (beta1**k / (1 - beta1 ** (done + k)))
        v_hat = v * (beta2**k / (1 - beta2 ** (done + k)))
        yield m_hat.div_(v_hat.sqrt_().add_(group["eps"]))


def _adam(out: Tensor, p: Tensor, state: dict[str, Any], group: Group, lrs: Lrs) -> None:
    out.copy_(p)
    if "exp_avg" in state:
        for lr, direction in zip(lrs, _adam_directions(state, group, len(lrs)), strict=True):
            out.sub_(direction.mul_(lr))


def _lamb(out: Tensor, p: Tensor, state: dict[str, Any], group: Group, lrs: Lrs) -> None:
    out.copy_(p)
    if "exp_avg" not in state:
        return
    for lr, direction in zip(lrs, _adam_directions(state, group, len(lrs)), strict=True):
        w_norm, u_norm = out.norm(), direction.norm()
        ratio = torch.where((w_norm > 0) & (u_norm > 0), w_norm / u_norm, 1.0)
        out.sub_(direction.mul_(ratio * lr if group["adapt"] else lr))


def _advance_for(optimizer: torch.optim.Optimizer) -> Advance | None:
    """The closed form for an optimizer, None where there is none or no momentum to go by."""
    forms: tuple[tuple[type, Advance], ...] = (
        (LARS, _lars),
        (LAMB, _lamb),
        (torch.optim.SGD, _sgd),
        (torch.optim.Adam, _adam),  # AdamW is a subclass
    )
    groups = optimizer.param_groups
    if isinstance(optimizer, (torch.optim.SGD, LARS)) and not all(
        group["momentum"] > 0 for group in groups
    ):
        return None
    if isinstance(optimizer, LARS) and not all(
        VARIANTS[group["variant"]].ratio_inside for group in groups
    ):
        return None  # the ratio of a gradient that is not known yet would scale the whole step
    plain = not any(g.get("maximize") or g.get("amsgrad") for g in groups)
    return next((form for kind, form in forms if plain and isinstance(optimizer, kind)), None)


class LookAhead:
    """Predicts the parameters of a model some updates ahead into a buffer of its own.

    ``lr_at``: the schedule, asked for the coming steps; None takes each group's present learning rate for all.
    ``predictor``: "momentum", or "last-update" also where momentum has a closed form. ``keep``: a prediction leaves
    the remembered weights as they are, so that one may follow another between two updates; repeating the last update
    then needs a second copy of the parameters.

    Raises ConadvError for an unknown predictor. Ranks: nothing is reduced; weights and optimizer state are the same on
    all learners, so predictions are.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        lr_at: Callable[[int], float] | None = None,
        predictor: str = "momentum",
        *,
        keep: bool = False,
    ) -> None:
        if predictor not in PREDICTORS:
            raise unknown("predictor", predictor, PREDICTORS)
        self._names: dict[Tensor, str] = {
            p: name for name, p in model.named_parameters() if p.requires_grad
        }
        self._optimizer = optimizer
        self._lr_at = lr_at
        self._advance = _advance_for(optimizer) if predictor == "momentum" else None
        self._weights = {name: p.detach().clone() for p, name in self._names.items()}
        self._previous: dict[str, Tensor] | None = None
        if self._advance is None:
            self._previous = (
                {n: w.clone() for n, w in self._weights.items()} if keep else self._weights
            )

    @torch.no_grad()
    def predict(self, version: int, num_steps: int) -> dict[str, Tensor]:
        """The parameters predicted for version ``version + num_steps``, seen from the present version.

        The tensors are the buffer itself: valid until the next call or :meth:`snapshot`.
        """
        if self._previous is not None:
            for p, name in self._names.items():  # p + num_steps (p - previous p)
                torch.lerp(self._previous[name], p, 1.0 + num_steps, out=self._weights[name])
        else:
            self._by_momentum(version, num_steps)
        return self._weights

    def _by_momentum(self, version: int, num_steps: int) -> None:
        assert self._advance is not None
        for group in self._optimizer.param_groups:
            lrs = [
                group["lr"] if self._lr_at is None else self._lr_at(version + k)
                for k in range(num_steps)
            ]
            for p in group["params"]:
                if p in self._names:
                    state = self._optimizer.state.get(p, {})
                    self._advance(self._weights[self._names[p]], p, state, group, lrs)

    @torch.no_grad()
    def snapshot(self) -> None:
        """Call after the attack and before the update: the extrapolation needs theta_t once theta_{t+1} is there."""
        if self._previous is not None:
            for p, name in self._names.items():
                self._previous[name].copy_(p)

    def state_dict(self) -> dict[str, Tensor]:
        """The weights before the last update, by parameter; empty where the optimizer's state says all."""
        return dict(self._previous or {})

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        previous = self._previous or {}
        for name, value in check_keys(state, previous, _WHAT).items():
            previous[name].copy_(check_like(value, previous[name], f"{name} of {_WHAT}"))
