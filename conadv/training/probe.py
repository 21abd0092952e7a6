"""The staleness probe: what stale and predicted weights are worth to the attack, during training.

Before a probed step t it compares, on the same clean training images, the attack at theta_t with
attacks at theta_{t-tau} and at predictions of theta_t made at step t - tau (docs/staleness.md).
Training is not touched: a run with the probe has the bits of a run without.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor

from conadv.config.resolve import Derived
from conadv.config.schema import Config
from conadv.data.loader import Data
from conadv.engine.lookahead import LookAhead
from conadv.engine.step import TrainStep
from conadv.engine.validate import check_count, check_keys, check_like
from conadv.nn import split_batchnorm as norm
from conadv.optim.schedules import WarmupDecay
from conadv.types import Attack, MicroBatch

Weights = Mapping[str, Tensor]
Line = dict[str, Any]
STALE, CURRENT, NOISE = "stale", "current", "noise"
PREDICTORS = ("momentum", "last-update")  # of look-ahead, measured beside stale weights


class Probe:
    """Measures before steps every, 2 every, 3 every, ... of a run.

    The images are a fixed subset of the training images, unaugmented, the same for all steps,
    methods and seeds, in forward passes of the run's micro-batch size: batch norm sees what it sees
    in training.

    Memory: on the host, for each probed step and tau that lie ahead, the weights at t - tau and one
    prediction per predictor; on the device what the predictors need.
    Ranks: one rank measures on its own; the others wait for it at the next sum of gradients.
    """

    def __init__(
        self,
        config: Config,
        attack: Attack,
        engine: TrainStep,
        data: Data,
        derived: Derived,
        lr_at: WarmupDecay,
    ) -> None:
        assert derived.probe_every is not None
        self._engine, self._num_steps, self._lr_at = engine, derived.steps, lr_at
        self._per_epoch, self._every = derived.steps_per_epoch, derived.probe_every
        self._taus = sorted(set(config.probe.staleness))
        self._config = config.attack
        self._attack = attack
        self._route = "adv" if "adv" in norm.routes_of(engine.model) else norm.CLEAN
        self._ahead = {
            name: LookAhead(engine.model, engine.optimizer, lr_at, name, keep=True)
            for name in PREDICTORS
        }
        # [t][tau][predictor]: weights for the probe of step t, stored or predicted at step t - tau
        self._waiting: dict[int, dict[int, dict[str, Weights]]] = {}
        # as many whole micro-batches as fit, or one smaller pass; the same whatever the ranks
        wanted = min(config.probe.images, data.train_size)
        size = min(derived.micro_batch_size, wanted)
        whole = copy(data)  # one rank measures, and reads every batch
        whole.rank, whole.ranks = 0, 1
        batches = whole.eval_batches("train", wanted // size * size, size)
        self._micro = [MicroBatch(i, y, {"clean": x}) for i, (x, y) in enumerate(batches)]

    def before_step(self) -> list[Line]:
        """Call before each step, at its weights: the lines of this step's probe, if it has one."""
        step = self._engine.version
        lines = self._measure(step) if self._probes(step) else []
        for tau in filter(lambda tau: self._probes(step + tau), self._taus):
            made = {STALE: self._engine.trainable()}
            made |= {name: ahead.predict(step, tau) for name, ahead in self._ahead.items()}
            on_host = {name: _on_host(weights, copy=True) for name, weights in made.items()}
            self._waiting.setdefault(step + tau, {})[tau] = on_host
        if any(self._probes(step + 1 + tau) for tau in self._taus):
            for ahead in self._ahead.values():
                ahead.snapshot()
        return lines

    def state_dict(self) -> dict[str, Any]:
        """What waits for coming probes, and what the predictors remember."""
        ahead = {name: ahead.state_dict() for name, ahead in self._ahead.items()}
        return {"waiting": self._waiting, "ahead": ahead}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state. Raises ConadvError where it is not this probe's."""
        check_keys(state, ("waiting", "ahead"), "its probe")
        check_keys(state["ahead"], self._ahead, "its probe's look-ahead")
        own, self._waiting = self._engine.trainable(), {}
        for step, taus in check_keys(state["waiting"], None, "its probe").items():
            check_count(step, "its probe's step", self._num_steps)
            for tau, made in check_keys(taus, None, "its probe").items():
                check_count(tau, "its probe's staleness", step)
                for name, weights in check_keys(made, (STALE, *self._ahead), "its probe").items():
                    check_like(weights, own, f"its probe's {name}")
                on_host = {name: _on_host(weights) for name, weights in made.items()}
                self._waiting.setdefault(step, {})[tau] = on_host
        for name, ahead in self._ahead.items():
            ahead.load_state_dict(state["ahead"][name])

    def _probes(self, step: int) -> bool:
        return 0 < step < self._num_steps and step % self._every == 0

    def _measure(self, step: int) -> list[Line]:
        clean = self._loss(step, [self._engine.images(micro, "clean") for micro in self._micro])
        common = {
            "step": step,
            "epoch": step / self._per_epoch,
            "phase": self._lr_at.phase(step),
            "lr": self._lr_at(step),
            "clean_loss": clean,
            "images": sum(len(micro.y_N) for micro in self._micro),
            "eps": self._config.eps,
        }
        true, attacked = self._attacked(step, None)
        signs, noisy = self._noise(step)
        found: list[tuple[int, str, float | None, float, float | None]] = [
            (0, CURRENT, 1.0, self._loss(step, attacked), None),
            (0, NOISE, mean_cosine(signs, true), self._loss(step, noisy), None),
        ]
        for tau, made in sorted(self._waiting.pop(step, {}).items()):
            for name, weights in made.items():
                gradients, attacked = self._attacked(step, weights)
                error = self._error(weights, made[STALE])
                cosine = mean_cosine(gradients, true)
                found.append((tau, name, cosine, self._loss(step, attacked), error))
        names = ("tau", "predictor", "cosine", "loss_increase", "relative_error")
        return [
            {**common, **dict(zip(names, (tau, name, cosine, loss - clean, error), strict=True))}
            for tau, name, cosine, loss, error in found
        ]

    def _attacked(self, step: int, weights: Weights | None) -> tuple[list[Tensor], list[Tensor]]:
        """(grad_x of every image's loss, attacked images) at given weights, None for theta_t."""
        there = weights and {name: w.to(self._engine.device) for name, w in weights.items()}
        gradients: list[Tensor] = []
        ascended = self._engine.loss
        images: list[Tensor] = []
        for micro in self._micro:
            x, y_N = self._engine.images(micro, "clean").detach(), self._engine.labels(micro)
            with self._pass(step, micro, there) as (forward, _):
                leaf = x.clone().requires_grad_()
                gradients += torch.autograd.grad(ascended.total(forward(leaf), y_N), leaf)
            with self._pass(step, micro, there) as (forward, draws):
                images.append(self._attack(forward, x, y_N, draws))
        return gradients, images

    def _noise(self, step: int) -> tuple[list[Tensor], list[Tensor]]:
        """Random signs, and the images that they make, scaled as the attack scales its gradient."""
        space, eps, kind = self._engine.space, self._config.eps, self._config.norm
        signs, images = [], []
        for micro in self._micro:
            with self._pass(step, micro, None) as (_, draws):
                x = self._engine.images(micro, "clean")
                coins = torch.randint(
                    0, 2, x.shape, generator=draws, device=x.device, dtype=x.dtype
                )
                signs.append(coins.mul_(2).sub_(1))
                images.append(space.project(space.ascend(x, signs[-1], eps, kind), x, eps, kind))
        return signs, images

    @torch.no_grad()
    def _loss(self, step: int, images: list[Tensor]) -> float:
        """The mean of the trained loss at theta_t, in the attack's mode. Sync point."""
        total = 0.0
        for micro, x in zip(self._micro, images, strict=True):
            with self._pass(step, micro, None) as (forward, _):
                loss = self._engine.loss.total(forward(x), self._engine.labels(micro))
                total += loss.item() / len(x)
        return total / len(images)

    def _error(self, predicted: Weights, stale: Weights) -> float | None:
        """|prediction - theta_t| / |theta_t - theta_{t-tau}|; None where nothing has moved."""
        now = _on_host(self._engine.trainable())
        moved = _distance(now, stale)
        return _distance(predicted, now) / moved if moved else None

    def _pass(self, step: int, micro: MicroBatch, weights: Weights | None) -> Any:
        """The attack's mode, with the same draws for all points: they differ by weights alone."""
        path = ("probe", step, micro.index)
        return self._engine.attacks.open(path, weights, self._route)


def mean_cosine(a: list[Tensor], b: list[Tensor]) -> float | None:
    """Mean over images of cos(a_i, b_i), (N, ...) tensors; zero gradients are left out, None if all
    are.

    In float64: gradients of images that are classified with certainty are smaller than any fixed
    floor.
    """
    x, y = (torch.cat([part.detach().flatten(1) for part in parts]).double() for parts in (a, b))
    lengths = x.norm(dim=1) * y.norm(dim=1)
    cosines = ((x * y).sum(1) / lengths)[lengths > 0]
    return cosines.mean().item() if len(cosines) else None


def _distance(a: Weights, b: Weights) -> float:
    """|a - b| over all tensors."""
    return float(torch.stack([(a[name].double() - b[name].double()).norm() for name in b]).norm())


def _on_host(weights: Weights, *, copy: bool = False) -> Weights:
    return {name: w.detach().to("cpu", copy=copy) for name, w in weights.items()}
