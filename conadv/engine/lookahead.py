"""Look-ahead: the weights that the next updates will reach, predicted from what is known before step t's gradient is.

An attack at a prediction waits for nothing. The predictors, by name:

**momentum**: the coming gradients are taken to be zero, so what is left is the part of the next tau updates that
momentum has already decided. With the learning rate inside the momentum buffer (LARS "tf"):

    v_{t+1} = mu v_t + u_t,   theta_{t+1} = theta_t - v_{t+1}
    theta_{t+tau} ~ theta_t - (mu + ... + mu^tau) v_t

The same definition, "what the optimizer does with zero gradients and no weight decay", gives the closed forms below
for SGD, LARS with the learning rate outside, Adam(W) and LAMB. Any other optimizer, SGD or LARS without momentum, and
LARS "nus" (its ratio is outside the buffer) get **last-update**: the last update once more for every step,
theta_t + tau (theta_t - theta_{t-1}).

**momentum-gradient**: the coming gradients are taken to be the last one seen, g_{t-1}. A copy of the optimizer makes
tau real updates with it, weight decay and trust ratio at the predicted weights included. No closed form: each
update's ratio depends on the weights of the one before.

Learning rates of the coming steps are the schedule's; with "-constant-lr" behind momentum or momentum-gradient that of
step t serves them all. That matters from tau = 2 on; for momentum with LARS "tf" and "no-wd-ratio" it never does, since
the learning rate is in the buffer already.

Our own addition to ConAdv; predicting stale weights by momentum goes back to SpecTrain (Chen et al., arXiv 1809.02839).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from conadv.config.schema import PredictorName
from conadv.engine.validate import check_keys, check_like, check_mapping
from conadv.errors import unknown
from conadv.optim.lamb import LAMB
from conadv.optim.lars import LARS, VARIANTS

Group = dict[str, Any]
Lrs = Sequence[float]
CONSTANT = "-constant-lr"
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


class _Rehearsal:
    """A copy of the optimizer over copies of its parameters, which makes updates that the real one may make.

    Owns, besides the parameters, a copy of the optimizer's state and the last gradient.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._real = optimizer
        self._twin = copy.deepcopy(optimizer)  # without its hooks
        self.gradients: dict[Tensor, Tensor] = {}  # by the real parameter
        self._pairs = [
            (p, q)
            for group, twin in zip(optimizer.param_groups, self._twin.param_groups, strict=True)
            for p, q in zip(group["params"], twin["params"], strict=True)
        ]
        optimizer.register_step_pre_hook(self._see)

    def outs(self) -> dict[Tensor, Tensor]:
        """Where the prediction of each real parameter will stand."""
        return {p: q.detach() for p, q in self._pairs}

    def _see(self, *_: Any) -> None:
        """Copy the gradients that the optimizer is about to use: summed over ranks, clipped, whatever its loop does."""
        for p, _ in self._pairs:
            if p.grad is None:
                self.gradients.pop(p, None)
            elif p in self.gradients:
                self.gradients[p].copy_(p.grad)
            else:
                self.gradients[p] = p.grad.detach().clone()

    def run(self, lrs: Lrs | None, num_steps: int) -> None:
        """``num_steps`` updates from the present weights; lrs None: by each group's own learning rate."""
        for group, twin in zip(self._real.param_groups, self._twin.param_groups, strict=True):
            twin.update({name: value for name, value in group.items() if name != "params"})
        for p, q in self._pairs:
            q.copy_(p)
            self._copy_state(p, q)
        for k in range(num_steps):
            for p, q in self._pairs:  # anew each time: some optimizers write into their gradients
                q.grad = self.gradients[p].clone() if p in self.gradients else None
            if lrs is not None:
                for group in self._twin.param_groups:
                    group["lr"] = lrs[k]
            self._twin.step()
        for _, q in self._pairs:
            q.grad = None

    def _copy_state(self, p: Tensor, q: Tensor) -> None:
        if p not in self._real.state:
            self._twin.state.pop(q, None)
            return
        kept = self._twin.state[q]
        for name, value in self._real.state[p].items():
            if isinstance(value, Tensor) and isinstance(kept.get(name), Tensor):
                kept[name].copy_(value)
            else:
                kept[name] = copy.deepcopy(value)


