"""Attack ranks: some ranks of the world do nothing but attack, the others train.

Step t of a learner: send the weights for the attack on B_{t + tau} (theta_t, or the look-ahead's prediction), take the
adversarial images of B_t, which were made at step t - tau, then gradient, wait, update. An attack rank: read the batch
of the next step, wait for weights, attack, send the images. Both read the same data order, so no clean images travel.

| message | from | to | content | in flight |
| --- | --- | --- | --- | --- |
| weights | one learner per attack rank (``Teams.feeder``) | that attack rank | the trainable parameters | 1 |
| images | attack rank | every learner whose micro-batches it has | those images, as they wait (pending dtype) | tau |

Every message begins with what it is, the weight version and the step that it is for. Buffers do not travel: the attack
normalises by batch statistics, and other buffers of an attack rank stay as they were at the start.

Where attack ranks may be lost (``Teams.may_lose``), learners keep what they need to make the images themselves: the
weights of every request until its images are there. What a lost attack rank owes is made on the critical path, what it
would have had to make later beside the sums, all of it at the same weights and with the same draws: the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from conadv.distributed.teams import Channels, Teams
from conadv.engine.executors import Executor, Served
from conadv.errors import ConadvError
from conadv.types import Batch, StepRecord

if TYPE_CHECKING:
    from conadv.engine.attack_ranks.attacker import Attacker
    from conadv.engine.attack_ranks.failed import FailedRank
    from conadv.engine.attack_ranks.learner import Learner
    from conadv.engine.step import TrainStep


class Ranks(Executor):
    """Learners train, attack ranks attack for them.

    ``late``: what a learner does with adversarial images that are not there when their step begins: "wait" (the bits
    are those of :class:`Inline`) or "skip" (the step goes without them, on all learners, and its record says ``late``;
    which steps that hits depends on timing).
    Raises ConadvError without attack ranks, or for a method that attacks no future batch.
    Ranks: ``step(batch, future)`` on learners, ``step.serve(batches)`` on attack ranks, ``close`` on all.
    In flight: on a learner one copy of the weights and tau batches of images; on an attack rank two copies of weights.
    With ``teams.may_lose`` tau more copies of the weights on every learner.
    """

    def __init__(self, teams: Teams, late: str = "wait") -> None:
        if late not in ("wait", "skip"):
            raise ConadvError(f"late {late!r} is not 'wait' or 'skip'.")
        if not teams.attackers:
            raise ConadvError(
                "The ranks executor needs attack ranks: make_teams(comm, attack_ranks) with 1 or more."
            )
        self.teams = teams
        self._skip = late == "skip"
        self._learner: Learner | None = None
        self._attacker: Attacker | None = None

    @property
    def attack_only(self) -> bool:
        return self.teams.attacking

    def attach(self, engine: TrainStep) -> None:
        if engine.method.future_attack is None:
            raise ConadvError(
                f"Attack ranks have nothing to do with {type(engine.method).__name__}: it attacks no future batch. "
                "Use conadv with staleness 1 or more, or no attack ranks."
            )
        if engine.method.attack_statistics == "running":
            raise ConadvError(
                "Attack ranks have no running statistics: use attack.statistics batch, or no attack ranks."
            )
        if engine.comm is not self.teams.comm:
            raise ConadvError(
                "With attack ranks learners sum gradients among themselves: give TrainStep comm=teams.comm."
            )
        from conadv.engine.attack_ranks.attacker import Attacker
        from conadv.engine.attack_ranks.learner import Learner

        world = self.teams.world
        world.broadcast([*engine.model.parameters(), *engine.model.buffers()])
        channels = Channels(weights=world.new_channel(), images=world.new_channel())
        if self.teams.attacking:
            self._attacker = Attacker(self.teams, engine, channels, self._skip)
        else:
            self._learner = Learner(self.teams, engine, channels, self._skip)

    def __call__(self, engine: TrainStep, batch: Batch, future: Batch | None) -> StepRecord:
        if self._learner is None:
            raise ConadvError("An attack rank has no steps of its own: call step.serve(batches).")
        late = self._learner.begin(batch, future)
        engine.gradient(batch)
        self._learner.prepare()
        engine.wait()
        record = engine.update()
        record.late = late
        return record

    def settle(self) -> None:
        if self._learner is not None:
            self._learner.settle()

    def failed_ranks(self) -> list[FailedRank]:
        return [] if self._learner is None else self._learner.failed.take()

    def serve(self, batches: Iterable[Batch], served: Served | None = None) -> None:
        if self._attacker is None:
            raise ConadvError("serve() is for attack ranks; a learner calls step(batch, future).")
        self._attacker.serve(batches, served)

    def close(self, *, failed: bool = False) -> bool:
        """End the exchange. Learner: tell its attack ranks; attack rank: wait for that.

        ``failed``: training has ended with an error. Returns whether all went well, on attack ranks too.
        """
        side = self._learner or self._attacker
        self._learner = self._attacker = None
        return side.close(failed) if side is not None else not failed
