"""The real engine on synthetic images: what a profile measures and what a check of it runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from conadv.config.schema import (
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    optimizer_settings,
    resolve,
)
from conadv.distributed.comm import Comm
from conadv.engine import TrainStep
from conadv.models.trial import check_model
from conadv.optim.groups import MODEL_RULES, parameter_groups
from conadv.optim.make import build_optimizer
from conadv.plan.model import kind_of
from conadv.plan.profile import Workload
from conadv.training.build import method_of, space_of
from conadv.training.trainer import make_model
from conadv.types import Batch, MicroBatch

if TYPE_CHECKING:
    from conadv.engine.executors import Executor

LEARNING_RATE = 1e-3  # small: random labels must not end a measurement by a loss that is not finite


def config_of(workload: Workload, method: str) -> Config:
    """The settings of a run of ``method``, one of KINDS."""
    kind_of(method)
    return resolve(
        Config(
            method=method.removesuffix("-lookahead"),
            lookahead=method.endswith("-lookahead"),
            steps=10**6,
            precision=workload.precision,
            channels_last=workload.channels_last,
            data=DataConfig(mean=(0.5,), std=(0.25,)),
            model=ModelConfig(name=workload.model, width=workload.width, args=workload.args),
            optim=OptimConfig(name=workload.optimizer, lr=LEARNING_RATE),  # type: ignore[arg-type]
        )
    )


def try_out(workload: Workload) -> None:
    """ConadvError unless the network takes images of this size."""
    config = config_of(workload, "vanilla")
    model = make_model(config, workload.channels, workload.num_classes)
    check_model(model, workload.channels, workload.image_size, workload.num_classes)


def build_step(
    workload: Workload, method: str, comm: Comm, executor: Executor | None = None
) -> TrainStep:
    """The engine of ``method`` on the comm's device, as training builds it."""
    config = config_of(workload, method)
    model: nn.Module = make_model(config, workload.channels, workload.num_classes).to(comm.device)
    if workload.channels_last:
        model = model.to(memory_format=torch.channels_last)
    groups = parameter_groups(
        model, weight_decay=config.optim.weight_decay or 0.0, rules=MODEL_RULES
    )
    return TrainStep(
        model,
        build_optimizer(
            config.optim.name, groups, LEARNING_RATE, **optimizer_settings(config.optim)
        ),
        method_of(config),
        space=space_of(config),
        precision=config.precision,
        channels_last=config.channels_last,
        pending_dtype=config.pending_dtype,
        executor=executor,
        comm=comm,
    )


def batches(
    workload: Workload, numbers: range, micro_batch: int, device: torch.device, first: int = 0
) -> Iterator[Batch]:
    """Steps first, first + 1, ... with the same random images: the micro-batches of these global numbers."""
    micro = []
    for number in numbers:
        draws = torch.Generator().manual_seed(number)
        shape = (micro_batch, workload.channels, workload.image_size, workload.image_size)
        x = torch.randn(shape, generator=draws).clamp_(-2, 2).to(device)
        y = torch.randint(0, workload.num_classes, (micro_batch,), generator=draws).to(device)
        micro.append(MicroBatch(number, y, {"clean": x, "second": x}))
    step = first
    while True:
        yield Batch(step, tuple(micro))
        step += 1
