"""Settings that decide when and where things run, and which executor that comes to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from conadv.distributed.teams import Teams
from conadv.engine.attack_ranks.executor import Ranks
from conadv.engine.executors import Executor, Inline, Stream, check_future_attack
from conadv.errors import ConadvError
from conadv.types import Method

ExecutorName = Literal["auto", "inline", "stream", "ranks"]
EXECUTORS: tuple[str, ...] = get_args(ExecutorName)


@dataclass(frozen=True)
class Execution:
    """None of this changes what is computed, with one exception: ``late`` = "skip".

    executor: "auto" picks, see :func:`choose`. attack_ranks: how many of the ranks only attack.
    late: what happens to adversarial images that attack ranks do not deliver in time
    (conadv.engine.attack_ranks). on_attack_loss: whether an attack rank that fails ends the run, or
    learners attack in its place. timeline_steps: for so many steps the record says when each phase
    ran, on every rank.
    """

    executor: ExecutorName = "auto"
    attack_ranks: int = 0
    late: Literal["wait", "skip"] = "wait"
    on_attack_loss: Literal["stop", "continue"] = "stop"
    timeline_steps: int = 200

    def __post_init__(self) -> None:
        for name in ("attack_ranks", "timeline_steps"):
            if getattr(self, name) < 0:
                option = name.replace("_", "-")
                raise ConadvError(f"--{option} {getattr(self, name)} must be 0 or more.")
        # Asked for twice, in ways that contradict each other: nobody can tell which is meant.
        if self.executor != "auto" and (self.executor == "ranks") != (self.attack_ranks > 0):
            raise ConadvError(
                f"--executor {self.executor} does not fit --attack-ranks {self.attack_ranks}: the "
                "ranks executor needs attack ranks, and the others have none."
            )
        # Settings without effect are errors: they would look as if they had been tried.
        if not self.attack_ranks and (self.late == "skip" or self.may_lose):
            option = "--late skip" if self.late == "skip" else "--on-attack-loss continue"
            raise ConadvError(f"{option} has no effect without --attack-ranks.")
        if self.late == "skip" and self.may_lose:
            raise ConadvError(
                "--late skip does not go with --on-attack-loss continue: a step that waits for "
                "nobody cannot tell a late attack rank from a lost one. Leave one of them out."
            )

    @property
    def may_lose(self) -> bool:
        """Whether learners go on without attack ranks that fail."""
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


def choose(execution: Execution, method: Method) -> Choice:
    """The executor of a run.

    The rule of "auto": attack ranks if there are any, and inline otherwise. Stream is never taken
    by itself: whether a second stream gains anything depends on how full the device is (``conadv
    bench attack-cost`` measures it).
    Raises ConadvError for a choice that has no effect with the method.
    """
    # Before anything is built: the executor itself would say so only then.
    if execution.attack_ranks or execution.executor == "stream":
        used = "stream" if execution.executor == "stream" else "ranks"
        check_future_attack(method, f"The {used} executor")
    if execution.executor != "auto":  # a request is never second-guessed
        return Choice(execution.executor, "asked for")
    if execution.attack_ranks:
        return Choice("ranks", f"{execution.attack_ranks} attack rank(s) were asked for")
    return Choice("inline", "the default without attack ranks")
