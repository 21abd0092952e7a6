"""Steps that count for nothing: a throw-away engine like the run's own, on synthetic images."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import nn

from conadv import rng
from conadv.config.schema import Config, optimizer_settings, replace
from conadv.distributed.comm import Comm
from conadv.engine import TrainStep
from conadv.models.trial import check_model
from conadv.optim.groups import MODEL_RULES, parameter_groups
from conadv.optim.make import build_optimizer
from conadv.training.build import method_of
from conadv.training.trainer import make_engine, make_model
from conadv.types import Batch, MicroBatch

LEARNING_RATE = 1e-6  # random labels must not blow the weights up


@dataclass(frozen=True)
class Shape:
    """What decides the size of a network and of its images."""

    channels: int
    image_size: int
    num_classes: int


class Rehearsal:
    """Engines and batches of a config (micro_batch_size does not matter) on ``device``, apart from the run's own.

    Nothing of the run is touched: weights, optimizer and statistics are the engine's own, random draws are keyed.
    Ranks: each for itself.
    """

    def __init__(self, config: Config, shape: Shape, device: torch.device) -> None:
        self.config, self.shape, self.device = config, shape, device

    def model(self) -> nn.Module:
        """The network on the CPU, tried on two images. Raises ConadvError where it does not take them."""
        shape = self.shape
        model = make_model(self.config, shape.channels, shape.num_classes)
        with rng.scope(torch.device("cpu"), self.config.seed, "trial"):
            check_model(model, shape.channels, shape.image_size, shape.num_classes)
        return model

    def engine(self) -> TrainStep:
        """A new engine like the run's own."""
        config = self.config
        model = self.model().to(self.device)
        if config.channels_last:
            model = model.to(memory_format=torch.channels_last)
        method = method_of(config)
        groups = parameter_groups(
            model, weight_decay=config.optim.weight_decay or 0.0, rules=MODEL_RULES
        )
        optimizer = build_optimizer(
            config.optim.name, groups, LEARNING_RATE, **optimizer_settings(config.optim)
        )
        calm = replace(config, on_nonfinite="skip", nonfinite_limit=100)
        return make_engine(calm, model, optimizer, method, None, Comm(device=self.device))

    def batch(self, engine: TrainStep, step: int, micro_batch: int) -> Batch:
        """One micro-batch of random pixels with the views that the run has."""
        shape = self.shape
        draws = rng.generator("cpu", 0, "rehearsal", step)
        size = (micro_batch, shape.channels, shape.image_size, shape.image_size)
        names = (
            "clean",
            *engine.method.data_views,
            *(["aug"] if self.config.data.aug_view is not None else []),
        )
        views = {
            name: torch.randint(0, 256, size, generator=draws, dtype=torch.uint8) for name in names
        }
        y_N = torch.randint(0, shape.num_classes, (micro_batch,), generator=draws)
        return Batch(step, (MicroBatch(0, y_N, views),))

    def steps(self, micro_batch: int, ballast: int = 0) -> float:
        """Train until all that waits is there, at most 4 steps; returns the seconds of the last.

        ``ballast``: bytes on the device that are taken meanwhile, by what is not rehearsed.
        """
        if self.config.compile:
            torch.compiler.reset()  # graphs of other sizes count towards the limit of recompilations
        engine = self.engine()
        taken = torch.empty(ballast, dtype=torch.uint8, device=self.device)
        if self.device.type == "cpu":
            taken.zero_()  # memory that was never written is not there
        seconds = 0.0
        for step in range(min(engine.ahead, 2) + 2):
            future = self.batch(engine, step + engine.ahead, micro_batch) if engine.ahead else None
            batch = self.batch(engine, step, micro_batch)
            begin = time.perf_counter()
            engine(batch, future)
            seconds = (
                time.perf_counter() - begin
            )  # reading back the losses has waited for the device
        del taken
        return seconds
