"""Perturbations at a lower resolution: cheaper to compute, constant over small blocks of pixels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from conadv.errors import ConadvError


def check_resolution(resolution: float) -> None:
    if not 0 < resolution <= 1:
        raise ConadvError(f"resolution = {resolution} must be above 0 and at most 1.")


def shrink(x_NCHW: Tensor, resolution: float) -> Tensor:
    """``x_NCHW`` at ``resolution`` times its height and width, by the mean over areas; itself at resolution 1."""
    if resolution == 1:
        return x_NCHW
    if x_NCHW.dim() != 4:
        raise ConadvError(
            f"An attack at a lower resolution needs images (N, C, H, W), not {tuple(x_NCHW.shape)}."
        )
    size = [max(1, round(length * resolution)) for length in x_NCHW.shape[2:]]
    return F.interpolate(x_NCHW, size=size, mode="area")


def grow(coarse_NChw: Tensor, like_NCHW: Tensor) -> Tensor:
    """``coarse_NChw`` in the size of ``like_NCHW``, every value repeated over its block."""
    if coarse_NChw.shape == like_NCHW.shape:
        return coarse_NChw
    return F.interpolate(coarse_NChw, size=list(like_NCHW.shape[2:]), mode="nearest")
