"""How a run is executed: settings that decide when and where things run, and which executor that comes to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from conadv.distributed.teams import Teams
from conadv.engine.attack_ranks.executor import Ranks
from conadv.engine.executors import Executor, Inline, Stream
from conadv.errors import ConadvError
from conadv.types import Method

ExecutorName = Literal["auto", "inline", "stream", "ranks"]
EXECUTORS = ("auto", "inline", "stream", "ranks")


@dataclass(frozen=True)
class Execution:
    """None of this changes what is computed, with one exception: ``late`` = "skip".

    executor: "auto" picks, see :func:`choose`. attack_ranks: how many of the ranks only attack. late: what happens to
    adversarial images that attack ranks do not deliver in time (see conadv.engine.Ranks). on_attack_loss: whether an
    attack rank that is lost ends the run, or learners attack in its place. timeline_steps: for so many steps the record
    says when each phase ran, on every rank.
    """

    executor: ExecutorName = "auto"
    attack_ranks: int = 0
    late: Literal["wait", "skip"] = "wait"
    on_attack_loss: Literal["stop", "continue"] = "stop"
    timeline_steps: int = 200

    def __post_init__(self) -> None:
        if self.attack_ranks < 0:
            raise ConadvError(f"--attack-ranks {self.attack_ranks} must be 0 or more.")
        if self.timeline_steps < 0:
            raise ConadvError(f"--timeline-steps {self.timeline_steps} must be 0 or more.")
        if (self.executor == "ranks") != (self.attack_ranks > 0) and self.executor != "auto":
            raise ConadvError(
                f"--executor {self.executor} does not fit --attack-ranks {self.attack_ranks}: the ranks executor needs "
                "attack ranks, and the others have none."
            )
        if self.late == "skip" and not self.attack_ranks:
            raise ConadvError(
                "--late skip has no effect without --attack-ranks: nothing can be late on one process."
            )
        if self.may_lose and not self.attack_ranks:
            raise ConadvError(
                "--on-attack-loss continue has no effect without --attack-ranks: there are none to lose."
            )

    @property
    def may_lose(self) -> bool:
        """Whether learners go on without attack ranks that are lost."""
        return self.on_attack_loss == "continue"


@dataclass(frozen=True)
class Choice:
    """An executor's name and why it was taken; for the record."""

    name: str
    why: str

    def make(self, teams: Teams, late: str) -> Executor:
        if self.name == "ranks":
            return Ranks(teams, late)
        return Stream() if self.name == "stream" else Inline()


def choose(execution: Execution, method: Method, device: torch.device) -> Choice:
    """The executor of a run.

    The rule of "auto": attack ranks if there are any, and inline otherwise. Stream is never taken by itself: whether a
    second stream gains anything depends on how full the device is (``conadv bench attack-cost`` measures it).
    Raises ConadvError for a choice that the method or the device cannot use.
    """
    attacks_ahead = method.future_attack is not None
    if execution.attack_ranks and not attacks_ahead:
        raise ConadvError(
            f"--attack-ranks {execution.attack_ranks} with a method that attacks no future batch: those ranks would "
            "have nothing to do. Use --method conadv with staleness 1 or more, or leave --attack-ranks out."
        )
    if execution.executor == "stream" and device.type != "cuda":
        raise ConadvError(
            "--executor stream needs a CUDA device: streams are its queues. Use --executor inline."
        )
    if execution.executor == "stream" and not attacks_ahead:
        raise ConadvError(
            "--executor stream has no effect without an attack on a future batch (conadv, staleness 1)."
        )
    if execution.executor != "auto":
        return Choice(execution.executor, "asked for")
    if execution.attack_ranks:
        return Choice("ranks", f"{execution.attack_ranks} attack rank(s) were asked for")
    if not attacks_ahead:
        return Choice("inline", "the method attacks no future batch: there is nothing to move")
    return Choice(
        "inline", "no attack ranks were asked for, and a second stream is taken only when asked for"
    )
