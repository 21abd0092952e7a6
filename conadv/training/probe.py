"""The staleness probe: during training, what stale and predicted weights are worth to the attack.

Before a probed step t it compares, on the same clean training images, the attack at theta_t with attacks at
theta_{t-tau} and at predictions of theta_t made at step t - tau. docs/staleness.md says what it measures. Training is
not touched: a run with the probe has the bits of a run without.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from conadv.attacks.targets import ascent_loss
from conadv.config.schema import Config, ProbeConfig, micro_batch
from conadv.data.loader import Data
from conadv.engine import TrainStep
from conadv.engine.lookahead import LookAhead
from conadv.engine.validate import check_count, check_keys, check_like, check_mapping
from conadv.errors import ConadvError
from conadv.nn import split_batchnorm as norm
from conadv.optim.schedules import WarmupDecay
from conadv.training.build import attack_of
from conadv.types import MicroBatch

Weights = Mapping[str, Tensor]
Line = dict[str, Any]
STALE, CURRENT, NOISE = "stale", "current", "noise"


def period(probe: ProbeConfig, steps_per_epoch: int) -> int:
    """Steps between two probed ones, at least one."""
    assert probe.every_epochs is not None
    return max(1, round(probe.every_epochs * steps_per_epoch))


def check_duration(probe: ProbeConfig, num_steps: int, steps_per_epoch: int) -> None:
    """ConadvError where a run of ``num_steps`` steps is too short for what the probe is to measure."""
    if probe.every_epochs is None:
        return
    every = period(probe, steps_per_epoch)
    last = (num_steps - 1) // every * every
    if not last:
        raise ConadvError(
            f"probe.every_epochs {probe.every_epochs:g} is {every} steps, but there are only {num_steps}: nothing "
            "would be measured. Probe more often, or train longer."
        )
    if max(probe.staleness) > last:
        raise ConadvError(
            f"probe.staleness {max(probe.staleness)} has no effect: the last probed step is step {last}. "
            "Train longer, or leave it out."
        )


class Probe:
    """Measures before steps every, 2 every, 3 every, ... of a run.

    The images are a fixed subset of the training images, unaugmented, the same for all steps, points, methods and
    seeds, in forward passes of the run's micro-batch size (batch norm sees what it sees in training).

    Memory, on the host: for each probed step and tau that lie ahead, the weights at t - tau and one prediction of each
    predictor; on the device what the predictors need. Only steps that a probe refers to are kept.
    Ranks: one rank measures on its own; the others wait for it at the next sum of gradients.
    """

    def __init__(
        self, config: Config, engine: TrainStep, data: Data, num_steps: int, lr_at: WarmupDecay
    ) -> None:
        self._engine, self._num_steps, self._lr_at = engine, num_steps, lr_at
        self._per_epoch = data.order.steps_per_epoch
        self._every = period(config.probe, self._per_epoch)
        self._taus = sorted(config.probe.staleness)
        self._config = config.attack
        self._attack = attack_of(config.attack, engine.space)
        self._route = "adv" if "adv" in norm.routes_of(engine.model) else norm.CLEAN
        self._ahead = {
            name: LookAhead(engine.model, engine.optimizer, lr_at, name, keep=True)
            for name in config.probe.predictors
        }
        self._waiting: dict[
            int, dict[int, dict[str, Weights]]
        ] = {}  # [t][tau][predictor]: made at step t - tau
        self._micro = list(_images(data, config))

    def before_step(self) -> list[Line]:
        """Call before each step, at its weights: the lines of this step's probe, if it has one."""
        step = self._engine.version
        lines = self._measure(step) if self._probes(step) else []
        self._keep(step)
        if self._serves(step + 1):
            for ahead in self._ahead.values():
                ahead.remember()
        return lines

    def state_dict(self) -> dict[str, Any]:
        """What waits for coming probes, and what they remember."""
        return {
            "waiting": self._waiting,
            "ahead": {name: ahead.state_dict() for name, ahead in self._ahead.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_keys(state, ("waiting", "ahead"), "its probe")
        check_keys(state["ahead"], self._ahead, "its probe's look-ahead")
        self._check_waiting(state["waiting"])
        self._waiting = {
            step: {
                tau: {name: _on_host(weights) for name, weights in made.items()}
                for tau, made in taus.items()
            }
            for step, taus in state["waiting"].items()
        }
        for name, ahead in self._ahead.items():
            ahead.load_state_dict(state["ahead"][name])

    def _check_waiting(self, waiting: Any) -> None:
        what, own = "its probe", self._engine.trainable()
        for step, taus in check_mapping(waiting, what).items():
            check_count(step, f"{what}'s step", self._num_steps)
            for tau, made in check_mapping(taus, what).items():
                check_count(tau, f"{what}'s staleness", step)
                for name, weights in check_keys(made, (STALE, *self._ahead), what).items():
                    for part, value in check_keys(weights, own, f"{what}'s {name}").items():
                        check_like(value, own[part], f"{part} of {what}'s {name}")

    # ---- when

    def _probes(self, step: int) -> bool:
        return 0 < step < self._num_steps and step % self._every == 0

    def _serves(self, step: int) -> bool:
        """Whether a probe needs the weights or predictions of this step."""
        return any(self._probes(step + tau) for tau in self._taus)

    def _keep(self, step: int) -> None:
        now: Weights | None = None
        for tau in self._taus:
            if self._probes(step + tau):
                now = now or _on_host(self._engine.trainable(), copy=True)
                made: dict[str, Weights] = {STALE: now}
                for name, ahead in self._ahead.items():
                    made[name] = _on_host(ahead.predict(step, tau), copy=True)
                self._waiting.setdefault(step + tau, {})[tau] = made

    # ---- what

    def _measure(self, step: int) -> list[Line]:
        waiting = sorted(self._waiting.pop(step, {}).items())
        points = [(tau, name, weights) for tau, made in waiting for name, weights in made.items()]
        true = [self._gradient(step, micro, None) for micro in self._micro]
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
        found: list[tuple[int, str, float | None, float]] = [
            (0, CURRENT, 1.0, self._loss(step, self._attacked(step, None))),
            (0, NOISE, *self._noise(step, true)),
        ]
        found += [(tau, name, *self._at(step, weights, true)) for tau, name, weights in points]
        stale = {tau: weights for tau, name, weights in points if name == STALE}
        errors = {(tau, name): self._error(weights, stale[tau]) for tau, name, weights in points}
        return [
            {
                **common,
                "tau": tau,
                "predictor": name,
                "cosine": cosine,
                "loss_increase": loss - clean,
                "relative_error": errors.get((tau, name)),
            }
            for tau, name, cosine, loss in found
        ]

    def _at(self, step: int, weights: Weights, true: list[Tensor]) -> tuple[float | None, float]:
        """(cosine with the gradient at theta_t, loss at theta_t) of the attack made at other weights."""
        there = {name: w.to(self._engine.device) for name, w in weights.items()}
        found = [self._gradient(step, micro, there) for micro in self._micro]
        return mean_cosine(found, true), self._loss(step, self._attacked(step, there))

    def _noise(self, step: int, true: list[Tensor]) -> tuple[float | None, float]:
        """The same for random signs, scaled as the attack scales its gradient."""
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
        return mean_cosine(signs, true), self._loss(step, images)

    def _error(self, predicted: Weights, stale: Weights) -> float | None:
        """|prediction - theta_t| / |theta_t - theta_{t-tau}|; None where nothing has moved."""
        now = _on_host(self._engine.trainable())
        moved = _distance(now, stale)
        return _distance(predicted, now) / moved if moved else None

    def _pass(self, step: int, micro: MicroBatch, weights: Weights | None) -> Any:
        """All points of a probe get the same draws, so that they differ by their weights alone."""
        return self._engine.attack_pass(
            "probe", step, micro.index, weights=weights, route=self._route
        )

    def _gradient(self, step: int, micro: MicroBatch, weights: Weights | None) -> Tensor:
        """grad_x of the loss of every image, like the images."""
        x = self._engine.images(micro, "clean").detach().requires_grad_()
        with self._pass(step, micro, weights) as (forward, _):
            (gradient,) = torch.autograd.grad(
                ascent_loss(forward(x), self._engine.labels(micro), 1), x
            )
        return gradient

    def _attacked(self, step: int, weights: Weights | None) -> list[Tensor]:
        images = []
        for micro in self._micro:
            with self._pass(step, micro, weights) as (forward, draws):
                x, y_N = self._engine.images(micro, "clean"), self._engine.labels(micro)
                images.append(self._attack(forward, x, y_N, draws))
        return images

    @torch.no_grad()
    def _loss(self, step: int, images: list[Tensor]) -> float:
        """Mean cross-entropy at theta_t, in the attack's mode. Sync point."""
        total = 0.0
        for micro, x in zip(self._micro, images, strict=True):
            with self._pass(step, micro, None) as (forward, _):
                total += ascent_loss(forward(x), self._engine.labels(micro), 1).item() / len(x)
        return total / len(images)


def mean_cosine(a: list[Tensor], b: list[Tensor]) -> float | None:
    """Mean over images of cos(a_i, b_i), (N, ...) tensors; images with a zero gradient are left out, None if all are.

    In float64: gradients of images that are classified with certainty are far smaller than any fixed floor.
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


def _images(data: Data, config: Config) -> Iterator[MicroBatch]:
    """The same images whatever the ranks: as many whole micro-batches as fit, or one smaller pass."""
    wanted = min(config.probe.images, data.train_size)
    size = min(micro_batch(config), wanted)
    batches = replace(data, rank=0, ranks=1).eval_batches("train", wanted // size * size, size)
    for index, (x, y) in enumerate(batches):
        yield MicroBatch(index, y, {"clean": x})
