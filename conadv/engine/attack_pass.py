"""Attacks on a batch: the mode in which they see the model, and the images that they make."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from conadv import rng
from conadv.engine.forward import Network
from conadv.engine.inputs import Inputs
from conadv.nn import split_batchnorm as norm
from conadv.types import Attack, Batch, ExtraBatch, Forward, Method


class AttackPass:
    """Runs attacks. Model modes, ``requires_grad``, ``.grad``, statistics and global generators stay as they are."""

    def __init__(self, network: Network, inputs: Inputs, seed: int) -> None:
        self._network, self._inputs, self._seed = network, inputs, seed

    def attack_batch(
        self,
        method: Method,
        attack: Attack,
        batch: Batch,
        weights: Mapping[str, Tensor] | None,
        version: int,
    ) -> ExtraBatch:
        """Attack the clean view of every micro-batch, at the present weights (of ``version``) or at ``weights``.

        The method says how many images, on which route, by which statistics.
        Ranks: nothing is reduced. In flight: nothing; it may run beside the gradient of the same weights.
        """
        self._inputs.check_space(batch)
        images, labels = [], []
        for micro in batch.micro:
            count = method.num_attacked(len(micro.y_N))
            labels.append(self._inputs.labels(micro)[:count])
            # Keyed by step and micro-batch: the same draws whoever attacks it, and whenever.
            with self.open(
                "attack",
                batch.step,
                micro.index,
                weights=weights,
                route=method.attack_route,
                running=method.attack_statistics == "running",
            ) as (forward, draws):
                x_NCHW = self._inputs.images(micro, "clean")[:count]
                images.append(attack(forward, x_NCHW, labels[-1], draws))
        return ExtraBatch(tuple(images), tuple(labels), version)

    @contextmanager
    def open(
        self,
        *path: str | int,
        weights: Mapping[str, Tensor] | None = None,
        route: str = "adv",
        running: bool = False,
    ) -> Iterator[tuple[Forward, torch.Generator]]:
        """The mode in which attacks see the model: yields (x_NCHW -> logits_NK, the generator of the attack's draws).

        On the route of the view ``route``, with batch statistics, or the ``running`` ones, which are left alone either
        way, at the present or given weights. ``path`` keys the draws of the attack and of the model (dropout); outside
        of the block nothing has changed.
        """
        network = self._network
        draws = rng.generator(network.device, self._seed, *path)
        statistics = norm.running_stats if running else norm.frozen_stats
        with (
            rng.scope(network.device, self._seed, *path),
            network.on_route_of(route),
            statistics(network.model),
        ):
            yield network.for_attack(weights), draws
