"""How a step computes: the settings that change numbers or speed, but not the method."""

from __future__ import annotations

from dataclasses import dataclass

from conadv.engine.precision import LOW_TYPES
from conadv.errors import ConadvError, unknown


@dataclass(frozen=True)
class Numerics:
    """How a step computes.

    precision: "fp32"; "bf16" or "fp16" for autocast, fp16 with a loss scale
        (:class:`conadv.engine.guard.LossScale`).
    clip_norm: an update scales the gradient, after unscaling, down to this norm; None does not.
    on_nonfinite, nonfinite_limit: what an update does when a loss or gradient is infinite or NaN:
        "stop" raises NonFiniteError, "skip" leaves the update out, at most so many times in a row.
    channels_last: the memory format of images (that of the model is the caller's).
    pending_dtype: how images wait (:class:`conadv.engine.pending.Pending`); None: as they are.
    fuse_views: all views of a micro-batch in one forward pass, or one pass per view; equal up to
        rounding. Default: one pass on CUDA (fewer, larger kernels), one per view on the CPU, where
        a smaller batch stays in caches and needs less memory (docs/experiments.md).
    compile: run the network through torch.compile, without graph breaks (an error otherwise): one
        graph for each route and for the attack, none after that. Gradients are then there all at
        once, so their sums over ranks overlap the attack but no longer backward.

    Raises ConadvError for values that are not known or out of range.
    """

    precision: str = "fp32"
    clip_norm: float | None = None
    on_nonfinite: str = "stop"
    nonfinite_limit: int = 10
    channels_last: bool = False
    pending_dtype: str | None = None
    fuse_views: bool | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        if self.precision not in LOW_TYPES:
            raise unknown("precision", self.precision, LOW_TYPES)
        if self.on_nonfinite not in ("stop", "skip"):
            raise unknown("on_nonfinite", self.on_nonfinite, ("stop", "skip"))
        if self.nonfinite_limit < 1:
            raise ConadvError(f"nonfinite_limit {self.nonfinite_limit} must be 1 or more.")


DEFAULT = Numerics()
