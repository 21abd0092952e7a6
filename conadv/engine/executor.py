"""Executors: when the phases of a step run. They may reorder phases, never change what comes out of them.

The contract: `extra` before `gradient`, `wait` after it, `update` last, and `prepare` anywhere before `update`, since
both it and the gradient read the weights theta_t. All executors therefore give the same bits.
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
    """Everything on this process and device: gradient, the attack on the future batch, wait, update.

    With several ranks ``gradient`` leaves its sums over ranks under way, and the attack runs while the network is
    busy. On a single process nothing runs beside the attack, so it costs what its arithmetic costs.
    """

    def __call__(self, engine: TrainStep, batch: Batch, future: Batch | None) -> StepRecord:
        engine.gradient(batch)
        engine.prepare(future)
        engine.wait()
        return engine.update()
