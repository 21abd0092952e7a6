"""Residual networks for small images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 16
"""Channels of the first stage unless others are asked for, as in the paper."""


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: a 1x1 convolution where the shape changes."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x), inplace=True)


class SmallResNet(nn.Module):
    """Depth 6n + 2: a 3x3 stem and three stages of n basic blocks, width, 2 and 4 width wide.

    x (N, C, H, W) -> logits (N, K). Resolution halves at the second and third stage.
    Source: He et al. 2016, arXiv 1512.03385, section 4.2, with their projection shortcuts (B).
    """

    def __init__(self, depth: int, width: int, in_channels: int, num_classes: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        stages = []
        c_in = width
        for stage in range(3):
            for block in range(blocks):
                stages.append(BasicBlock(c_in, width << stage, 2 if stage and not block else 1))
                c_in = width << stage
        self.blocks = nn.Sequential(*stages)
        self.fc = nn.Linear(c_in, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return self.fc(self.blocks(out).mean((2, 3)))  # type: ignore[no-any-return]


def build_small(
    name: str, in_channels: int, num_classes: int, options: Mapping[str, Any]
) -> nn.Module:
    """The network of SMALL with this name; its first stage has ``width`` channels, else WIDTH."""
    depth, width = int(name.removeprefix("resnet")), options.get("width", WIDTH)
    return SmallResNet(depth, width, in_channels, num_classes)
