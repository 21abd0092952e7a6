"""The contracts of conadv on one page.

Shape suffixes: N images, C channels, H height, W width, K classes. ``x_NCHW`` is *model space*: what the model takes,
normally pixels normalised by mean and standard deviation. Pixels are uint8 0..255 or floats in [0, 1]; ``eps`` and
``step_size`` are always in [0, 1] pixel units (see :class:`conadv.attacks.PixelSpace`).

Steps are counted from 0. The *weight version* t names the weights theta_t after t updates, so step t trains theta_t
and an adversarial batch with version t - tau has staleness tau.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

Forward = Callable[[Tensor], Tensor]
"""x_NCHW -> logits_NK. The engine has already set the route and frozen the statistics."""

Span = tuple[str, float, float]
"""(phase, start, end) in seconds on one clock (see conadv.distributed.clock)."""

Schedule = Callable[[int], float]
"""step (0-based) -> value. Pure: no state, so that look-ahead may ask for future steps."""


class Attack(Protocol):
    """Makes adversarial images. Pure: touches no module mode, no statistics, no ``.grad``, no global generator.

    Returns a tensor like ``x_NCHW`` (same shape, dtype, device; detached) whose distance to it is at most ``eps``.
    Ranks: attacks its own images only; nothing is reduced.
    """

    def __call__(
        self, forward: Forward, x_NCHW: Tensor, y_N: Tensor, generator: torch.Generator
    ) -> Tensor: ...


@dataclass(frozen=True)
class MicroBatch:
    """The images of one forward pass.

    ``views`` maps a view's name to images of the same N samples: "clean" always, "aug" for the third route, "second"
    for the multi-view control. uint8 images are pixels, which the engine moves to the device and normalises;
    floating-point images are taken as model space.
    ``index`` is this micro-batch's place in the global batch, rank * accumulation + m: it keys the randomness, so
    that N ranks draw what one rank with N-fold accumulation draws.
    ``y_N``: classes (int64), or probabilities (N, K; float) where images are mixed.
    """

    index: int
    y_N: Tensor
    views: Mapping[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """One rank's share of the global batch of one step: ``accumulation`` micro-batches."""

    step: int
    micro: tuple[MicroBatch, ...]
    epoch: int = 0


@dataclass(frozen=True)
class ExtraBatch:
    """The images that join the clean ones in a step: adversarial ones, or a control's.

    images, labels: one entry per micro-batch. weight_version: the weights that made them; None where no weights did.
    """

    images: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]
    weight_version: int | None = None


@dataclass
class StepRecord:
    """What one step did. Losses are means over the *global* batch, weighted as in ``loss``; seconds per phase.

    ``staleness`` is measured (step - weight_version), not configured. ``phases`` maps a phase (data, attack, gradient,
    send, receive, wait, update) to seconds on this rank. They took ``seconds`` together, less than their sum where the
    attack has a stream of its own. ``spans`` says when they ran, and when the network was busy beside them ("network":
    a bucket of gradients; "transfer": weights or images). ``late``: the extra images did not arrive in time and the
    step went without them. ``skipped``: why the update was not made (a loss or gradient was not finite, or overflowed
    in fp16); such numbers are then NaN or infinite here.
    """

    step: int
    epoch: int
    lr: float
    loss: float
    losses: dict[str, float]
    grad_norm: float
    weight_version: int | None = None
    phases: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    spans: list[Span] = field(default_factory=list)
    late: bool = False
    skipped: str | None = None

    @property
    def staleness(self) -> int | None:
        return None if self.weight_version is None else self.step - self.weight_version
