"""Look-ahead: the weights that the next updates will reach, as far as momentum decides.

An attack at a prediction waits for nothing. The coming gradients are taken to be zero, so what is
left is the part of the next tau updates that momentum has already decided. With the learning rate
inside the momentum buffer (LARS "tf"):

    v_{t+1} = mu v_t + u_t,   theta_{t+1} = theta_t - v_{t+1}
    theta_{t+tau} ~ theta_t - (mu + ... + mu^tau) v_t

The same definition, "what the optimizer does with zero gradients and no weight decay", gives the
closed forms below for SGD, LARS with the learning rate outside, Adam(W) and LAMB. Any other
optimizer, SGD or LARS without momentum, and LARS "nus" (its ratio is outside the buffer) get the
last update once more for every step, theta_t + tau (theta_t - theta_{t-1}); the staleness probe
measures that for all of them ("last-update").

Learning rates of the coming steps are the schedule's.

Our own addition to ConAdv; predicting stale weights by momentum goes back to SpecTrain (Chen et
al., arXiv 1809.02839).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from conadv.engine.validate import check_like
from conadv.errors import unknown
from conadv.optim.lamb import LAMB
from conadv.optim.lars import LARS, VARIANTS

PREDICTORS = ("momentum", "last-update")
Advance = Callable[[Tensor, Tensor, dict[str, Any], dict[str, Any], Sequence[float]], None]
"""(out, parameter, its optimizer state, its group, coming learning rates): write the prediction."""


def _along_buffer(
    out: Tensor, p: Tensor, state: dict[str, Any], group: dict[str, Any], lrs: Sequence[float]
) -> None:
    """SGD and LARS: theta - sum_k lr_k mu^k v, without lr_k where v has it inside."""
    buffer = state.get("momentum_buffer")
    if buffer is None:  # no update yet
        out.copy_(p)
        return
    mu, inside = group["momentum"], "variant" in group and VARIANTS[group["variant"]].lr_inside
    more = 1 if group.get("nesterov") else 0  # steps along mu v_{k+1} once more: one more factor mu
    factor = sum((1.0 if inside else lr) * mu ** (k + more) for k, lr in enumerate(lrs, 1))
    torch.add(p, buffer, alpha=-factor, out=out)


def _adam(
    out: Tensor, p: Tensor, state: dict[str, Any], group: dict[str, Any], lrs: Sequence[float]
) -> None:
    """Adam(W) and LAMB: updates while both moments only decay; LAMB's with its ratio."""
    out.copy_(p)
    if "exp_avg" not in state:
        return
    m, v = state["exp_avg"], state["exp_avg_sq"]
    done = state["step"].double()  # stays where it is: reading it back would wait for a CUDA device
    beta1, beta2 = group["betas"]
    for k, lr in enumerate(lrs, 1):
        m_hat = m * (beta1**k / (1 - beta1 ** (done + k)))
        v_hat = v * (beta2**k / (1 - beta2 ** (done + k)))
        direction = m_hat.div_(v_hat.sqrt_().add_(group["eps"]))
        factor: float | Tensor = lr
        if group.get("adapt"):
            # At the predicted weights: the ratio of each coming update follows those before it.
            w_norm, u_norm = out.norm(), direction.norm()
            factor = torch.where((w_norm > 0) & (u_norm > 0), w_norm / u_norm, 1.0) * lr
        out.sub_(direction.mul_(factor))


def _advance_for(optimizer: torch.optim.Optimizer) -> Advance | None:
    """The closed form for an optimizer, None where there is none or no momentum to go by."""
    groups = optimizer.param_groups
    if any(group.get("maximize") or group.get("amsgrad") for group in groups):
        return None
    if isinstance(optimizer, (torch.optim.Adam, LAMB)):  # AdamW is an Adam
        return _adam
    if not isinstance(optimizer, (torch.optim.SGD, LARS)) or not all(
        group["momentum"] > 0 for group in groups
    ):
        return None
    # A ratio outside the buffer, of a gradient that is not known yet, would scale the whole step.
    known = all(
        "variant" not in group or VARIANTS[group["variant"]].ratio_inside for group in groups
    )
    return _along_buffer if known else None


class LookAhead:
    """Predicts the parameters of a model some updates ahead into a buffer of its own.

    ``lr_at``: the schedule, asked for the coming steps; None takes each group's present learning
    rate for all.
    ``predictor``: "momentum", or "last-update" also where momentum has a closed form. ``keep``: a
    prediction leaves the remembered weights as they are, so that one may follow another between two
    updates; repeating the last update then needs a second copy of the parameters.

    Raises ConadvError for an unknown predictor. Ranks: nothing is reduced; weights and optimizer
    state are the same on all learners, so predictions are.
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
        self._model, self._optimizer, self._lr_at = model, optimizer, lr_at
        self._advance = _advance_for(optimizer) if predictor == "momentum" else None
        self._weights: dict[str, Tensor] = {}
        self._copies = [self._weights]
        self._previous: dict[str, Tensor] = {}
        if self._advance is None:
            # With one prediction between two updates the memory can be its buffer.
            self._previous = {} if keep else self._weights
            self._copies += [self._previous] if keep else []
        self._follow()

    def _follow(self) -> dict[str, Tensor]:
        """The parameters that are trained now, with copies of the new ones, of others none."""
        found = self._model.named_parameters()
        params: dict[str, Tensor] = {name: p for name, p in found if p.requires_grad}
        for copies in self._copies:
            for name in copies.keys() - params.keys():
                del copies[name]
            # One that was frozen so far has not moved: its last update is zero.
            copies |= {name: p.detach().clone() for name, p in params.items() if name not in copies}
        return params

    @torch.no_grad()
    def predict(self, version: int, num_steps: int) -> dict[str, Tensor]:
        """The parameters predicted for version ``version + num_steps``.

        The tensors are the buffer itself: valid until the next call or :meth:`snapshot`.
        """
        params = self._follow()
        if self._advance is None:
            for name, p in params.items():  # p + num_steps (p - previous p)
                torch.lerp(self._previous[name], p, 1.0 + num_steps, out=self._weights[name])
            return self._weights
        names = {p: name for name, p in params.items()}
        for group in self._optimizer.param_groups:
            lrs = [float(group["lr"])] * num_steps  # it may be a tensor
            if self._lr_at is not None:
                lrs = [self._lr_at(version + k) for k in range(num_steps)]
            for p in group["params"]:
                if p in names:
                    state = self._optimizer.state.get(p, {})
                    self._advance(self._weights[names[p]], p, state, group, lrs)
        return self._weights

    @torch.no_grad()
    def snapshot(self) -> None:
        """Between attack and update: keeps theta_t for when theta_{t+1} is there."""
        params = self._follow() if self._previous else {}
        for name, previous in self._previous.items():
            previous.copy_(params[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The weights before the last update; empty where the optimizer's state says all."""
        return dict(self._previous)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        check_like(state, self._previous, "its look-ahead")
        for name, previous in self._previous.items():
            previous.copy_(state[name])
