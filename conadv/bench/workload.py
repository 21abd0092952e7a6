"""Models, batches and methods by name, for the benchmarks that train."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from conadv.attacks.fgsm import FGSM
from conadv.attacks.noise import RandomSigns
from conadv.attacks.space import PixelSpace
from conadv.bench.options import AttackCostArgs
from conadv.config.schema import (
    Config,
    OptimConfig,
    optimizer_settings,
    replace,
    resolve,
)
from conadv.methods.base import Method
from conadv.methods.concurrent import Concurrent
from conadv.methods.controls import MultiView, Noise
from conadv.methods.recycle import Recycle
from conadv.methods.sequential import Sequential
from conadv.methods.vanilla import Vanilla
from conadv.models.make import build_model
from conadv.models.trial import check_model
from conadv.nn.split_batchnorm import split_batchnorm
from conadv.optim.groups import parameter_groups
from conadv.optim.make import build_optimizer
from conadv.types import MicroBatch

SPACE = PixelSpace((0.5,), (0.25,))
EPS = 4 / 255
ATTACK = FGSM(EPS, space=SPACE)
LR = {
    "sgd": 0.01,
    "adamw": 1e-4,
    "lars": 0.1,
    "lamb": 1e-3,
}  # small: the numbers must stay finite, nothing else

METHODS: dict[str, Callable[[int], Method]] = {
    "vanilla": lambda tau: Vanilla(),
    "multiview": lambda tau: MultiView(),
    "noise": lambda tau: Noise(RandomSigns(EPS, SPACE)),
    "disadv": lambda tau: Sequential(ATTACK),
    "conadv": lambda tau: Concurrent(ATTACK, tau),
    "conadv-lookahead": lambda tau: Concurrent(ATTACK, tau, lookahead=True),
    "recycle": lambda tau: Recycle(ATTACK),
}


def network(options: AttackCostArgs, route: str | None, device: torch.device) -> nn.Module:
    """The model in train mode, with a batch-norm route for the method's extra images. Same weights everywhere."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model(options.model, options.channels, options.classes, width=options.width)
        check_model(model, options.channels, options.image_size, options.classes)
    model = split_batchnorm(model.train(), *([route] if route else [])).to(device)
    if options.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if options.compile != "off":
        model.compile(mode=options.compile)
    return model


def optimizer(options: AttackCostArgs, model: nn.Module) -> Optimizer:
    """The named optimizer with its usual settings, in its fastest form."""
    lr = LR[options.optimizer]
    config = resolve(replace(Config(steps=1), optim=OptimConfig(name=options.optimizer, lr=lr)))
    return build_optimizer(
        config.optim.name,
        parameter_groups(model, weight_decay=config.optim.weight_decay or 0.0),
        lr,
        **optimizer_settings(config.optim),
    )


def micro_batches(
    options: AttackCostArgs, size: int, indices: Iterable[int], device: torch.device
) -> tuple[MicroBatch, ...]:
    """Random images with labels, in model space on the device; the number of a micro-batch decides its images."""
    return tuple(_micro_batch(options, size, index, device) for index in indices)


def _micro_batch(
    options: AttackCostArgs, size: int, index: int, device: torch.device
) -> MicroBatch:
    shape = (size, options.channels, options.image_size, options.image_size)
    x, y = random_images(shape, options.classes, index, device)
    if options.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    return MicroBatch(index, y, {"clean": x, "second": x.clone()})


def random_images(
    shape: tuple[int, int, int, int], classes: int, seed: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(x_NCHW in model space, y_N) of the given shape."""
    g = torch.Generator().manual_seed(seed)
    x = SPACE.normalize(torch.rand(shape, generator=g)).to(device)
    return x, torch.randint(0, classes, (shape[0],), generator=g).to(device)
