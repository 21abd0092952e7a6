"""Models at equal training loss: which of a run's checkpoints to analyse, so that sharpness can be compared."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from conadv.analysis.model import images
from conadv.analysis.objective import clean_objective
from conadv.engine.validate import load_weights
from conadv.errors import ConadvError, printable
from conadv.nn.ema import evaluated_state
from conadv.training import checkpoint
from conadv.training.run_dir import RunDir
from conadv.training.trainer import Parts, load_run

FACTOR = 2.0
"""Losses further apart than this are not called equal: Hessian and gradient go with the loss (docs/analysis.md)."""


def step_at_loss(path: Path, target: float, count: int, device: torch.device) -> int:
    """The step of the kept checkpoint whose training loss is nearest to ``target`` by its logarithm; the later of two.

    The loss is the one that the analysis has: clean route, eval mode, ``count`` images, float32. Damaged checkpoints
    are passed over. Ranks: one process.

    Raises ConadvError where no checkpoint's loss lies within ``FACTOR`` of the target.
    """
    parts, losses = load_run(path, device), {}
    folder = RunDir(path).checkpoints
    for step in checkpoint.steps(folder):
        try:
            losses[step] = _loss(parts, checkpoint.load_step(folder, step, device), count)
        except checkpoint.DamagedCheckpoint:
            continue
    apart = {
        step: abs(math.log(loss / target)) for step, loss in losses.items() if 0 < loss < math.inf
    }
    best = min(apart, key=lambda step: (apart[step], -step), default=None)
    if best is None or apart[best] > math.log(FACTOR):
        nearest = (
            "none has a loss above 0"
            if best is None
            else f"the nearest is {losses[best]:.3g}, at step {best}"
        )
        raise ConadvError(
            f"{printable(path)} has no checkpoint with a training loss within a factor of {FACTOR:g} of {target:g} "
            f"among {len(losses)}: {nearest}. Train with --checkpoint.every-epochs 1 --checkpoint.keep 1000, or choose "
            "another loss, one that all runs pass."
        )
    return best


def _loss(parts: Parts, state: dict[str, object], count: int) -> float:
    with checkpoint.giving(state):
        load_weights(parts.model, evaluated_state(state))
    try:
        train = clean_objective(parts.model, *images(parts.data, "train", count), parts.space)
        return train.value(train.theta).loss
    except ConadvError:  # diverged at this step
        return math.nan
