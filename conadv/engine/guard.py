"""Steps whose numbers are not finite: whether one is left out or ends the run, and what leaving it out undoes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from conadv.engine.precision import LossScale
from conadv.engine.validate import check_count, check_keys
from conadv.errors import ConadvError, unknown


class NonFiniteError(ConadvError):
    """A loss or gradient is infinite or NaN. Raised before the update: the parameters are still the last good ones.

    The forward pass has been through batch norm, so running statistics may hold NaN: to go on, load a checkpoint.
    Ranks: all of them raise it, since what is checked has been summed over them.
    """

    agreed = True


class Guard:
    """Judges every step by its losses and its gradient's norm, before the update.

    ``on_nonfinite``: "stop" raises NonFiniteError, "skip" leaves the update out; after ``limit`` such steps in a row
    the next one raises. With ``scale`` (fp16) an overflow of the gradient alone lowers the scale and leaves the update
    out, whatever ``on_nonfinite``; that is no error and does not count, until the scale is 1.

    A step that is left out is an update by zero: parameters, optimizer state and all buffers (running statistics) are
    those of before, while the step, the schedule and the data go on. For that the buffers are copied before each step.
    Ranks: what is judged is the same on all, so all decide alike; each restores its own buffers.
    """

    def __init__(
        self, model: nn.Module, on_nonfinite: str, limit: int, scale: LossScale | None
    ) -> None:
        if on_nonfinite not in ("stop", "skip"):
            raise unknown("on_nonfinite", on_nonfinite, ("stop", "skip"))
        if limit < 1:
            raise ConadvError(f"nonfinite_limit {limit} must be 1 or more.")
        self._stop, self._limit, self.scale = on_nonfinite == "stop", limit, scale
        self._in_a_row = 0
        self._buffers = [] if self._stop and scale is None else list(model.buffers())
        self._copies = [buffer.clone() for buffer in self._buffers]

    @torch.no_grad()
    def remember(self) -> None:
        """Before a step's first forward pass."""
        if self._copies:
            torch._foreach_copy_(self._copies, self._buffers)

    @torch.no_grad()
    def restore(self) -> None:
        """Give the buffers the values that :meth:`remember` saw."""
        if self._copies:
            torch._foreach_copy_(self._buffers, self._copies)

    def judge(self, step: int, losses: Mapping[str, float], grad_norm: float) -> str | None:
        """Why the update must be left out, None if it may be made. Raises NonFiniteError where that ends the run."""
        bad = next(
            (
                f"loss of the {view} view is {v}"
                for view, v in losses.items()
                if not math.isfinite(v)
            ),
            None,
        )
        if bad is None and math.isfinite(grad_norm):
            self._in_a_row = 0
            if self.scale is not None:
                self.scale.good()
            return None
        if bad is None and self.scale is not None and self.scale.can_shrink:
            self.scale.shrink()
            return f"the gradient overflowed at loss scale {2 * self.scale.scale:g}"
        self._in_a_row += 1
        reason = f"the {bad or f'gradient is {grad_norm}'}"
        if self._stop or self._in_a_row > self._limit:
            self.restore()
            before = (
                ""
                if self._stop
                else f" So were the {self._limit} steps before it (nonfinite_limit)."
            )
            raise NonFiniteError(f"Step {step}: {reason}. The update was not made.{before}")
        return reason

    def state_dict(self) -> dict[str, object]:
        return {"in_a_row": self._in_a_row, "scale": self.scale.state_dict() if self.scale else {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_keys(state, ("in_a_row", "scale"), "its guard")
        self._in_a_row = check_count(state["in_a_row"], "its guard's in_a_row")
        if self.scale is not None:
            self.scale.load_state_dict(state["scale"])
        else:
            check_keys(state["scale"], (), "its loss scale")

    @property
    def in_a_row(self) -> int:
        """How many of the last steps were left out, one after the other."""
        return self._in_a_row