class LookAhead:
    """Predicts the parameters of a model some updates ahead into a buffer of its own.

    ``lr_at``: the schedule, asked for the coming steps; None takes each group's present learning rate for all.
    ``predictor``: see the module. ``keep``: a prediction leaves what the predictor remembers as it is, so that one may
    follow another between two updates; "last-update" then needs a second copy of the parameters.

    Raises ConadvError for an unknown predictor. Ranks: nothing is reduced; weights, optimizer state and summed
    gradients are the same on all learners, so predictions are.
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
        if predictor not in get_args(PredictorName):
            raise unknown("predictor", predictor, get_args(PredictorName))
        kind = predictor.removesuffix(CONSTANT)
        self._names: dict[Tensor, str] = {
            p: name for name, p in model.named_parameters() if p.requires_grad
        }
        self._optimizer = optimizer
        self._lr_at = lr_at
        self._constant = predictor != kind
        self._advance = _advance_for(optimizer) if kind == "momentum" else None
        self._rehearsal = _Rehearsal(optimizer) if kind == "momentum-gradient" else None
        outs = (
            self._rehearsal.outs()
            if self._rehearsal
            else {p: p.detach().clone() for p in self._names}
        )
        self._weights = {name: outs[p] for p, name in self._names.items() if p in outs}
        self._previous: dict[str, Tensor] | None = None
        if self._advance is None and self._rehearsal is None:
            self._previous = (
                {n: w.clone() for n, w in self._weights.items()} if keep else self._weights
            )

    @torch.no_grad()
    def predict(self, version: int, num_steps: int) -> dict[str, Tensor]:
        """The parameters predicted for version ``version + num_steps``, seen from the present version.

        The tensors are the buffer itself: valid until the next call or :meth:`remember`.
        """
        lrs = self._coming(version, num_steps)
        if self._rehearsal is not None:
            self._rehearsal.run(lrs, num_steps)
        elif self._previous is not None:
            for p, name in self._names.items():  # p + num_steps (p - previous p)
                torch.lerp(self._previous[name], p, 1.0 + num_steps, out=self._weights[name])
        else:
            self._by_momentum(lrs, num_steps)
        return self._weights

    def _coming(self, version: int, num_steps: int) -> Lrs | None:
        """The schedule's learning rate of each coming step; None without a schedule."""
        if self._lr_at is None:
            return None
        return [self._lr_at(version if self._constant else version + k) for k in range(num_steps)]

    def _by_momentum(self, lrs: Lrs | None, num_steps: int) -> None:
        assert self._advance is not None
        for group in self._optimizer.param_groups:
            for p in group["params"]:
                if p in self._names:
                    state = self._optimizer.state.get(p, {})
                    coming = [group["lr"]] * num_steps if lrs is None else lrs
                    self._advance(self._weights[self._names[p]], p, state, group, coming)

    @torch.no_grad()
    def remember(self) -> None:
        """Call after the attack and before the update: the extrapolation needs theta_t once theta_{t+1} is there."""
        if self._previous is not None:
            for p, name in self._names.items():
                self._previous[name].copy_(p)

    def state_dict(self) -> dict[str, Tensor]:
        """What is remembered, by parameter: the weights before the last update, or the last gradient.

        Empty for the closed forms, which follow from the optimizer's state.
        """
        if self._rehearsal is not None:
            return {
                self._names[p]: g for p, g in self._rehearsal.gradients.items() if p in self._names
            }
        return dict(self._previous or {})

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        named = {name: p for p, name in self._names.items()}
        if self._rehearsal is None or not set(check_mapping(state, _WHAT)) <= set(
            named
        ):  # some have no gradient yet
            check_keys(state, self._previous or {}, _WHAT)
        for name, value in state.items():
            check_like(value, named[name], f"{name} of {_WHAT}")
        if self._rehearsal is not None:
            self._rehearsal.gradients = {
                named[name]: value.clone() for name, value in state.items()
            }
        elif self._previous is not None:
            for name, value in state.items():
                self._previous[name].copy_(value)
