"""Which checkpoint of a run to analyse, so that runs are compared at equal training loss."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path

import torch

from conadv.analysis.model import images
from conadv.analysis.objective import clean_objective
from conadv.engine.validate import load_weights
from conadv.errors import ConadvError, printable
from conadv.nn.ema import evaluated_state
from conadv.training import checkpoint
from conadv.training.resume import load_run
from conadv.training.run_dir import RunDir

FACTOR = 2.0
"""Losses further apart than this are not equal: Hessian and gradient go with the loss."""


def step_at_loss(
    path: Path, target: float, count: int, device: torch.device, data: Path | None = None
) -> int:
    """The step of the checkpoint whose loss on ``count`` training images is nearest to ``target``.

    Nearest by the logarithm; of two equally near ones the later. The loss is that of the analysis:
    clean route, eval mode, float32. Checkpoints that cannot be read are passed over.
    ``data``: where the run's data lie now, if not where they were. Ranks: one process.

    Raises ConadvError where no checkpoint's loss is within ``FACTOR`` of the target.
    """
    parts, folder = load_run(path, device, data=data), RunDir(path).checkpoints
    x, y = images(parts.data, "train", count)
    losses = {}
    for step in checkpoint.steps(folder):
        with suppress(ConadvError):  # a damaged checkpoint, or training had diverged by this step
            state = checkpoint.load_step(folder, step, device)
            load_weights(parts.model, evaluated_state(state))
            train = clean_objective(parts.model, x, y, parts.space)
            losses[step] = train.value(train.theta).loss
    apart = {step: abs(math.log(loss / target)) for step, loss in losses.items() if loss > 0}
    best = min(apart, key=lambda step: (apart[step], -step), default=None)
    if best is None or apart[best] > math.log(FACTOR):
        nearest = "" if best is None else f": the nearest has {losses[best]:.3g}, at step {best}"
        raise ConadvError(
            f"None of the {len(losses)} checkpoints of {printable(path)} has a training loss "
            f"within a factor of {FACTOR:g} of {target:g}{nearest}. Choose a loss that all runs "
            "pass, or train with --checkpoint.every-epochs 1 --checkpoint.keep 1000."
        )
    return best
