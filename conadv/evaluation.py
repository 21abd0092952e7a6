"""Evaluation on the clean route with running statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import norm, rng
from .attacks import PixelSpace
from .errors import ConadvError
from .types import Attack


@dataclass(frozen=True)
class Result:
    """Mean cross-entropy (no label smoothing) and accuracy in [0, 1] over ``images`` images."""

    loss: float
    accuracy: float
    images: int


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; every module's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    space: PixelSpace,
    *,
    attack: Attack | None = None,
    seed: int = 0,
    precision: str = "fp32",
    channels_last: bool = False,
) -> Result:
    """Loss and accuracy on ``batches`` of (images_NCHW, y_N): uint8 pixels or model space.

    With ``attack``, images are attacked first (white box, eval mode, clean route). The model's modes and statistics
    are left as they were. Ranks: evaluates what it is given; nothing is reduced.
    """
    device = next(model.parameters()).device
    layout = torch.channels_last if channels_last else torch.contiguous_format
    loss, correct, images = torch.zeros((), device=device), torch.zeros((), device=device), 0

    def forward(x: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext():
            logits: Tensor = model(x)
        return logits.float()

    with _eval_mode(model), norm.route(model, norm.CLEAN), torch.no_grad():
        for number, (x, y) in enumerate(batches):
            x, y = x.to(device), y.to(device)
            x = (space.normalize(x) if x.dtype == torch.uint8 else x).contiguous(memory_format=layout)
            if attack is not None:
                x = attack(forward, x, y, rng.generator(device, seed, "robust", number))
            logits = forward(x)
            loss += F.cross_entropy(logits, y, reduction="sum")
            correct += (logits.argmax(1) == y).sum()
            images += len(y)
    if not images:
        raise ConadvError("evaluate: there is no batch to evaluate on.")
    return Result(loss.item() / images, correct.item() / images, images)
