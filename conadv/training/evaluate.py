"""Evaluation on the clean route with running statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conadv import rng
from conadv.attacks.space import PixelSpace
from conadv.distributed.comm import Comm
from conadv.engine.guard import NonFiniteError
from conadv.engine.precision import LOW_TYPES, amplify, autocast
from conadv.errors import ConadvError
from conadv.nn import split_batchnorm as norm
from conadv.types import Attack


@dataclass(frozen=True)
class Result:
    """Mean cross-entropy (no label smoothing) and accuracy in [0, 1] over ``images`` images."""

    loss: float
    accuracy: float
    images: int


def stop_if_diverged(results: Mapping[str, Result | None], step: int) -> None:
    """Raise NonFiniteError for a loss that is not finite after ``step`` updates; ``results`` by
    split.

    The update before an evaluation was made by finite numbers, and its weights are looked at first
    there.
    Ranks: results are those of all, so all raise.
    """
    for split, result in results.items():
        if result is not None and not math.isfinite(result.loss):
            raise NonFiniteError(
                f"After {step} steps the loss on the {split} images is {result.loss}: training has "
                "diverged. Lower the learning rate, or lengthen its warm-up."
            )


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; every module's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def forward_pass(model: nn.Module, precision: str) -> Callable[[Tensor], Tensor]:
    """images_NCHW -> float32 logits_NK in the run's precision, with gradients that do not vanish in
    fp16.
    """
    device, low = next(model.parameters()).device, LOW_TYPES[precision]

    def forward(x: Tensor) -> Tensor:
        with autocast(device, low):
            logits: Tensor = model(x)
        return amplify(logits.float(), low)

    return forward


def model_inputs(
    batches: Iterable[tuple[Tensor, Tensor]],
    space: PixelSpace,
    device: torch.device,
    forward: Callable[[Tensor], Tensor],
    attack: Attack | None,
    comm: Comm,
    draws: tuple[int, str],
    *,
    channels_last: bool,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches on the device in model space, attacked where there is an attack.

    ``batches``: those of this rank, every ``comm.ranks``-th of all. ``draws``: seed and purpose of
    the attack's random draws, which are keyed by a batch's number among those of all ranks, so that
    they do not depend on how many ranks there are. Batches without an image are left out.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for number, (x, y) in enumerate(batches):
        if not len(y):  # none of its images could be read
            continue
        x, y = x.to(device), y.to(device)
        x = (space.normalize(x) if x.dtype == torch.uint8 else x).contiguous(memory_format=layout)
        if attack is not None:
            path = (*draws, comm.rank + number * comm.ranks)
            x = attack(forward, x, y, rng.generator(device, *path))
        yield x, y


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    space: PixelSpace,
    *,
    attack: Attack | None = None,
    seed: int = 0,
    precision: str = "fp32",
    channels_last: bool = False,
    comm: Comm | None = None,
) -> Result:
    """Loss and accuracy on ``batches`` of (images_NCHW, y_N): uint8 pixels or model space.

    With ``attack``, images are attacked first (white box, eval mode, clean route). The model's
    modes and statistics are left as they were.

    Ranks: with ``comm``, ``batches`` are this rank's: every ``comm.ranks``-th of the whole list,
    beginning with number ``comm.rank`` (none is fine). Sums go over the ranks, so all return the
    same result. An attack's draws are keyed by a batch's number in the whole list; the model must
    be the same on all ranks, buffers included.
    """
    comm = comm or Comm()
    device = next(model.parameters()).device
    loss, correct, images = torch.zeros((), device=device), torch.zeros((), device=device), 0
    forward = forward_pass(model, precision)
    inputs = model_inputs(
        batches, space, device, forward, attack, comm, (seed, "robust"), channels_last=channels_last
    )
    with eval_mode(model), norm.route(model, norm.CLEAN), torch.no_grad():
        for x, y in inputs:
            logits = forward(x)
            loss += F.cross_entropy(logits, y, reduction="sum")
            correct += (logits.argmax(1) == y).sum()
            images += len(y)
    sums = comm.all_reduce(
        torch.stack([loss.double(), correct.double(), torch.tensor(images, device=device).double()])
    )
    total_loss, total_correct, total = sums.tolist()
    if not total:
        raise ConadvError("evaluate: there is no batch to evaluate on.")
    return Result(total_loss / total, total_correct / total, int(total))
