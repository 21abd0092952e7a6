"""Non-finite losses and gradients: skip the step or stop the run. The loss scale of fp16."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from conadv.engine.numerics import Numerics
from conadv.engine.validate import check_count, check_keys, shown
from conadv.errors import ConadvError
from conadv.nn.buffers import BufferCopies


class NonFiniteError(ConadvError):
    """A loss or gradient is infinite or NaN. The parameters are still the last good ones.

    The forward pass has been through batch norm, so running statistics may hold NaN: to go on, load
    a checkpoint.
    Ranks: all of them raise it, since what is checked has been summed over them.
    """

    agreed = True


@dataclass
class LossScale:
    """The factor on the loss in fp16, as ``torch.amp.GradScaler`` moves it.

    Halved, and the step left out, when a gradient overflows; doubled after ``growth_interval``
    steps without. A power of two, so that neither scaling nor unscaling rounds. Ranks: a pure
    function of what all ranks have seen in the same way (the norm of the summed gradient), so all
    have the same scale.

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
        # Only a power of two scales and unscales without rounding.
        if not isinstance(scale, float) or math.frexp(scale)[0] != 0.5:
            raise ConadvError(f"its loss scale is {shown(scale)}, not a power of two")
        self.good_steps = check_count(state["good_steps"], "its good_steps")
        self.scale = scale


class Guard:
    """Judges every step by its losses and its gradient's norm, before the update.

    on_nonfinite "stop" raises NonFiniteError, "skip" leaves the update out; after
    ``nonfinite_limit`` such steps in a row the next one raises. In fp16 an overflow of the gradient
    alone lowers the scale and leaves the update out, whatever on_nonfinite is; that is no error and
    does not count, until the scale is 1.

    A step that is left out is an update by zero: parameters, optimizer state and all buffers
    (running statistics) are those of before, while the step, the schedule and the data go on. For
    that the buffers are copied before each step.
    Ranks: what is judged is the same on all, so all decide alike; each restores its own buffers.
    """

    def __init__(self, model: nn.Module, numerics: Numerics) -> None:
        self._stop, self._limit = numerics.on_nonfinite == "stop", numerics.nonfinite_limit
        self._clip_norm = numerics.clip_norm
        self.scale = LossScale() if numerics.precision == "fp16" else None
        self._in_a_row = 0
        # Where the first non-finite number ends the run nothing is ever undone, nor copied.
        undoes = not self._stop or self.scale is not None
        self._buffers = BufferCopies(model, batchnorm=True) if undoes else None

    @property
    def factor(self) -> float:
        """By how much the present gradients are larger than those of the loss."""
        return 1.0 if self.scale is None else self.scale.scale

    # Buffers only: parameters and optimizer state change in the update alone.

    def snapshot(self) -> None:
        """Before a step's first forward pass."""
        if self._buffers is not None:
            self._buffers.take()

    def restore(self) -> None:
        """Give the buffers the values that :meth:`snapshot` saw."""
        if self._buffers is not None:
            self._buffers.restore()

    def judge(self, step: int, losses: Mapping[str, float], grad_norm: float) -> str | None:
        """Why the update must be left out, None if it may be made; or NonFiniteError."""
        bad = [
            f"loss of the {view} view is {v}" for view, v in losses.items() if not math.isfinite(v)
        ]
        if not bad and math.isfinite(grad_norm):
            self._in_a_row = 0
            if self.scale is not None:
                self.scale.good()
            return None
        # Finite losses and an infinite gradient: the scale was too large, the gradient may be fine.
        if not bad and self.scale is not None and self.scale.can_shrink:
            self.scale.shrink()
            return f"the gradient overflowed at loss scale {2 * self.scale.scale:g}"
        # From here on it is an error, of data or of the learning rate, that the run may outlive.
        self._in_a_row += 1
        reason = f"the {bad[0] if bad else f'gradient is {grad_norm}'}"
        if self._stop or self._in_a_row > self._limit:
            self.restore()
            text = f"Step {step}: {reason}. The update was not made."
            if not self._stop:
                text += f" So were the {self._limit} steps before it (nonfinite_limit)."
            raise NonFiniteError(text)
        return reason

    def multiplier(self, factor: float, grad_norm: float) -> float:
        """What unscales and clips the gradient: one multiplication for both.

        ``factor``: that of the gradients, before :meth:`judge` may have changed it. ``grad_norm``:
        unscaled, since the clip's threshold is for the gradient without the scale.
        """
        # As torch.nn.utils.clip_grad_norm_, which adds the same 1e-6.
        clip = 1.0 if self._clip_norm is None else min(1.0, self._clip_norm / (grad_norm + 1e-6))
        return clip / factor

    def state_dict(self) -> dict[str, object]:
        return {"in_a_row": self._in_a_row, "scale": self.scale.state_dict() if self.scale else {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_keys(state, ("in_a_row", "scale"), "its guard")
        self._in_a_row = check_count(state["in_a_row"], "its guard's in_a_row")
        if self.scale is not None:
            self.scale.load_state_dict(state["scale"])
        else:
            check_keys(state["scale"], (), "its loss scale")
