"""Small models and batches that several test files use."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from conadv import Numerics, TrainStep
from conadv.models.small import SmallResNet
from conadv.nn.split_batchnorm import split_batchnorm


def tiny_resnet(*routes: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A ResNet-8 of width 4 for 3-channel images and 5 classes, with perturbed batch-norm
    parameters.
    """
    torch.manual_seed(seed)
    model = SmallResNet(8, 4, 3, 5).to(dtype)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 1.5)
    return split_batchnorm(model, *routes)


def no_norm_net(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A small convolutional network without batch statistics."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1),
        nn.GELU(),
        nn.Conv2d(6, 8, 3, 2, 1),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(32, 5),
    ).to(dtype)


class Quantiser(nn.Module):
    """Follows the largest activation, as moving quantisers do, and adds a share of it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("largest", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.largest.lerp_(x.detach().abs().max(), 0.3)
        return x + 0.3 * self.largest


class Counter(nn.Module):
    """Draws by a state of its own, a buffer that every pass replaces by a new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        return x * (1 + 0.1 * torch.sin(12.9898 * self.count))


def buffered_net(seed: int = 0) -> nn.Module:
    """A network of layers that write to buffers in every forward pass, batch norm among them."""
    torch.manual_seed(seed)
    layers = [
        spectral_norm(nn.Conv2d(3, 6, 3, 2, 1)),
        nn.InstanceNorm2d(6, track_running_stats=True),
        nn.GELU(),
        Quantiser(),
        nn.BatchNorm2d(6),
        Counter(),
        nn.Conv2d(6, 4, 3, 2, 1),
        nn.Flatten(),
        nn.Linear(16, 5),
    ]
    return split_batchnorm(nn.Sequential(*layers), "adv")


def images(
    n: int = 8, seed: int = 0, dtype: torch.dtype = torch.float32, size: int = 8
) -> tuple[Tensor, Tensor]:
    """n random images in [0, 1] with labels of 5 classes."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 3, size, size, generator=g, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, 5, (n,), generator=g)


def batches(
    count: int, n: int = 8, dtype: torch.dtype = torch.float32
) -> list[tuple[Tensor, Tensor]]:
    return [images(n, 100 + i, dtype) for i in range(count)]


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Same names and same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, method: Any = None, **options: Any
) -> TrainStep:
    """A TrainStep; the options that are fields of Numerics become its numerics."""
    names = {field.name for field in dataclasses.fields(Numerics)} & options.keys()
    numerics = Numerics(**{name: options.pop(name) for name in names})
    return TrainStep(model, optimizer, method, numerics=numerics, **options)
