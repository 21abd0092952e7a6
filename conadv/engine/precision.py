"""The types of autocast, and what fp16 needs so that an attack's gradient is not zero."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from conadv.attacks.loss import raised

LOW_TYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""By the name of a precision, the type that autocast computes in."""
ATTACK_SCALE = 2.0**10
"""fp16: factor on the gradient of an attack's loss, which directions do not depend on."""


def autocast(device: torch.device, low: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if low is None else torch.autocast(device.type, low)


def amplify(logits_NK: Tensor, low: torch.dtype | None) -> Tensor:
    """The output as an attack sees it: half types in float32, fp16 with an amplified gradient.

    An attack uses only the direction of the gradient. Without the factor those of images that are
    classified with confidence would vanish on the way back to the pixels, and the attack would
    leave them as they are.
    """
    logits_NK = raised(logits_NK)
    # bf16 has the range of float32, so only fp16 loses small gradients.
    if low == torch.float16 and logits_NK.requires_grad:
        logits_NK.register_hook(lambda gradient: gradient * ATTACK_SCALE)
    return logits_NK
