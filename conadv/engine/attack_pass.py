"""Attacks on a batch: the mode in which they see the model, and the images that they make."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from conadv import rng
from conadv.attacks.contract import run_attack
from conadv.engine.forward import Network
from conadv.engine.inputs import Inputs
from conadv.nn import split_batchnorm as norm
from conadv.types import Attack, Batch, ExtraBatch, Forward, Method


@dataclass(frozen=True)
class AttackPass:
    """Runs attacks. The model and all global generators stay as they are."""

    network: Network
    inputs: Inputs
    seed: int

    def attack_batch(
        self,
        method: Method,
        attack: Attack,
        batch: Batch,
        weights: Mapping[str, Tensor] | None,
        version: int,
    ) -> ExtraBatch:
        """Attack the clean view, at the present weights (of ``version``) or at ``weights``.

        The method says how many images, on which route, by which statistics.
        Ranks: nothing is reduced. In flight: nothing; it may run beside the gradient of the same
        weights.
        """
        self.inputs.check_space(batch)
        watched = self.network.trainable().values()
        images, labels = [], []
        for micro in batch.micro:
            count = method.num_attacked(len(micro.y_N))
            # Keyed by step and micro-batch: the same draws whoever attacks it, and whenever.
            path = ("attack", batch.step, micro.index)
            how = method.attack_route, method.attack_statistics
            with self.open(path, weights, *how) as (forward, draws):
                x_NCHW, y_N = self.inputs.images(micro, "clean"), self.inputs.labels(micro)[:count]
                images.append(run_attack(attack, forward, x_NCHW[:count], y_N, draws, watched))
                labels.append(y_N)
        return ExtraBatch(tuple(images), tuple(labels), version)

    @contextmanager
    def open(
        self,
        path: tuple[str | int, ...],
        weights: Mapping[str, Tensor] | None = None,
        route: str = "adv",
        statistics: str = "batch",
    ) -> Iterator[tuple[Forward, torch.Generator]]:
        """The attack's mode; yields (x_NCHW -> logits_NK, the generator of the attack's draws).

        On the route of the view ``route``, with "batch" or "running" statistics, which are left
        alone either way, at the present or given weights. ``path`` keys the draws of the attack and
        of the model (dropout); outside of the block nothing has changed.
        """
        network, seed = self.network, self.seed
        draws = rng.generator(network.device, seed, *path)
        frozen = norm.running_stats if statistics == "running" else norm.frozen_stats
        with (
            rng.scope(network.device, seed, *path),
            network.on_route_of(route),
            frozen(network.model),
        ):
            yield network.for_attack(weights), draws
