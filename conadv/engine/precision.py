"""Precision: which type autocast uses, and what fp16 needs so that small gradients do not become zero."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conadv.engine.validate import check_count, check_keys, shown
from conadv.errors import ConadvError

_TYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
ATTACK_SCALE = 2.0**10
"""fp16: factor on the gradient of an attack's loss, which directions do not depend on."""


def low_type(precision: str) -> torch.dtype | None:
    """The type that autocast computes in, None for fp32. Raises ConadvError for another name."""
    if precision not in _TYPES:
        raise ConadvError(f"precision {precision!r} is not 'fp32', 'bf16' or 'fp16'.")
    return _TYPES[precision]


def autocast(device: torch.device, low: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if low is None else torch.autocast(device.type, low)


def amplify(logits_NK: Tensor, low: torch.dtype | None) -> Tensor:
    """The logits as an attack sees them: float32, and in fp16 with a gradient that is ``ATTACK_SCALE`` times as large.

    An attack uses only the direction of the gradient. Without the factor those of images that are classified with
    confidence would vanish on the way back to the pixels, and the attack would leave them as they are.
    """
    if low is None:
        return logits_NK
    logits_NK = logits_NK.float()
    if low == torch.float16 and logits_NK.requires_grad:
        logits_NK.register_hook(lambda gradient: gradient * ATTACK_SCALE)
    return logits_NK


@dataclass
class LossScale:
    """The factor on the loss in fp16, as ``torch.amp.GradScaler`` moves it.

    Halved, and the step left out, when a gradient overflows; doubled after ``growth_interval`` steps without.
    A power of two, so that neither scaling nor unscaling rounds. Ranks: a pure function of what all ranks have seen
    in the same way (the norm of the summed gradient), so all have the same scale.

    Source: Micikevicius et al., "Mixed Precision Training", arXiv 1710.03740, section 3.2.
    """

    scale: float = 2.0**16
    good_steps: int = 0
    growth_interval: int = 2000

    @property
    def can_shrink(self) -> bool:
        """Whether an overflow may be the scale's fault; at 1 it is the gradient's own."""
        return self.scale > 1.0

    def shrink(self) -> None:
        self.scale, self.good_steps = self.scale / 2, 0

    def good(self) -> None:
        """Count a step without overflow."""
        self.good_steps += 1
        if self.good_steps == self.growth_interval:
            self.scale, self.good_steps = self.scale * 2, 0

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_keys(state, ("scale", "good_steps"), "its loss scale")
        scale = state["scale"]
        if not isinstance(scale, float) or not 1 <= scale < math.inf or math.frexp(scale)[0] != 0.5:
            raise ConadvError(f"its loss scale is {shown(scale)}, not a power of two")
        self.good_steps = check_count(
            state["good_steps"], "its good_steps", self.growth_interval - 1
        )
        self.scale = scale
