"""Executors: when the phases of a step run, never what comes out of them.

The contract: `gradient`, then `wait`, `update` last, and `prepare` anywhere before `update`, since
both it and the gradient read the weights theta_t. All executors therefore give the same bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from conadv.distributed.clock import PhaseClock
from conadv.distributed.comm import Comm
from conadv.engine.inputs import Inputs, RawBatch
from conadv.engine.pending import Pending
from conadv.engine.stop import StopRequest
from conadv.errors import ConadvError
from conadv.types import Batch, Engine, Method, Span, StepRecord

Served = Callable[[int, list[Span]], None]
"""Hears of a batch that an attack rank has attacked: its step, and the spans of doing so."""


class Step(Engine, Protocol):
    """A training step as executors see it (:class:`conadv.TrainStep`)."""

    model: nn.Module
    method: Method
    comm: Comm
    clock: PhaseClock
    device: torch.device
    stop: int
    stop_request: StopRequest
    inputs: Inputs

    @property
    def pending(self) -> Pending: ...

    @property
    def ahead(self) -> int: ...
    def begin(self) -> None: ...
    def attack_state(self) -> dict[str, Tensor]: ...
    def snapshot(self) -> None: ...
    def gradient(self, batch: RawBatch) -> dict[str, Tensor]: ...
    def prepare(self, future: RawBatch | None, *, early: bool = False) -> None: ...
    def wait(self) -> None: ...
    def update(self) -> StepRecord: ...


def check_future_attack(method: Method, what: str) -> None:
    """ConadvError unless the method leaves an attack to do for ``what``."""
    if method.future_attack is None:
        raise ConadvError(
            f"{what}: no effect with {type(method).__name__}, which attacks no future batch. Use "
            "method conadv with staleness 1 or more, or leave it out."
        )


class Executor(ABC):
    """Runs one step and returns its record."""

    @property
    def attack_only(self) -> bool:
        """Whether this process only attacks, for others that learn."""
        return False

    def attach(self, engine: Step) -> None:  # noqa: B027 (most executors have nothing to set up)
        """Called once, when the step is made. Raises ConadvError where the two do not fit."""

    @abstractmethod
    def __call__(self, engine: Step, batch: Batch, future: Batch | None) -> StepRecord: ...

    def settle(self) -> None:  # noqa: B027
        """Bring what is under way elsewhere into the engine, as before a checkpoint."""

    def serve(self, batches: Iterable[Batch], served: Served | None = None) -> None:
        """On an attack rank: attack batches for the learners."""
        raise ConadvError("serve() is for attack ranks: give TrainStep the Ranks executor.")

    # Nothing to lose or to close where there are no other processes.

    def failed_ranks(self) -> Sequence[Any]:
        """The attack ranks that this learner has lost since the last call and goes on without."""
        return []

    def close(self, *, failed: bool = False) -> bool:
        """End the exchange with other processes; returns whether all of them did well."""
        return not failed


class Inline(Executor):
    """One after the other on this process and device: gradient, attack, wait, update.

    With several ranks ``gradient`` leaves its sums over ranks under way, and the attack runs while
    the network is busy. On a single process nothing runs beside the attack, so it costs what its
    arithmetic costs.
    """

    def __call__(self, engine: Step, batch: Batch, future: Batch | None) -> StepRecord:
        engine.gradient(batch)
        # The sums over the ranks are under way now: the attack fills the wait.
        engine.prepare(future)
        engine.wait()
        return engine.update()


class Stream(Executor):
    """CUDA: the attack runs on a stream of its own beside the gradient.

    Both read theta_t: the side stream begins when the last update is done, and the update waits for
    it. Pays where a small local batch leaves the device partly idle; on a full device the
    arithmetic costs what it costs.
    Raises ConadvError without CUDA. In flight: the images of both streams at once, so more memory
    than :class:`Inline`.
    """

    def __init__(self) -> None:
        self._side: torch.cuda.Stream | None = None

    def attach(self, engine: Step) -> None:
        if engine.device.type != "cuda":
            raise ConadvError(
                "The stream executor needs a CUDA device. Use executor inline on the CPU."
            )
        self._side = torch.cuda.Stream(engine.device)

    def __call__(self, engine: Step, batch: Batch, future: Batch | None) -> StepRecord:
        assert self._side is not None
        main = torch.cuda.current_stream(engine.device)
        # By then theta_t is complete, step t - 1 has read the images that it was given, and the
        # buffers that the attack sees are copied.
        engine.begin()
        self._side.wait_stream(main)
        with torch.cuda.stream(self._side):
            engine.prepare(future, early=True)
        engine.gradient(batch)
        main.wait_stream(self._side)
        engine.wait()
        return engine.update()
