"""An exponential moving average of the weights, with batch norm's routes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from conadv.errors import ConadvError, printable


class EMA(AveragedModel):
    """theta^ <- d theta^ + (1 - d) theta, d = min(``decay``, (1 + n) / (10 + n)) in update n + 1.

        average = EMA(model, 0.999)
        for batch, future in windows(loader, step.ahead):
            step(batch, future)
            average.update_parameters(model)
        evaluate(average.module, ...)

    ``average.module`` is a copy of the model with the same routes. The running statistics of every
    route are averaged like its weights, so that a route's statistics never come from another
    route's images; other buffers are copied. Averaged statistics are those of many weights, not of
    the averaged weights: :func:`conadv.recalibrate` computes the latter.

    The smaller d at the start lets the average forget the first weights in short runs; the first
    update copies.
    Raises ValueError for a decay outside of (0, 1), and ConadvError for a model that cannot be
    copied. Sync point on CUDA: none, the counter stays on the CPU.
    Ranks: nothing is reduced. Weights are the same on all, statistics are each rank's own.
    In flight: one copy of weights and buffers.

    Source: Polyak and Juditsky (1992); the warm-up is that of TensorFlow's ExponentialMovingAverage
    (num_updates).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"decay = {decay} must be in (0, 1).")
        try:
            super().__init__(model, multi_avg_fn=self._average, use_buffers=True)
        except (RuntimeError, AssertionError, TypeError) as error:  # hooks, FSDP, locks and files
            raise ConadvError(
                f"The {type(model).__name__} cannot be copied for an average: {printable(error)}. "
                "Use the parametrizations of torch.nn.utils in place of its hooks (spectral_norm, "
                "weight_norm), and average weights before they are sharded."
            ) from error
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take the weights of ``model`` into the average."""
        pairs = list(zip(self.module.modules(), model.modules(), strict=True))
        for ours, theirs in pairs:
            for name, buffer in theirs.named_buffers(recurse=False):
                own = ours._buffers.get(name)
                if own is None or own.shape != buffer.shape:  # made or resized since
                    ours._buffers[name] = buffer.detach().clone()
        super().update_parameters(model)
        # An average of other buffers is not what they stand for: the unit vectors of spectral norm
        # get shorter, and the weights that are divided by them grow without bound.
        for ours, theirs in pairs:
            for name, buffer in theirs.named_buffers(recurse=False):
                if not name.startswith("running_"):
                    ours.get_buffer(name).copy_(buffer)

    @torch.no_grad()
    def _average(self, averaged: Any, current: Any, _: Any) -> None:
        count = int(self.n_averaged)  # type: ignore[call-overload, arg-type]
        if not (averaged[0].is_floating_point() or averaged[0].is_complex()):
            torch._foreach_copy_(averaged, current)
            return
        decay = min(self.decay, (1 + count) / (10 + count))
        torch._foreach_lerp_(averaged, current, 1 - decay)


def evaluated_state(state: dict[str, Any]) -> dict[str, Tensor]:
    """The state dict of the model that a checkpoint evaluates: the average where there is one."""
    if state.get("ema") is None:
        model: dict[str, Tensor] = state["model"]
        return model
    prefix = "module."
    return {
        name.removeprefix(prefix): value
        for name, value in state["ema"].items()
        if name.startswith(prefix)
    }
