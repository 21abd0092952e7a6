"""Executors: when the phases of a step run. They may reorder phases, never change what comes out of them.

The contract: `extra` before `gradient`, `update` last, and `prepare` anywhere before `update`, since both it and the
gradient read the weights theta_t. All executors therefore give the same bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from ..types import Batch, StepRecord

if TYPE_CHECKING:
    from .step import TrainStep


class Executor(Protocol):
    """Runs one step and returns its record."""

    def __call__(self, engine: TrainStep, batch: Batch, future: Batch | None) -> StepRecord: ...


class Inline:
    """Everything on this process and device: gradient, then the attack on the future batch, then the update.

    The attack stands where a gradient reduction would be under way, between the end of backward and the update. On a
    single process nothing runs beside it, so it costs what its arithmetic costs.
    """

    def __call__(self, engine: TrainStep, batch: Batch, future: Batch | None) -> StepRecord:
        engine.gradient(batch)
        engine.prepare(future)
        return engine.update()
