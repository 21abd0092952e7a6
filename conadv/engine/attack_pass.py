"""Attacks on a batch: the mode in which they see the model, and the images that they make."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from conadv import rng
from conadv.attacks.contract import run_attack
from conadv.attacks.loss import TrainedLoss
from conadv.engine.forward import Network
from conadv.engine.inputs import Inputs
from conadv.nn import split_batchnorm as norm
from conadv.nn.buffers import BufferCopies, every_parameter
from conadv.types import Attack, Batch, ExtraBatch, Forward, Method


@dataclass
class AttackPass:
    """Runs attacks. The model and all global generators stay as they are.

    An attack sees the buffers of the beginning of its step, whether it runs before the step's
    gradient, after it, or on another rank: executors agree.
    """

    network: Network
    inputs: Inputs
    loss: TrainedLoss
    seed: int
    statistics: str = "batch"  # "running": attacks also read batch norm's buffers

    def __post_init__(self) -> None:
        batchnorm = self.statistics == "running"
        self._buffers = BufferCopies(self.network.model, batchnorm=batchnorm)
        self._in_step = False

    def begin(self) -> None:
        """The step begins: attacks see these buffers until :meth:`end`."""
        self._buffers.take()
        self._in_step = True

    def end(self) -> None:
        self._in_step = False

    def buffers(self) -> dict[str, Tensor]:
        """What attacks see of the buffers, by name; not batch norm's unless they read them."""
        if not self._in_step:
            self._buffers.take()
        return self._buffers.copies

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
        watched = every_parameter(self.network.model)
        images, labels = [], []
        for micro in batch.micro:
            count = method.num_attacked(len(micro.y_N))
            # Keyed by step and micro-batch: the same draws whoever attacks it, and whenever.
            path = ("attack", batch.step, micro.index)
            how = method.attack_route, method.attack_statistics
            with self.open(path, weights, *how) as (forward, draws):
                x_NCHW, y_N = self.inputs.images(micro, "clean"), self.inputs.labels(micro)[:count]
                made = run_attack(attack, forward, x_NCHW[:count], y_N, draws, watched)
                # An attack may return its input, which may be memory that the loader fills again.
                same = made.untyped_storage().data_ptr() == x_NCHW.untyped_storage().data_ptr()
                images.append(made.clone() if same else made)
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
            # Copies of the copies: a pass writes to them, and the next micro-batch starts afresh.
            given = weights or {}
            own = {name: given.get(name, copy).clone() for name, copy in self.buffers().items()}
            with network.for_attack(weights, own, self.loss) as forward:
                yield forward, draws
